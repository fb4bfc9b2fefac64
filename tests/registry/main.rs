//! The importer against registries: ones that misbehave in every way we could think of (`server`), and Debian's
//! `docker-registry` with images that `skopeo` pushes (`real`).
//!
//! Everything goes through the importer's own protocol, with a stand-in for the broker (`broker`).

mod auth;
mod broker;
mod confined;
mod content;
mod faults;
mod flows;
mod messages;
mod proxied;
mod proxies;
mod pulls;
mod real;
mod server;
mod signatures;
mod sites;
mod submit;
