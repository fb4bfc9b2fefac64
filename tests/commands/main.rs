//! The commands of enroot, as an unprivileged user types them, with a real registry and independent judges.

#![forbid(unsafe_code)]

mod bundle;
mod containers;
mod create;
mod export;
mod images;
mod imports;
mod inspect;
mod json;
mod login;
mod node;
mod shape;
mod start;
mod tree;
mod world;
