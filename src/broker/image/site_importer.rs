//! The image of a step whose images a site's importer gets (behaviour reference, section 4), and the importer's `release`:
//! at once when the file's bytes are in the store; when the step is over while a container runs from the file itself.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions};

use super::{Acquired, Acquisition, Preparation};
use crate::broker::BrokerError;
use crate::broker::import::{self, ImportError, ImportSettings, LocalRequest};
use crate::broker::squashfs::Method;
use crate::policy::Subject;
use crate::request::{Environment, ImageSource, LocalImage, StepRequest, User};
use crate::source::importer::ImporterCall;
use crate::task::importer;

impl Acquisition<'_, '_> {
    /// What the site's importer makes of the reference.
    pub(super) fn by_site_importer(&mut self, call: &ImporterCall) -> Result<Acquired, BrokerError> {
        let (typed, subject) = match &self.request.image {
            Some(image @ (ImageSource::Registry { typed, .. } | ImageSource::Local { typed, .. })) => {
                (typed.clone(), Subject::of(&self.request.user, image))
            }
            _ => return Err(BrokerError::Start("no image".into())),
        };
        if let Some(importer) = &self.request.importer {
            make_user_directory(&importer.runtime, &self.request.user).map_err(|errno| {
                BrokerError::Start(format!("couldn't mkdir {}: {errno}", importer.runtime.display()))
            })?;
        }
        self.announce(&typed);
        let (store, settings) = (self.store()?, self.config.import_settings());
        let uri = if typed.starts_with("docker://") || typed.starts_with("dockerd://") {
            typed.clone()
        } else {
            format!("docker://{typed}")
        };
        let (user, cwd, environment, in_use) =
            (&self.request.user, Path::new(&self.request.cwd), self.environment, self.in_use);
        // It is what it is: nobody knows its name.
        let image = LocalImage::Path { path: uri.clone().into(), form: None, name: None };
        let wanted = LocalRequest { user, image: &image, typed: &typed, cwd, environment };
        let method = Method::choose(self.config.squashfs.mode, self.request);
        let caretaker = Caretaker::start(&settings, self.request, environment, self.life)
            .map_err(|error| tracing::warn!("nobody calls importer release if slurmstepd is killed: {error}"));
        let preparation = Preparation { store: &store, settings: &settings, wanted, in_use, life: self.life, method };
        let image = self.watch(Some(&typed), |cancel, events| {
            let opened = import::open_imported(&settings, subject, call, &uri, environment, cancel, events)?;
            preparation.prepare(opened, cancel, events)
        });
        // All of it is in the store now, or none of it is wanted. A file that is used as it is stays until the step's end,
        // which does this once more.
        let still_used =
            matches!(image, Ok(Acquired::Mount(_) | Acquired::Fuse(_)) | Err(ImportError::Cancelled { .. }));
        if !still_used {
            if let Err(error) = importer::release(&settings.executable, self.request, environment) {
                tracing::info!("could not call importer release: {error}");
            }
            if let Ok(caretaker) = caretaker {
                caretaker.dismiss();
            }
        }
        let image = image.map_err(|error| match error {
            ImportError::Cancelled { .. } => BrokerError::Cancelled,
            ImportError::SiteImporter { problem, log } => {
                BrokerError::SiteImporter { image: typed.clone(), importer: call.program.clone(), problem, log }
            }
            other => BrokerError::Create { image: typed.clone(), reason: other.to_string() },
        })?;
        self.conclude(&typed, false);
        Ok(image)
    }
}

/// A process that outlives the broker and calls `release` when the step is over and slurmstepd, whose task that is, was
/// killed before it could.
struct Caretaker(Pid);

impl Caretaker {
    fn start(settings: &ImportSettings, request: &StepRequest, job: &Environment, life: &OwnedFd) -> io::Result<Self> {
        importer::release_after(&settings.executable, request, job, life.as_fd()).map(Self)
    }

    /// There is nothing left to release.
    fn dismiss(self) {
        let _ = rustix::process::kill_process(self.0, Signal::KILL);
        let _ = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(self.0), WaitOptions::empty()));
    }
}

/// The user's own directory below `runtime`: what is there stays.
fn make_user_directory(runtime: &Path, user: &User) -> Result<(), Errno> {
    crate::broker::make_directory(runtime)?;
    let path = runtime.join(user.uid.to_string());
    match rustix::fs::mkdir(&path, Mode::RWXU) {
        Err(Errno::EXIST) => Ok(()),
        other => {
            other?;
            let (uid, gid) = (rustix::fs::Uid::from_raw(user.uid), rustix::fs::Gid::from_raw(user.gid));
            rustix::fs::chownat(rustix::fs::CWD, &path, Some(uid), Some(gid), rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
        }
    }
}
