//! Names of containers (behaviour reference, section 3.6): pure.

#![forbid(unsafe_code)]

use std::fmt;

use crate::request::{NameMode, StepFacts, StepRequest};

/// Every name begins with it: it is enroot's directory that pyxis shared.
const PREFIX: &str = "pyxis_";
/// Longest name of a file.
const MAX_LENGTH: usize = 255;

/// The name of a container on a node: `pyxis_NAME`, or `pyxis_JOBID_NAME` if containers end with their job.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FullName(String);

/// A name that no container can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidName {
    /// It names the container's directory.
    #[error("--container-name: invalid name: {0:?}: a name may hold neither \"/\" nor control characters")]
    Character(String),
    /// With its prefix.
    #[error("--container-name: name too long: {length} bytes, at most {MAX_LENGTH} with \"{prefix}\"")]
    TooLong {
        /// Bytes of the full name.
        length: usize,
        /// What comes before the name.
        prefix: String,
    },
}

impl FullName {
    /// The container `name`; of job `job` only, if that is given.
    pub fn new(name: &str, job: Option<u32>) -> Result<Self, InvalidName> {
        if name.is_empty() || name.chars().any(|character| character == '/' || character.is_control()) {
            return Err(InvalidName::Character(name.chars().take(80).collect()));
        }
        let prefix = prefix(job);
        let length = prefix.len() + name.len();
        match length <= MAX_LENGTH {
            true => Ok(Self(prefix + name)),
            false => Err(InvalidName::TooLong { length, prefix }),
        }
    }

    /// A name as [`fmt::Display`] has it, as found in a directory.
    pub fn parse(full: &str) -> Option<Self> {
        let name = full.strip_prefix(PREFIX)?;
        Self::new(name, None).ok()
    }

    /// What the request's container is called: with its mode if it is to be kept. `None` outside of Slurm, without name.
    pub fn of(request: &StepRequest) -> Result<Option<(Self, Option<NameMode>)>, InvalidName> {
        let job = request.step.as_ref().filter(|_| request.job_scope).map(|step| step.job_id);
        match (&request.name, &request.step) {
            (Some(named), _) => Ok(Some((Self::new(&named.name, job)?, Some(named.mode)))),
            (None, Some(StepFacts { job_id, step_id, .. })) => {
                Ok(Some((Self::new(&format!("{job_id}.{step_id}"), job)?, None)))
            }
            (None, None) => Ok(None),
        }
    }

    /// As a file name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is a container of `job`, in a cluster where containers end with their job.
    pub fn is_of_job(&self, job: u32) -> bool {
        self.0.starts_with(&prefix(Some(job)))
    }
}

fn prefix(job: Option<u32>) -> String {
    match job {
        Some(job) => format!("{PREFIX}{job}_"),
        None => PREFIX.to_owned(),
    }
}

impl fmt::Display for FullName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_file_names() {
        let name = |name: &str, job| FullName::new(name, job).map(|full| full.0);
        assert_eq!(name("x", None).unwrap(), "pyxis_x");
        assert_eq!(name("a b:ü,\\", Some(7)).unwrap(), "pyxis_7_a b:ü,\\");
        assert_eq!(name("..", None).unwrap(), "pyxis_..");
        for bad in ["", "a/b", "/", "a\nb", "a\0b"] {
            assert!(matches!(name(bad, None), Err(InvalidName::Character(_))), "{bad:?}");
        }
        assert_eq!(name(&"n".repeat(249), None).unwrap().len(), 255);
        assert!(name(&"n".repeat(250), None).is_err());
        assert!(name(&"n".repeat(249), Some(1)).is_err());
    }

    #[test]
    fn a_name_is_of_a_job_or_not() {
        let full = |text| FullName::parse(text).unwrap();
        assert!(full("pyxis_12_x").is_of_job(12));
        assert!(!full("pyxis_12_x").is_of_job(1));
        assert!(!full("pyxis_12x").is_of_job(12));
        assert_eq!(FullName::parse("other"), None);
        assert_eq!(FullName::parse("pyxis_"), None);
    }
}
