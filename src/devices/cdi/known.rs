//! Hooks of vendors' tools whose work is done here. They change the root filesystem from outside, by programs that want
//! privileges which nobody has here, and what they leave would stay in containers that are kept: `nvidia-cdi-hook COMMAND`,
//! `nvidia-ctk hook COMMAND`, `amd-ctk hook COMMAND`.

#![forbid(unsafe_code)]

/// What a hook wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// Links: what each holds, and where it is.
    Links(Vec<(String, String)>),
    /// The dynamic linker has to find what is in these directories.
    LibraryDirectories(Vec<String>),
    /// The driver's tools must not make device nodes.
    NoNodeModification,
    /// The image's own user-space driver is to be used if it is newer than the host's, which is this one.
    CudaCompat(String),
    /// Nothing that is not so already, or that a container without a desktop would notice.
    Nothing,
}

/// What the hook `path` with `args` wants, if it is known. A text that one of them would not take is an error.
pub fn recognise(path: &str, args: &[String]) -> Option<Result<Known, String>> {
    let arguments = args.get(1..).unwrap_or_default();
    let (command, options) = match path.rsplit('/').next()? {
        "nvidia-cdi-hook" => arguments.split_first()?,
        "nvidia-ctk" | "amd-ctk" => arguments.split_first().filter(|(hook, _)| *hook == "hook")?.1.split_first()?,
        _ => return None,
    };
    Some(match command.as_str() {
        "create-symlinks" => links(&values(options, "link")).map(Known::Links),
        "update-ldcache" => Ok(Known::LibraryDirectories(values(options, "folder"))),
        "disable-device-node-modification" | "update-nvidia-params" => Ok(Known::NoNodeModification),
        "enable-cuda-compat" | "cuda-compat" => {
            Ok(Known::CudaCompat(values(options, "host-driver-version").pop().unwrap_or_default()))
        }
        // Directories of device nodes can be entered, sonames come with libraries, profiles are for windows.
        "chmod" | "create-soname-symlinks" | "update-application-profile" => Ok(Known::Nothing),
        _ => return None,
    })
}

/// All values of `--NAME VALUE` and `--NAME=VALUE`.
fn values(options: &[String], name: &str) -> Vec<String> {
    let mut values = Vec::new();
    let mut options = options.iter();
    while let Some(option) = options.next() {
        let Some(option) = option.strip_prefix("--").or_else(|| option.strip_prefix('-')) else { continue };
        match option.split_once('=') {
            Some((key, value)) if key == name => values.push(value),
            None if option == name => values.extend(options.next().map(String::as_str)),
            _ => {}
        }
    }
    // Their command lines take lists as well.
    values.into_iter().flat_map(|value| value.split(',')).map(str::to_owned).collect()
}

fn links(values: &[String]) -> Result<Vec<(String, String)>, String> {
    values
        .iter()
        .map(|value| match value.split_once("::") {
            Some((target, link)) if !target.is_empty() && link.starts_with('/') && !link.contains("::") => {
                Ok((target.to_owned(), link.to_owned()))
            }
            _ => Err(format!("create-symlinks: {value:?} is no TARGET::LINK")),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(path: &str, args: &str) -> Option<Result<Known, String>> {
        recognise(path, &args.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn hooks_of_nvidia_and_amd() {
        let links = Known::Links(vec![("a.so.1".into(), "/lib/a.so".into()), ("../b".into(), "/c/d".into())]);
        for (path, args) in [
            ("/usr/bin/nvidia-ctk", "nvidia-ctk hook create-symlinks --link a.so.1::/lib/a.so --link ../b::/c/d"),
            ("/usr/bin/nvidia-cdi-hook", "nvidia-cdi-hook create-symlinks --link=a.so.1::/lib/a.so,../b::/c/d"),
            ("/opt/amd-ctk", "amd-ctk hook create-symlinks --link a.so.1::/lib/a.so -link=../b::/c/d"),
        ] {
            assert_eq!(known(path, args), Some(Ok(links.clone())), "{args}");
        }
        let cache = "nvidia-cdi-hook update-ldcache --folder /usr/lib64 --folder /usr/lib64/vdpau";
        let directories = Known::LibraryDirectories(vec!["/usr/lib64".into(), "/usr/lib64/vdpau".into()]);
        assert_eq!(known("/usr/bin/nvidia-cdi-hook", cache), Some(Ok(directories)));
        let compat = known("/x/nvidia-ctk", "nvidia-ctk hook enable-cuda-compat --host-driver-version=550.54.15");
        assert_eq!(compat, Some(Ok(Known::CudaCompat("550.54.15".into()))));
        let chmod = known("/x/nvidia-ctk", "nvidia-ctk hook chmod --mode 755 --path /dev/dri");
        assert_eq!(chmod, Some(Ok(Known::Nothing)));
    }

    #[test]
    fn other_programs_are_left_alone() {
        assert_eq!(known("/usr/bin/vendor-hook", "vendor-hook create-symlinks --link a::/b"), None);
        assert_eq!(known("/usr/bin/nvidia-ctk", "nvidia-ctk create-symlinks --link a::/b"), None);
        assert_eq!(known("/usr/bin/nvidia-cdi-hook", "nvidia-cdi-hook new-thing"), None);
        assert_eq!(known("/usr/bin/nvidia-cdi-hook", ""), None);
    }

    #[test]
    fn links_that_are_none() {
        for wrong in ["a", "a::b", "::/b", "a::/b::/c"] {
            let error = known("/x/nvidia-cdi-hook", &format!("h create-symlinks --link {wrong}")).unwrap();
            assert_eq!(error, Err(format!("create-symlinks: {wrong:?} is no TARGET::LINK")));
        }
    }
}
