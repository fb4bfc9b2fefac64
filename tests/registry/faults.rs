//! Networks and registries in trouble.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use spank_pyxis::importer::protocol::{Command, FailureKind};
use std::os::fd::AsFd;

use crate::broker::Import;
use crate::content::{Content, ranged};
use crate::server::{Delivery, Reply, Request, Server};

/// A registry of `content` that answers as `fault` says, and properly where that says nothing. `fault` gets the number
/// of the request among those for its path.
fn faulty(content: Content, fault: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static) -> Server {
    let seen = Mutex::new(std::collections::BTreeMap::<String, usize>::new());
    Server::start(move |request| {
        let number = {
            let mut seen = seen.lock().unwrap();
            let count = seen.entry(request.path.clone()).or_default();
            *count += 1;
            *count
        };
        fault(request, number).unwrap_or_else(|| content.answer(request))
    })
}

#[test]
fn trouble_that_passes_is_waited_for() {
    for (status, path) in [(429, "manifests"), (500, "manifests"), (502, "blobs"), (503, "manifests"), (504, "blobs")] {
        let registry = faulty(Content::simple(1000), move |request, number| {
            (request.path.contains(path) && number == 1).then(|| Reply::status(status).header("Retry-After", "1"))
        });
        Import::new("some/image", &[&registry.host()]).run().unwrap();
        assert_eq!(registry.count("manifests") + registry.count("blobs"), if path == "blobs" { 5 } else { 4 });
    }
}

#[test]
fn trouble_that_stays_is_told() {
    let registry = faulty(Content::default(), |_, _| {
        Some(Reply::status(503).body(r#"{"errors": [{"code": "UNAVAILABLE", "message": "under\nrepair"}]}"#))
    });
    let (kind, message) = Import::new("some/image", &[&registry.host()]).fail();
    assert_eq!(kind, FailureKind::Unavailable);
    let expected = format!(
        "{} answers 503 Service Unavailable to the request for manifest latest (UNAVAILABLE: under\\nrepair): try \
         again later, or configure a mirror",
        registry.host()
    );
    assert_eq!(message, expected);
    assert_eq!(registry.count(""), 3);

    let registry = faulty(Content::default(), |_, _| Some(Reply::status(429).header("Retry-After", "3600")));
    let (kind, message) = Import::new("some/image", &[&registry.host()]).fail();
    assert_eq!(kind, FailureKind::Unavailable);
    assert!(message.contains("allows no more requests for now: try again in 3600 s"), "{message}");
    assert_eq!(registry.count(""), 1, "not waited for");
}

#[test]
fn a_broken_download_goes_on_where_it_stopped() {
    let content = Content::simple(8_000_000);
    let total = content.blob_bytes();
    let sent = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&sent);
    let layer = content.layer(0);
    let bytes = content.clone().blob(&layer).clone();
    let registry = faulty(content, move |request, _| {
        if !request.path.ends_with(&layer) {
            return None;
        }
        // Every connection is cut after a megabyte.
        let rest = bytes.len() - request.range().map_or(0, |(start, _)| start);
        counter.fetch_add(rest.min(1_000_000), Ordering::SeqCst);
        Some(ranged(&bytes, request).delivery(Delivery::Cut(1_000_000)))
    });
    Import::new("some/image", &[&registry.host()]).run().unwrap();
    let sent = sent.load(Ordering::SeqCst);
    assert!(sent <= total + total / 10, "{sent} bytes sent for {total}");
}

#[test]
fn a_server_without_ranges_is_put_up_with() {
    let content = Content::simple(3_000_000);
    let layer = content.layer(0);
    let bytes = content.clone().blob(&layer).clone();
    let registry = faulty(content, move |request, number| {
        let delivery = if number == 1 { Delivery::Cut(2_000_000) } else { Delivery::Whole };
        request.path.ends_with(&layer).then(|| Reply::ok(&*bytes).delivery(delivery))
    });
    Import::new("some/image", &[&registry.host()]).run().unwrap();
}

#[test]
fn a_stalled_download_is_taken_up_again() {
    let content = Content::simple(3_000_000);
    let layer = content.layer(0);
    let bytes = content.clone().blob(&layer).clone();
    let registry = faulty(content, move |request, number| {
        let delivery = if number == 1 { Delivery::Stall(1_000_000) } else { Delivery::Whole };
        request.path.ends_with(&layer).then(|| ranged(&bytes, request).delivery(delivery))
    });
    Import::new("some/image", &[&registry.host()]).run().unwrap();
    assert_eq!(registry.count("blobs"), 3);
}

/// First and last byte of a range.
type Part = (usize, Option<usize>);

/// A registry that sends `bytes` each twentieth of a second over each connection, and the parts that were asked for.
fn slow(content: &Content, bytes: usize, ranges: bool) -> (Server, Arc<Mutex<Vec<Part>>>) {
    let (content, layer) = (content.clone(), content.layer(0));
    let blob = content.clone().blob(&layer).clone();
    let parts = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&parts);
    let server = faulty(content, move |request, _| {
        if !request.path.ends_with(&layer) {
            return None;
        }
        seen.lock().unwrap().extend(request.range());
        let reply = if ranges { ranged(&blob, request) } else { Reply::ok(&*blob) };
        Some(reply.delivery(Delivery::Slow(bytes)))
    });
    (server, parts)
}

