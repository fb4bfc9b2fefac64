//! Why there is no container, and how that is said.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use crate::metrics::Counter;
use crate::task::UserMessage;

/// Why there is no container. Each is reported by [`BrokerError::messages`].
#[derive(Debug, thiserror::Error)]
pub(super) enum BrokerError {
    /// The image could not be had.
    #[error("failed to import docker image: {image}")]
    Import {
        /// As the user typed it.
        image: String,
        /// Why.
        reason: String,
        /// What may help, if anything is known.
        hint: Option<String>,
    },
    /// An image on this machine could not be had.
    #[error("failed to create container filesystem for image: {image}")]
    Create {
        /// As the user typed it.
        image: String,
        /// Why.
        reason: String,
    },
    /// The site's importer got no image.
    #[error("failed to import docker image: {image} (importer: {})", .importer.display())]
    SiteImporter {
        /// As the user typed it.
        image: String,
        /// Which program.
        importer: PathBuf,
        /// What happened, in pyxis's words.
        problem: String,
        /// What the program said.
        log: Vec<String>,
    },
    /// Root's part of the start.
    #[error("cannot start container: {0}")]
    Start(String),
    /// What is asked for does not fit what is there: the text says it all.
    #[error("{0}")]
    Refused(String),
    /// Init said why.
    #[error("container init failed")]
    Init(Vec<UserMessage>),
    /// The leader or the step has ended: nobody is left to be told.
    #[error("cancelled")]
    Cancelled,
}

impl BrokerError {
    /// For the metrics.
    pub fn counters(&self) -> &'static [Counter] {
        match self {
            Self::Import { .. } => &[Counter::NotStarted, Counter::NoImage],
            Self::Create { .. } => &[Counter::NotStarted, Counter::NoLocalImage],
            Self::SiteImporter { .. } => &[Counter::NotStarted, Counter::NoSiteImage],
            Self::Start(_) => &[Counter::NotStarted, Counter::NodeFailed],
            Self::Refused(_) => &[Counter::NotStarted, Counter::Refused],
            Self::Init(_) => &[Counter::NotStarted, Counter::InitFailed],
            Self::Cancelled => &[Counter::Cancelled],
        }
    }

    pub fn messages(self) -> Vec<UserMessage> {
        match self {
            Self::Import { ref reason, .. } | Self::Create { ref reason, .. } => {
                let hint = if let Self::Import { hint: Some(hint), .. } = &self { Some(hint) } else { None };
                [self.to_string(), "printing enroot log file:".into(), format!("    [ERROR] {reason}")]
                    .into_iter()
                    .chain(hint.map(|hint| format!("    [INFO] {hint}")))
                    .map(UserMessage::error)
                    .collect()
            }
            Self::SiteImporter { ref problem, ref log, .. } => {
                let mut messages = vec![UserMessage::error(problem)];
                if !log.is_empty() {
                    messages.push(UserMessage::error("printing importer log file:"));
                    messages.extend(log.iter().map(|line| UserMessage::error(format!("    {line}"))));
                }
                messages.push(UserMessage::error(&self));
                messages
            }
            Self::Start(_) | Self::Refused(_) => vec![UserMessage::error(self)],
            Self::Init(messages) => messages,
            Self::Cancelled => vec![],
        }
    }
}

pub(super) fn failed<E: std::fmt::Display>(what: &str) -> impl Fn(E) -> BrokerError + '_ {
    move |error| BrokerError::Start(format!("{what}: {error}"))
}
