//! A small HTTP server that answers as a test says, also wrongly: it cuts, stalls, and claims lengths that are none.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Request {
    /// `GET`, `HEAD`.
    pub method: String,
    /// Path without the query.
    pub path: String,
    /// Query parameters, decoded.
    pub query: BTreeMap<String, String>,
    /// Fields of a form that was posted.
    pub form: BTreeMap<String, String>,
    headers: Vec<(String, String)>,
}

impl Request {
    /// A header's value; the name is in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// First and, if it is named, last byte of a `Range` request.
    pub fn range(&self) -> Option<(usize, Option<usize>)> {
        let (start, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        let last = if last.is_empty() { None } else { Some(last.parse().ok()?) };
        Some((start.parse().ok()?, last))
    }
}

/// How an answer's body is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// All of it.
    Whole,
    /// This many bytes, then the connection is closed.
    Cut(usize),
    /// This many bytes, then nothing more until the client gives up.
    Stall(usize),
    /// All of it, this many bytes each twentieth of a second.
    Slow(usize),
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    delivery: Delivery,
}

impl Reply {
    /// An answer without a body.
    pub fn status(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new(), delivery: Delivery::Whole }
    }

    /// 200 with a body.
    pub fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self { body: body.into(), ..Self::status(200) }
    }

    /// The same with another header.
    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// The same with a body.
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// The same with a byte changed in the middle.
    pub fn damaged(mut self) -> Self {
        let middle = self.body.len() / 2;
        self.body[middle] ^= 0x55;
        self
    }

    /// The same, sent in another way.
    pub fn delivery(mut self, delivery: Delivery) -> Self {
        self.delivery = delivery;
        self
    }
}

/// A running server on a port of its own. Stops accepting when dropped.
pub struct Server {
    port: u16,
    log: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts a server that answers by `handler`.
    pub fn start(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (log, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let handler = Arc::new(handler);
        let acceptor = {
            let (log, stop) = (Arc::clone(&log), Arc::clone(&stop));
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let (log, handler, stream) = (Arc::clone(&log), Arc::clone(&handler), stream.unwrap());
                    // A connection that fails is the client's business.
                    std::thread::spawn(move || serve(&stream, &log, &*handler));
                }
            })
        };
        Self { port, log, stop, acceptor: Some(acceptor) }
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    /// How many requests for paths that contain `text` came so far.
    pub fn count(&self, text: &str) -> usize {
        self.requests().iter().filter(|request| request.path.contains(text)).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the acceptor.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

/// Answers the requests of one connection until either side closes it.
fn serve(stream: &TcpStream, log: &Mutex<Vec<Request>>, handler: &dyn Fn(&Request) -> Reply) {
    let mut reader = BufReader::new(stream);
    loop {
        let request = match read_request(&mut reader) {
            Ok(Some(request)) => request,
            Ok(None) => return,
            // What is no HTTP (a TLS handshake) is told so in HTTP.
            Err(NoHttp) => {
                let mut writer = stream;
                let _ = writer.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n400 Bad Request");
                return;
            }
        };
        log.lock().unwrap().push(request.clone());
        let reply = handler(&request);
        if send(stream, &request, &reply).is_none() {
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
    }
}

fn send(mut stream: &TcpStream, request: &Request, reply: &Reply) -> Option<()> {
    let mut head = format!("HTTP/1.1 {} Test\r\n", reply.status);
    if !reply.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-length")) {
        head += &format!("Content-Length: {}\r\n", reply.body.len());
    }
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(format!("{head}\r\n").as_bytes()).ok()?;
    if request.method == "HEAD" {
        return Some(());
    }
    match reply.delivery {
        Delivery::Whole => stream.write_all(&reply.body).ok(),
        Delivery::Slow(bytes) => {
            for piece in reply.body.chunks(bytes) {
                stream.write_all(piece).ok()?;
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            Some(())
        }
        Delivery::Cut(bytes) => {
            stream.write_all(&reply.body[..bytes.min(reply.body.len())]).ok()?;
            None
        }
        Delivery::Stall(bytes) => {
            stream.write_all(&reply.body[..bytes.min(reply.body.len())]).ok()?;
            // The client has nothing to say until it closes.
            let _ = stream.read(&mut [0]);
            None
        }
    }
}

struct NoHttp;

/// The next request; none at the end of the connection.
fn read_request(reader: &mut impl BufRead) -> Result<Option<Request>, NoHttp> {
    let mut line = Vec::new();
    if !matches!(reader.read_until(b'\n', &mut line), Ok(1..)) {
        return Ok(None);
    }
    let line = String::from_utf8(line).map_err(|_| NoHttp)?;
    let words: Vec<&str> = line.trim_end().split(' ').collect();
    let [method, target, "HTTP/1.1"] = words[..] else { return Err(NoHttp) };
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).map_err(|_| NoHttp)?;
        match line.trim_end().split_once(':') {
            Some((name, value)) => headers.push((name.to_ascii_lowercase(), value.trim().to_owned())),
            None => break,
        }
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let length = headers.iter().find(|(name, _)| name == "content-length").and_then(|(_, value)| value.parse().ok());
    let mut form = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut form).map_err(|_| NoHttp)?;
    let (query, form) = (pairs(query), pairs(&String::from_utf8(form).map_err(|_| NoHttp)?));
    Ok(Some(Request { method: method.to_owned(), path: path.to_owned(), query, form, headers }))
}

fn pairs(text: &str) -> BTreeMap<String, String> {
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (decode(name), decode(value))).collect()
}

fn decode(text: &str) -> String {
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        bytes.push(u8::from_str_radix(&part[..2], 16).unwrap());
        bytes.extend(&part.as_bytes()[2..]);
    }
    String::from_utf8(bytes).unwrap()
}
