//! `testbed up EXECUTABLE PLUGIN` starts a cluster and a registry to play with; `testbed down` ends them.

#![forbid(unsafe_code)]

use std::os::unix::fs::PermissionsExt;
use std::process::ExitCode;

use anyhow::{Result, bail};
use testbed::install::Build;
use testbed::{ClusterOptions, Testbed, images, site};

/// Name of the demo's site.
const NAME: &str = "demo";

/// The session that the demo ends with.
const SESSION: [&str; 4] = ["--container-image=alpine:latest", "grep", "PRETTY", "/etc/os-release"];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments[..] {
        ["up", executable, plugin] => up(&Build { executable: executable.into(), plugin: plugin.into() }),
        ["down"] => site::remove(NAME).map(|found| {
            println!(
                "{}",
                if found { "The demo is stopped and its files are removed." } else { "No demo is running." }
            );
        }),
        _ => Err(anyhow::anyhow!("usage: testbed up EXECUTABLE PLUGIN | testbed down")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("testbed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn up(build: &Build) -> Result<()> {
    site::remove(NAME)?;
    println!("Starting munged, slurmctld, two slurmd and docker-registry …");
    let testbed = Testbed::start(NAME, build, &ClusterOptions::default())?;
    testbed.hub.push(&images::busybox(&testbed.site.path("state/busybox"))?, "library/alpine:latest")?;
    testbed.hub.push(&images::distroless(&testbed.site.path("state/distroless"))?, "library/distroless:latest")?;
    let user = testbed.cluster.user(0).clone();
    let shell = testbed.site.write(
        "shell",
        format!(
            "#!/bin/sh\n# A shell, or the command given, as {name} with this cluster's Slurm.\ncd {home}\n\
             exec setpriv --reuid {uid} --regid {gid} --init-groups env -i HOME={home} USER={name} LOGNAME={name} \\\n\
             \x20   SHELL=/bin/bash TERM=\"${{TERM:-dumb}}\" PATH=/usr/local/bin:/usr/bin:/bin SLURM_CONF={conf} \"$@\"\n",
            name = user.name,
            uid = user.uid,
            gid = user.gid,
            home = user.home.display(),
            conf = testbed.cluster.config().display(),
        ),
    )?;
    std::fs::set_permissions(&shell, std::fs::Permissions::from_mode(0o755))?;
    println!("\n{}$ srun {}", user.name, SESSION.join(" "));
    let status = testbed.cluster.command(0, "srun", SESSION).status()?;
    if !status.success() {
        bail!("srun ended with {status}; the logs of the nodes are gone with the testbed");
    }
    println!(
        "\nThe cluster keeps running. Its registry stands in for Docker Hub and holds alpine and distroless.\n\n    \
         {shell} bash                       a shell as {name}\n    \
         {shell} srun -N2 --container-image=alpine:latest sh -c 'hostname; id'\n    \
         make demo-stop                     ends it and removes its files\n",
        shell = shell.display(),
        name = user.name,
    );
    testbed.keep()
}
