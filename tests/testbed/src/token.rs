//! A token server, as Docker Hub and NGC have one: whoever asks gets a Bearer token for what he may do
//! (distribution's "Token Authentication Specification"). `docker-registry` believes its signature.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::process::output_of;
use crate::registry::Account;
use crate::site::Site;

/// Who the tokens are for.
pub const SERVICE: &str = "testbed registry";
/// Who says so.
pub const ISSUER: &str = "testbed tokens";

/// Seconds that a token is good for: what a pull with many layers outlives.
const LIFETIME: u64 = 60;

/// A token server on loopback. It ends with the process.
#[derive(Debug)]
pub struct TokenServer {
    port: u16,
    certificate: PathBuf,
    issued: Arc<AtomicU64>,
    accounts: Arc<Mutex<Vec<Account>>>,
}

/// What the server's thread knows.
struct Issuer {
    accounts: Arc<Mutex<Vec<Account>>>,
    key: PathBuf,
    /// The certificate without its armour.
    certificate: String,
}

impl TokenServer {
    /// Starts a server for `accounts`. They may do everything, except below `denied/`; anybody else may pull what is below
    /// `public/`.
    pub fn start(site: &Site, name: &str, accounts: Vec<Account>) -> Result<Self> {
        let (certificate, key) =
            (site.path(&format!("etc/tokens-{name}.pem")), site.path(&format!("etc/tokens-{name}.key")));
        let mut openssl = Command::new("openssl");
        openssl.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=testbed tokens"]);
        output_of(openssl.arg("-keyout").arg(&key).arg("-out").arg(&certificate))?;
        let armoured = std::fs::read_to_string(&certificate)?;
        let accounts = Arc::new(Mutex::new(accounts));
        let known = Arc::clone(&accounts);
        let issuer = Issuer {
            accounts: known,
            key,
            certificate: armoured.lines().filter(|line| !line.contains("--")).collect(),
        };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let issued = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&issued);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                match issuer.serve(&client) {
                    Ok(()) => drop(count.fetch_add(1, Ordering::SeqCst)),
                    // The client sees it, and the test with it.
                    Err(error) => drop(respond(&client, "401 Unauthorized", &format!("{error:#}"))),
                }
            }
        });
        Ok(Self { port, certificate, issued, accounts })
    }

    /// For `auth.token` in the registry's configuration.
    pub fn registry_configuration(&self) -> String {
        format!(
            "auth: {{ token: {{ realm: 'http://localhost:{}/token', service: '{SERVICE}', issuer: '{ISSUER}', \
             rootcertbundle: {} }} }}\n",
            self.port,
            self.certificate.display()
        )
    }

    /// Whose passwords are believed from now on.
    pub fn set_accounts(&self, accounts: Vec<Account>) {
        *self.accounts.lock().expect("no holder panics") = accounts;
    }

    /// Tokens handed out so far.
    pub fn issued(&self) -> u64 {
        self.issued.load(Ordering::SeqCst)
    }
}

