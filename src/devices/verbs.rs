//! What programs need to use InfiniBand devices: libibverbs, its provider for the device, and the file that names the
//! provider. An image that has them keeps its own; one without libibverbs gets the host's. Provider and libibverbs have to be
//! of one build (their private ABI): the host's provider goes into an image with a libibverbs of its own only if it fits.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use super::edits::{ContainerEdits, Library, Origin};
use super::host::Host;
use super::infiniband::Device;
use super::ldcache::{self, Abi, Cache};
use super::remains::own_cache;
use super::root::RootTraits;
use crate::mounts::entry::MountEntry;
use crate::mounts::rootdir::RootDir;

const VERBS: &str = "libibverbs.so.1";
/// What libibverbs and programs that use it need besides.
const COMPANIONS: [&str; 3] = ["librdmacm.so.1", "libnl-3.so.200", "libnl-route-3.so.200"];
/// Where files name the providers.
const CONFIGURATION: &str = "/etc/libibverbs.d";
/// What the version of the private ABI comes after, in libibverbs.
const PRIVATE_ABI: &[u8] = b"IBVERBS_PRIVATE_";
/// Most bytes of libibverbs: a tenth is usual.
const MAX_LIBRARY: u64 = 4 << 20;

/// Adds to `edits` what the image `image` lacks for the `chosen` devices.
pub fn add(edits: &mut ContainerEdits, node: &Host, image: RootDir<'_>, traits: &RootTraits, chosen: &[&Device]) {
    let providers: BTreeSet<&str> = chosen.iter().map(|device| device.provider).collect();
    // The host's libraries are glibc's.
    if providers.is_empty() || traits.is_musl {
        return;
    }
    let cache = node.read(ldcache::PATH, ldcache::MAX_FILE).unwrap_or_default();
    let hosts = Cache::parse(&cache).unwrap_or_default();
    let on_host = |name: &str| path_in(&hosts, name);
    let own = own_cache(image).ok().flatten().unwrap_or_default();
    let images = Cache::parse(&own).unwrap_or_default();
    let in_image = |name: &str| {
        let there = |path: &str| image.open(Path::new(path), OFlags::PATH, Mode::empty()).is_ok();
        let fallback = format!("{}/{name}", traits.library_directory);
        path_in(&images, name).filter(|path| there(path)).or_else(|| there(&fallback).then_some(fallback))
    };
    let Some(verbs) = on_host(VERBS) else {
        if in_image(VERBS).is_none() {
            edits.log.push(format!("neither the node nor the image has {VERBS}: programs cannot use InfiniBand"));
        }
        return;
    };
    let abi = node.read(&verbs, MAX_LIBRARY).ok().and_then(|library| private_abi(&library));
    let directory = |library: &str| library.rsplit_once('/').map_or("", |(directory, _)| directory).to_owned();
    // libibverbs looks beside itself, wherever it was built for.
    let target = match in_image(VERBS) {
        Some(library) => {
            let own = image.read(&library, MAX_LIBRARY).ok().flatten().and_then(|library| private_abi(&library));
            let has =
                |provider: &&str| own.as_deref().is_some_and(|own| in_image_provider(image, &library, provider, own));
            let missing: Vec<&str> = providers.iter().copied().filter(|provider| !has(provider)).collect();
            if missing.is_empty() {
                return;
            }
            if own.is_none() || own != abi {
                edits.notices.push(format!(
                    "the image's libibverbs has no provider for {}, and the node's is for another version: InfiniBand will \
                     not be used; install ibverbs-providers (Debian, Ubuntu) or libibverbs (Red Hat) in the image",
                    missing.join(", ")
                ));
                return;
            }
            directory(&library)
        }
        None => {
            for name in [VERBS].into_iter().chain(COMPANIONS) {
                if in_image(name).is_none() {
                    edits.libraries.extend(on_host(name).and_then(|path| library(node, &path, name)));
                }
            }
            directory(&verbs)
        }
    };
    let Some(abi) = abi else { return };
    for provider in providers {
        let file = format!("lib{provider}-rdmav{abi}.so");
        let source = node.resolve(format!("{}/libibverbs/{file}", directory(&verbs)));
        let Some(source) = source.as_deref().and_then(Path::to_str) else {
            edits.log.push(format!("the node has no provider {file} for libibverbs"));
            continue;
        };
        let mut bind = |source: &str, target: String| {
            let options = ["x-create=file", "bind", "ro", "nosuid", "nodev", "private"];
            edits.mounts.extend(MountEntry::new(source, &target, options.into_iter()));
        };
        bind(source, format!("{target}/libibverbs/{file}"));
        let named = format!("{CONFIGURATION}/{provider}.driver");
        if node.exists(&named) {
            bind(&named, named.clone());
        }
        // The provider is a library as well, for programs that know the device.
        let name = format!("lib{provider}.so.1");
        if in_image(&name).is_none() {
            edits.libraries.extend(on_host(&name).and_then(|path| library(node, &path, &name)));
        }
    }
}

fn path_in(cache: &Cache<'_>, name: &str) -> Option<String> {
    let entry = cache.entries.iter().find(|entry| entry.name == name.as_bytes() && entry.abi() == Abi::Native)?;
    entry.path().to_str().filter(|path| path.starts_with('/')).map(str::to_owned)
}

