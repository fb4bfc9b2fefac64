//! What a node has beside GPUs and CUDA's libraries: sockets and devices of services, libraries for graphics, video and 32-bit
//! programs; and images that have their libraries elsewhere than Debian's.

use std::fs;
use std::os::unix::net::UnixListener;

use anyhow::{Result, ensure};
use testbed::image::{Compression, ImageBuilder};
use testbed::{images, process};

use super::node::{GpuBed, VERSION, compile, make_image_with, write};
use super::{LIBRARIES, gpus};
use crate::Case;
use crate::world::World;

pub const CASES: &[Case] = &[
    ("services_of_the_node", services),
    ("graphics_video_and_32_bit", other_libraries),
    ("images_of_other_distributions", other_images),
];

const DEVICES: &str = r#"
    for node in gdrdrv nvidia-modeset nvidia-fs0 nvidia-fs1 nvidia-nvswitchctl nvidia-nvswitch0; do
        mknod -m 666 /dev/$node c 1 3
    done
    mkdir /dev/nvidia-caps-imex-channels
    for channel in 0 1; do mknod -m 666 /dev/nvidia-caps-imex-channels/channel$channel c 1 3; done
    for service in persistenced fabricmanager; do
        mkdir -p /run/nvidia-$service
        mount -t tmpfs -o mode=755 tmpfs /run/nvidia-$service
        : >/run/nvidia-$service/socket
        mount --bind $1/socket /run/nvidia-$service/socket
    done
    mkdir -p $1/mps
    : >$1/mps/control
    [ -e /etc/cufile.json ] || echo '{}' >/etc/cufile.json
"#;
const NO_DEVICES: &str = r#"
    cd /dev
    rm -rf gdrdrv nvidia-modeset nvidia-fs? nvidia-nvswitch* nvidia-caps-imex-channels
    for service in persistenced fabricmanager; do
        umount -l /run/nvidia-$service 2>/dev/null || true
        rmdir /run/nvidia-$service 2>/dev/null || true
    done
    if [ "$(cat /etc/cufile.json 2>/dev/null)" = '{}' ]; then rm /etc/cufile.json; fi
"#;

fn services(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    gpus.on_node(NO_DEVICES)?;
    let socket = gpus.bed.site.path("driver/socket");
    let _ = fs::remove_file(&socket);
    let _service = UnixListener::bind(&socket)?;
    gpus.on_node(DEVICES)?;
    let result = services_are_there(gpus);
    gpus.on_node(NO_DEVICES)?;
    result
}

fn services_are_there(gpus: &GpuBed) -> Result<()> {
    let mps = gpus.bed.site.path("driver/mps").display().to_string();
    let script = format!(
        "cd /dev; echo $(ls -d gdrdrv nvidia* nvidia-caps-imex-channels/* 2>/dev/null)
         echo $(for name in persistenced fabricmanager; do test -S /run/nvidia-$name/socket && echo $name; done) \
              $(cat /etc/cufile.json 2>/dev/null) $(ls {mps} 2>/dev/null)
         grep -E ' (/run/nvidia|{mps})' /proc/mounts | cut -d ' ' -f 4 | cut -d , -f 1-4 | sort | uniq -c | xargs"
    );
    // Nothing of /dev but what is shown.
    let seen = |variables: &[(&str, &str)]| -> Result<String> {
        let own = [("ENROOT_RESTRICT_DEV", "y"), ("CUDA_MPS_PIPE_DIRECTORY", mps.as_str())];
        gpus.sh(1, &[&own, variables].concat(), &script)
    };
    let channels = |list: &str| format!("nvidia-caps-imex-channels {list}");
    let both = channels("nvidia-caps-imex-channels/channel0 nvidia-caps-imex-channels/channel1");
    let all = "persistenced fabricmanager control\n3 rw,nosuid,nodev,noexec";
    assert_eq!(seen(&[])?, format!("gdrdrv {both} nvidia-uvm nvidia-uvm-tools nvidia0 nvidiactl\n{all}"));
    let asked = [("NVIDIA_GDS", "enabled"), ("NVIDIA_NVSWITCH", "enabled"), ("NVIDIA_IMEX_CHANNELS", "1")];
    let one = channels("nvidia-caps-imex-channels/channel1");
    assert_eq!(
        seen(&asked)?,
        format!(
            "gdrdrv {one} nvidia-fs0 nvidia-fs1 nvidia-nvswitch0 nvidia-nvswitchctl nvidia-uvm nvidia-uvm-tools nvidia0 \
             nvidiactl\n{}",
            all.replace("manager ", "manager {} ")
        )
    );
    let capabilities = |list| ("NVIDIA_DRIVER_CAPABILITIES", list);
    assert_eq!(
        seen(&[capabilities("utility"), ("NVIDIA_GDRCOPY", "enabled")])?,
        "gdrdrv nvidia0 nvidiactl\npersistenced fabricmanager\n2 rw,nosuid,nodev,noexec"
    );
    assert_eq!(seen(&[capabilities("display")])?, "nvidia-modeset nvidia0 nvidiactl");
    // In the host's /dev, too, other channels are out of reach.
    let opened = "cd /dev/nvidia-caps-imex-channels; for node in *; do true 2>/dev/null <$node && echo $node; done";
    assert_eq!(gpus.sh(1, &asked, opened)?, "channel1");
    let arguments = ["--gpus-per-node=1", "--container-image=cuda", "true"];
    let output = gpus.srun(&[("NVIDIA_IMEX_CHANNELS", "0,7")], &arguments)?;
    let text = "[ERROR] nvidia-container-cli: device error: NVIDIA_IMEX_CHANNELS: 7: unknown channel on this node";
    ensure!(!output.status.success() && output.stderr.contains(text), "{output}");
    Ok(())
}

