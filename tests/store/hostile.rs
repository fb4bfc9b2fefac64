//! Importers that were taken over: whatever they report, the broker answers with one line and the store is as before.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use spank_pyxis::broker::import::{ImportError, ImportEvent};
use spank_pyxis::importer::protocol::{Command, FailureKind, Report};
use spank_pyxis::sys::memfile;

use crate::fake::{Answer, FakeImporter, Registries, Repository, Served, answer, deliver, digest, image_of, layer};
use crate::site;

const UID: u32 = 1001;

/// Runs an import of a two-layer image with an importer that answers so; returns the error.
fn attack(name: &str, answer: Answer) -> ImportError {
    let site = site();
    let registries = Registries::new([("host.example/app", Repository::with("gzip", &["base", "top"]))]);
    let error = site.acquire(&FakeImporter { registries: registries.clone(), answer }, UID, "host.example/app");
    let error = error.expect_err(name);
    let text = error.to_string();
    assert!(!text.contains('\n') && text.len() < 1500, "{name}: {text:?}");
    site.assert_tidy();
    assert!(site.store.images().unwrap().is_empty(), "{name}");
    // And the next one, with an honest importer, works.
    site.acquire(&FakeImporter::honest(&registries), UID, "host.example/app").expect(name);
    error
}

fn misbehaves(name: &str, expected: &str, answer: Answer) {
    let error = attack(name, answer);
    assert!(matches!(error, ImportError::Importer { .. }), "{name}: {error}");
    assert!(error.to_string().contains(expected), "{name}: {error}");
}

fn send_resolved(served: &Served, report: &Report) {
    let _ = served.channel.send(report, &[Served::config().as_fd()]);
}

#[test]
fn nonsense_instead_of_the_image() {
    misbehaves("no config", "no image config", |served, _, _| served.report(&served.resolved()));
    misbehaves("two files", "no image config", |served, _, _| {
        let (a, b) = (Served::config(), Served::config());
        let _ = served.channel.send(&served.resolved(), &[a.as_fd(), b.as_fd()]);
    });
    misbehaves("a file that can change", "not sealed", |served, _, _| {
        let _ = served.channel.send(&served.resolved(), &[tempfile::tempfile().unwrap().as_fd()]);
    });
    misbehaves("a pipe that never ends", "not sealed", |served, _, _| {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let _ = served.channel.send(&served.resolved(), &[read.as_fd()]);
        std::mem::forget(write);
    });
    misbehaves("a huge config", "more than", |served, _, _| {
        let config = memfile::sealed("config", &vec![b' '; 9 << 20]).unwrap();
        let _ = served.channel.send(&served.resolved(), &[config.as_fd()]);
    });
    misbehaves("too many layers", "501 layers", |served, _, _| {
        let Report::Resolved { manifest, origin, .. } = served.resolved() else { unreachable!() };
        let layers = vec![layer("", ""); 501];
        send_resolved(served, &Report::Resolved { manifest, origin, layers, warnings: vec![] });
    });
    for origin in ["other.example/app", "host.example/other", "host.example", "", "host.example/app\nx"] {
        let error = attack(
            origin,
            match origin {
                "other.example/app" => |served, _, _| other_origin(served, "other.example/app"),
                "host.example/other" => |served, _, _| other_origin(served, "host.example/other"),
                "host.example" => |served, _, _| other_origin(served, "host.example"),
                "" => |served, _, _| other_origin(served, ""),
                _ => |served, _, _| other_origin(served, "host.example/app\nx"),
            },
        );
        assert!(error.to_string().contains("was not to be asked"), "{error}");
    }
    misbehaves("an answer without a question", "a layer that nobody asked for", |served, _, _| {
        served.report(&Report::Fetched { layer: 0, unpacked: 1, image: 1 });
    });
    misbehaves("no JSON", "protocol", |served, _, _| {
        let _ = rustix::net::send(&served.channel, b"\x00\xff{", rustix::net::SendFlags::NOSIGNAL);
    });
}

fn other_origin(served: &Served, origin: &str) {
    let Report::Resolved { manifest, layers, .. } = served.resolved() else { unreachable!() };
    send_resolved(served, &Report::Resolved { manifest, origin: origin.into(), layers, warnings: vec![] });
}

/// An honest importer, except that it answers fetches so.
macro_rules! on_fetch {
    (|$served:ident, $layer:ident, $file:ident| $body:block) => {
        |$served, command, mut descriptors: Vec<OwnedFd>| match command {
            Command::Fetch { layer: $layer } => {
                let $file = descriptors.remove(0);
                $body
            }
            command => answer($served, command, descriptors),
        }
    };
}

