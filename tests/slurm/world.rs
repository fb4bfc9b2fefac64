//! What the tests share: the cluster, its registries and images, and the ways to run a step.

use std::collections::HashSet;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, ensure};
use serde_json::json;
use testbed::image::{Compression, ImageBuilder};
use testbed::install::Build;
use testbed::proxy::Proxy;
use testbed::registry::{Account, Registry, RegistryOptions};
use testbed::{ClusterOptions, Output, Running, TestUser, Testbed, images, process, site, wait};

use crate::nvidia::GpuBed;

/// The image of most tests.
pub const IMAGE: &str = "--container-image=alpine:latest";

/// The cluster and what belongs to it.
pub struct World {
    pub bed: Testbed,
    /// Wants a password.
    pub private: Registry,
    /// Wants Bearer tokens; what is below `public/` is for everybody.
    pub tokens: Registry,
    /// In front of the hub; may be made to stall.
    pub proxy: Proxy,
    /// Another cluster, whose node has GPUs; started when a test needs it.
    pub gpus: Option<GpuBed>,
    /// Another cluster, whose nodes are pods; started when a test needs it.
    pub pods: Option<Testbed>,
    pushed: HashSet<&'static str>,
    /// The tests leave files in the users' home directories.
    _homes: std::fs::File,
}

impl World {
    pub fn create() -> Result<Self> {
        let homes = site::claim_homes()?;
        let name = format!("slurm-{}", std::process::id());
        let bed = Testbed::start(&name, &Build::of(env!("CARGO_BIN_EXE_pyxis")), &ClusterOptions::default())?;
        let account = Account { user: "somebody".into(), password: "open-sesame:1%$\"#".into() };
        let private = Registry::start(
            &bed.site,
            "private",
            RegistryOptions { accounts: vec![account], ..RegistryOptions::default() },
        )?;
        let accounts = private.accounts().to_vec();
        let options = RegistryOptions { accounts, tokens: true, ..RegistryOptions::default() };
        let tokens = Registry::start(&bed.site, "tokens", options)?;
        let proxy = Proxy::start(bed.hub.port())?;
        let mut world =
            Self { bed, private, tokens, proxy, gpus: None, pods: None, pushed: HashSet::new(), _homes: homes };
        world.bed.pyxis.configure(&world.configuration())?;
        let image = images::busybox(&world.directory("alpine")?)?;
        world.bed.hub.push(&image, "library/alpine:latest")?;
        for repository in ["public/image", "team/private"] {
            world.tokens.push(&image, &format!("{repository}:latest"))?;
        }
        for tag in ["netrc", "docker", "users", "wrong", "command", "site", "helper", "store", "root"] {
            world.private.push(&image, &format!("team/private:{tag}"))?;
        }
        // Every test may rely on a clean home.
        for user in 0..2 {
            let home = world.user(user).home.clone();
            for name in [".cache", ".config", ".docker", "work"] {
                let _ = std::fs::remove_dir_all(home.join(name));
            }
            world.make_directory(user, "work")?;
        }
        world.pushed.insert("alpine");
        Ok(world)
    }

    /// The configuration of the nodes.
    pub fn configuration(&self) -> String {
        let insecure = [&self.bed.hub.host(), &self.private.host(), &self.tokens.host(), &self.proxy.host()]
            .map(|host| format!("[registry.\"{host}\"]\ninsecure = true\n"));
        testbed::install::hub_mirror(&self.bed.hub.host()) + &insecure.concat()
    }

    pub fn user(&self, index: usize) -> &TestUser {
        self.bed.cluster.user(index)
    }

    /// A directory of user `index`, empty if it did not exist.
    pub fn make_directory(&self, index: usize, relative: &str) -> Result<PathBuf> {
        let user = self.user(index);
        let path = user.home.join(relative);
        process::output_of(user.command("mkdir").arg("-p").arg(&path))?;
        Ok(path)
    }

