//! Squashfs 4.0 (kernel document filesystems/squashfs): the format in which users exchange images.

#![forbid(unsafe_code)]

pub mod reader;
pub mod writer;
