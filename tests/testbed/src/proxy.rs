//! A TCP proxy in front of a registry that can be made to misbehave: to delay, to stall, to throttle, to hang up, to damage
//! what it passes on, to answer in the registry's place. It counts what passes.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use anyhow::Result;

use crate::wait;

/// What the proxy does with the bytes that the server sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// Passes them on.
    Pass,
    /// Passes on this many bytes of each connection, then holds the rest until the behaviour changes.
    StallAfter(u64),
    /// Passes on this many bytes of each connection, then closes it.
    HangUpAfter(u64),
    /// Waits this long before the first byte of each connection.
    Delay(Duration),
    /// Passes on this many bytes a second of each connection.
    Throttle(u64),
    /// Damages the byte at this place of each connection.
    Corrupt(u64),
    /// Answers each request itself: status code and reason, and perhaps header lines.
    Answer(&'static str),
}

/// A proxy on a free port of loopback. It ends with the process.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    behaviour: Mutex<Behaviour>,
    changed: Condvar,
    held: AtomicBool,
    connections: AtomicU64,
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl Proxy {
    /// Starts a proxy for the server on port `server` of loopback.
    pub fn start(server: u16) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let state = Arc::new(State {
            behaviour: Mutex::new(Behaviour::Pass),
            changed: Condvar::new(),
            held: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        });
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                shared.connections.fetch_add(1, Ordering::SeqCst);
                let state = Arc::clone(&shared);
                // A connection that breaks is what the tests are about: nothing to report.
                std::thread::spawn(move || drop(state.serve(client, server)));
            }
        });
        Ok(Self { port, state })
    }

    /// `localhost:PORT`.
    pub fn host(&self) -> String {
        format!("localhost:{}", self.port)
    }

    /// Changes the behaviour, also of open connections.
    pub fn set(&self, behaviour: Behaviour) {
        self.state.held.store(false, Ordering::SeqCst);
        *self.state.lock() = behaviour;
        self.state.changed.notify_all();
    }

    /// Connections so far.
    pub fn connections(&self) -> u64 {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// Requests so far.
    pub fn requests(&self) -> u64 {
        self.state.requests.load(Ordering::SeqCst)
    }

    /// Bytes that clients were sent so far.
    pub fn bytes(&self) -> u64 {
        self.state.bytes.load(Ordering::SeqCst)
    }

    /// Waits until a client waits for bytes that are held back.
    pub fn wait_until_held(&self, deadline: Duration) -> Result<()> {
        wait::until("a stalled download", deadline, || self.state.held.load(Ordering::SeqCst).then_some(()))
    }
}

