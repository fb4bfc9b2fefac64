//! Man pages and shell completions, made from the commands' own descriptions: for `make install` and packagers.

mod reference;

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use super::{devices, doctor, gc, inspect, login, pull};

/// Write man pages and shell completions.
#[derive(Debug, Clone, clap::Args)]
pub struct GenerateArgs {
    /// PREFIX/share: below it man/man1, bash-completion/completions, zsh/site-functions and fish/vendor_completions.d
    #[arg(value_name = "DIRECTORY", required_unless_present = "configuration")]
    directory: Option<PathBuf>,
    /// Print the reference of the configuration instead, as Markdown
    #[arg(long)]
    configuration: bool,
}

/// What all commands say in JSON that cannot do what they were asked for.
const JSON_ERROR: &str = "\
Where the command fails before it has a result: one object:
  error  the line that it says on standard error as well";

/// What commands say in JSON. Fields are added, and none is removed or changes its meaning.
const JSON: &[(&str, &str)] = &[
    ("devices", devices::JSON),
    ("doctor", doctor::JSON),
    ("gc", gc::JSON),
    ("inspect", inspect::JSON),
    ("login", login::LOGIN_JSON),
    ("logout", login::LOGOUT_JSON),
    ("pull", pull::JSON),
];

/// Runs the command.
pub fn run(args: &GenerateArgs) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let Some(directory) = args.directory.as_ref().filter(|_| !args.configuration) else {
        print!("{}", reference::reference());
        return Ok(ExitCode::SUCCESS);
    };
    let failed = |error| format!("cannot write below {}: {}", directory.display(), crate::sys::reason(error));
    man_pages(&directory.join("man/man1")).and_then(|()| completions(directory)).map_err(failed)?;
    Ok(ExitCode::SUCCESS)
}

/// The commands as people see them.
fn command() -> Command {
    let mut command = super::Arguments::command();
    command.build();
    command
}

fn man_pages(directory: &Path) -> io::Result<()> {
    let command = command();
    write_page(&command, directory, "pyxis")?;
    for subcommand in command.get_subcommands().filter(|command| !command.is_hide_set() && command.get_name() != "help")
    {
        write_page(subcommand, directory, &format!("pyxis-{}", subcommand.get_name()))?;
    }
    Ok(())
}

fn write_page(command: &Command, directory: &Path, title: &str) -> io::Result<()> {
    let name = command.get_name();
    // As it is typed, `pyxis pull`, and as its page is called, `pyxis-pull`, it was named when the command was built.
    let page = command.clone().disable_help_subcommand(true);
    let mut text = Vec::new();
    Man::new(page).title(title.to_uppercase()).section("1").source("Pyxis").manual("Pyxis").render(&mut text)?;
    if let Some((_, schema)) = JSON.iter().find(|(command, _)| *command == name) {
        text.extend(b".SH \"JSON OUTPUT\"\n");
        for line in [schema, "", JSON_ERROR].iter().flat_map(|text| text.split('\n')) {
            let line = line.replace('\\', "\\\\").replace('-', "\\-");
            match line.as_str() {
                "" => text.extend(b".PP\n"),
                line if line.starts_with("  ") => text.extend(format!(".br\n\\&{line}\n").as_bytes()),
                line => text.extend(format!("\\&{line}\n").as_bytes()),
            }
        }
    }
    write(&directory.join(format!("{title}.1")), &text)
}

fn completions(directory: &Path) -> io::Result<()> {
    for (shell, path) in [
        (Shell::Bash, "bash-completion/completions/pyxis"),
        (Shell::Zsh, "zsh/site-functions/_pyxis"),
        (Shell::Fish, "fish/vendor_completions.d/pyxis.fish"),
    ] {
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut super::Arguments::command(), "pyxis", &mut text);
        write(&directory.join(path), &text)?;
    }
    Ok(())
}

/// A file for everybody, whatever the umask is.
fn write(path: &Path, text: &[u8]) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_and_a_completion() {
        let directory = tempfile::tempdir().unwrap();
        man_pages(directory.path()).unwrap();
        completions(directory.path()).unwrap();
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        let main = read("pyxis.1");
        let completions =
            ["bash-completion/completions/pyxis", "zsh/site-functions/_pyxis", "fish/vendor_completions.d/pyxis.fish"]
                .map(read);
        for command in command().get_subcommands().filter(|command| !command.is_hide_set()) {
            let name = command.get_name();
            for completion in &completions {
                assert!(completion.contains(name), "{name}");
            }
            if name == "help" {
                continue;
            }
            let page = read(&format!("pyxis-{name}.1"));
            assert!(page.contains(".SH SYNOPSIS") && page.contains(&format!("pyxis {name}")), "{name}: {page}");
            assert!(main.contains(name), "{name}");
            // Every option is described, and what its JSON says.
            for option in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
                if let Some(long) = option.get_long() {
                    assert!(page.contains(&long.replace('-', "\\-")), "{name}: --{long}");
                    assert!(option.get_help().is_some(), "{name}: --{long}");
                }
            }
            let has_json = command.get_arguments().any(|argument| argument.get_long() == Some("json"));
            assert_eq!(has_json, page.contains("JSON OUTPUT"), "{name}");
            assert_eq!(has_json, page.contains("\\&  error  the line"), "{name}: {page}");
        }
        assert!(!directory.path().join("pyxis-generate.1").exists());
    }
}
