//! Errors as the broker is told about them: whose fault, and one line.

#![forbid(unsafe_code)]

use std::io;

use super::layer::ImportError;
use super::protocol::{FailureKind, Report};
use crate::import::LayerError;
use crate::registry::error::RegistryError;

/// Most characters of a message: the parts that come from outside are bounded, but there may be several.
const MAX_MESSAGE: usize = 1000;

/// Something that ends the import.
#[derive(Debug)]
pub struct Failure {
    kind: FailureKind,
    message: String,
}

impl Failure {
    /// A failure of this machine.
    pub fn local(message: impl Into<String>) -> Self {
        Self { kind: FailureKind::Local, message: message.into() }
    }

    /// The same, with what it is about in front.
    pub fn about(mut self, subject: &str) -> Self {
        self.message = format!("{subject}: {}", self.message);
        self
    }

    /// The same, with more behind it.
    pub fn with(mut self, more: &str) -> Self {
        self.message = format!("{}; {more}", self.message);
        self
    }

    /// The message as it is: who shows it makes it one line.
    pub fn into_message(self) -> String {
        self.message
    }

    /// As a message to the broker: one line.
    pub fn report(self) -> Report {
        let printable = |c: char| if c.is_control() { ' ' } else { c };
        let message = self.message.chars().take(MAX_MESSAGE).map(printable).collect();
        Report::Failed { kind: self.kind, message }
    }
}

impl From<RegistryError> for Failure {
    fn from(error: RegistryError) -> Self {
        Self { kind: kind(&error), message: error.to_string() }
    }
}

fn kind(error: &RegistryError) -> FailureKind {
    use RegistryError as Error;
    match error {
        Error::ImageNotFound { .. } | Error::BlobNotFound { .. } | Error::ForeignLayer { .. } | Error::Reference(_) => {
            FailureKind::NotFound
        }
        Error::Manifest { source, .. } => match source {
            crate::image::manifest::ManifestError::NoPlatform { .. } => FailureKind::NotFound,
            _ => FailureKind::BadImage,
        },
        Error::OperatingSystem { .. } => FailureKind::NotFound,
        Error::CredentialsMissing { .. }
        | Error::UserUnknown { .. }
        | Error::CredentialsRefused { .. }
        | Error::Forbidden { .. }
        | Error::Blocked { .. }
        | Error::Challenge { .. } => FailureKind::Denied,
        Error::Transport(_) | Error::TooManyRequests { .. } | Error::Status { .. } | Error::Redirect { .. } => {
            FailureKind::Unavailable
        }
        Error::TooLong { .. }
        | Error::Truncated { .. }
        | Error::WrongDigest { .. }
        | Error::Nesting(_)
        | Error::Config { .. }
        | Error::LayerCount { .. } => FailureKind::BadImage,
        Error::Mirrors { source, .. } => kind(source),
    }
}

impl From<ImportError> for Failure {
    fn from(error: ImportError) -> Self {
        match error {
            ImportError::Download(error) => match error.downcast::<RegistryError>() {
                Ok(error) => error.into(),
                Err(error) => Self { kind: FailureKind::Unavailable, message: crate::sys::reason(error) },
            },
            ImportError::Layer(LayerError::Write(error)) => Self::write(&error, "the layer image"),
            ImportError::Layer(LayerError::TooLarge) => {
                Self::bad("it unpacks to more bytes than import.max_layer_bytes in pyxis.toml allows")
            }
            ImportError::Layer(LayerError::TooManyEntries) => {
                Self::bad("it has more files and directories than import.max_layer_entries in pyxis.toml allows")
            }
            ImportError::Undiagnosed(error) => (*error).into(),
            ImportError::Thread(_) => Self::local(error.to_string()),
            other => Self::bad(&other.to_string()),
        }
    }
}

impl Failure {
    /// The image is no good.
    pub fn bad(message: &str) -> Self {
        Self { kind: FailureKind::BadImage, message: message.to_owned() }
    }

    /// `what` cannot be written to the store.
    pub fn write(error: &io::Error, what: &str) -> Self {
        Self::local(write_failure(error, what))
    }
}

fn write_failure(error: &io::Error, what: &str) -> String {
    let advice = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ": make room in the layer store (pyxis gc), or give it a larger file system"
        }
        _ => "",
    };
    let reason = error
        .raw_os_error()
        .map_or_else(|| error.to_string(), |code| crate::sys::reason(io::Error::from_raw_os_error(code)));
    format!("cannot write {what}: {reason}{advice}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::error::{TransportError, TransportReason};

    fn reported(failure: Failure) -> (FailureKind, String) {
        match failure.report() {
            Report::Failed { kind, message } => (kind, message),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn failures_are_sorted_and_one_line() {
        let transport = || TransportError { host: "reg.io".into(), reason: TransportReason::Broken("a\nb".into()) };
        let (kind, message) = reported(Failure::from(RegistryError::from(transport())).about("layer x"));
        assert_eq!((kind, &*message), (FailureKind::Unavailable, "layer x: reg.io: the connection broke: a b"));

        let inside = io::Error::other(RegistryError::from(transport()));
        assert_eq!(reported(ImportError::Download(inside).into()).0, FailureKind::Unavailable);

        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        let (kind, message) = reported(ImportError::Layer(LayerError::Write(full)).into());
        assert_eq!(kind, FailureKind::Local);
        assert_eq!(
            message,
            "cannot write the layer image: No space left on device: make room in the layer store (pyxis gc), or give \
             it a larger file system"
        );
        assert_eq!(reported(ImportError::Layer(LayerError::TooLarge).into()).0, FailureKind::BadImage);
        assert!(reported(Failure::local("x".repeat(5000))).1.len() <= MAX_MESSAGE);
    }
}
