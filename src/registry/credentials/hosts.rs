//! Which entries of the files are meant for a registry and its token server.

use std::net::IpAddr;

use crate::image::reference::is_docker_hub;

/// How well an entry for the host `entry` fits `host`: 2 to the letter, 1 if an entry without a port stands for every
/// port, or one of Docker Hub's names for another.
pub(super) fn fit(entry: &str, host: &str) -> Option<u8> {
    if entry.eq_ignore_ascii_case(host) {
        Some(2)
    } else {
        let same = entry.eq_ignore_ascii_case(without_port(host)) || (is_docker_hub(entry) && is_docker_hub(host));
        same.then_some(1)
    }
}

/// Whether a token server is its registry's own: the pairs that are known, or one host's name ends in the other's.
pub(super) fn belong_together(registry: &str, realm: &str) -> bool {
    let (registry, realm) = (name(registry), name(realm));
    let below = |child: &str, parent: &str| {
        parent.contains('.') && child.strip_suffix(parent).is_some_and(|rest| rest.ends_with('.'))
    };
    registry == realm
        || (is_docker_hub(&registry) && realm == "auth.docker.io")
        || (registry == "nvcr.io" && realm == "authn.nvidia.com")
        || (!is_address(&registry) && (below(&registry, &realm) || below(&realm, &registry)))
}

/// Whether the two are neighbours, as `registry.example.org` and `gitlab.example.org`.
pub(super) fn are_neighbours(registry: &str, realm: &str) -> bool {
    let (registry, realm) = (name(registry), name(realm));
    let parent = |host: &str| host.split_once('.').map(|(_, parent)| parent.to_owned());
    !is_address(&registry)
        && parent(&registry).is_some_and(|above| above.contains('.') && Some(above) == parent(&realm))
}

fn is_address(host: &str) -> bool {
    host.starts_with('[') || host.parse::<IpAddr>().is_ok()
}

fn name(host: &str) -> String {
    without_port(host).to_ascii_lowercase()
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_fit_hosts() {
        for (entry, host, expected) in [
            ("reg.io", "reg.io", Some(2)),
            ("REG.io:5000", "reg.io:5000", Some(2)),
            ("reg.io", "reg.io:5000", Some(1)),
            ("reg.io:5001", "reg.io:5000", None),
            ("regxio", "reg.io", None),
            ("docker.io", "registry-1.docker.io", Some(1)),
            ("auth.docker.io", "registry-1.docker.io", None),
        ] {
            assert_eq!(fit(entry, host), expected, "{entry} {host}");
        }
    }

    #[test]
    fn token_servers_belong_to_registries() {
        for (registry, realm, together, neighbours) in [
            ("reg.io", "reg.io:5001", true, false),
            ("registry-1.docker.io", "auth.docker.io", true, true),
            ("nvcr.io", "authn.nvidia.com", true, false),
            ("registry.gitlab.com", "gitlab.com", true, false),
            ("reg.io", "auth.reg.io", true, false),
            ("registry.example.org", "gitlab.example.org", false, true),
            ("evil.io", "auth.docker.io", false, false),
            ("evil.com", "com", false, false),
            ("evil.com", "other.com", false, false),
            ("10.0.0.1", "0.0.1", false, false),
            ("10.0.0.1", "11.0.0.1", false, false),
        ] {
            assert_eq!(belong_together(registry, realm), together, "{registry} {realm}");
            assert_eq!(are_neighbours(registry, realm), neighbours, "{registry} {realm}");
        }
    }
}
