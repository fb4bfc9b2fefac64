//! Debian's registry behind a proxy that delays, cuts, damages, throttles, and answers in its place.

use std::time::Duration;

use spank_pyxis::importer::protocol::FailureKind;
use testbed::Site;
use testbed::image::{Compression, ImageBuilder};
use testbed::proxy::{Behaviour, Proxy};
use testbed::registry::{Registry, RegistryOptions};

use crate::broker::Import;
use crate::content::tar;

/// A registry with an image of one layer of `size` bytes that do not compress, and the proxy in front of it.
fn proxied(name: &str, size: usize) -> (Site, Registry, Proxy) {
    testbed::prerequisites::check().unwrap();
    let site = Site::create(&format!("registry-{name}")).unwrap();
    let registry = Registry::start(&site, "open", RegistryOptions::default()).unwrap();
    let image = ImageBuilder::new(&site.path("layout")).unwrap();
    let image = image.layer_from_tar(&*tar(size), Compression::Gzip).unwrap().finish("latest").unwrap();
    registry.push(&image, "image:latest").unwrap();
    let proxy = Proxy::start(registry.port()).unwrap();
    (site, registry, proxy)
}

fn import(proxy: &Proxy) -> Import {
    Import::new("image", &[&proxy.host()])
}

/// The benchmark has the same with 2 GiB and 50 MiB.
#[test]
fn cut_connections_cost_next_to_nothing() {
    let (_site, _registry, proxy) = proxied("cut", 20_000_000);
    let connections = proxy.connections();
    proxy.set(Behaviour::HangUpAfter(1 << 20));
    let imported = import(&proxy).run().unwrap();
    let size: u64 = imported.layers.iter().map(|layer| layer.size).sum();
    assert!(proxy.connections() - connections >= size >> 20);
    assert!(proxy.bytes() * 10 <= size * 11, "{} bytes for {size}", proxy.bytes());
}

#[test]
fn slow_is_slow_and_no_more() {
    let (_site, _registry, proxy) = proxied("slow", 1_000_000);
    for behaviour in [Behaviour::Delay(Duration::from_millis(700)), Behaviour::Throttle(2_000_000)] {
        proxy.set(behaviour);
        import(&proxy).run().unwrap();
    }
    // Below the least rate a connection counts as stalled, and what it brought is kept.
    proxy.set(Behaviour::Throttle(20_000));
    let mut slow = import(&proxy);
    slow.registries.network.min_rate = 100_000;
    let (kind, message) = slow.fail();
    assert_eq!(kind, FailureKind::Unavailable);
    assert!(message.contains(&format!("{}: stalled: ", proxy.host())), "{message}");
}

#[test]
fn damage_on_the_way_is_found_and_made_good() {
    let (_site, _registry, proxy) = proxied("damage", 1_000_000);
    proxy.set(Behaviour::Corrupt(500_000));
    let imported = import(&proxy).run().unwrap();
    // The byte that is damaged is one of each connection, and this one is used again.
    let size: u64 = imported.layers.iter().map(|layer| layer.size).sum();
    assert!(proxy.bytes() >= size * 2, "{} bytes for {size}", proxy.bytes());
}

#[test]
fn what_a_gateway_answers_is_told() {
    let (_site, _registry, proxy) = proxied("answers", 1000);
    for (answer, expected) in [
        (
            "502 Bad Gateway",
            "answers 502 Bad Gateway to the request for manifest latest: try again later, or configure a mirror",
        ),
        (
            "429 Too Many Requests\r\nRetry-After: 3600",
            "allows no more requests for now: try again in 3600 s, log in, or configure a mirror",
        ),
    ] {
        proxy.set(Behaviour::Answer(answer));
        let (kind, message) = import(&proxy).fail();
        assert_eq!(kind, FailureKind::Unavailable);
        assert_eq!(message, format!("{} {expected}", proxy.host()));
    }
}
