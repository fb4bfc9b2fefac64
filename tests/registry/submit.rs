//! What `srun` asks for all nodes of a step before it starts: what an image's tag means.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use spank_pyxis::cli::MEANING;
use spank_pyxis::request::{Meaning, Place, TagMeaning};

use crate::content::Content;
use crate::server::{Delivery, Reply, Request, Server};

/// A user at a machine with a configuration.
struct Submit {
    home: tempfile::TempDir,
    server: Server,
}

impl Submit {
    fn new(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        Self { home: tempfile::tempdir().unwrap(), server: Server::start(answer) }
    }

    /// What the tag means, if that is known.
    #[track_caller]
    fn ask(&self, image: &str, policy: Option<&str>, more: &str) -> Option<Meaning> {
        match self.answer(image, policy, more) {
            Some(TagMeaning::Known(meaning)) => Some(meaning),
            other => panic!("{other:?}"),
        }
    }

    /// Where nodes are to agree on it.
    #[track_caller]
    fn place(&self, image: &str, policy: Option<&str>, more: &str) -> Place {
        match self.answer(image, policy, more) {
            Some(TagMeaning::Asked(place)) => place,
            other => panic!("{other:?}"),
        }
    }

    /// The answer, if there is one, for a step of two nodes.
    fn answer(&self, image: &str, policy: Option<&str>, more: &str) -> Option<TagMeaning> {
        self.answer_for("2", image, policy, more)
    }

    /// The same for a step of any. Where nodes agree is there until this process ends.
    fn answer_for(&self, nodes: &str, image: &str, policy: Option<&str>, more: &str) -> Option<TagMeaning> {
        let host = self.server.host();
        let config = self.home.path().join("pyxis.toml");
        std::fs::write(&config, format!("{more}\n[registry.\"{host}\"]\ninsecure = true\n")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_pyxis"));
        command.arg0(MEANING).arg(config).arg(nodes).args(policy).env_clear().env("HOME", self.home.path());
        command.env("SLURM_CONF", self.home.path().join("slurm.conf"));
        command.env("ENROOT_SYSCONF_PATH", "/nonexistent");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), image.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.success(), !text.is_empty(), "{text}");
        output.status.success().then(|| TagMeaning::parse(text.trim_end()).unwrap())
    }

    fn cache(&self) -> Vec<PathBuf> {
        let files = std::fs::read_dir(self.home.path().join(".cache/pyxis/tags")).unwrap();
        files.map(|file| file.unwrap().path()).collect()
    }

    /// Makes what is known `seconds` older.
    fn age(&self, seconds: u64) {
        for file in self.cache() {
            let mut entry: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
            entry["asked_at"] = (entry["asked_at"].as_u64().unwrap() - seconds).into();
            std::fs::write(file, entry.to_string()).unwrap();
        }
    }
}

/// As registries do it, with the digest in a header.
fn registry() -> Submit {
    let content = Content::simple(1000);
    let digest = spank_pyxis::registry::sha256(content.manifest("latest").to_string().as_bytes());
    Submit::new(move |request| content.answer(request).header("Docker-Content-Digest", digest.to_string()))
}

#[test]
fn a_tag_is_asked_for_once_in_a_while() {
    let submit = registry();
    let image = format!("{}/team/image", submit.server.host());
    let digest = spank_pyxis::registry::sha256(Content::simple(1000).manifest("latest").to_string().as_bytes());
    let first = submit.ask(&image, None, "").unwrap();
    assert_eq!((first.digest, first.name.as_str()), (digest, format!("{image}:latest").as_str()));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    assert!(first.asked_at <= now && first.asked_at + 60 > now, "{first:?}");
    // Registries do not count this as a pull.
    let requests = submit.server.requests();
    assert_eq!((requests.len(), requests[0].method.as_str()), (1, "HEAD"));
    assert_eq!(submit.ask(&image, None, ""), Some(first.clone()));
    assert_eq!(submit.ask(&image, Some("recent"), ""), Some(first));
    assert_eq!(submit.server.requests().len(), 1);
    submit.age(300);
    assert!(submit.ask(&image, None, "").is_some());
    assert_eq!(submit.server.requests().len(), 2);
    assert!(submit.ask(&image, Some("always"), "").is_some());
    assert!(submit.ask(&image, None, "store.pull = \"always\"").is_some());
    assert_eq!(submit.server.requests().len(), 4);
}

#[test]
fn it_is_not_asked_for_where_it_does_not_matter() {
    let submit = registry();
    let host = submit.server.host();
    let image = format!("{host}/team/image");
    for (image, policy, more) in [
        (image.as_str(), Some("missing"), ""),
        (&image, Some("never"), ""),
        (&image, None, "store.pull = \"missing\""),
        (&format!("{image}@sha256:{}", "0".repeat(64)), None, ""),
        ("/x.sqsh", None, ""),
        ("Not An Image", None, ""),
    ] {
        assert_eq!(submit.answer(image, policy, more), None, "{image}");
    }
    submit.place(&image, None, "network.submit_timeout = 0");
    // When components start, what a tag has meant may be old.
    assert!(matches!(submit.answer_for("0", &image, None, ""), Some(TagMeaning::Asked(_))));
    assert_eq!(submit.server.requests().len(), 0);
}