/// Of which class, what, and its SONAME.
const MORE: [(&str, &str, &str); 5] = [
    ("64", "libGLX_nvidia", "libGLX_nvidia.so.0"),
    ("64", "libnvidia-encode", "libnvidia-encode.so.1"),
    ("64", "libnvidia-opticalflow", "libnvidia-opticalflow.so.1"),
    ("32", "libcuda", "libcuda.so.1"),
    ("32", "libnvidia-ml", "libnvidia-ml.so.1"),
];

fn other_libraries(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    let directory = gpus.bed.site.path("driver/more");
    let _ = fs::remove_dir_all(&directory);
    for (class, library, soname) in MORE {
        let file = directory.join(class).join(format!("{library}.so.{VERSION}"));
        fs::create_dir_all(directory.join(class))?;
        let (class, soname) = (format!("-m{class}"), format!("-Wl,-soname,{soname}"));
        compile("int nothing;\n", &file, &[&class, "-shared", "-fPIC", "-nostdlib", &soname])?;
    }
    let own = gpus.bed.site.path("driver/ld.so.conf");
    let conf = directory.join("ld.so.conf");
    let directory = directory.display();
    write(&conf, &format!("include {}\n{directory}/64\n{directory}/32\n", own.display()))?;
    let cache = conf.with_extension("cache");
    process::output_of(std::process::Command::new("ldconfig").arg("-f").arg(&conf).arg("-C").arg(&cache))?;
    gpus.on_node(&format!("mount --bind {} /etc/ld.so.cache", cache.display()))?;
    let result = other_libraries_are_there(gpus);
    gpus.on_node("umount /etc/ld.so.cache")?;
    result
}

