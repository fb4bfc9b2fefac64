//! The site's importer, run as the user: `IMPORTER get URI` prints the path of an image file, `IMPORTER release` removes
//! what it has made for the step (behaviour reference, section 4; the messages are pyxis's).

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::FromReader;
use super::program::{self, Output, RunError};
use super::reader::{BrokerChannel, Refusal, serve_path};
use crate::enroot::{HOST_PATH, conf};
use crate::request::{Environment, StepRequest, User};
use crate::sys;
use crate::sys::command::{Stream, capture};
use crate::task::importer::is_asked;

/// How long `release` may take: steps wait for it.
const RELEASE_TIME: Duration = Duration::from_secs(60);
/// Most lines of its complaints that are passed on.
const MAX_LINES: usize = 100;
const MAX_LINE: usize = 500;

/// How the importer is run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImporterCall {
    /// As whom.
    pub user: User,
    /// The program.
    pub program: PathBuf,
    /// Where: the step's working directory.
    pub cwd: PathBuf,
    /// What is set besides the job's environment.
    pub variables: Vec<(String, String)>,
}

impl ImporterCall {
    /// For a step whose image the site's importer gets.
    pub fn new(request: &StepRequest) -> Option<Self> {
        let importer = request.importer.as_ref().filter(|_| is_asked(request))?;
        let mut variables = Vec::new();
        let mut set = |name: &str, value: String| variables.push((name.to_owned(), value));
        set("SLURM_JOB_UID", request.user.uid.to_string());
        set("SLURM_JOB_GID", request.user.gid.to_string());
        set("PYXIS_RUNTIME_PATH", importer.runtime.display().to_string());
        set("PYXIS_VERSION", env!("CARGO_PKG_VERSION").to_owned());
        if let Some(step) = &request.step {
            set("SLURM_JOB_ID", step.job_id.to_string());
            set("SLURM_STEP_ID", step.step_id.to_string());
        }
        for (name, choice) in [
            ("ENROOT_MOUNT_HOME", request.mount_home),
            ("ENROOT_REMAP_ROOT", request.remap_root),
            ("ENROOT_ROOTFS_WRITABLE", request.writable),
            ("ENROOT_UNSHARE_NET", request.unshare.net.then_some(true)),
            ("ENROOT_UNSHARE_IPC", request.unshare.ipc.then_some(true)),
            ("ENROOT_UNSHARE_UTS", request.unshare.uts.then_some(true)),
        ] {
            if let Some(yes) = choice {
                set(name, if yes { "y" } else { "n" }.to_owned());
            }
        }
        let (user, program, cwd) = (request.user.clone(), importer.program.clone(), request.cwd.clone());
        Some(Self { user, program, cwd, variables })
    }
}

/// Why there is no file.
struct Failure {
    problem: String,
    log: Vec<String>,
}

/// Has the importer get `uri`, and opens the file that it names.
pub fn get(channel: &BrokerChannel, call: &ImporterCall, uri: &str, job: &Environment) -> io::Result<()> {
    let report = match ask(channel, call, uri, job) {
        Ok(path) => match serve_path(channel, Path::new(&path), &call.cwd) {
            Ok(()) => return Ok(()),
            Err(Refusal(message)) => FromReader::Failed { message },
        },
        Err(Failure { problem, log }) => FromReader::ImporterFailed { problem, log },
    };
    channel.send(&report, &[])
}