#[test]
fn a_slow_registry_is_asked_over_several_connections() {
    // Six times as long as it takes to notice, at 2 MB/s.
    let content = Content::simple(18_000_000);
    let (server, parts) = slow(&content, 100_000, true);
    Import::new("some/image", &[&server.host()]).run().unwrap();
    let parts = parts.lock().unwrap().clone();
    let bounded: Vec<_> = parts.iter().filter_map(|(start, last)| Some((*start, (*last)?))).collect();
    assert!(bounded.len() >= 3, "{parts:?}");
    // Nothing is asked for twice.
    let mut sorted = bounded.clone();
    sorted.sort_unstable();
    assert!(sorted.windows(2).all(|pair| pair[0].1 < pair[1].0), "{parts:?}");

    // One connection is all that the administrator wants.
    let (server, parts) = slow(&content, 300_000, true);
    let mut import = Import::new("some/image", &[&server.host()]);
    import.registries.network.blob_connections = 1;
    import.run().unwrap();
    assert!(parts.lock().unwrap().is_empty());
}

#[test]
fn a_slow_server_without_ranges_is_read_on() {
    let content = Content::simple(12_000_000);
    let (server, parts) = slow(&content, 100_000, false);
    Import::new("some/image", &[&server.host()]).run().unwrap();
    assert!(!parts.lock().unwrap().is_empty());
}

#[test]
fn a_registry_that_wants_one_connection_gets_one() {
    let content = Content::simple(12_000_000);
    let layer = content.layer(0);
    let blob = content.clone().blob(&layer).clone();
    let registry = faulty(content, move |request, _| {
        if !request.path.ends_with(&layer) {
            return None;
        }
        Some(match request.range() {
            Some((_, Some(_))) => Reply::status(429).header("Retry-After", "3600"),
            _ => ranged(&blob, request).delivery(Delivery::Slow(100_000)),
        })
    });
    Import::new("some/image", &[&registry.host()]).run().unwrap();
}

#[test]
fn a_download_that_gets_nowhere_fails() {
    let content = Content::simple(3_000_000);
    let layer = content.layer(0);
    let bytes = content.clone().blob(&layer).clone();
    let (size, digest) = (bytes.len(), layer.clone());
    let registry = faulty(content, move |request, _| {
        request.path.ends_with(&layer).then(|| ranged(&bytes, request).delivery(Delivery::Cut(10_000)))
    });
    let (kind, message) = Import::new("some/image", &[&registry.host()]).fail();
    assert_eq!(kind, FailureKind::Unavailable);
    assert!(
        message.starts_with(&format!("layer {digest}: {}: the connection broke", registry.host())),
        "{message} ({size} bytes)"
    );
    assert_eq!(registry.count(&digest), 3);
}

