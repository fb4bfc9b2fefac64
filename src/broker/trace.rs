//! The broker's trace events, where the administrator wants them ([`LogSettings`]): as lines of the node's log, which the
//! leading task writes to slurmd's, or in the journal.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tracing::{Level, Subscriber};

use crate::config::{LogDestination, LogFormat, LogSettings};
use crate::request::{ImageSource, StepRequest};
use crate::sys::channel::Channel;
use crate::sys::journal::{self, Journal};
use crate::task::UserMessage;
use crate::task::protocol::{ToBroker, ToLeader};
use crate::trace::{Heard, Listener};

/// The log of this process, once it is known where to.
static LOG: OnceLock<Arc<Log>> = OnceLock::new();

/// Where events go.
struct Log {
    channel: Channel<ToLeader, ToBroker>,
    journal: Option<Journal>,
    format: LogFormat,
    /// What every entry says, by its name in JSON.
    about: Vec<(&'static str, String)>,
}

/// Takes down the events of this process from now on.
pub fn install(channel: &Channel<ToLeader, ToBroker>, settings: &LogSettings, request: &StepRequest) {
    // Without it the log lacks some lines, and the container starts all the same.
    let Ok(copy) = channel.as_fd().try_clone_to_owned() else { return };
    let log = Arc::new(Log::new(copy.into(), settings, request, Path::new(journal::SOCKET)));
    let _ = LOG.set(Arc::clone(&log));
    let _ = tracing::subscriber::set_global_default(subscriber(log, settings.level.into()));
}

/// The log, if it is structured.
fn structured() -> Option<&'static Log> {
    LOG.get().map(Arc::as_ref).filter(|log| log.journal.is_some() || log.format == LogFormat::Json)
}

/// Whether `line`, which container init has for the log, has been taken down: not if lines are what is wanted.
pub fn line(line: &str) -> bool {
    let Some(log) = structured() else { return false };
    let message = line.strip_prefix("pyxis: ").unwrap_or(line).to_owned();
    log.write(&Heard { level: Level::INFO, message, fields: vec![] });
    true
}

/// Takes down why a start failed, which the user is told and slurmd's log has as text.
pub fn failed(messages: &[UserMessage]) {
    let Some(log) = structured() else { return };
    for message in messages {
        if let UserMessage::Error(text) = message {
            log.write(&Heard { level: Level::ERROR, message: text.clone(), fields: vec![] });
        }
    }
}

fn subscriber(log: Arc<Log>, level: Level) -> impl Subscriber + Send + Sync {
    Listener::new(
        // Libraries trace as well; what they say is about themselves.
        move |event| *event.level() <= level && event.target().starts_with(env!("CARGO_CRATE_NAME")),
        move |heard| log.write(heard),
    )
}

impl Log {
    fn new(channel: Channel<ToLeader, ToBroker>, settings: &LogSettings, request: &StepRequest, socket: &Path) -> Self {
        let mut about = vec![("uid", request.user.uid.to_string())];
        if let Some(step) = &request.step {
            about.extend([("job_id", step.job_id.to_string()), ("step_id", step_name(step.step_id))]);
        }
        let image = match &request.image {
            Some(ImageSource::Registry { reference, .. }) => Some(reference.to_string()),
            Some(ImageSource::File(path)) => Some(path.display().to_string()),
            Some(ImageSource::Local { typed, .. }) => Some(typed.clone()),
            None => None,
        };
        about.extend(image.map(|image| ("image", image)));
        about.extend(request.name.as_ref().map(|name| ("container_name", name.name.clone())));
        let mut log = Self { channel, journal: None, format: settings.format, about };
        if settings.destination == LogDestination::Journald {
            match Journal::connect(socket) {
                Ok(journal) => log.journal = Some(journal),
                Err(error) => log.write(&Heard {
                    level: Level::WARN,
                    message: format!("the log goes to slurmd's: {}: {}", socket.display(), crate::sys::reason(error)),
                    fields: vec![],
                }),
            }
        }
        log
    }

    fn write(&self, heard: &Heard) {
        if let Some(journal) = &self.journal
            && self.to_journal(journal, heard).is_ok()
        {
            return;
        }
        let line = match self.format {
            LogFormat::Text => format!("pyxis: {heard}"),
            LogFormat::Json => self.json(heard),
        };
        // A leader that is gone is noticed where the broker waits.
        let _ = self.channel.send(&ToLeader::Say(UserMessage::Log(line)), &[]);
    }

