//! From a layer's tar stream, or from a squashfs image, to its EROFS image, for the importer.
//!
//! `tar` reads entries, `layer` gives them their meaning in an OCI layer (image-spec, layer.md), and
//! [`erofs`](crate::erofs) writes the image. Nothing here touches a path of the file system.

#![forbid(unsafe_code)]

mod error;
mod layer;
pub mod merge;
mod parents;
mod path;
mod squashfs;
pub(crate) mod tar;

pub use error::LayerError;
pub use layer::{LayerLimits, LayerSummary, write_layer};
pub use squashfs::{Converted, write_squashfs};