fn other_libraries_are_there(gpus: &GpuBed) -> Result<()> {
    let list = |capabilities: &str, directory: &str| {
        let script = format!("cd {directory} 2>/dev/null && echo $(ls | grep -E 'nvidia|cuda')");
        gpus.sh(2, &[("NVIDIA_DRIVER_CAPABILITIES", capabilities)], &format!("{script} || true"))
    };
    let video = list("video", LIBRARIES)?;
    for name in ["libcuda.so.1", "libnvidia-encode.so.1", "libnvidia-opticalflow.so.1", "libnvidia-opticalflow.so"] {
        ensure!(video.split(' ').any(|there| there == name), "{name}: {video}");
    }
    let graphics =
        format!("libGLX_indirect.so.0 libGLX_nvidia.so.0 libGLX_nvidia.so.{VERSION} libnvidia-glcore.so.{VERSION}");
    // It begins with the name in capitals.
    let names = format!("cd {LIBRARIES}; echo $(ls | grep -iE 'glx|glcore')");
    let profile = "cat /etc/nvidia/nvidia-application-profiles-rc.d/10-container.conf | tr -d '\\n'";
    for capability in ["graphics", "display"] {
        let variables = [("NVIDIA_DRIVER_CAPABILITIES", capability), ("NVIDIA_VISIBLE_DEVICES", "1")];
        let seen = gpus.sh(2, &variables, &format!("{names}; {profile}"))?;
        let (libraries, profile) = seen.split_once('\n').unwrap_or_default();
        assert_eq!(libraries, graphics, "{capability}");
        ensure!(profile.contains("\"EGLVisibleDGPUDevices\", 0x2]"), "{profile}");
    }
    // Only who asks for them has libraries for 32-bit programs.
    let directory = "/usr/lib/i386-linux-gnu";
    assert_eq!(list("compute,utility", directory)?, "");
    assert_eq!(
        list("compute,utility,compat32", directory)?,
        format!("libcuda.so libcuda.so.1 libcuda.so.{VERSION} libnvidia-ml.so.1 libnvidia-ml.so.{VERSION}")
    );
    let script = "ldconfig -p | grep 'libcuda.so.1 ' | tr -d '\\t' | sort; cuda-program";
    assert_eq!(
        gpus.sh(1, &[("NVIDIA_DRIVER_CAPABILITIES", "compute,compat32")], script)?,
        format!(
            "libcuda.so.1 (libc6) => {directory}/libcuda.so.1\nlibcuda.so.1 (libc6,x86-64) => {LIBRARIES}/libcuda.so.1\n\
             cuInit 0"
        )
    );
    Ok(())
}

/// Red Hat's directories, and images whose linker is musl's.
fn other_images(world: &mut World) -> Result<()> {
    let directories = ["red-hat", "musl", "musl-64"].map(|name| world.directory(&format!("cuda-{name}")));
    let gpus = gpus(world)?;
    let [red_hat, musl, musl_64] = directories;
    let image = make_image_with(&red_hat?, |tree| Ok(fs::remove_file(tree.join("etc/debian_version"))?))?;
    gpus.bed.hub.push(&image, "library/red-hat:latest")?;
    let run = |image: &str, script: &str| -> Result<String> {
        let image = format!("--container-image={image}");
        let arguments = ["--gpus-per-node=1", &image, "--container-readonly", "sh", "-c", script];
        Ok(gpus.srun(&[("NVIDIA_VISIBLE_DEVICES", "all")], &arguments)?.success()?.stdout)
    };
    let script =
        "ldconfig -p | grep 'libcuda.so.1 ' | sed 's/.*=> //'; ls /usr/lib/x86_64-linux-gnu | wc -l; cuda-program";
    assert_eq!(run("red-hat", script)?, "/usr/lib64/libcuda.so.1\n0\ncuInit 0\n");
    for (name, layout, has_lib64) in [("musl", musl, false), ("musl-64", musl_64, true)] {
        let layout = layout?;
        let tree = layout.join("tree");
        images::busybox_tree(&tree)?;
        write(&tree.join("lib/ld-musl-x86_64.so.1"), "")?;
        if has_lib64 {
            fs::create_dir_all(tree.join("usr/lib64"))?;
        }
        let image = ImageBuilder::new(&layout)?
            .config("Env", serde_json::json!([images::IMAGE_PATH]))
            .layer_from_tree(&tree, Compression::Gzip)?
            .finish("latest")?;
        gpus.bed.hub.push(&image, &format!("library/{name}:latest"))?;
    }
    // Where musl looks anyway; else it is told, and glibc's cache is of no use to it.
    let script = "ls /usr/lib*/libnvidia-ml.so.1; cat /etc/ld-musl-x86_64.path 2>/dev/null; ls /etc/ld.so.cache 2>/dev/null; true";
    assert_eq!(run("musl", script)?, "/usr/lib/libnvidia-ml.so.1\n");
    assert_eq!(run("musl-64", script)?, "/usr/lib64/libnvidia-ml.so.1\n/usr/lib64\n/lib:/usr/local/lib:/usr/lib\n");
    Ok(())
}
