//! The files by which an image that enroot made says what its containers start with (behaviour reference, section 13.2):
//! written into images that leave this machine as squashfs files, so that they start the same with enroot and with us.
//!
//! They replace what the image has at these paths.

#![forbid(unsafe_code)]

use std::fmt::Write;
use std::io;

use crate::image::config::ImageConfig;
use crate::mounts::rootdir::RootDir;

/// Command script: enters the working directory and executes the entrypoint.
pub const RC: &str = "/etc/rc";
/// First line of the command scripts written here.
const HEAD: &str =
    "# Starts a container of this image; made from its config. To start it in another way, change /etc/rc.local.";

/// A file, as it goes into an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GeneratedFile {
    /// Absolute.
    pub path: &'static str,
    /// Permission bits.
    pub mode: u16,
    /// All of it.
    pub content: String,
}

/// The files for an image with this config. `source` is where it comes from, as `docker://…`.
pub fn files(image: &ImageConfig, source: Option<&str>) -> [GeneratedFile; 4] {
    let file = |path, mode, content| GeneratedFile { path, mode, content };
    [
        file(RC, 0o755, rc(image, source)),
        file("/etc/rc.local", 0o644, rc_local()),
        file("/etc/environment", 0o644, environment(&image.env)),
        file("/etc/fstab", 0o644, fstab(&image.volumes)),
    ]
}

/// Writes the files into a root filesystem, unless it has them already: users may have changed them since.
pub fn write(root: RootDir<'_>, image: &ImageConfig, source: Option<&str>) -> io::Result<()> {
    let there = root.read(RC, 1 << 20)?.is_some_and(|content| content.starts_with(HEAD.as_bytes()));
    if there {
        return Ok(());
    }
    // The script last: it says that the others are there.
    for file in files(image, source).iter().rev() {
        root.write(file.path, file.content.as_bytes(), file.mode.into())?;
    }
    Ok(())
}

fn rc(image: &ImageConfig, source: Option<&str>) -> String {
    let mut script = format!("{HEAD}\n");
    if let Some(source) = source {
        let _ = writeln!(script, "# enroot-provenance: {}", one_line(source));
    }
    for (key, value) in &image.labels {
        let _ = writeln!(script, "# {} {}", one_line(key), one_line(value));
    }
    let workdir = quoted(if image.working_dir.is_empty() { "/" } else { &image.working_dir });
    let entrypoint = command(&image.entrypoint);
    let alone = match command(&[image.entrypoint.as_slice(), &image.cmd].concat()) {
        command if command.is_empty() => " /bin/sh".to_owned(),
        command => command,
    };
    let _ = write!(
        script,
        "\n\
         mkdir -p {workdir} 2> /dev/null\n\
         cd {workdir} || exit 1\n\
         unset OLDPWD\n\
         \n\
         if [ -s /etc/rc.local ]; then\n    . /etc/rc.local\nfi\n\
         \n\
         if [ $# -gt 0 ]; then\n    exec{entrypoint} \"$@\"\nelse\n    exec{alone}\nfi\n"
    );
    script
}

fn rc_local() -> String {
    "# Sourced by /etc/rc before the image's entrypoint is executed.\n\
     # To start something else instead, execute it here; \"$@\" is the command that was asked for.\n"
        .to_owned()
}

/// One variable a line. The reader drops what has no valid name and everything behind a line's end, and takes a quote off
/// each end of a value that has one at both ends: such a value gets another pair.
fn environment(variables: &[String]) -> String {
    let mut text = String::new();
    for variable in variables {
        let Some((name, value)) = variable.split_once('=') else { continue };
        let value = value.split('\n').next().unwrap_or_default();
        let is_quote = |character| matches!(character, '"' | '\'');
        let unblanked = value.trim_end_matches([' ', '\t']);
        let quote = if unblanked.starts_with(is_quote) && unblanked.ends_with(is_quote) { "\"" } else { "" };
        let _ = writeln!(text, "{name}={quote}{value}{quote}");
    }
    text
}

/// Volumes are binds of themselves: they stay writable when the root is read-only.
fn fstab(volumes: &[String]) -> String {
    let mut text = String::new();
    for volume in volumes.iter().filter(|volume| !volume.trim_matches('/').is_empty()) {
        let path: String = volume.chars().fold(String::new(), |mut path, character| {
            match character {
                ' ' | '\t' | '\n' | '\\' => {
                    let _ = write!(path, "\\{:03o}", character as u32);
                }
                _ => path.push(character),
            }
            path
        });
        let path = path.trim_start_matches('/');
        let _ = writeln!(text, "${{ENROOT_ROOTFS}}/{path} /{path} none x-create=dir,bind,rw,nosuid,nodev");
    }
    text
}

