//! A TCP proxy in front of a registry that can be made to misbehave: to stall, to drip, to hang up.

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

    /// Waits until a client waits for bytes that are held back.
    pub fn wait_until_held(&self, deadline: Duration) -> Result<()> {
        wait::until("a stalled download", deadline, || self.state.held.load(Ordering::SeqCst).then_some(()))
    }
}

impl State {
    fn lock(&self) -> std::sync::MutexGuard<'_, Behaviour> {
        self.behaviour.lock().expect("no holder panics")
    }

    fn serve(&self, client: TcpStream, server: u16) -> std::io::Result<()> {
        let server = TcpStream::connect((Ipv4Addr::LOCALHOST, server))?;
        let (mut request, mut forward) = (client.try_clone()?, server.try_clone()?);
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut request, &mut forward);
            let _ = forward.shutdown(Shutdown::Write);
        });
        let result = self.answer(server, &client);
        client.shutdown(Shutdown::Both)?;
        result
    }

    fn answer(&self, mut server: TcpStream, mut client: &TcpStream) -> std::io::Result<()> {
        let mut buffer = [0; 8192];
        let mut passed = 0;
        loop {
            let count = server.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            let mut sent = 0;
            while sent < count {
                let Some(allowed) = self.allowance(passed) else { return Ok(()) };
                let part = (count - sent).min(usize::try_from(allowed).unwrap_or(usize::MAX));
                client.write_all(&buffer[sent..sent + part])?;
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
                Behaviour::Pass => return Some(u64::MAX),
                Behaviour::StallAfter(limit) | Behaviour::HangUpAfter(limit) if passed < limit => {
                    return Some(limit - passed);
                }
                Behaviour::HangUpAfter(_) => return None,
                Behaviour::StallAfter(_) => {
                    self.held.store(true, Ordering::SeqCst);
                    behaviour = self.changed.wait(behaviour).expect("no holder panics");
                }
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
}