#[test]
fn a_wrong_range_is_not_taken() {
    let content = Content::simple(3_000_000);
    let layer = content.layer(0);
    let bytes = content.clone().blob(&layer).clone();
    let registry = faulty(content, move |request, number| {
        if !request.path.ends_with(&layer) {
            return None;
        }
        Some(match number {
            1 => Reply::ok(&*bytes).delivery(Delivery::Cut(1_000_000)),
            _ => Reply::status(206)
                .header("Content-Range", format!("bytes 2000000-{}/{}", bytes.len() - 1, bytes.len()))
                .body(&bytes[2_000_000..]),
        })
    });
    let (_, message) = Import::new("some/image", &[&registry.host()]).fail();
    assert!(message.contains("another range than the one asked for"), "{message}");
}

#[test]
fn a_manifest_that_breaks_off_is_asked_for_again() {
    let content = Content::simple(1000);
    let manifest = content.manifest("latest").to_string();
    let registry = faulty(content, move |request, number| {
        (number == 1 && request.path.contains("manifests"))
            .then(|| Reply::ok(manifest.as_str()).delivery(Delivery::Cut(100)))
    });
    Import::new("some/image", &[&registry.host()]).run().unwrap();
    assert_eq!(registry.count("manifests"), 2);
}

#[test]
fn an_expired_signature_leads_back_to_the_registry() {
    let content = Content::simple(1_000_000);
    let layer = content.layer(0);
    let (bytes, path) = (content.clone().blob(&layer).clone(), layer.clone());
    let store = Server::start(move |request| match &*request.query["signature"] {
        "1" => ranged(&bytes, request).delivery(Delivery::Cut(500_000)),
        "2" => Reply::status(403),
        _ => ranged(&bytes, request),
    });
    let target = store.host();
    let registry = faulty(content, move |request, number| {
        request
            .path
            .ends_with(&path)
            .then(|| Reply::status(302).header("Location", format!("http://{target}/x?signature={number}")))
    });
    Import::new("some/image", &[&registry.host()]).run().unwrap();
    assert_eq!(registry.count(&layer), 3);
}

#[test]
fn redirects_end() {
    let registry = Server::start(|request| Reply::status(301).header("Location", request.path.as_str()));
    let (_, message) = Import::new("some/image", &[&registry.host()]).fail();
    assert!(message.ends_with("redirects the request for manifest latest too often"), "{message}");
    let registry = Server::start(|_| Reply::status(301));
    let (_, message) = Import::new("some/image", &[&registry.host()]).fail();
    assert!(message.ends_with("redirects the request for manifest latest without saying where to"), "{message}");
}

#[test]
fn nobody_there() {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let host = format!("127.0.0.1:{port}");
    let (kind, message) = Import::new("some/image", &[&host]).fail();
    assert_eq!(kind, FailureKind::Unavailable);
    assert_eq!(
        message,
        format!("{host}: connection refused: nothing listens there, or a firewall is in between: check host and port")
    );

    let (kind, message) = Import::new("some/image", &["nosuch.invalid"]).fail();
    assert_eq!(kind, FailureKind::Unavailable);
    assert!(message.starts_with("nosuch.invalid: ") && message.contains("DNS settings of this node"), "{message}");
}

#[test]
fn plain_http_where_tls_is_expected() {
    let registry = Server::start(|_| Reply::status(200));
    let mut import = Import::new("some/image", &[&registry.host()]);
    import.registries.registry.clear();
    let (kind, message) = import.fail();
    assert_eq!(kind, FailureKind::Unavailable);
    assert!(message.ends_with("say insecure = true for it in pyxis.toml"), "{message}");
}

#[test]
fn garbage_is_not_http() {
    let registry = Server::start(|_| Reply::status(200).header("Content-Length", "many").body("x"));
    let (kind, message) = Import::new("some/image", &[&registry.host()]).fail();
    assert_eq!(kind, FailureKind::Unavailable);
    assert!(message.contains("the connection broke"), "{message}");
}