fn ask(channel: &BrokerChannel, call: &ImporterCall, uri: &str, job: &Environment) -> Result<String, Failure> {
    let failed = |problem: String| Failure { problem, log: Vec::new() };
    let mut command = program::command(&program_path(call), &environment(call, job), &call.cwd);
    command.args(["get", uri]);
    let ended = program::run(command, Output::FirstLine, channel).map_err(|error| match error {
        RunError::Start(error) => {
            failed(format!("couldn't execute importer {}: {}", call.program.display(), sys::reason(error)))
        }
        RunError::Cancelled => failed("cancelled".into()),
    })?;
    let lines: Vec<&str> = ended.complaint.lines().collect();
    let last = lines.get(lines.len().saturating_sub(MAX_LINES)..).unwrap_or_default();
    let log = last.iter().map(|line| line.chars().take(MAX_LINE).collect()).collect();
    let problem = match (ended.status.code(), ended.status.signal()) {
        (Some(0), _) if ended.output.is_empty() => "importer did not return a squashfs path".to_owned(),
        (Some(0), _) => return Ok(ended.output),
        (Some(code), _) => format!("importer get failed with exit code {code}"),
        (None, signal) => format!("importer get terminated with signal {}", signal.unwrap_or(0)),
    };
    Err(Failure { problem, log })
}

/// Has the importer release what it has for the step; whether it says that it has.
pub fn release(call: &ImporterCall, job: &Environment) -> io::Result<bool> {
    let mut command = program::command(&program_path(call), &environment(call, job), &call.cwd);
    command.arg("release");
    let ended = capture(&mut command, Stream::Error, 0, RELEASE_TIME)?;
    Ok(ended.status.is_some_and(|status| status.success()))
}

/// Without a search in `PATH`, as execve(2) has it.
fn program_path(call: &ImporterCall) -> OsString {
    match call.program.as_os_str().as_bytes().contains(&b'/') {
        true => call.program.clone().into(),
        false => Path::new(".").join(&call.program).into(),
    }
}

fn environment(call: &ImporterCall, job: &Environment) -> Environment {
    let mut environment = conf::of_job(job);
    environment.set("PATH", HOST_PATH);
    for (name, value) in &call.variables {
        environment.set(name.as_str(), value.as_str());
    }
    environment
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::source::{SourceForm, ToReader};
    use crate::sys::channel::{self, Channel};

    /// What an importer with this script makes the reader say.
    fn run(script: &str) -> FromReader {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("importer");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::write(directory.path().join("x.sqsh"), b"hsqs...").unwrap();
        let call = ImporterCall {
            user: User { uid: 0, gid: 0, groups: vec![] },
            program,
            cwd: directory.path().to_owned(),
            variables: vec![("SLURM_JOB_UID".into(), "7".into())],
        };
        let (broker, reader): (Channel<ToReader, FromReader>, BrokerChannel) = channel::pair().unwrap();
        let job = Environment::from_block(b"PATH=/nonexistent\0HOME=/h\0LD_PRELOAD=x\0");
        get(&reader, &call, "docker://alpine", &job).unwrap();
        broker.receive().unwrap().unwrap().0
    }

    #[test]
    fn the_first_line_is_the_path() {
        for script in [
            "echo $PWD/x.sqsh; echo more",
            "echo x.sqsh",
            "echo x.sqsh; seq 100000",
            "[ \"$1 $2 $#\" = 'get docker://alpine 2' ] && ! read x && printf x.sqsh",
            "[ \"$SLURM_JOB_UID $HOME $LD_PRELOAD\" = '7 /h ' ] && [ $PATH != /nonexistent ] && echo x.sqsh",
        ] {
            let report = run(script);
            assert!(matches!(report, FromReader::Opened { form: SourceForm::Squashfs, .. }), "{script}: {report:?}");
        }
    }

    #[test]
    fn failures_have_pyxis_words() {
        for (script, expected, expected_log) in [
            ("echo one >&2; echo two >&2; exit 3", "importer get failed with exit code 3", &["one", "two"][..]),
            ("kill -9 $$", "importer get terminated with signal 9", &[]),
            ("echo why >&2", "importer did not return a squashfs path", &["why"]),
            ("echo; seq 100000", "importer did not return a squashfs path", &[]),
        ] {
            let FromReader::ImporterFailed { problem, log } = run(script) else { panic!("{script}") };
            assert_eq!((&*problem, log), (expected, expected_log.iter().map(|line| (*line).to_owned()).collect()));
        }
        let report = run("echo /nonexistent.sqsh");
        assert!(matches!(&report, FromReader::Failed { message } if message.starts_with("No such file")), "{report:?}");
    }
}
