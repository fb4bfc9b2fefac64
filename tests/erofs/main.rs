//! Layer images, judged by `fsck.erofs`, by the kernel, by GNU tar and by umoci. Run as root: mounts file systems.

mod archive;
mod features;
mod formats;
mod generated;
mod large;
mod malformed;
mod overlay;
mod reader;
mod support;
mod tree;
