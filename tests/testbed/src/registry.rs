//! Registries: Debian's `docker-registry` on loopback, open or with passwords, plain or with TLS.

use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::cluster::free_ports;
use crate::process::{self, Daemon, Output};
use crate::site::Site;
use crate::token::TokenServer;
use crate::wait;

/// A user of a registry with passwords.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// User name.
    pub user: String,
    /// Password.
    pub password: String,
}

/// Who is let in, and how.
#[derive(Debug, Clone, Default)]
pub struct RegistryOptions {
    /// Basic authentication for these accounts; everybody if there are none.
    pub accounts: Vec<Account>,
    /// Bearer tokens instead, from a server that knows the accounts and lets anybody pull what is below `public/`.
    pub tokens: bool,
    /// HTTPS with a certificate for `localhost` and `registry.invalid`, signed by a certification authority that nobody knows.
    pub tls: bool,
    /// With TLS: only for who shows a certificate of the same authority.
    pub client_certificates: bool,
}

/// A running registry. Ended when dropped.
#[derive(Debug)]
pub struct Registry {
    name: String,
    port: u16,
    options: RegistryOptions,
    certificate: Option<Certificate>,
    tokens: Option<TokenServer>,
    storage: PathBuf,
    daemon: Daemon,
}

impl Registry {
    /// Starts the registry `name` and waits until it listens.
    pub fn start(site: &Site, name: &str, options: RegistryOptions) -> Result<Self> {
        let storage = site.make_directory(&format!("state/registry-{name}"))?;
        let port = free_ports(1)?[0];
        let mut config = format!(
            "version: 0.1\nlog: {{ accesslog: {{ disabled: false }}, level: info }}\n\
             storage: {{ filesystem: {{ rootdirectory: {} }}, delete: {{ enabled: true }} }}\n\
             http:\n  addr: 127.0.0.1:{port}\n",
            storage.display()
        );
        let mut certificate = None;
        if options.tls {
            let made = Certificate::create(site, name)?;
            let (own, key, authority) = (made.certificate.display(), made.key.display(), made.authority.display());
            let clients =
                if options.client_certificates { format!(", clientcas: [{authority}]") } else { String::new() };
            config += &format!("  tls: {{ certificate: {own}, key: {key}{clients} }}\n");
            certificate = Some(made);
        }
        let mut tokens = None;
        if options.tokens {
            let server = TokenServer::start(site, name, options.accounts.clone())?;
            config += &server.registry_configuration();
            tokens = Some(server);
        } else if !options.accounts.is_empty() {
            let file = site.write(&format!("etc/registry-{name}.htpasswd"), htpasswd(&options.accounts)?)?;
            config += &format!("auth: {{ htpasswd: {{ realm: testbed, path: {} }} }}\n", file.display());
        }
        let config = site.write(&format!("etc/registry-{name}.yml"), config)?;
        let mut daemon = site.daemon(
            &format!("registry-{name}"),
            Command::new("docker-registry").arg("serve").arg(config).env_clear(),
        )?;
        wait::until(&format!("registry {name}"), wait::DEADLINE, || match daemon.check() {
            Err(error) => Some(Err(error)),
            Ok(()) => TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok().map(|_| Ok(())),
        })??;
        Ok(Self { name: name.into(), port, options, certificate, tokens, storage, daemon })
    }

    /// `localhost:PORT`.
    pub fn host(&self) -> String {
        format!("localhost:{}", self.port)
    }

    /// The port on loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Knows these accounts from now on, and no others. One that had none stays without.
    pub fn set_accounts(&mut self, site: &Site, accounts: Vec<Account>) -> Result<()> {
        match &self.tokens {
            Some(tokens) => tokens.set_accounts(accounts.clone()),
            // The registry looks whether its file has changed.
            None => drop(site.write(&format!("etc/registry-{}.htpasswd", self.name), htpasswd(&accounts)?)?),
        }
        self.options.accounts = accounts;
        Ok(())
    }

    /// The accounts it knows.
    pub fn accounts(&self) -> &[Account] {
        &self.options.accounts
    }

    /// The certificate of the authority that signed the server's, with TLS.
    pub fn authority(&self) -> Option<&Path> {
        self.certificate.as_ref().map(|certificate| certificate.authority.as_path())
    }

