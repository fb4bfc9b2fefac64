//! The importer as it really runs: a process of the service account that has given everything up. Needs root, to become
//! that account.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, WaitOptions};
use spank_pyxis::importer::protocol::{Command, FailureKind, Report};
use spank_pyxis::sys::{channel, spawn};
use testbed::image::Compression;
use testbed::registry::{Registry, RegistryOptions};
use testbed::{Site, images, wait};

use crate::broker::{Conversation, Import};
use crate::server::{Reply, Server};

const NOBODY: &str = "65534";

/// An importer process.
struct Process {
    conversation: Conversation,
    pid: Pid,
}

impl Process {
    fn start(environment: &[&str]) -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests need root");
        let (broker, end) = channel::pair::<Command, Report>().unwrap();
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let parent = rustix::process::getpid().as_raw_nonzero().to_string();
        let environment: Vec<_> = environment.iter().map(|&variable| CString::new(variable).unwrap()).collect();
        let pid = spawn::spawn(
            Path::new(env!("CARGO_BIN_EXE_pyxis")),
            &[b"pyxis-importer", parent.as_bytes(), NOBODY.as_bytes(), NOBODY.as_bytes(), b"1000000000"],
            &environment,
            &[(null.as_fd(), 0), (null.as_fd(), 1), (std::io::stderr().as_fd(), 2), (OwnedFd::from(end).as_fd(), 3)],
        )
        .unwrap();
        Self { conversation: Conversation(broker), pid }
    }

    /// A field of `/proc/PID/status`.
    fn status(&self, field: &str) -> String {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid.as_raw_nonzero())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// Closes the channel and waits for the exit status.
    fn end(self) -> Option<i32> {
        let pidfd = rustix::process::pidfd_open(self.pid, PidfdFlags::empty()).unwrap();
        drop(self.conversation);
        let mut ready = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
        let deadline = wait::DEADLINE.try_into().unwrap();
        assert_eq!(rustix::event::poll(&mut ready, Some(&deadline)), Ok(1), "the importer does not end");
        rustix::process::waitpid(Some(self.pid), WaitOptions::empty()).unwrap().unwrap().1.exit_status()
    }
}

#[test]
fn an_import_needs_nothing_that_was_given_up() {
    testbed::prerequisites::check().unwrap();
    let site = Site::create("registry-confined").unwrap();
    let registry = Registry::start(&site, "tls", RegistryOptions { tls: true, ..RegistryOptions::default() }).unwrap();
    let layers = [Compression::Gzip, Compression::Zstd, Compression::None];
    let trees = images::feature_trees(&site.path("trees"), 500).unwrap();
    registry.push(&images::features(&site.path("layout"), &trees, layers).unwrap(), "features:latest").unwrap();
    let mut import = Import::new("features", &[&registry.host()]);
    import.registries.registry.clear();

    // A CA of the site's own, where only the configuration says so.
    let authority = format!("SSL_CERT_FILE={}", registry.authority().unwrap().display());
    let process = Process::start(&[&authority]);
    import.run_in(&process.conversation).unwrap();
    for (field, value) in [
        ("Uid", "65534 65534 65534 65534"),
        ("Groups", ""),
        ("CapPrm", "0000000000000000"),
        ("CapBnd", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
    ] {
        assert_eq!(process.status(field), value, "{field}");
    }
    let peak: u64 = process.status("VmHWM").trim_end_matches(" kB").parse().unwrap();
    assert!(peak <= 256 << 10, "{peak} KiB");
    // What root's processes make dumpable belongs to the process's user: this one is not.
    use std::os::unix::fs::MetadataExt;
    assert_eq!(std::fs::metadata(format!("/proc/{}/mem", process.pid.as_raw_nonzero())).unwrap().uid(), 0);
    assert_eq!(process.end(), Some(0));

    let process = Process::start(&[]);
    let (kind, message) = import.run_in(&process.conversation).unwrap_err();
    assert!(kind == FailureKind::Unavailable && message.contains("unknown authority"), "{message}");
    assert_eq!(process.end(), Some(0));
}

#[test]
fn names_are_looked_up() {
    let process = Process::start(&[]);
    let (kind, message) = Import::new("x", &["nosuch.invalid"]).run_in(&process.conversation).unwrap_err();
    assert!(kind == FailureKind::Unavailable && message.contains("DNS settings of this node"), "{message}");
    assert_eq!(process.end(), Some(0));
}

/// What is wrong with the proxy is not blamed on the registry.
#[test]
fn a_proxy_in_trouble_is_named() {
    let proxy = Server::start(|_| Reply::status(403));
    let nobody = std::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    for (address, reason) in [
        (proxy.host(), "it answers 403: it does not let this node connect there"),
        (nobody.to_string(), "connection refused"),
    ] {
        let process = Process::start(&[&format!("https_proxy=http://{address}")]);
        let mut import = Import::new("x", &["registry.invalid"]);
        import.registries.registry.clear();
        let (kind, message) = import.run_in(&process.conversation).unwrap_err();
        assert_eq!(kind, FailureKind::Unavailable);
        let expected = format!(
            "registry.invalid: not reached through the proxy {address} ({reason}): check https_proxy and no_proxy in \
             import.environment of pyxis.toml"
        );
        assert_eq!(message, expected);
        assert_eq!(process.end(), Some(0));
    }
}
