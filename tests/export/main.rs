//! Squashfs images and exported root filesystems, judged by `unsquashfs`, by the kernel and by our own reader. Run as root: mounts file systems.

#[path = "../squashfs/contents.rs"]
mod contents;
mod filesystems;
mod images;
mod support;
#[path = "../erofs/tree.rs"]
mod tree;
