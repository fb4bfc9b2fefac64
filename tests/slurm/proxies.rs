//! Steps whose registry only a proxy can find: the job's, or the site's.

use std::process::Command;

use anyhow::{Result, ensure};
use testbed::connect::ConnectProxy;
use testbed::registry::{Account, Registry, RegistryOptions};
use testbed::{Output, images, process, wait};

use crate::Case;
use crate::world::World;

pub const CASES: &[Case] =
    &[("the_jobs_proxy", of_the_job), ("the_sites_proxy", of_the_site), ("the_shells_proxy", of_the_shell)];

const PASSWORD: &str = "proxy-pass-1%$";

struct Behind {
    registry: Registry,
    proxy: ConnectProxy,
    image: String,
    /// The configuration that trusts the registry.
    configuration: String,
}

impl Behind {
    fn new(world: &World, name: &str) -> Result<Self> {
        let options = RegistryOptions { tls: true, ..RegistryOptions::default() };
        let registry = Registry::start(&world.bed.site, name, options)?;
        registry.push(&images::busybox(&world.directory(name)?)?, "some/image:latest")?;
        let account = Account { user: "somebody".into(), password: PASSWORD.into() };
        let proxy = ConnectProxy::start(Some(account))?;
        let host = format!("registry.invalid:{}", registry.port());
        let authority = registry.authority().map(|path| path.display().to_string()).unwrap_or_default();
        let configuration = world.configuration() + &format!("[registry.\"{host}\"]\nca = \"{authority}\"\n");
        Ok(Self { registry, proxy, image: format!("{host}/some/image"), configuration })
    }

    fn srun(&self, world: &World, user: usize, variables: &[(&str, &str)]) -> Result<Output> {
        let image = format!("--container-image={}", self.image);
        let mut command: Command = world.bed.cluster.command(user, "srun", ["-w", "node1", &image, "id", "-un"]);
        process::run(command.envs(variables.iter().copied()), wait::DEADLINE)
    }
}

/// Fails if the proxy's password is in a log of the node, of Slurm, or in a store.
fn nowhere(world: &World, output: &Output) -> Result<()> {
    ensure!(!output.stderr.contains(PASSWORD), "{output}");
    let mut grep = Command::new("grep");
    for secret in [PASSWORD.to_owned(), PASSWORD.bytes().map(|byte| format!("%{byte:02X}")).collect()] {
        grep.args(["-e", &secret]);
    }
    grep.arg("-rlF").arg(world.bed.site.path("log"));
    for node in world.bed.cluster.nodes() {
        grep.arg(node.private("/var/lib/pyxis")).arg(node.private("/run/pyxis"));
    }
    let found = process::run(&mut grep, wait::DEADLINE)?.stdout;
    ensure!(found.is_empty(), "the secret is in {found}");
    Ok(())
}

fn of_the_job(world: &mut World) -> Result<()> {
    let behind = Behind::new(world, "proxy-job")?;
    world.bed.pyxis.configure(&behind.configuration)?;
    let result = job_proxy(world, &behind);
    world.bed.pyxis.configure(&world.configuration())?;
    result
}

fn job_proxy(world: &World, behind: &Behind) -> Result<()> {
    let url = behind.proxy.url();
    let unreached = "there is no such host";
    for variables in [&[][..], &[("https_proxy", &*url), ("no_proxy", ".invalid")], &[("http_proxy", &url)]] {
        let output = behind.srun(world, 0, variables)?;
        ensure!(!output.status.success() && output.stderr.contains(unreached), "{output}");
    }
    ensure!(behind.proxy.asked().is_empty());
    let wrong = format!("http://somebody:{PASSWORD}x@{}", behind.proxy.host()).replace("%$", "%25%24");
    let output = behind.srun(world, 0, &[("https_proxy", &wrong)])?;
    let expected = format!(
        "not reached through the proxy {} (it wants a user name and a password, or others: \
         http://USER:PASSWORD@HOST:PORT): check https_proxy and no_proxy in the job's environment",
        behind.proxy.host()
    );
    ensure!(!output.status.success() && output.stderr.contains(&expected), "{output}");
    nowhere(world, &output)?;
    let output = behind.srun(world, 0, &[("HTTPS_PROXY", &url)])?.success()?;
    assert_eq!(output.stdout, "pyxis-test-1\n");
    ensure!(behind.proxy.asked().iter().all(|target| behind.image.starts_with(target.as_str())));
    nowhere(world, &output)?;
    // It is for whose job it was.
    let other = behind.srun(world, 1, &[])?;
    ensure!(!other.status.success() && other.stderr.contains(unreached), "{other}");
    ensure!(behind.registry.log(&world.bed.site).contains("some/image/manifests/latest"));
    Ok(())
}