    /// A new directory for making an image.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        self.bed.site.make_directory(&format!("state/{name}"))
    }

    /// Makes sure that Docker Hub, as the nodes see it, has `library/NAME:latest`.
    pub fn have(&mut self, name: &'static str, make: impl FnOnce(PathBuf) -> Result<String>) -> Result<()> {
        if self.pushed.insert(name) {
            let image = make(self.directory(name)?)?;
            self.bed.hub.push(&image, &format!("library/{name}:latest"))?;
        }
        Ok(())
    }

    /// Pushes an image that no node has seen before, with a layer of `bytes` that do not compress. Gives its name.
    pub fn new_image(&self, bytes: usize) -> Result<String> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("new{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::SeqCst));
        let directory = self.directory(&name)?;
        let tree = directory.join("tree");
        images::busybox_tree(&tree)?;
        let mut payload = vec![0; bytes];
        std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut payload)?;
        std::fs::write(tree.join("payload"), payload)?;
        let image = ImageBuilder::new(&directory)?
            .config("Env", json!([images::IMAGE_PATH]))
            .layer_from_tree(&tree, Compression::Gzip)?
            .finish("latest")?;
        self.bed.hub.push(&image, &format!("library/{name}:latest"))?;
        std::fs::remove_dir_all(directory)?;
        Ok(name)
    }

    /// Runs `srun ARGUMENTS` as user 0.
    pub fn srun(&self, arguments: &[&str]) -> Result<Output> {
        self.bed.cluster.srun(arguments)
    }

    /// Starts `srun ARGUMENTS` as user 0.
    pub fn start(&self, arguments: &[&str]) -> Result<Running> {
        self.bed.cluster.start_srun(arguments)
    }

    /// Runs a shell script in a container of the small image as user 0 and gives its standard output, without the last
    /// newline.
    pub fn sh(&self, options: &[&str], script: &str) -> Result<String> {
        self.sh_as(0, options, script)
    }

    /// The same as user `index`.
    pub fn sh_as(&self, index: usize, options: &[&str], script: &str) -> Result<String> {
        let image = options.iter().all(|option| !option.starts_with("--container-image")).then_some(IMAGE);
        let arguments = [image.as_slice(), options, &["sh", "-c", script]].concat();
        let output = process::run(&mut self.bed.cluster.command(index, "srun", arguments), wait::DEADLINE * 2)?;
        Ok(output.success()?.stdout.trim_end_matches('\n').to_owned())
    }

    /// A step with these options that must fail, must say `text`, and must run its command nowhere. Gives all that it
    /// said.
    pub fn refused(&self, options: &[&str], text: &str) -> Result<String> {
        let marker = self.make_directory(0, "work")?.join("ran-on-the-host");
        let script = format!("echo it ran; touch {}", marker.display());
        let output = self.srun(&[options, &["sh", "-c", &script]].concat())?;
        ensure!(!output.status.success(), "succeeded: {output}");
        ensure!(!output.stdout.contains("it ran") && !marker.exists(), "ran on the host: {output}");
        ensure!(output.stderr.contains(text), "does not say \"{text}\": {output}");
        Ok(output.stderr)
    }

    /// Cancels whatever runs, after a test that failed.
    pub fn end_all_jobs(&self) {
        let others = self.gpus.iter().map(|gpus| &gpus.bed).chain(&self.pods);
        for bed in others.chain([&self.bed]) {
            for index in 0..2 {
                let uid = bed.cluster.user(index).uid.to_string();
                // What cannot be cancelled is reported by the look at the nodes that follows.
                let _ = bed.cluster.admin("scancel", ["--user", &uid]);
            }
        }
        self.proxy.set(testbed::proxy::Behaviour::Pass);
    }

    /// Fails unless both nodes still take steps.
    pub fn nodes_work(&self) -> Result<()> {
        self.srun(&["-N2", "true"])?.success().map(drop)
    }

    /// A command of user `index` on the machine, outside Slurm.
    pub fn as_user(&self, index: usize, program: &str) -> Command {
        self.user(index).command(program)
    }
}

/// Lines in sorted order: tasks write in any.
pub fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    lines
}
