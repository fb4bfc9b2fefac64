//! What the administrator's rules say about an image, asked before any of it is used, and the numbers behind the names in
//! them. See [`crate::policy`] for the rules themselves.

use crate::policy::{Accounts, Evidence, Keys, Subject, Verdict};

use super::process::{AccountKind, account_number};
use super::{ImportError, ImportSettings};

/// What may be done with an image about which nothing but its name is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Permission {
    /// Whatever it turns out to be, it may be used.
    Given,
    /// It depends on its digests, or on who has signed it.
    Depends,
}

/// Whether `subject` may be looked for at all.
pub(super) fn before(settings: &ImportSettings, subject: &Subject) -> Result<Permission, ImportError> {
    match settings.policy.judge(subject, None, &Node { settings, subject }) {
        Verdict::Allowed => Ok(Permission::Given),
        Verdict::Undecided | Verdict::IfSigned(_) => Ok(Permission::Depends),
        Verdict::Denied(message) => Err(ImportError::Policy(message)),
    }
}

/// Whether `subject`, of which all but signatures is known by `evidence`, may be used: the keys of which it has to have a
/// signature that is not known yet, if so.
pub(super) fn known(
    settings: &ImportSettings,
    subject: &Subject,
    evidence: &Evidence,
) -> Result<Option<Keys>, ImportError> {
    match settings.policy.judge(subject, Some(evidence), &Node { settings, subject }) {
        Verdict::Allowed => Ok(None),
        Verdict::IfSigned(keys) => Ok(Some(keys)),
        Verdict::Denied(message) => Err(ImportError::Policy(message)),
        // Only without evidence.
        Verdict::Undecided => Err(ImportError::Policy("internal error: the policy is undecided".into())),
    }
}

/// Whether `subject` may be used by what `evidence` says and nothing else.
pub(in crate::broker) fn settled(
    settings: &ImportSettings,
    subject: &Subject,
    evidence: &Evidence,
) -> Result<(), ImportError> {
    match known(settings, subject, evidence)? {
        None => Ok(()),
        Some(keys) => Err(ImportError::Policy(keys.refusal("no such signature was seen when it was imported"))),
    }
}

/// The users and groups that this node knows.
struct Node<'a> {
    settings: &'a ImportSettings,
    subject: &'a Subject,
}

impl Accounts for Node<'_> {
    fn uid(&self, name: &str) -> Result<u32, String> {
        account_number(self.settings, self.subject.user().uid, AccountKind::User, name)
    }

    fn gid(&self, name: &str) -> Result<u32, String> {
        account_number(self.settings, self.subject.user().uid, AccountKind::Group, name)
    }
}