/// The words of a command, each behind a blank.
fn command(words: &[String]) -> String {
    words.iter().map(|word| format!(" {}", quoted(word))).collect()
}

/// A word that a shell reads as `text`.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// For a comment.
fn one_line(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { ' ' } else { character }).collect()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::process::Command;

    use proptest::prelude::*;
    use rustix::fs::{Mode, OFlags};

    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    /// What a shell that runs the script prints, with `arguments`.
    fn run(image: &ImageConfig, arguments: &[&str]) -> (Option<i32>, String) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rc");
        std::fs::write(&path, rc(image, Some("docker://a\nexit 7"))).unwrap();
        let output = Command::new("sh").arg(&path).args(arguments).current_dir("/").output().unwrap();
        assert_eq!(output.stderr, b"", "{}", String::from_utf8_lossy(&output.stderr));
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    }

    #[test]
    fn the_script_executes_what_the_image_says() {
        let print = ["printf", "<%s>"];
        let image = |entrypoint: &[&str], cmd: &[&str]| ImageConfig {
            entrypoint: strings(entrypoint),
            cmd: strings(cmd),
            ..ImageConfig::default()
        };
        assert_eq!(run(&image(&print, &["a b", "$HOME"]), &[]).1, "<a b><$HOME>");
        assert_eq!(run(&image(&print, &["a b"]), &["c'd", "\"e"]).1, "<c'd><\"e>");
        assert_eq!(run(&image(&[], &["echo", "x"]), &[]).1, "x\n");
        assert_eq!(run(&image(&[], &["echo", "x"]), &["echo", "y"]).1, "y\n");
        assert_eq!(run(&image(&[], &[]), &[]).0, Some(0));
    }

    #[test]
    fn the_script_enters_the_working_directory() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("it's a $new/one");
        let mut image = ImageConfig {
            working_dir: path.to_str().unwrap().to_owned(),
            cmd: strings(&["pwd"]),
            labels: [("k\ney".to_owned(), "v\nexit 9".to_owned())].into(),
            ..ImageConfig::default()
        };
        assert_eq!(run(&image, &[]).1, format!("{}\n", path.display()));
        image.working_dir = "/proc/nothing".into();
        let file = rc(&image, None);
        assert!(file.contains("# k ey v exit 9\n"), "{file}");
        let status = Command::new("sh").args(["-c", &file]).stderr(std::process::Stdio::null()).status().unwrap();
        assert_ne!(status.code(), Some(0));
    }

    #[test]
    fn volumes_and_variables_are_written_as_they_are_read() {
        assert_eq!(
            fstab(&strings(&["/data", "/a b\\", "/"])),
            "${ENROOT_ROOTFS}/data /data none x-create=dir,bind,rw,nosuid,nodev\n\
             ${ENROOT_ROOTFS}/a\\040b\\134 /a\\040b\\134 none x-create=dir,bind,rw,nosuid,nodev\n"
        );
        assert_eq!(
            environment(&strings(&["A=b=c", "Q=\"x\" ", "H='x", "M=one\ntwo", "NONE"])),
            "A=b=c\nQ=\"\"x\" \"\nH='x\nM=one\n"
        );
    }

    #[test]
    fn what_users_changed_stays() {
        let directory = tempfile::tempdir().unwrap();
        let fd = rustix::fs::open(directory.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let root = RootDir::new(fd.as_fd());
        let path = |name: &str| directory.path().join(name);
        std::fs::create_dir(path("etc")).unwrap();
        std::fs::write(path("etc/rc"), "the image's own").unwrap();
        let image = ImageConfig { env: strings(&["A=1"]), ..ImageConfig::default() };
        write(root, &image, None).unwrap();
        assert_eq!(std::fs::read(path("etc/environment")).unwrap(), b"A=1\n");
        assert!(std::fs::read_to_string(path("etc/rc")).unwrap().contains("exec /bin/sh"));
        std::fs::write(path("etc/environment"), "B=2").unwrap();
        write(root, &image, None).unwrap();
        assert_eq!(std::fs::read(path("etc/environment")).unwrap(), b"B=2");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        #[test]
        fn any_words_reach_the_command(words in proptest::collection::vec("[^\0]{0,12}", 0..5)) {
            let image = ImageConfig {
                entrypoint: strings(&["printf", "%s\\0", "-"]),
                cmd: words.clone(),
                ..ImageConfig::default()
            };
            let expected: String = ["-".to_owned()].iter().chain(&words).map(|word| format!("{word}\0")).collect();
            prop_assert_eq!(run(&image, &[]).1, expected);
        }
    }
}
