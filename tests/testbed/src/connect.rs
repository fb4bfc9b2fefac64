//! A forward proxy (RFC 9110, section 9.3.6, `CONNECT`), as sites have one between their nodes and the world. The names that
//! it is asked for are all on loopback, so that what only the proxy can find shows who has used it.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};

use crate::registry::Account;
use crate::token::basic;

/// A proxy on a free port of loopback. It ends with the process.
#[derive(Debug)]
pub struct ConnectProxy {
    port: u16,
    account: Option<Account>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl ConnectProxy {
    /// Starts a proxy: for everybody, or for `account`.
    pub fn start(account: Option<Account>) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (log, wanted) = (Arc::clone(&asked), account.clone());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (log, wanted) = (Arc::clone(&log), wanted.clone());
                // A connection that breaks is the client's business.
                std::thread::spawn(move || drop(serve(&client, wanted.as_ref(), &log)));
            }
        });
        Ok(Self { port, account, asked })
    }

    /// `localhost:PORT`.
    pub fn host(&self) -> String {
        format!("localhost:{}", self.port)
    }

    /// `http://USER:PASSWORD@localhost:PORT`, with the account as a URL has it.
    pub fn url(&self) -> String {
        let quoted = |text: &str| text.bytes().map(|byte| format!("%{byte:02X}")).collect::<String>();
        let account = self.account.as_ref();
        let account = account.map(|account| format!("{}:{}@", quoted(&account.user), quoted(&account.password)));
        format!("http://{}{}", account.unwrap_or_default(), self.host())
    }

    /// `HOST:PORT` of each connection that was asked for, also of those that were refused.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("no holder panics").clone()
    }
}

fn serve(mut client: &TcpStream, account: Option<&Account>, log: &Mutex<Vec<String>>) -> Result<()> {
    // A client waits for the answer before it sends more: nothing of the tunnel is left in the reader.
    let mut reader = BufReader::new(client);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let target = match words[..] {
        ["CONNECT", target, "HTTP/1.1"] => target.to_owned(),
        _ => {
            client.write_all(b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
            return Ok(());
        }
    };
    let mut shown = None;
    loop {
        let mut line = String::new();
        ensure!(reader.read_line(&mut line)? > 0, "an unfinished request");
        match line.trim_end().split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("proxy-authorization") => {
                shown = Some(value.trim().to_owned())
            }
            Some(_) => {}
            None => break,
        }
    }
    log.lock().expect("no holder panics").push(target.clone());
    if account.is_some_and(|account| shown != Some(format!("Basic {}", basic(account)))) {
        let refusal = "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=testbed\r\n";
        client.write_all(format!("{refusal}Content-Length: 0\r\nConnection: close\r\n\r\n").as_bytes())?;
        return Ok(());
    }
    let (_, port) = target.rsplit_once(':').context("no port")?;
    let server = TcpStream::connect((Ipv4Addr::LOCALHOST, port.parse()?))?;
    client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")?;
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Write);
    });
    let _ = std::io::copy(&mut &server, &mut client);
    Ok(client.shutdown(Shutdown::Both)?)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn ask(proxy: &ConnectProxy, request: &str) -> String {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, proxy.port)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn tunnels_for_who_may() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let target = format!("nowhere.invalid:{}", listener.local_addr().unwrap().port());
        std::thread::spawn(move || listener.accept().unwrap().0.write_all(b"hello"));
        let account = Account { user: "me".into(), password: "p:w%".into() };
        let proxy = ConnectProxy::start(Some(account)).unwrap();
        assert!(proxy.url().starts_with("http://%6D%65:%70%3A%77%25@localhost:"), "{}", proxy.url());
        let request = |more: &str| format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{more}\r\n");
        assert!(ask(&proxy, &request("")).starts_with("HTTP/1.1 407 "));
        assert!(ask(&proxy, &request("Proxy-Authorization: Basic bWU6cDp3JQ==\r\n")).ends_with("\r\n\r\nhello"));
        assert!(ask(&proxy, "GET http://x/ HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405 "));
        assert_eq!(proxy.asked(), [target.clone(), target.clone()]);
    }
}
