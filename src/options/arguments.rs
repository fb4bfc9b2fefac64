//! The administrator's arguments behind the plugin's path in plugstack.conf (behaviour reference, section 4): pyxis's
//! own, so that existing files keep working, and where this plugin finds its executable.
//!
//! Slurm splits the line at blanks, knows no quotes, and takes `#` anywhere as the start of a comment.

use std::path::PathBuf;

use super::environment::parse_bool;

/// What the arguments say. Later ones win.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arguments {
    /// `sbatch_support=`: whether sbatch, salloc and their like offer the options.
    pub sbatch_support: bool,
    /// `executable=`: the program that starts containers.
    pub executable: PathBuf,
    /// `config=`: its configuration file.
    pub config: PathBuf,
    /// `execute_entrypoint=`: whether images' entrypoints run where the user says nothing.
    pub execute_entrypoint: bool,
    /// `container_scope=job`: named containers end with their job.
    pub job_scope: bool,
    /// `importer=`: the site's program that turns references into squashfs files.
    pub importer: Option<PathBuf>,
    /// `runtime_path=`: where an importer finds the user's directory.
    pub runtime_path: PathBuf,
    /// Arguments of pyxis's that are set to something else than their default and change nothing here: images are
    /// mounted, never unpacked, and the configuration file says where things are and how squashfs files run.
    pub without_effect: Vec<&'static str>,
}

