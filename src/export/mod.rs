//! Export.
pub mod target;
