//! Debian's registry with TLS behind a proxy of the site's, by a name that nobody but the proxy can find.

use std::collections::BTreeMap;

use spank_pyxis::importer::protocol::FailureKind;
use spank_pyxis::registry::config::RegistryEntry;
use spank_pyxis::request::Environment;
use testbed::Site;
use testbed::connect::ConnectProxy;
use testbed::image::{Compression, ImageBuilder};
use testbed::registry::{Account, Registry, RegistryOptions};

use crate::broker::Import;
use crate::content::{Content, tar};
use crate::server::Server;

const PASSWORD: &str = "pr%xy:s3cret";

struct Behind {
    _site: Site,
    registry: Registry,
    proxy: ConnectProxy,
}

impl Behind {
    fn new(name: &str) -> Self {
        testbed::prerequisites::check().unwrap();
        let site = Site::create(&format!("registry-{name}")).unwrap();
        let options = RegistryOptions { tls: true, ..RegistryOptions::default() };
        let registry = Registry::start(&site, "tls", options).unwrap();
        let image = ImageBuilder::new(&site.path("layout")).unwrap();
        let image = image.layer_from_tar(&*tar(1000), Compression::Gzip).unwrap().finish("latest").unwrap();
        registry.push(&image, "image:latest").unwrap();
        let account = Account { user: "node".into(), password: PASSWORD.into() };
        Self { _site: site, registry, proxy: ConnectProxy::start(Some(account)).unwrap() }
    }

    fn host(&self) -> String {
        format!("registry.invalid:{}", self.registry.port())
    }

    /// An import whose job says this about proxies.
    fn import(&self, job: &[&str]) -> Import {
        let mut import = Import::new("image", &[&self.host()]);
        let entry = RegistryEntry { ca: self.registry.authority().map(Into::into), ..RegistryEntry::default() };
        import.registries.registry = BTreeMap::from([(self.host(), entry)]);
        Import { job: job.iter().collect::<Environment>(), ..import }
    }
}

/// The message of an import that does not reach its registry.
fn unreached(import: &Import) -> String {
    let (kind, message) = import.fail();
    assert_eq!(kind, FailureKind::Unavailable);
    assert!(!message.contains("s3cret"), "{message}");
    message
}

#[test]
fn the_sites_proxy_is_used() {
    let behind = Behind::new("proxy-site");
    let mut import = behind.import(&["https_proxy=http://localhost:1", "no_proxy=*"]);
    import.registries.proxy.https_proxy = Some(behind.proxy.url().as_str().into());
    import.run().unwrap();
    let asked = behind.proxy.asked();
    assert!(!asked.is_empty() && asked.iter().all(|target| *target == behind.host()), "{asked:?}");

    // Wrong, the password is not shown.
    let wrong = format!("http://node:not-s3cret@{}", behind.proxy.host());
    import.registries.proxy.https_proxy = Some(wrong.as_str().into());
    assert_eq!(
        unreached(&import),
        format!(
            "{}: not reached through the proxy {} (it wants a user name and a password, or others: \
             http://USER:PASSWORD@HOST:PORT): check https_proxy and no_proxy in [proxy] of pyxis.toml",
            behind.host(),
            behind.proxy.host()
        )
    );
    // Without it there is no such host.
    import.registries.proxy.no_proxy = ".invalid".into();
    assert!(
        unreached(&import).contains("there is no such host: check the image name, and the DNS settings of this node")
    );
}

#[test]
fn the_jobs_proxy_is_used_where_the_site_has_none() {
    let behind = Behind::new("proxy-job");
    for variable in ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
        let before = behind.proxy.asked().len();
        behind.import(&[&format!("{variable}={}", behind.proxy.url())]).run().unwrap();
        assert!(behind.proxy.asked().len() > before, "{variable}");
    }
    let proxy = format!("https_proxy={}", behind.proxy.url());
    let asked = behind.proxy.asked().len();
    for none in ["no_proxy=registry.invalid", "NO_PROXY=*"] {
        assert!(unreached(&behind.import(&[&proxy, none])).contains("no such host"), "{none}");
    }
    let mut import = behind.import(&[&proxy]);
    import.registries.proxy.from_jobs = false;
    assert!(unreached(&import).contains("no such host"));
    assert_eq!(behind.proxy.asked().len(), asked);
    assert_eq!(
        unreached(&behind.import(&["https_proxy=socks5://s3cret@host:1"])),
        format!(
            "{}: not reached: https_proxy or http_proxy in the job's environment is not of the form \
             http://[USER:PASSWORD@]HOST[:PORT]",
            behind.host()
        )
    );
}

/// Who is between us and a registry without TLS is the registry: only the site may say who that is.
#[test]
fn plain_http_goes_past_the_jobs_proxy() {
    let content = Content::simple(1000);
    let server = Server::start(move |request| content.answer(request));
    let proxy = ConnectProxy::start(None).unwrap();
    let mut import = Import::new("some/image", &[&server.host()]);
    let of_job = ["http_proxy", "https_proxy", "all_proxy"].map(|name| format!("{name}={}", proxy.url()));
    import.job = of_job.iter().collect();
    import.run().unwrap();
    assert!(proxy.asked().is_empty());
    import.registries.proxy.http_proxy = Some(proxy.url().as_str().into());
    import.run().unwrap();
    assert!(proxy.asked().iter().all(|target| *target == server.host()) && !proxy.asked().is_empty());
}
