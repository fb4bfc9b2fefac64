//! Images made for these tests.

use std::path::Path;

use serde_json::json;
use testbed::image::{Compression, ImageBuilder};

/// An image with the layers `tars` and a config that says something.
pub fn image(layout: &Path, tars: &[Vec<u8>]) -> String {
    let image = ImageBuilder::new(layout)
        .unwrap()
        .config("Env", json!(["PATH=/bin", "COLOUR=light blue"]))
        .config("Entrypoint", json!(["/bin/echo", "it's"]))
        .config("WorkingDir", json!("/work/here"))
        .config("Volumes", json!({"/data": {}}))
        .config("Labels", json!({"maintainer": "somebody"}));
    let layers = |image: ImageBuilder, tar: &Vec<u8>| image.layer_from_tar(&tar[..], Compression::Gzip);
    tars.iter().try_fold(image, layers).unwrap().finish("latest").unwrap()
}

/// A tar archive being built.
pub struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    pub fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn add(mut self, path: &str, kind: tar::EntryType, link: &str, content: &[u8]) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_mtime(86_400);
        header.set_size(content.len() as u64);
        // The library would refuse what a hostile image has.
        let bytes = header.as_old_mut();
        bytes.name[..path.len()].copy_from_slice(path.as_bytes());
        bytes.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    pub fn directory(self, path: &str) -> Self {
        self.add(path, tar::EntryType::Directory, "", b"")
    }

    pub fn file(self, path: &str, content: &str) -> Self {
        self.add(path, tar::EntryType::Regular, "", content.as_bytes())
    }

    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.add(path, tar::EntryType::Symlink, target, b"")
    }

    pub fn link(self, path: &str, target: &str) -> Self {
        self.add(path, tar::EntryType::Link, target, b"")
    }

    pub fn done(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}
