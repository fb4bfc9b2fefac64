//! Squashfs images and exported root filesystems, judged by `unsquashfs` and by the kernel. Run as root: mounts file systems.

mod filesystems;
mod images;
mod support;
#[path = "../erofs/tree.rs"]
mod tree;
