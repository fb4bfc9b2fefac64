//! The broker's trace events, as lines of the node's log: it has no log of its own, and the leading task writes to
//! slurmd's.

use std::os::fd::AsFd;

use tracing::{Level, Subscriber};

use crate::sys::channel::Channel;
use crate::task::UserMessage;
use crate::task::protocol::{ToBroker, ToLeader};
use crate::trace::Listener;

/// Sends the events of this process, up to `level`, to the leader from now on.
pub fn install(channel: &Channel<ToLeader, ToBroker>, level: Level) {
    // Without it the log lacks some lines, and the container starts all the same.
    let Ok(copy) = channel.as_fd().try_clone_to_owned() else { return };
    let _ = tracing::subscriber::set_global_default(to_node_log(copy.into(), level));
}

fn to_node_log(channel: Channel<ToLeader, ToBroker>, level: Level) -> impl Subscriber + Send + Sync {
    Listener::new(
        // Libraries trace as well; what they say is about themselves.
        move |event| *event.level() <= level && event.target().starts_with(env!("CARGO_CRATE_NAME")),
        move |line| {
            // A leader that is gone is noticed where the broker waits.
            let _ = channel.send(&ToLeader::Say(UserMessage::Log(format!("pyxis: {line}"))), &[]);
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::channel;

    #[test]
    fn events_arrive_as_lines() {
        let (broker, leader) = channel::pair::<ToLeader, ToBroker>().unwrap();
        tracing::subscriber::with_default(to_node_log(broker, Level::INFO), || {
            tracing::debug!("too quiet");
            tracing::info!(layers = 3, "mounted");
        });
        match leader.receive().unwrap() {
            Some((ToLeader::Say(UserMessage::Log(line)), _)) => assert_eq!(line, "pyxis: mounted layers=3"),
            other => panic!("{other:?}"),
        }
        assert!(leader.receive().unwrap().is_none());
    }
}
