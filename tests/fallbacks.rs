//! Steps on kernels that lack something: each of the other ways is forced on the nodes (`[debug]`). `tests/container` runs all
//! of its tests that way; here is what Slurm has a part in.

use std::process::Stdio;

use testbed::install::{Build, hub_mirror};
use testbed::{ClusterOptions, Testbed, images, process, wait};

const IMAGE: &str = "--container-image=alpine:latest";

#[test]
fn steps_work_without_what_a_kernel_may_lack() {
    let name = format!("fallbacks-{}", std::process::id());
    let build = Build::of(env!("CARGO_BIN_EXE_pyxis"));
    let mut bed = Testbed::start(&name, &build, &ClusterOptions::default()).unwrap();
    let image = images::busybox(&bed.site.make_directory("state/alpine").unwrap()).unwrap();
    bed.hub.push(&image, "library/alpine:latest").unwrap();
    for feature in ["idmapped-layers", "layers-from-files", "shared-layers"] {
        let usual = hub_mirror(&bed.hub.host());
        bed.pyxis.configure(&format!("{usual}[debug]\nwithout = [{feature:?}]\n")).unwrap();
        steps(&bed, feature);
        bed.cluster.wait_until_idle().unwrap();
        testbed::clean::check(&mut bed.cluster).unwrap();
    }
}

fn steps(bed: &Testbed, feature: &str) {
    let srun = |user: usize, arguments: &[&str]| {
        let mut command = bed.cluster.command(user, "srun", arguments);
        let output = process::run(command.stdin(Stdio::null()), wait::DEADLINE * 2).unwrap();
        output.success().unwrap_or_else(|error| panic!("without {feature}: {error}")).stdout
    };
    // Two users, several tasks and nodes, an image that is there for one way and not for the next.
    for user in 0..2 {
        let uid = bed.cluster.user(user).uid.to_string();
        let output = srun(user, &[IMAGE, "--nodes=2", "--ntasks=4", "stat", "-c", "%u", "/bin/busybox"]);
        assert_eq!(output.lines().filter(|line| **line == uid).count(), 4, "without {feature}: {output}");
    }
    // Writing, as root inside; kept from one step to the next.
    let script = "rm /bin/cat && echo new >/etc/new && stat -c %u /etc/new";
    let written =
        srun(0, &["-w", "node1", IMAGE, "--container-writable", "--container-remap-root", "sh", "-c", script]);
    assert_eq!(written, "0\n", "without {feature}");
    let name = format!("--container-name={feature}");
    srun(0, &["-w", "node1", IMAGE, &name, "--container-writable", "sh", "-c", "echo kept >/kept"]);
    let again = srun(0, &["-w", "node1", &name, "cat", "/kept", "/etc/os-release"]);
    assert!(again.starts_with("kept\n") && again.contains("PRETTY_NAME"), "without {feature}: {again}");
}