#[test]
fn the_importer_ends_with_its_broker() {
    let content = Content::simple(3_000_000);
    let layer = content.layer(0);
    let bytes = content.clone().blob(&layer).clone();
    let registry = faulty(content, move |request, _| {
        request.path.ends_with(&layer).then(|| Reply::ok(&*bytes).delivery(Delivery::Stall(1_000_000)))
    });
    let mut import = Import::new("some/image", &[&registry.host()]);
    import.registries.network.stall_timeout = 3600;
    let (broker, importer) = spank_pyxis::sys::channel::pair().unwrap();
    let serving = std::thread::spawn(move || spank_pyxis::importer::serve(importer));
    let conversation = crate::broker::Conversation(broker);
    conversation.resolve(&import).unwrap();
    let file = tempfile::tempfile().unwrap();
    conversation.0.send(&Command::Fetch { layer: 0 }, &[file.as_fd()]).unwrap();
    testbed::wait::until("the download", testbed::wait::DEADLINE, || (registry.count("blobs") == 2).then_some(()))
        .unwrap();
    drop(conversation);
    testbed::wait::until("the importer's end", testbed::wait::DEADLINE, || serving.is_finished().then_some(()))
        .unwrap();
}

/// A server of `content` that damages the first `times` answers to requests for what ends in `path`.
fn damaging(content: &Content, path: String, times: usize) -> Server {
    let (content, left) = (content.clone(), AtomicUsize::new(times));
    Server::start(move |request| {
        let damage = request.path.ends_with(&path)
            && left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok();
        let reply = content.answer(request);
        if damage { reply.damaged() } else { reply }
    })
}

#[test]
fn what_arrives_damaged_is_asked_for_again() {
    let content = Content::simple(300_000);
    let manifest = content.manifest("latest");
    let config = manifest["config"]["digest"].as_str().unwrap().to_owned();
    for path in [content.layer(0), config] {
        for times in [1, 2] {
            let server = damaging(&content, path.clone(), times);
            let imported = Import::new("some/image", &[&server.host()]).run().unwrap();
            assert!(imported.elsewhere.is_empty());
            assert_eq!(server.count(&path), times + 1, "{path}");
        }
        let server = damaging(&content, path.clone(), usize::MAX);
        let (kind, message) = Import::new("some/image", &[&server.host()]).fail();
        assert_eq!((kind, server.count(&path)), (FailureKind::BadImage, 3), "{message}");
        assert!(message.contains("somebody changed it, or it was damaged on its way"), "{message}");
        assert!(message.ends_with(": push the image again"), "{message}");
    }
    let server = damaging(&content, content.layer(0), usize::MAX);
    let (_, message) = Import::new("some/image", &[&server.host()]).fail();
    let host = server.host();
    assert!(
        message.ends_with(&format!("; downloaded 3 times from {host}, {host}, {host}: push the image again")),
        "{message}"
    );
}

/// What a mirror has damaged, or has lost, the registry may have; and that it had is told.
#[test]
fn another_place_is_asked_for_layers_that_one_cannot_give() {
    let content = Content::simple(300_000);
    let layer = content.layer(0);
    let registry = {
        let content = content.clone();
        Server::start(move |request| content.answer(request))
    };
    let lost = {
        let (content, layer) = (content.clone(), layer.clone());
        Server::start(move |request| match request.path.ends_with(&layer) {
            true => Reply::status(404),
            false => content.answer(request),
        })
    };
    for mirror in [damaging(&content, layer.clone(), usize::MAX), lost] {
        let before = registry.count(&layer);
        let import = Import::new("some/image", &[&registry.host()]).mirror(&registry.host(), &mirror.host());
        let imported = import.run().unwrap();
        assert_eq!(imported.origin, format!("{}/some/image", mirror.host()));
        assert_eq!(imported.elsewhere, [(0, format!("{}/some/image", registry.host()))]);
        assert_eq!((mirror.count(&layer), registry.count(&layer)), (1, before + 1));
    }
}