#[test]
fn nonsense_about_a_layer() {
    misbehaves(
        "index out of range",
        "nobody asked for",
        on_fetch!(|served, _layer, _file| {
            served.report(&Report::Fetched { layer: 2, unpacked: 1, image: 1 });
        }),
    );
    misbehaves(
        "index far out of range",
        "nobody asked for",
        on_fetch!(|served, _layer, _file| {
            served.report(&Report::Progress { layer: usize::MAX, bytes: 1 });
        }),
    );
    misbehaves(
        "confirmation instead of a layer",
        "nobody asked for",
        on_fetch!(|served, layer, _file| {
            served.report(&Report::Confirmed { layer, allowed: true });
        }),
    );
    misbehaves(
        "the image again",
        "nobody asked for",
        on_fetch!(|served, _layer, _file| {
            send_resolved(served, &served.resolved());
        }),
    );
    misbehaves(
        "twice the same layer",
        "nobody asked for",
        on_fetch!(|served, layer, file| {
            let image = image_of(&served.blob(layer).unwrap());
            deliver(served, layer, &image, file);
            served.report(&Report::Fetched { layer, unpacked: 1, image: image.len() as u64 });
        }),
    );
    misbehaves(
        "more than the limit",
        "nobody asked for",
        on_fetch!(|served, layer, file| {
            std::fs::File::from(file).write_all(b"x").unwrap();
            served.report(&Report::Fetched { layer, unpacked: u64::MAX, image: 1 });
        }),
    );
    misbehaves(
        "a descriptor",
        "unexpected descriptors",
        on_fetch!(|served, layer, file| {
            let report = Report::Progress { layer, bytes: 1 };
            let _ = served.channel.send(&report, &[file.as_fd()]);
        }),
    );
    misbehaves(
        "it leaves",
        "closed its channel",
        on_fetch!(|served, _layer, _file| {
            rustix::net::shutdown(&served.channel, rustix::net::Shutdown::Both).unwrap();
        }),
    );
    let error = attack(
        "from somebody else",
        on_fetch!(|served, layer, _file| {
            served.report(&Report::Elsewhere { layer, origin: "other.example/app".into() });
        }),
    );
    assert!(error.to_string().contains("was not to be asked"), "{error}");
    let error = attack(
        "an empty layer",
        on_fetch!(|served, layer, _file| {
            served.report(&Report::Fetched { layer, unpacked: 0, image: 0 });
        }),
    );
    assert!(error.to_string().contains("has 0 bytes"), "{error}");
    let error = attack(
        "a shorter layer",
        on_fetch!(|served, layer, file| {
            std::fs::File::from(file).write_all(b"12345").unwrap();
            served.report(&Report::Fetched { layer, unpacked: 6, image: 6 });
        }),
    );
    assert!(error.to_string().contains("has 5 bytes instead of 6"), "{error}");
}

#[test]
fn a_layer_cannot_be_changed_after_it_was_published() {
    let error = attack(
        "it keeps the file",
        on_fetch!(|served, layer, file| {
            std::fs::File::from(file.try_clone().unwrap()).write_all(b"12345").unwrap();
            served.report(&Report::Fetched { layer, unpacked: 5, image: 5 });
            // Until the broker hangs up.
            while let Ok(Some(_)) = served.channel.receive() {}
            drop(file);
        }),
    );
    assert!(error.to_string().contains("still open for writing"), "{error}");
    // A descriptor that it opens anew would be as bad.
    let site = site();
    let new = site.store.new_layer().unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), new.as_fd().as_raw_fd());
    let status = std::process::Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c"])
        .arg(format!("exec 2>/dev/null; : >> {path}"))
        .status()
        .unwrap();
    assert!(!status.success());
}

#[test]
fn its_words_are_one_line() {
    let error = attack("control characters", |served, _, _| {
        served.fail(FailureKind::BadImage, &format!("\x1b[2Jline\r\none\n{}", "x".repeat(5000)));
    });
    assert!(error.to_string().starts_with("[2Jline  one xxx"), "{error}");
    let site = site();
    let registries = Registries::new([("host.example/app", Repository::with("gzip", &["base"]))]);
    let warn = FakeImporter {
        registries,
        answer: |served, command, descriptors| match command {
            Command::Resolve { .. } => {
                let Report::Resolved { manifest, origin, layers, .. } = served.resolved() else { unreachable!() };
                let warnings = vec!["a\nb\x07".to_owned(); 100];
                send_resolved(served, &Report::Resolved { manifest, origin, layers, warnings });
            }
            command => answer(served, command, descriptors),
        },
    };
    let mut warnings = Vec::new();
    site.acquire_with(&warn, UID, "host.example/app", &mut |event| {
        if let ImportEvent::Warning(text) = event {
            warnings.push(text);
        }
    })
    .unwrap();
    assert_eq!((warnings.len(), warnings[0].as_str()), (20, "a b"));
}

#[test]
fn it_cannot_publish_what_was_not_asked_for() {
    // The second user's image shares no layer with the first one's: nothing of the first is touched.
    let site = site();
    let registries = Registries::new([
        ("host.example/one", Repository::with("gzip", &["one"])),
        ("host.example/two", Repository::with("gzip", &["two"])),
    ]);
    site.acquire(&FakeImporter::honest(&registries), UID, "host.example/one").unwrap();
    let swap: Answer = on_fetch!(|served, layer, file| { deliver(served, layer, b"other bytes", file) });
    site.acquire(&FakeImporter { registries: registries.clone(), answer: swap }, UID, "host.example/two").unwrap();
    let one = site.store.lease(&digest("one")).unwrap().unwrap();
    assert_eq!(one.file.metadata().unwrap().len(), image_of("one").len() as u64);
}
