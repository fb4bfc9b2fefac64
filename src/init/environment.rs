//! The container's environment (behaviour reference, section 7.3), as far as files and options say it: the image's, then
//! the site's and the user's `environ.d`, `--container-env`, and `HOME` if it is the host's. Hooks come after it.

use super::plan::Plan;
use super::site::Site;
use super::{InitError, Start, entrypoint};
use crate::enroot::environ;
use crate::image::config::ImageConfig;
use crate::mounts::rootdir::RootDir;
use crate::request::Environment;
use crate::sys;

/// What comes from the host: read before the container has its root.
#[derive(Debug, Default)]
pub struct FromHost {
    assignments: Environment,
    /// What `${NAME}` stands for.
    variables: Environment,
    /// For the node's log.
    pub log: Option<String>,
}

impl FromHost {
    /// Reads `environ.d`. `variables` is the environment of what runs on the host for the container.
    pub fn read(start: &Start<'_>, site: &Site, variables: Environment) -> Result<Self, InitError> {
        let mut assignments = Environment::default();
        let variable = |name: &str| variables.get(name).map(<[u8]>::to_owned);
        let log = environ::assign_directories(&mut assignments, start.sysconf, &site.user_directory, &variable)
            .map_err(|error| InitError::Other(error.to_string()))?;
        Ok(Self { assignments, variables, log })
    }

    /// The whole environment. `task` is the leading task's.
    pub fn with_image(
        &self,
        start: &Start<'_>,
        image: &ImageConfig,
        root: RootDir<'_>,
        plan: &Plan,
        task: &Environment,
    ) -> Result<Environment, InitError> {
        let mut environment: Environment = image.env.iter().collect();
        if let Some(digest) = &start.image_digest {
            environment.set("PYXIS_IMAGE_DIGEST", digest.to_string());
        }
        if let Some(text) = image_file(start, root, "/etc/environment", environ::MAX_FILE)? {
            let variable = |name: &str| self.variables.get(name).map(<[u8]>::to_owned);
            environ::assign(&mut environment, &text, Some(&variable));
        }
        for (name, value) in self.assignments.iter() {
            environment.set(name, value);
        }
        entrypoint::add_named(&mut environment, start.request, task);
        plan.add_home(&mut environment);
        Ok(environment)
    }
}

/// A file by which enroot describes an image. Images with a config are described by that, and may ship anything here.
pub fn image_file(
    start: &Start<'_>,
    root: RootDir<'_>,
    path: &'static str,
    limit: u64,
) -> Result<Option<Vec<u8>>, InitError> {
    if !start.image_config.is_empty() {
        return Ok(None);
    }
    root.read(path, limit)
        .map_err(|error| InitError::Other(format!("cannot read the image's {path}: {}", sys::reason(error))))
}
