//! Images that users have on the node: files, directories, and what their container engines hold.
//!
//! Only their user may open them, and only the importer may read what is inside. So a short-lived process that runs *as
//! the user*, the source reader, opens what he names and passes on descriptors, which the broker never looks into:
//!
//! ```text
//! broker ── ToReader ──▶ source reader         the job's user: opens the path, runs docker or podman
//!    ◀──── FromReader ──┘   │
//!    └── descriptor ──▶ importer ── LayoutAsk ──▶ (an OCI layout's files, one by one)
//! ```
//!
//! * [`reader`]: the source reader;
//! * [`engine`]: how it gets an image out of a container engine;
//! * [`importer`]: how it has the site's importer get one;
//! * [`layout`]: how it hands out the files of an OCI layout.

#![forbid(unsafe_code)]

mod engine;
pub mod importer;
mod layout;
mod program;
pub mod reader;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::image::digest::Digest;
use crate::request::{LocalImage, User};
use crate::store::FileIdentity;

/// From the broker to the source reader.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ToReader {
    /// The first message, with one descriptor: the job's environment in a memory file.
    Open {
        /// Whom to become.
        user: User,
        /// What to open.
        image: LocalImage,
        /// The step's working directory.
        cwd: PathBuf,
    },
    /// The other first message, with the job's environment as well: has the site's importer get an image.
    Import {
        /// Which importer, and as whom to run it.
        call: importer::ImporterCall,
        /// What to get, with a scheme.
        uri: String,
    },
    /// Answers [`FromReader::Found`]: the image itself is wanted.
    Save,
}

/// From the source reader to the broker. Written by a process of the user's: what it says concerns nobody else.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum FromReader {
    /// The engine has the image.
    Found {
        /// What the engine calls its content.
        id: String,
    },
    /// It is open. One descriptor, for the importer.
    Opened {
        /// What the descriptor is.
        form: SourceForm,
        /// The file's state, unless it has changed just now.
        file: Option<FileIdentity>,
    },
    /// The site's importer has failed.
    ImporterFailed {
        /// In pyxis's words.
        problem: String,
        /// What it said, line by line.
        log: Vec<String>,
    },
    /// It cannot be had: one line that says why.
    Failed {
        /// For the user.
        message: String,
    },
}

/// What a source reader has opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SourceForm {
    /// A squashfs file.
    Squashfs,
    /// A tar archive, as a file that can be read from anywhere.
    Archive,
    /// A tar archive, perhaps compressed, that can be read once from front to back.
    Stream,
    /// A socket for [`LayoutAsk`] and [`LayoutAnswer`].
    Layout,
}

/// From the importer to the source reader: a file of an OCI layout.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum LayoutAsk {
    /// `index.json`
    Index,
    /// `blobs/sha256/HEX`
    Blob(Digest),
}

/// From the source reader to the importer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum LayoutAnswer {
    /// One descriptor: the file.
    File {
        /// Bytes of it.
        size: u64,
    },
    /// There is none, or it cannot be opened: why.
    None {
        /// As strerror(3) has it.
        reason: String,
    },
}