fn of_the_site(world: &mut World) -> Result<()> {
    let behind = Behind::new(world, "proxy-site")?;
    let site = format!("[proxy]\nhttps_proxy = \"{}\"\nno_proxy = \"10.0.0.0/8\"\n", behind.proxy.url());
    world.bed.pyxis.configure(&format!("{}{site}", behind.configuration))?;
    // A job's own do not count then.
    let used = behind.srun(world, 0, &[("https_proxy", "http://localhost:1"), ("no_proxy", "*")]);
    let without = format!("{}[proxy]\nfrom_jobs = false\n", behind.configuration);
    world.bed.pyxis.configure(&without)?;
    let ignored = behind.srun(world, 1, &[("https_proxy", &behind.proxy.url())]);
    world.bed.pyxis.configure(&world.configuration())?;
    let used = used?.success()?;
    assert_eq!(used.stdout, "pyxis-test-1\n");
    nowhere(world, &used)?;
    let ignored = ignored?;
    ensure!(!ignored.status.success() && ignored.stderr.contains("there is no such host"), "{ignored}");
    Ok(())
}

/// Where root types a command.
fn of_the_shell(world: &mut World) -> Result<()> {
    let behind = Behind::new(world, "proxy-shell")?;
    // It is no job's.
    let site = format!("{}[proxy]\nfrom_jobs = false\n", behind.configuration);
    world.bed.pyxis.configure(&site)?;
    let result = shell_proxy(world, &behind);
    world.bed.pyxis.configure(&world.configuration())?;
    result
}

fn shell_proxy(world: &World, behind: &Behind) -> Result<()> {
    let url = behind.proxy.url();
    let user = world.user(0).name.as_str();
    let commands = [
        &["pull", &behind.image][..],
        &["pull", "--user", user, &behind.image],
        &["run", "--container-pull=always", &behind.image, "id", "-u"],
        &["run", "--container-pull=always", "--user", user, &behind.image, "id", "-u"],
    ];
    for command in commands {
        let pyxis = |variables: &[(&str, &str)]| {
            let program = world.bed.pyxis.executable.display().to_string();
            let mut typed = world.bed.cluster.nodes()[0].command(&program);
            typed.arg("--config").arg(&world.bed.pyxis.config).args(command).envs(variables.iter().copied());
            process::run(&mut typed, wait::DEADLINE)
        };
        let asked = behind.proxy.asked().len();
        for variables in [&[][..], &[("https_proxy", &*url), ("no_proxy", ".invalid")]] {
            let output = pyxis(variables)?;
            ensure!(!output.status.success() && output.stderr.contains("there is no such host"), "{output}");
        }
        let output = pyxis(&[("https_proxy", "http://localhost:1")])?;
        ensure!(output.stderr.contains("check https_proxy and no_proxy in your environment"), "{output}");
        ensure!(behind.proxy.asked().len() == asked, "{output}");
        let output = pyxis(&[("https_proxy", &url)])?.success()?;
        ensure!(behind.proxy.asked().len() > asked, "{output}");
        nowhere(world, &output)?;
    }
    // What the site says goes first.
    let site = format!("{}[proxy]\nhttps_proxy = \"{url}\"\n", behind.configuration);
    world.bed.pyxis.configure(&site)?;
    let program = world.bed.pyxis.executable.display().to_string();
    let mut typed = world.bed.cluster.nodes()[0].command(&program);
    typed.arg("--config").arg(&world.bed.pyxis.config).args(["pull", &behind.image]);
    process::run(typed.env("https_proxy", "http://localhost:1"), wait::DEADLINE)?.success().map(drop)
}
