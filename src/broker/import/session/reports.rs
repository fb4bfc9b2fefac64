//! What the importer says, and what may be wrong with that.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::{MAX_MESSAGE, Session};
use crate::broker::import::process::describe_end;
use crate::broker::import::{ImportError, ImportEvent, one_line};
use crate::importer::protocol::Report;
use crate::sys::memfile;

/// Most bytes of an image config.
const MAX_CONFIG: u64 = 8 << 20;
/// An importer that says nothing for so long hangs. Its own timeouts are far below.
const STALL: Duration = Duration::from_secs(600);
/// How often whoever shows the progress is told that time passes.
const TICK: Duration = Duration::from_secs(1);

impl Session<'_, '_> {
    /// The next report, or `None` after `timeout`. Notices everything that ends an import.
    pub(super) fn next_report(
        &mut self,
        timeout: Option<Duration>,
    ) -> Result<Option<(Report, Vec<OwnedFd>)>, ImportError> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let stalled = self.active + STALL;
            let tick = self.ticked + TICK;
            let wake = [Some(stalled), Some(tick), deadline].into_iter().flatten().min();
            let ready = self.poll(wake)?;
            if Instant::now() >= tick {
                self.ticked = Instant::now();
                (self.events)(ImportEvent::Tick { elsewhere: self.elsewhere });
            }
            if ready.diagnostics {
                let lines = self.importer.process.as_mut().map(|process| process.read_diagnostics());
                for line in lines.into_iter().flatten() {
                    (self.events)(ImportEvent::Log(format!("importer: {line}")));
                }
            }
            if ready.channel {
                let (report, descriptors) = match self.importer.channel.receive() {
                    Ok(Some(message)) => message,
                    Ok(None) => return Err(self.ended()),
                    Err(error) => return Err(self.misbehaves(&one_line(&error.to_string(), 200))),
                };
                if let Report::Failed { kind, message } = report {
                    return Err(ImportError::Refused { kind, message: one_line(&message, MAX_MESSAGE) });
                }
                if let Report::Trouble { message } = report {
                    (self.events)(ImportEvent::Trouble(one_line(&message, MAX_MESSAGE)));
                    continue;
                }
                if !matches!(report, Report::Resolved { .. }) && !descriptors.is_empty() {
                    return Err(self.misbehaves("unexpected descriptors"));
                }
                return Ok(Some((report, descriptors)));
            }
            let now = Instant::now();
            if now >= stalled {
                return Err(self.failed("the importer hangs: nothing has happened for ten minutes; try again"));
            }
            if deadline.is_some_and(|deadline| now >= deadline) {
                return Ok(None);
            }
        }
    }

    /// Waits for the importer or until `wake`, and for a cancellation.
    fn poll(&self, wake: Option<Instant>) -> Result<Ready, ImportError> {
        let diagnostics = self.importer.process.as_ref().and_then(|process| process.diagnostics());
        let mut watched = Vec::with_capacity(self.cancel.len() + 2);
        watched.push(PollFd::new(&self.importer.channel, PollFlags::IN));
        // Hang-ups and errors are always reported; the leader's socket may well hold a message.
        watched.extend(self.cancel.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::RDHUP)));
        watched.extend(diagnostics.map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        let timeout = wake.map(|wake| wake.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
        let timeout = timeout.and_then(|timeout| timeout.try_into().ok());
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut watched, timeout.as_ref()))
            .map_err(|errno| self.failed(&format!("cannot wait for the importer: {}", crate::sys::reason(errno))))?;
        let mut events = watched.iter().map(|fd| !fd.revents().is_empty());
        let channel = events.next().unwrap_or(false);
        if events.by_ref().take(self.cancel.len()).any(|ready| ready) {
            return Err(ImportError::Cancelled { image: self.image() });
        }
        Ok(Ready { channel, diagnostics: events.next().unwrap_or(false) })
    }

    /// The config from the memory file of a `Resolved` report.
    pub(super) fn read_config(&self, mut descriptors: Vec<OwnedFd>) -> Result<Vec<u8>, ImportError> {
        let (Some(file), true) = (descriptors.pop(), descriptors.is_empty()) else {
            return Err(self.misbehaves("no image config"));
        };
        // Only memory files can be sealed, so reading it cannot block, and it does not change meanwhile.
        if !memfile::is_sealed(file.as_fd()) {
            return Err(self.misbehaves("image config not sealed"));
        }
        memfile::read_all(file, MAX_CONFIG).map_err(|error| self.misbehaves(&format!("image config: {error}")))
    }

    pub(super) fn sent(&mut self, result: io::Result<()>) -> Result<(), ImportError> {
        match result {
            Ok(()) => Ok(()),
            // It may have said why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => loop {
                match self.importer.channel.receive() {
                    Ok(Some((Report::Failed { kind, message }, _))) => {
                        break Err(ImportError::Refused { kind, message: one_line(&message, MAX_MESSAGE) });
                    }
                    Ok(Some(_)) => {}
                    _ => break Err(self.ended()),
                }
            },
            Err(error) => Err(self.failed(&format!("cannot instruct the importer: {}", crate::sys::reason(error)))),
        }
    }

    fn ended(&mut self) -> ImportError {
        let status = self.importer.process.as_mut().and_then(|process| process.ended());
        // Its last words are in the pipe by now.
        while let Some(process) = self.importer.process.as_mut()
            && process.diagnostics().is_some()
        {
            for line in process.read_diagnostics() {
                (self.events)(ImportEvent::Log(format!("importer: {line}")));
            }
        }
        self.failed(&describe_end(status))
    }

    pub(super) fn unexpected(&self, report: &Report) -> ImportError {
        let what = match report {
            Report::Resolved { .. } => "the image again",
            Report::Examined { .. } => "digests",
            Report::Confirmed { .. } => "a confirmation",
            Report::Progress { .. } => "progress",
            Report::Elsewhere { .. } | Report::Fetched { .. } | Report::Converted { .. } => "a layer",
            Report::Failed { .. } | Report::Trouble { .. } => "a failure",
        };
        self.misbehaves(&format!("{what} that nobody asked for"))
    }

    pub(super) fn misbehaves(&self, what: &str) -> ImportError {
        self.failed(&format!("the importer does not keep to the protocol ({what}): please report this"))
    }

    pub(super) fn failed(&self, reason: &str) -> ImportError {
        ImportError::Importer { image: self.image(), reason: reason.to_owned() }
    }
}

/// What [`Session::poll`] found.
struct Ready {
    channel: bool,
    diagnostics: bool,
}