fn library(node: &Host, path: &str, name: &str) -> Option<Library> {
    let path = node.resolve(path)?;
    let file = path.file_name()?.to_str()?.to_owned();
    let mut names = vec![file];
    if names[0] != name {
        names.push(name.to_owned());
    }
    Some(Library { origin: Origin::Host, path, is_32_bit: false, names })
}

fn in_image_provider(image: RootDir<'_>, library: &str, provider: &str, abi: &str) -> bool {
    let path = Path::new(library).with_file_name("libibverbs").join(format!("lib{provider}-rdmav{abi}.so"));
    image.open(&path, OFlags::PATH, Mode::empty()).is_ok()
}

/// The version of a libibverbs's private ABI: the number in the name of a symbol version.
fn private_abi(library: &[u8]) -> Option<String> {
    let at = library.windows(PRIVATE_ABI.len()).position(|window| window == PRIVATE_ABI)? + PRIVATE_ABI.len();
    let digits = library[at..].iter().take(4).take_while(|byte| byte.is_ascii_digit());
    let version: String = digits.map(|&digit| char::from(digit)).collect();
    (!version.is_empty()).then_some(version)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd;

    use super::*;
    use crate::devices::infiniband::tests::node;
    use crate::devices::ldcache::{Addition, merge};

    const LIB: &str = "/usr/lib/x86_64-linux-gnu";

    fn write(root: &Path, path: &str, content: &[u8]) {
        let path = root.join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// Edits for an image with these files, on a node with private ABI 34.
    fn edits(image: &[(&str, &str)]) -> ContainerEdits {
        let directory = tempfile::tempdir().unwrap();
        let (host, root) = (directory.path().join("host"), directory.path().join("image"));
        let node = node(&host, &[("mlx5", "0000:81:00.0", 0)], &["infiniband", "infiniband_verbs"]);
        let names = [VERBS, "libnl-3.so.200", "librdmacm.so.1", "libmlx5.so.1"];
        let addition = |name: &str| Addition { name: name.into(), path: format!("{LIB}/{name}"), is_32_bit: false };
        let additions = names.map(addition);
        write(&host, ldcache::PATH, &merge(Cache::default(), &additions).to_bytes());
        for name in names {
            write(&host, &format!("{LIB}/{name}"), b"\x7fELF IBVERBS_PRIVATE_34\0");
        }
        write(&host, &format!("{LIB}/libibverbs/libmlx5-rdmav34.so"), b"");
        write(&host, "/etc/libibverbs.d/mlx5.driver", b"driver mlx5\n");
        fs::create_dir_all(&root).unwrap();
        for (path, content) in image {
            write(&root, path, content.as_bytes());
        }
        let fd = fs::File::open(&root).unwrap();
        let image = RootDir::new(fd.as_fd());
        let mut edits = ContainerEdits::default();
        let devices = Device::all(&node);
        add(&mut edits, &node, image, &RootTraits::of(image), &devices.iter().collect::<Vec<_>>());
        edits
    }

    fn names(edits: &ContainerEdits) -> Vec<&str> {
        edits.libraries.iter().flat_map(|library| &library.names).map(String::as_str).collect()
    }

    fn targets(edits: &ContainerEdits) -> Vec<&str> {
        edits.mounts.iter().map(|entry| entry.target.as_str()).collect()
    }

    #[test]
    fn an_image_without_verbs_gets_the_hosts() {
        let edits = edits(&[("/etc/os-release", "")]);
        assert_eq!(names(&edits), [VERBS, "librdmacm.so.1", "libnl-3.so.200", "libmlx5.so.1"]);
        // Where the host's libibverbs looks for it.
        let provider = format!("{LIB}/libibverbs/libmlx5-rdmav34.so");
        assert_eq!(targets(&edits), [provider.as_str(), "/etc/libibverbs.d/mlx5.driver"]);
        assert_eq!(edits.notices, [""; 0]);
    }

    #[test]
    fn an_image_keeps_its_own() {
        let own = [
            ("/etc/debian_version", ""),
            ("/usr/lib/x86_64-linux-gnu/libibverbs.so.1", "IBVERBS_PRIVATE_25"),
            ("/usr/lib/x86_64-linux-gnu/libibverbs/libmlx5-rdmav25.so", ""),
        ];
        assert_eq!(edits(&own), ContainerEdits::default());
        // Its provider is missing, and the host's does not fit.
        let unfit = edits(&own[..2]);
        assert_eq!((unfit.notices.len(), unfit.mounts.len(), unfit.libraries.len()), (1, 0, 0));
        assert!(unfit.notices[0].contains("no provider for mlx5"), "{unfit:?}");
        // Or does.
        let fits = edits(&[own[0], ("/usr/lib/x86_64-linux-gnu/libibverbs.so.1", "IBVERBS_PRIVATE_34")]);
        assert_eq!(targets(&fits)[0], "/usr/lib/x86_64-linux-gnu/libibverbs/libmlx5-rdmav34.so");
        assert_eq!(names(&fits), ["libmlx5.so.1"]);
        // musl's programs cannot use any of it.
        assert_eq!(edits(&[(&ldcache::musl_path_file().0, "")]), ContainerEdits::default());
    }

    #[test]
    fn the_private_abi_is_found() {
        assert_eq!(private_abi(b"xx IBVERBS_PRIVATE_34\0yy").as_deref(), Some("34"));
        assert_eq!(private_abi(b"IBVERBS_PRIVATE_"), None);
        assert_eq!(private_abi(b"nothing"), None);
    }
}