impl Issuer {
    fn serve(&self, client: &TcpStream) -> Result<()> {
        let mut lines = BufReader::new(client).lines();
        let request = lines.next().context("no request")??;
        let mut user = None;
        for line in lines {
            let line = line?;
            if line.is_empty() {
                break;
            }
            if let Some(credentials) = line.to_ascii_lowercase().strip_prefix("authorization: basic ") {
                // The value as it was sent: base64 knows upper and lower case.
                let offset = line.len() - credentials.len();
                user = Some(self.authenticate(line[offset..].trim())?);
            }
        }
        let query = request.split(' ').nth(1).and_then(|target| target.split_once('?')).context("no query")?.1;
        let mut access = Vec::new();
        for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            if name != "scope" {
                continue;
            }
            let scope = percent_decoded(value);
            for scope in scope.split(' ') {
                let [kind, repository, actions] = scope.splitn(3, ':').collect::<Vec<_>>()[..] else {
                    bail!("bad scope {scope}");
                };
                let allowed: Vec<_> = actions
                    .split(',')
                    .filter(|action| match user {
                        Some(_) => !repository.starts_with("denied/"),
                        None => *action == "pull" && repository.starts_with("public/"),
                    })
                    .collect();
                access.push(json!({ "type": kind, "name": repository, "actions": allowed }));
            }
        }
        let token = self.token(user.as_deref().unwrap_or_default(), &access)?;
        respond(client, "200 OK", &json!({ "token": token, "expires_in": LIFETIME }).to_string())
    }

    fn authenticate(&self, credentials: &str) -> Result<String> {
        let accounts = self.accounts.lock().expect("no holder panics");
        let account = accounts.iter().find(|account| basic(account) == credentials);
        Ok(account.context("wrong user name or password")?.user.clone())
    }

    /// A JSON Web Token (RFC 7519), signed with RS256.
    fn token(&self, subject: &str, access: &[serde_json::Value]) -> Result<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let header = json!({ "typ": "JWT", "alg": "RS256", "x5c": [self.certificate] });
        let claims = json!({
            "iss": ISSUER, "aud": SERVICE, "sub": subject, "jti": now.to_string(),
            "iat": now, "nbf": now - 5, "exp": now + LIFETIME, "access": access,
        });
        let part = |value: &serde_json::Value| base64(value.to_string().as_bytes(), URL);
        let signed = format!("{}.{}", part(&header), part(&claims));
        let mut openssl = Command::new("openssl")
            .args(["dgst", "-sha256", "-sign"])
            .arg(&self.key)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        openssl.stdin.take().context("stdin was piped")?.write_all(signed.as_bytes())?;
        let signature = openssl.wait_with_output()?;
        Ok(format!("{signed}.{}", base64(&signature.stdout, URL)))
    }
}

fn respond(mut client: &TcpStream, status: &str, body: &str) -> Result<()> {
    let head = format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n");
    Ok(write!(client, "{head}Content-Length: {}\r\n\r\n{body}", body.len())?)
}

fn percent_decoded(text: &str) -> String {
    let mut decoded = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digits = [bytes.next().unwrap_or(b'0'), bytes.next().unwrap_or(b'0')];
                std::str::from_utf8(&digits).ok().and_then(|hex| u8::from_str_radix(hex, 16).ok()).unwrap_or(b'?')
            }
            other => other,
        });
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// The last two digits of an alphabet, and whether the text is padded (RFC 4648, sections 4 and 5).
type Alphabet = ([u8; 2], bool);
const STANDARD: Alphabet = (*b"+/", true);
const URL: Alphabet = (*b"-_", false);

/// What HTTP's Basic authentication presents.
pub(crate) fn basic(account: &Account) -> String {
    base64(format!("{}:{}", account.user, account.password).as_bytes(), STANDARD)
}

/// RFC 4648.
fn base64(bytes: &[u8], (last, padded): Alphabet) -> String {
    let digits: Vec<u8> = (b'A'..=b'Z').chain(b'a'..=b'z').chain(b'0'..=b'9').chain(last).collect();
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().chain([&0; 2]).take(3).fold(0, |word, &byte| word << 8 | usize::from(byte));
        for position in 0..=chunk.len() {
            text.push(char::from(digits[word >> (18 - 6 * position) & 63]));
        }
        if padded {
            text.extend(std::iter::repeat_n('=', 3 - chunk.len()));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_as_in_the_rfc() {
        for (plain, encoded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(plain.as_bytes(), STANDARD), encoded);
        }
        assert_eq!(base64(&[0xfb, 0xff], STANDARD), "+/8=");
        assert_eq!(base64(&[0xfb, 0xff], URL), "-_8");
        assert_eq!(percent_decoded("repository%3Aa%2Fb%3Apull+x"), "repository:a/b:pull x");
    }
}