/// Why an argument cannot be used. The texts are pyxis's where it has one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentError {
    /// No such argument.
    #[error("unknown configuration option: {0}")]
    Unknown(String),
    /// A value outside the argument's set.
    #[error("{0}: invalid value: {1}")]
    Value(&'static str, String),
    /// More than the kernel takes.
    #[error("{0}: path too long: {1}")]
    TooLong(&'static str, String),
    /// A path that depends on who looks.
    #[error("{0}: not an absolute path: {1}")]
    Relative(&'static str, String),
}

impl Default for Arguments {
    fn default() -> Self {
        Self {
            sbatch_support: true,
            executable: PathBuf::from("/usr/bin/pyxis"),
            config: PathBuf::from("/etc/pyxis/pyxis.toml"),
            execute_entrypoint: false,
            job_scope: false,
            importer: None,
            runtime_path: PathBuf::from("/run/pyxis"),
            without_effect: Vec::new(),
        }
    }
}

impl Arguments {
    /// Parses the arguments of one plugstack line.
    pub fn parse<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Result<Self, ArgumentError> {
        let mut parsed = Self::default();
        for argument in arguments {
            let unknown = || ArgumentError::Unknown(argument.to_owned());
            let (key, value) = argument.split_once('=').ok_or_else(unknown)?;
            match key {
                "runtime_path" => parsed.runtime_path = path("runtime_path", value)?,
                "execute_entrypoint" => parsed.execute_entrypoint = boolean("execute_entrypoint", value)?,
                "container_scope" => match value {
                    "global" => parsed.job_scope = false,
                    "job" => parsed.job_scope = true,
                    _ => return Err(ArgumentError::Value("container_scope", value.to_owned())),
                },
                "sbatch_support" => parsed.sbatch_support = boolean("sbatch_support", value)?,
                "use_enroot_load" => {
                    let chosen = boolean("use_enroot_load", value)?;
                    parsed.note("use_enroot_load", chosen);
                }
                "importer" => {
                    let path = path("importer", value)?;
                    parsed.importer = Some(path).filter(|path| !path.as_os_str().is_empty());
                }
                "use_squashfuse" => {
                    let chosen = boolean("use_squashfuse", value)?;
                    parsed.note("use_squashfuse", chosen);
                }
                "executable" => parsed.executable = absolute_path("executable", value)?,
                "config" => parsed.config = absolute_path("config", value)?,
                _ => return Err(unknown()),
            }
        }
        let moved = parsed.runtime_path != Self::default().runtime_path;
        parsed.note("runtime_path", moved && parsed.importer.is_none());
        Ok(parsed)
    }

    fn note(&mut self, name: &'static str, differs: bool) {
        self.without_effect.retain(|other| *other != name);
        if differs {
            self.without_effect.push(name);
        }
    }
}

fn boolean(name: &'static str, value: &str) -> Result<bool, ArgumentError> {
    parse_bool(value.as_bytes()).ok_or_else(|| ArgumentError::Value(name, value.to_owned()))
}

fn path(name: &'static str, value: &str) -> Result<PathBuf, ArgumentError> {
    // PATH_MAX counts the final NUL.
    if value.len() >= 4096 {
        return Err(ArgumentError::TooLong(name, value.to_owned()));
    }
    Ok(PathBuf::from(value))
}

fn absolute_path(name: &'static str, value: &str) -> Result<PathBuf, ArgumentError> {
    let path = path(name, value)?;
    if path.is_absolute() { Ok(path) } else { Err(ArgumentError::Relative(name, value.to_owned())) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn defaults_and_all_arguments() {
        assert_eq!(Arguments::parse([]), Ok(Arguments::default()));
        let parsed = Arguments::parse([
            "runtime_path=/run/other",
            "execute_entrypoint=1",
            "container_scope=job",
            "sbatch_support=no",
            "use_enroot_load=y",
            "importer=/opt/import",
            "use_squashfuse=true",
            "executable=/opt/pyxis/bin/pyxis",
            "config=/opt/pyxis/pyxis.toml",
        ])
        .unwrap();
        assert_eq!(
            parsed,
            Arguments {
                sbatch_support: false,
                executable: "/opt/pyxis/bin/pyxis".into(),
                config: "/opt/pyxis/pyxis.toml".into(),
                execute_entrypoint: true,
                job_scope: true,
                importer: Some("/opt/import".into()),
                runtime_path: "/run/other".into(),
                without_effect: vec!["use_enroot_load", "use_squashfuse"],
            }
        );
    }

    #[test]
    fn defaults_spelled_out_change_nothing_and_later_arguments_win() {
        let spelled_out = Arguments::parse([
            "runtime_path=/run/pyxis",
            "execute_entrypoint=0",
            "container_scope=job",
            "container_scope=global",
            "sbatch_support=0",
            "sbatch_support=1",
            "use_enroot_load=false",
            "importer=",
            "use_squashfuse=n",
        ]);
        assert_eq!(spelled_out, Ok(Arguments::default()));
    }

    #[test]
    fn another_runtime_path_is_an_importers() {
        let parse = |arguments: &[&'static str]| Arguments::parse(arguments.iter().copied()).unwrap().without_effect;
        assert_eq!(parse(&["runtime_path=/x"]), ["runtime_path"]);
        assert_eq!(parse(&["runtime_path=/x", "importer=/y"]), [""; 0]);
        assert_eq!(parse(&["runtime_path=/x", "importer=/y", "importer="]), ["runtime_path"]);
    }

    #[test]
    fn errors_name_the_argument() {
        let long = format!("runtime_path=/{}", "x".repeat(4096));
        for (argument, expected) in [
            ("bogus", "unknown configuration option: bogus"),
            ("bogus=1", "unknown configuration option: bogus=1"),
            ("sbatch_support", "unknown configuration option: sbatch_support"),
            ("execute_entrypoint=maybe", "execute_entrypoint: invalid value: maybe"),
            ("sbatch_support=TRUE", "sbatch_support: invalid value: TRUE"),
            ("use_enroot_load=", "use_enroot_load: invalid value: "),
            ("use_squashfuse=2", "use_squashfuse: invalid value: 2"),
            ("container_scope=user", "container_scope: invalid value: user"),
            ("executable=pyxis", "executable: not an absolute path: pyxis"),
            ("config=", "config: not an absolute path: "),
        ] {
            assert_eq!(Arguments::parse([argument]).unwrap_err().to_string(), expected);
        }
        let error = Arguments::parse([&*long]).unwrap_err().to_string();
        assert!(error.starts_with("runtime_path: path too long: /xxx"), "{error}");
    }

    proptest! {
        #[test]
        fn any_text_is_judged(text in ".*") {
            let _ = Arguments::parse([&*text]);
        }
    }
}