    fn to_journal(&self, journal: &Journal, heard: &Heard) -> std::io::Result<()> {
        // As syslog(3) numbers them.
        let priority = match heard.level {
            Level::ERROR => "3",
            Level::WARN => "4",
            Level::INFO => "6",
            _ => "7",
        };
        let own = self.about.iter().chain(&heard.fields);
        let own: Vec<(String, &str)> =
            own.map(|(name, value)| (format!("PYXIS_{}", name.to_uppercase()), value.as_str())).collect();
        let mut fields =
            vec![("MESSAGE", heard.message.as_str()), ("PRIORITY", priority), ("SYSLOG_IDENTIFIER", "pyxis")];
        fields.extend(own.iter().map(|(name, value)| (name.as_str(), *value)));
        journal.send(&fields)
    }

    fn json(&self, heard: &Heard) -> String {
        let mut object = Map::new();
        for (name, value) in self.about.iter().chain(&heard.fields) {
            object.insert((*name).to_owned(), Value::String(value.clone()));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        object.insert("timestamp".into(), now.as_secs_f64().into());
        object.insert("level".into(), heard.level.as_str().to_lowercase().into());
        object.insert("message".into(), heard.message.clone().into());
        Value::Object(object).to_string()
    }
}

/// As Slurm's commands write it.
fn step_name(id: u32) -> String {
    match id {
        0xffff_fffb => "batch".into(),
        0xffff_fffc => "extern".into(),
        0xffff_fffa => "interactive".into(),
        number => number.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;
    use crate::sys::channel;

    const REQUEST: &str = r#"{"protocol":1,"user":{"uid":1000,"gid":1000,"groups":[]},
        "step":{"job_id":12,"step_id":4294967291,"local_tasks":1,"total_tasks":1},
        "image":{"File":"/images/a b.sqsh"},"name":{"name":"mine","mode":"Auto"},"job_scope":false,"save":null,
        "entrypoint":false,"entrypoint_log":false,"unshare":{"net":false,"ipc":false,"uts":false},"devices":[],
        "importer":null,"cwd":"/","mounts":[],"container_env":[],"workdir":null,"mount_home":null,"remap_root":null,
        "writable":null,"batch_script":null}"#;

    fn lines(settings: &LogSettings, socket: &Path, events: impl FnOnce()) -> Vec<String> {
        let (broker, leader) = channel::pair::<ToLeader, ToBroker>().unwrap();
        let log = Arc::new(Log::new(broker, settings, &serde_json::from_str(REQUEST).unwrap(), socket));
        tracing::subscriber::with_default(subscriber(log, settings.level.into()), events);
        std::iter::from_fn(|| match leader.receive().unwrap() {
            Some((ToLeader::Say(UserMessage::Log(line)), _)) => Some(line),
            None => None,
            other => panic!("{other:?}"),
        })
        .collect()
    }

    #[test]
    fn events_arrive_as_lines() {
        let settings = LogSettings::default();
        let found = lines(&settings, Path::new("/nonexistent"), || {
            tracing::debug!("too quiet");
            tracing::info!(layers = 3, "mounted");
        });
        assert_eq!(found, ["pyxis: mounted layers=3"]);
    }

    #[test]
    fn or_as_json() {
        let settings = LogSettings { format: LogFormat::Json, ..LogSettings::default() };
        let found = lines(&settings, Path::new("/nonexistent"), || tracing::warn!(layers = 3, "a \"b\"\nc"));
        let entry: Value = serde_json::from_str(&found[0]).unwrap();
        for (name, value) in [
            ("level", "warn"),
            ("message", "a \"b\"\nc"),
            ("layers", "3"),
            ("uid", "1000"),
            ("job_id", "12"),
            ("step_id", "batch"),
            ("image", "/images/a b.sqsh"),
            ("container_name", "mine"),
        ] {
            assert_eq!(entry[name], value, "{entry}");
        }
        assert!(entry["timestamp"].as_f64().unwrap() > 1e9);
        assert_eq!((found.len(), found[0].lines().count()), (1, 1));
    }

    #[test]
    fn or_as_fields_of_the_journal() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let settings = LogSettings { destination: LogDestination::Journald, ..LogSettings::default() };
        // Without a journal nothing is lost.
        let found = lines(&settings, &socket, || tracing::info!("mounted"));
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].starts_with("pyxis: the log goes to slurmd's: ") && found[1] == "pyxis: mounted", "{found:?}");
        let journald = UnixDatagram::bind(&socket).unwrap();
        assert!(lines(&settings, &socket, || tracing::info!(layers = 3, "mounted")).is_empty());
        let mut buffer = [0; 4096];
        let length = journald.recv(&mut buffer).unwrap();
        assert_eq!(
            std::str::from_utf8(&buffer[..length]).unwrap(),
            "MESSAGE=mounted\nPRIORITY=6\nSYSLOG_IDENTIFIER=pyxis\nPYXIS_UID=1000\nPYXIS_JOB_ID=12\n\
             PYXIS_STEP_ID=batch\nPYXIS_IMAGE=/images/a b.sqsh\nPYXIS_CONTAINER_NAME=mine\nPYXIS_LAYERS=3\n"
        );
    }
}