#[test]
fn a_registry_that_is_silent_is_waited_for_once() {
    let submit = Submit::new(|_| Reply::ok("{}").delivery(Delivery::Stall(0)).header("Content-Length", "9"));
    let image = format!("{}/team/image", submit.server.host());
    for _ in 0..3 {
        submit.place(&image, None, "network.submit_timeout = 1");
        // One try: a request for the digest, and perhaps for the manifest.
        let requests = submit.server.requests();
        assert!((1..=2).contains(&requests.len()), "{requests:?}");
    }
    let before = submit.server.requests().len();
    submit.age(301);
    submit.place(&image, None, "network.submit_timeout = 1");
    assert!(submit.server.requests().len() > before);
}

#[test]
fn a_no_is_asked_for_again() {
    let there = Arc::new(AtomicUsize::new(0));
    let content = Content::simple(1000);
    let submit = Submit::new({
        let there = Arc::clone(&there);
        move |request| if there.load(Ordering::SeqCst) == 0 { Reply::status(404) } else { content.answer(request) }
    });
    let image = format!("{}/team/image", submit.server.host());
    submit.place(&image, None, "");
    there.store(1, Ordering::SeqCst);
    // Without a header the manifest itself is looked at.
    let digest = spank_pyxis::registry::sha256(Content::simple(1000).manifest("latest").to_string().as_bytes());
    assert_eq!(submit.ask(&image, None, "").map(|meaning| meaning.digest), Some(digest));
}

#[test]
fn short_names_mean_what_they_mean_to_nodes() {
    let submit = registry();
    let host = submit.server.host();
    let alias = format!("[short_names]\naliases = {{ tool = \"{host}/team/image\" }}");
    let meaning = submit.ask("tool:latest", None, &alias).unwrap();
    assert_eq!(meaning.name, format!("{host}/team/image:latest"));
}

#[test]
fn without_a_place_to_remember_nothing_is_asked() {
    let submit = registry();
    std::fs::write(submit.home.path().join(".cache"), "").unwrap();
    submit.place(&format!("{}/team/image", submit.server.host()), None, "");
    assert_eq!(submit.server.requests().len(), 0);
}

#[test]
fn passwords_are_not_written_down() {
    let submit = registry();
    let image = format!("user:open-sesame@{}#team/image", submit.server.host());
    let meaning = submit.ask(&image, None, "").unwrap();
    assert!(!meaning.to_string().contains("open-sesame"), "{meaning}");
    for file in submit.cache() {
        assert!(!std::fs::read_to_string(&file).unwrap().contains("open-sesame"));
    }
}

#[test]
fn nodes_agree_at_a_port_for_srun() {
    let submit = registry();
    let image = format!("{}/team/image", submit.server.host());
    let place = || submit.place(&image, None, "network.submit_timeout = 0");
    let (first, second) = (place(), place());
    assert!(first.key != second.key && first.port != second.port);
    let taken = first.port;
    std::fs::write(submit.home.path().join("slurm.conf"), format!("SrunPortRange={taken}-{}\n", taken + 50)).unwrap();
    let third = place();
    assert!((taken + 1..=taken + 50).contains(&third.port), "{third:?}");
    // All are taken: each node asks for itself.
    std::fs::write(submit.home.path().join("slurm.conf"), format!("SrunPortRange={taken}-{taken}\n")).unwrap();
    assert_eq!(submit.answer(&image, None, "network.submit_timeout = 0"), None);
}

/// Whether nodes come to it or not.
#[test]
fn the_place_ends_with_srun() {
    let submit = registry();
    let (config, image) = (submit.home.path().join("pyxis.toml"), submit.home.path().join("image"));
    std::fs::write(&config, "network.submit_timeout = 0\n").unwrap();
    std::fs::write(&image, "reg.io/team/image").unwrap();
    // The shell stands for srun.
    let mut command = Command::new("bash");
    command.args([
        "-c",
        "(exec -a \"$0\" \"$1\" \"$2\" 2 <\"$3\"); read -r line",
        MEANING,
        env!("CARGO_BIN_EXE_pyxis"),
    ]);
    command.arg(config).arg(image).env("HOME", submit.home.path()).env("ENROOT_SYSCONF_PATH", "/nonexistent");
    let mut srun = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(srun.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let Some(TagMeaning::Asked(place)) = TagMeaning::parse(line.trim_end()) else { panic!("{line}") };
    let connected = || TcpStream::connect((Ipv4Addr::LOCALHOST, place.port));
    drop(connected().unwrap());
    drop(srun.stdin.take());
    srun.wait().unwrap();
    testbed::wait::until("the end of the place", testbed::wait::DEADLINE, || connected().err()).unwrap();
}