impl State {
    fn lock(&self) -> std::sync::MutexGuard<'_, Behaviour> {
        self.behaviour.lock().expect("no holder panics")
    }

    fn serve(self: &Arc<Self>, client: TcpStream, server: u16) -> std::io::Result<()> {
        let server = TcpStream::connect((Ipv4Addr::LOCALHOST, server))?;
        let (request, forward) = (client.try_clone()?, server.try_clone()?);
        let state = Arc::clone(self);
        std::thread::spawn(move || {
            let _ = state.ask(&request, &forward);
            let _ = forward.shutdown(Shutdown::Write);
        });
        let result = self.answer(server, &client);
        client.shutdown(Shutdown::Both)?;
        result
    }

    /// Passes requests on, or answers them.
    fn ask(&self, mut client: &TcpStream, mut server: &TcpStream) -> std::io::Result<()> {
        let mut buffer = [0; 8192];
        loop {
            let count = client.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            // Small and without a body, a request comes in one piece.
            self.requests.fetch_add(u64::from(buffer[..count].ends_with(b"\r\n\r\n")), Ordering::SeqCst);
            let behaviour = *self.lock();
            if let Behaviour::Answer(status) = behaviour {
                let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                client.write_all(answer.as_bytes())?;
                return client.shutdown(Shutdown::Both);
            }
            server.write_all(&buffer[..count])?;
        }
    }

    fn answer(&self, mut server: TcpStream, mut client: &TcpStream) -> std::io::Result<()> {
        let mut buffer = [0; 8192];
        let mut passed = 0;
        loop {
            let count = server.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            let behaviour = *self.lock();
            match behaviour {
                Behaviour::Delay(delay) if passed == 0 => std::thread::sleep(delay),
                Behaviour::Throttle(rate) => {
                    std::thread::sleep(Duration::from_secs_f64(count as f64 / rate.max(1) as f64));
                }
                Behaviour::Corrupt(at) => {
                    let at = at.checked_sub(passed).and_then(|at| usize::try_from(at).ok());
                    if let Some(byte) = at.and_then(|at| buffer[..count].get_mut(at)) {
                        *byte ^= 0x55;
                    }
                }
                _ => {}
            }
            let mut sent = 0;
            while sent < count {
                let Some(allowed) = self.allowance(passed) else { return Ok(()) };
                let part = (count - sent).min(usize::try_from(allowed).unwrap_or(usize::MAX));
                client.write_all(&buffer[sent..sent + part])?;
                self.bytes.fetch_add(part as u64, Ordering::SeqCst);
                sent += part;
                passed += part as u64;
            }
        }
    }

    /// How many bytes may pass now, after `passed`: waits while that is none. `None`: hang up.
    fn allowance(&self, passed: u64) -> Option<u64> {
        let mut behaviour = self.lock();
        loop {
            match *behaviour {
                Behaviour::StallAfter(limit) | Behaviour::HangUpAfter(limit) if passed < limit => {
                    return Some(limit - passed);
                }
                Behaviour::HangUpAfter(_) => return None,
                Behaviour::StallAfter(_) => {
                    self.held.store(true, Ordering::SeqCst);
                    behaviour = self.changed.wait(behaviour).expect("no holder panics");
                }
                _ => return Some(u64::MAX),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that sends 100,000 bytes to whoever connects.
    fn server() -> u16 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let _ = client.unwrap().write_all(&[7; 100_000]);
            }
        });
        port
    }

    #[test]
    fn passes_stalls_and_hangs_up() {
        let proxy = Proxy::start(server()).unwrap();
        let read = |proxy: &Proxy| {
            let mut bytes = Vec::new();
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, proxy.port)).unwrap();
            stream.read_to_end(&mut bytes).map(|_| bytes.len())
        };
        assert_eq!(read(&proxy).unwrap(), 100_000);
        proxy.set(Behaviour::HangUpAfter(1000));
        assert!(read(&proxy).unwrap_or(1000) <= 1000);
        proxy.set(Behaviour::StallAfter(20_000));
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| read(&proxy).unwrap());
            proxy.wait_until_held(wait::DEADLINE).unwrap();
            assert!(!reader.is_finished());
            proxy.set(Behaviour::Pass);
            assert_eq!(reader.join().unwrap(), 100_000);
        });
        assert_eq!(proxy.connections(), 3);
    }

    #[test]
    fn delays_damages_and_answers() {
        let proxy = Proxy::start(server()).unwrap();
        let read = |ask: &[u8]| {
            let mut bytes = Vec::new();
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, proxy.port)).unwrap();
            stream.write_all(ask).unwrap();
            stream.read_to_end(&mut bytes).unwrap();
            bytes
        };
        proxy.set(Behaviour::Corrupt(50_000));
        let bytes = read(b"");
        assert_eq!(bytes.iter().filter(|byte| **byte != 7).count(), 1);
        assert_ne!(bytes[50_000], 7);
        for behaviour in [Behaviour::Delay(Duration::from_millis(10)), Behaviour::Throttle(10 << 20)] {
            proxy.set(behaviour);
            assert_eq!(read(b"").len(), 100_000);
        }
        assert_eq!((proxy.requests(), proxy.bytes()), (0, 300_000));
    }

    #[test]
    fn answers_in_the_place_of_a_server_that_waits() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let proxy = Proxy::start(listener.local_addr().unwrap().port()).unwrap();
        proxy.set(Behaviour::Answer("429 Too Many Requests\r\nRetry-After: 7"));
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, proxy.port)).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\n"), "{answer}");
        assert_eq!(proxy.requests(), 1);
    }
}
