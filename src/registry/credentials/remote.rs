//! Credentials through a channel: the importer asks, and a process that is the user looks for them.
//!
//! So nothing of the user's is read unless a registry asks for it, and the importer, which reads what registries send,
//! knows the one secret that it presents and no other. It is answered about the registries of the image only.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use super::{Answer, Keyring, Query};
use crate::sys::channel::Channel;

/// How long to wait for an answer: a few helpers may be slow, and home directories on a slow network.
const TIME: Duration = Duration::from_secs(120);

/// The end that looks.
pub type Answerer = Channel<Answer, Query>;
/// The end that asks.
pub type Asker = Channel<Query, Answer>;

/// Answers about `registries` (`HOST[:PORT]`) until nobody asks any more.
pub fn serve(channel: &Answerer, keys: &dyn Keyring, registries: &[String]) -> std::io::Result<()> {
    while let Some((query, _)) = channel.receive()? {
        let answer = if registries.contains(&query.registry) {
            keys.find(&query)
        } else {
            Answer { warnings: vec!["asked for a registry that is none of the image's".into()], ..Answer::default() }
        };
        match channel.send(&answer, &[]) {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            sent => sent?,
        }
    }
    Ok(())
}

/// The user's keys, seen from another process.
#[derive(Debug)]
pub struct RemoteKeys(Mutex<Option<Asker>>);

impl RemoteKeys {
    /// Asks through `channel`.
    pub fn new(channel: Asker) -> Self {
        Self(Mutex::new(Some(channel)))
    }
}

impl Keyring for RemoteKeys {
    fn find(&self, query: &Query) -> Answer {
        let mut channel = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let problem = match channel.as_ref().map(|channel| ask(channel, query)) {
            Some(Ok(answer)) => return answer,
            Some(Err(problem)) => problem,
            None => "the user's files could not be read before",
        };
        // An answer that comes late must not be taken for that to another question.
        *channel = None;
        Answer { warnings: vec![problem.to_owned()], ..Answer::default() }
    }
}

fn ask(channel: &Asker, query: &Query) -> Result<Answer, &'static str> {
    const GONE: &str = "the process that reads the user's files has ended: see the node's log";
    channel.send(query, &[]).map_err(|_| GONE)?;
    let mut ready = [PollFd::new(channel, PollFlags::IN)];
    let timeout = TIME.try_into().ok();
    match rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, timeout.as_ref())) {
        Ok(0) => Err("reading the user's files takes too long: is his home directory there on this node?"),
        Err(_) => Err(GONE),
        Ok(_) => channel.receive().ok().flatten().map(|(answer, _)| answer).ok_or(GONE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::credentials::Credential;
    use crate::sys::channel;

    #[derive(Debug)]
    struct Fixed;

    impl Keyring for Fixed {
        fn find(&self, query: &Query) -> Answer {
            let credential = Credential::password("u", format!("of {}", query.registry), "F");
            Answer { credential: Some(credential), ..Answer::default() }
        }
    }

    #[test]
    fn only_the_images_registries_are_told_about() {
        let (asker, answerer) = channel::pair::<Query, Answer>().unwrap();
        let thread = std::thread::spawn(move || serve(&answerer, &Fixed, &["r.io".into()]));
        let keys = RemoteKeys::new(asker);
        let find = |registry: &str| {
            let owned = str::to_owned;
            keys.find(&Query { registry: owned(registry), repository: owned("x"), realm: owned("r.io"), user: None })
        };
        assert_eq!(find("r.io").credential.unwrap().secret.reveal(), "of r.io");
        let other = find("other.io");
        assert!(other.credential.is_none() && other.warnings.len() == 1, "{other:?}");
        drop(keys);
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn an_end_is_told() {
        let (asker, answerer) = channel::pair::<Query, Answer>().unwrap();
        drop(answerer);
        let keys = RemoteKeys::new(asker);
        let query = Query { registry: "r".into(), repository: "x".into(), realm: "r".into(), user: None };
        assert!(keys.find(&query).tried().contains("has ended"));
        assert!(keys.find(&query).tried().contains("could not be read"));
    }
}
