//! The options as Slurm registers them and users see them in `--help` (behaviour reference, section 3.2).

use std::ffi::CStr;

/// One of the options; the number is what SPANK hands to the callback as `val`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionId {
    /// `--container-image`
    Image,
    /// `--container-mounts`
    Mounts,
    /// `--container-workdir`
    Workdir,
    /// `--container-name`
    Name,
    /// `--container-save`
    Save,
    /// `--container-mount-home`
    MountHome,
    /// `--no-container-mount-home`
    NoMountHome,
    /// `--container-remap-root`
    RemapRoot,
    /// `--no-container-remap-root`
    NoRemapRoot,
    /// `--container-entrypoint`
    Entrypoint,
    /// `--no-container-entrypoint`
    NoEntrypoint,
    /// `--container-entrypoint-log`
    EntrypointLog,
    /// `--container-writable`
    Writable,
    /// `--container-readonly`
    Readonly,
    /// `--container-env`
    Env,
    /// `--container-unshare`
    Unshare,
    /// `--container-device`
    Device,
    /// `--container-pull`
    Pull,
}

/// How one option is registered.
#[derive(Debug)]
pub struct OptionSpec {
    /// Which one it is.
    pub id: OptionId,
    /// Name without the leading dashes.
    pub name: &'static CStr,
    /// What `--help` shows behind `--name=`; `None` for an option without argument.
    pub argument: Option<&'static CStr>,
    /// Help text. Slurm wraps it.
    pub help: &'static CStr,
}

impl OptionSpec {
    /// The name for messages.
    pub fn name(&self) -> &'static str {
        // The table holds ASCII only; a test says so.
        self.name.to_str().unwrap_or_default()
    }
}

impl OptionId {
    /// The row of the table.
    pub fn spec(self) -> &'static OptionSpec {
        &TABLE[self as usize]
    }

    /// The name for messages, without the leading dashes.
    pub fn name(self) -> &'static str {
        self.spec().name()
    }

    /// The option with this number.
    pub fn from_value(value: i32) -> Option<Self> {
        usize::try_from(value).ok().and_then(|index| TABLE.get(index)).map(|spec| spec.id)
    }
}

const fn row(id: OptionId, name: &'static CStr, argument: Option<&'static CStr>, help: &'static CStr) -> OptionSpec {
    OptionSpec { id, name, argument, help }
}

/// All options, in the order in which they are registered and numbered.
pub static TABLE: [OptionSpec; 18] = [
    row(
        OptionId::Image,
        c"container-image",
        Some(c"[USER@][REGISTRY#]IMAGE[:TAG]|PATH"),
        c"[pyxis] run in this container image: a reference (Docker Hub unless a registry is named) or, beginning with . or /, the path of a squashfs file.",
    ),
    row(
        OptionId::Mounts,
        c"container-mounts",
        Some(c"SRC:DST[:FLAGS][,SRC:DST...]"),
        c"[pyxis] bind mount host paths into the container. FLAGS are mount options joined by \"+\", e.g. ro+rprivate. SRC may also be \"tmpfs\" or \"umount\".",
    ),
    row(
        OptionId::Workdir,
        c"container-workdir",
        Some(c"PATH"),
        c"[pyxis] working directory inside the container. Default: the image's.",
    ),
    row(
        OptionId::Name,
        c"container-name",
        Some(c"NAME"),
        c"[pyxis] name of the container, kept on the node and used again by later steps that give the same name.",
    ),
    row(
        OptionId::Save,
        c"container-save",
        Some(c"PATH"),
        c"[pyxis] when the last task of a node has ended, save the container as a squashfs file at this path.",
    ),
    row(
        OptionId::MountHome,
        c"container-mount-home",
        None,
        c"[pyxis] bind mount the user's home directory into the container.",
    ),
    row(
        OptionId::NoMountHome,
        c"no-container-mount-home",
        None,
        c"[pyxis] do not bind mount the user's home directory into the container.",
    ),
    row(
        OptionId::RemapRoot,
        c"container-remap-root",
        None,
        c"[pyxis] be root inside the container: for installing packages. Grants nothing outside of it.",
    ),
    row(
        OptionId::NoRemapRoot,
        c"no-container-remap-root",
        None,
        c"[pyxis] be the same user inside the container as outside.",
    ),
    row(
        OptionId::Entrypoint,
        c"container-entrypoint",
        None,
        c"[pyxis] run the image's entrypoint, once for each node.",
    ),
    row(
        OptionId::NoEntrypoint,
        c"no-container-entrypoint",
        None,
        c"[pyxis] do not run the image's entrypoint.",
    ),
    row(
        OptionId::EntrypointLog,
        c"container-entrypoint-log",
        None,
        c"[pyxis] show what the image's entrypoint prints.",
    ),
    row(
        OptionId::Writable,
        c"container-writable",
        None,
        c"[pyxis] make the container's root filesystem writable; changes are gone when the step ends.",
    ),
    row(
        OptionId::Readonly,
        c"container-readonly",
        None,
        c"[pyxis] make the container's root filesystem read-only.",
    ),
    row(
        OptionId::Env,
        c"container-env",
        Some(c"NAME[,NAME...]"),
        c"[pyxis] environment variables whose value outside wins over the image's. NAME=VALUE sets a variable in the container.",
    ),
    row(
        OptionId::Unshare,
        c"container-unshare",
        Some(c"NS[,NS...]"),
        c"[pyxis] give the container namespaces of its own: net, ipc, uts.",
    ),
    row(
        OptionId::Device,
        c"container-device",
        Some(c"VENDOR/CLASS=NAME[,...]"),
        c"[pyxis] give the container these devices of the node, by their CDI names, e.g. amd.com/gpu=all.",
    ),
    row(
        OptionId::Pull,
        c"container-pull",
        Some(c"WHEN"),
        c"[pyxis] when to ask the registry about an image that the node has: always, recent (unless it has answered a few minutes ago), missing (only whether you may have it), never.",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// Names, argument texts and order are a public interface: scripts and `#SBATCH` lines depend on them.
    #[test]
    fn names_and_arguments_are_those_of_pyxis() {
        let shown: Vec<String> = TABLE
            .iter()
            .map(|spec| match spec.argument {
                Some(argument) => format!("{}={}", spec.name(), argument.to_str().unwrap()),
                None => spec.name().to_owned(),
            })
            .collect();
        assert_eq!(
            shown,
            [
                "container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH",
                "container-mounts=SRC:DST[:FLAGS][,SRC:DST...]",
                "container-workdir=PATH",
                "container-name=NAME",
                "container-save=PATH",
                "container-mount-home",
                "no-container-mount-home",
                "container-remap-root",
                "no-container-remap-root",
                "container-entrypoint",
                "no-container-entrypoint",
                "container-entrypoint-log",
                "container-writable",
                "container-readonly",
                "container-env=NAME[,NAME...]",
                "container-unshare=NS[,NS...]",
                "container-device=VENDOR/CLASS=NAME[,...]",
                "container-pull=WHEN",
            ]
        );
    }

    #[test]
    fn rows_stand_at_their_number() {
        for (index, spec) in TABLE.iter().enumerate() {
            assert_eq!(spec.id as usize, index);
            assert_eq!(OptionId::from_value(i32::try_from(index).unwrap()), Some(spec.id));
            assert!(spec.name().is_ascii() && spec.name().len() < spank_sys::SPANK_OPTION_MAXLEN as usize);
            assert!(spec.help.to_str().unwrap().starts_with("[pyxis] "));
        }
        assert_eq!(OptionId::from_value(-1), None);
        assert_eq!(OptionId::from_value(18), None);
    }
}