    /// A certificate of that authority for clients, and its key.
    pub fn client_certificate(&self) -> Option<(&Path, &Path)> {
        self.certificate.as_ref().map(|certificate| (certificate.certificate.as_path(), certificate.key.as_path()))
    }

    /// The server of its Bearer tokens.
    pub fn tokens(&self) -> Option<&TokenServer> {
        self.tokens.as_ref()
    }

    /// Where it keeps blobs and tags, to damage them.
    pub fn storage(&self) -> &Path {
        &self.storage
    }

    /// The log: one line a request.
    pub fn log(&self, site: &Site) -> String {
        std::fs::read_to_string(site.path(&format!("log/registry-{}.log", self.name))).unwrap_or_default()
    }

    /// Pushes the image at `source` (in skopeo's notation, such as `oci:DIRECTORY:TAG`) as `REPOSITORY:TAG`, byte by
    /// byte: nothing is compressed again.
    pub fn push(&self, source: &str, reference: &str) -> Result<()> {
        let arguments = ["copy", "--all", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false"];
        self.skopeo(&arguments, "--dest-creds", |command| {
            command.arg(source).arg(self.transport(reference));
        })
        .with_context(|| format!("cannot push {reference}"))
        .map(drop)
    }

    /// `docker://localhost:PORT/REFERENCE`.
    pub fn transport(&self, reference: &str) -> String {
        format!("docker://{}/{reference}", self.host())
    }

    fn skopeo(&self, arguments: &[&str], credentials: &str, complete: impl FnOnce(&mut Command)) -> Result<Output> {
        let mut command = Command::new("skopeo");
        // Without a policy of the machine's own nothing may be copied.
        command.arg("--insecure-policy").args(arguments);
        if let Some(Account { user, password }) = self.options.accounts.first() {
            command.arg(format!("{credentials}={user}:{password}"));
        }
        complete(&mut command);
        process::run(&mut command, wait::DEADLINE * 5)?.success()
    }

    /// The digest of the manifest or index behind `REPOSITORY:TAG`.
    pub fn digest(&self, reference: &str) -> Result<String> {
        let arguments = ["inspect", "--tls-verify=false", "--format={{.Digest}}"];
        let output = self.skopeo(&arguments, "--creds", |command| {
            command.arg(self.transport(reference));
        })?;
        Ok(output.stdout.trim().to_owned())
    }
}

fn htpasswd(accounts: &[Account]) -> Result<String> {
    let mut passwords = String::new();
    for Account { user, password } in accounts {
        // bcrypt, the only scheme that the registry takes; the cheapest one that it takes.
        passwords += &process::output_of(Command::new("htpasswd").args(["-nbB", "-C", "4", user, password]))?;
    }
    Ok(passwords)
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.daemon.stop(Signal::SIGTERM);
    }
}

/// A certificate for `localhost`, for servers and clients, and the authority that signed it.
#[derive(Debug)]
struct Certificate {
    authority: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

impl Certificate {
    fn create(site: &Site, name: &str) -> Result<Self> {
        let path = |file: &str| site.path(&format!("etc/registry-{name}-{file}"));
        let (authority, authority_key) = (path("ca.pem"), path("ca.key"));
        let (certificate, key, request) = (path("cert.pem"), path("cert.key"), path("cert.csr"));
        let extensions = site.write(
            &format!("etc/registry-{name}-extensions"),
            "subjectAltName=DNS:localhost,DNS:registry.invalid,IP:127.0.0.1\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth,clientAuth\n",
        )?;
        let new_key = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"];
        let mut self_signed = Command::new("openssl");
        self_signed.args(new_key).args(["-x509", "-subj", "/CN=testbed authority", "-keyout"]);
        process::output_of(self_signed.arg(&authority_key).arg("-out").arg(&authority))?;
        let mut requested = Command::new("openssl");
        requested.args(&new_key[..6]).args(["-subj", "/CN=localhost", "-keyout"]);
        process::output_of(requested.arg(&key).arg("-out").arg(&request))?;
        let mut signed = Command::new("openssl");
        signed.args(["x509", "-req", "-days", "2", "-CAcreateserial", "-in"]).arg(request).arg("-CA").arg(&authority);
        signed.arg("-CAkey").arg(&authority_key).arg("-extfile").arg(extensions).arg("-out").arg(&certificate);
        process::output_of(&mut signed)?;
        Ok(Self { authority, certificate, key })
    }
}
