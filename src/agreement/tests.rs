use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread::JoinHandle;

use proptest::prelude::*;

use super::guest::Conversation;
use super::*;
use crate::request::Place;

fn meaning(asked_at: u64) -> Meaning {
    Meaning { asked_at, digest: Digest::from_bytes([7; 32]), name: "reg.io/team/image:latest".into() }
}

/// A host that lives as long as this value, or until `nodes` have been answered.
struct Running {
    place: Place,
    /// Stands for `srun`.
    owner: Option<io::PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start(nodes: usize) -> Self {
        let (listener, place) = host::listen(None).unwrap();
        let (read, owner) = io::pipe().unwrap();
        let key = place.key.clone();
        let thread = std::thread::spawn(move || host::serve(&listener, &key, read.as_fd(), nodes).unwrap());
        Self { place, owner: Some(owner), thread: Some(thread) }
    }

    fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.place.port).into()
    }

    fn join(&self) -> io::Result<(Conversation, Message)> {
        Conversation::begin(self.address(), &self.place.key)
    }

    /// Joins in another thread.
    fn waiting(&self) -> JoinHandle<Message> {
        let (address, key) = (self.address(), self.place.key.clone());
        std::thread::spawn(move || Conversation::begin(address, &key).unwrap().1)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.owner.take());
        self.thread.take().unwrap().join().unwrap();
    }
}

#[test]
fn the_first_asks_and_the_others_use_its_answer() {
    let mut running = Running::start(4);
    let (mut first, turn) = running.join().unwrap();
    assert_eq!(turn, Message::Ask);
    let others: Vec<_> = (0..2).map(|_| running.waiting()).collect();
    first.say(&Message::Is(meaning(1))).unwrap();
    for other in others {
        assert_eq!(other.join().unwrap(), Message::Is(meaning(1)));
    }
    // Also who comes late; and then all have been.
    assert_eq!(running.join().unwrap().1, Message::Is(meaning(1)));
    running.thread.take().unwrap().join().unwrap();
    assert!(running.join().is_err());
    running.thread = Some(std::thread::spawn(|| {}));
}

#[test]
fn who_goes_leaves_his_turn_to_the_next() {
    let running = Running::start(0);
    for _ in 0..2 {
        let (conversation, turn) = running.join().unwrap();
        assert_eq!(turn, Message::Ask);
        drop(conversation);
    }
    let (third, turn) = running.join().unwrap();
    assert_eq!(turn, Message::Ask);
    let waiting = running.waiting();
    drop(third);
    assert_eq!(waiting.join().unwrap(), Message::None);
    assert_eq!(running.join().unwrap().1, Message::None);
}

#[test]
fn without_the_key_nothing_is_said_and_nothing_believed() {
    let running = Running::start(0);
    let wrong = "0".repeat(32);
    assert!(Conversation::begin(running.address(), &wrong).is_err());
    for line in ["\n".to_owned(), "GET / HTTP/1.1\r\n\r\n".into(), "x".repeat(MAX_LINE * 2)] {
        let mut stream = TcpStream::connect(running.address()).unwrap();
        // It may have hung up before all is written.
        let _ = io::Write::write_all(&mut stream, line.as_bytes());
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer, b"");
    }
    // None of them had a turn.
    assert_eq!(running.join().unwrap().1, Message::Ask);
    // Somebody else at the same place.
    let impostor = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = impostor.local_addr().unwrap();
    let answering = std::thread::spawn(move || {
        let (mut stream, _) = impostor.accept().unwrap();
        let line = Seal::new(&wrong).line(Side::Host, &"0".repeat(32), &Message::Is(meaning(1)));
        io::Write::write_all(&mut stream, line.as_bytes()).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let error = Conversation::begin(address, &running.place.key).err().unwrap();
    assert_eq!(error.to_string(), "a wrong answer");
    answering.join().unwrap();
}

#[test]
fn an_asker_that_talks_nonsense_has_failed() {
    let running = Running::start(0);
    let (mut conversation, _) = running.join().unwrap();
    conversation.say(&Message::Ask).unwrap();
    assert_eq!(running.join().unwrap().1, Message::Ask);
}

#[test]
fn ports_are_of_the_range() {
    for (text, range) in [
        ("60001-63000", Some(60001..=63000)),
        (" 5 - 5 ", Some(5..=5)),
        ("0-5", None),
        ("7-5", None),
        ("60001", None),
        ("1-70000", None),
        ("", None),
    ] {
        assert_eq!(host::port_range(text), range, "{text}");
    }
    let (taken, _) = host::listen(None).unwrap();
    let port = taken.local_addr().unwrap().port();
    assert_eq!(host::listen(Some(port..=port)).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    let range = port..=port.saturating_add(200);
    let (_other, place) = host::listen(Some(range.clone())).unwrap();
    assert!(range.contains(&place.port) && place.port != port);
}

proptest! {
    #[test]
    fn lines_are_read_as_they_were_written(asked_at in any::<u64>(), name in "[a-z0-9./:]{1,60}") {
        let (seal, nonce) = (Seal::new("key"), "0123456789abcdef".repeat(2));
        let told = Meaning { asked_at, name, ..meaning(0) };
        for message in [Message::Ask, Message::None, Message::Is(told)] {
            let line = seal.line(Side::Host, &nonce, &message);
            prop_assert_eq!(seal.open(Side::Host, Some(&nonce), line.as_bytes()), Some(message));
            prop_assert_eq!(seal.open(Side::Node, Some(&nonce), line.as_bytes()), None);
            prop_assert_eq!(seal.open(Side::Host, Some(&"0".repeat(32)), line.as_bytes()), None);
        }
        let hello = seal.line(Side::Node, &nonce, &Message::Hello(nonce.clone()));
        prop_assert_eq!(seal.open(Side::Node, None, hello.as_bytes()), Some(Message::Hello(nonce.clone())));
        prop_assert_eq!(seal.open(Side::Node, Some(&nonce), hello.as_bytes()), None);
    }

    #[test]
    fn any_bytes_are_judged(bytes in any::<Vec<u8>>(), at in 0usize..200, byte in any::<u8>()) {
        let (seal, nonce) = (Seal::new("key"), "0".repeat(32));
        prop_assert_eq!(seal.open(Side::Node, None, &bytes), None);
        let line = seal.line(Side::Host, &nonce, &Message::Is(meaning(1))).into_bytes();
        let mut damaged = line.clone();
        let at = at % damaged.len();
        damaged[at] = byte;
        let ends_alike = at + 1 == damaged.len();
        prop_assert!(damaged == line || ends_alike || seal.open(Side::Host, Some(&nonce), &damaged).is_none());
    }
}
