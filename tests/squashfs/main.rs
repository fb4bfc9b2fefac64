//! Squashfs images made by mksquashfs, judged by the tree that they were made from, by unsquashfs and by the kernel. Run as
//! root: mounts file systems.

mod contents;
mod convert;
mod damage;
mod features;
mod formats;
mod fuse;
#[allow(dead_code, reason = "the tests of layers look at more")]
#[path = "../erofs/reader.rs"]
mod reader;
mod support;
#[allow(dead_code, reason = "layers have more than squashfs images")]
#[path = "../erofs/tree.rs"]
mod tree;
