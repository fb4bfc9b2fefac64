//! The configuration, and what the host offers.

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use super::super::{Check, Status};
use crate::cli::unprivileged;
use crate::config::{Config, SquashfsMode};
use crate::devices::cdi::Registry;
use crate::devices::host::Host;
use crate::devices::nvidia::driver::Driver;

pub fn configuration(path: &Path) -> Check {
    let name = "configuration";
    match Config::load(path) {
        Ok(_) if path.exists() => Check::ok(name, format!("{} is valid", path.display())),
        Ok(_) => Check::ok(name, format!("{} is not there: every setting has its default", path.display())),
        Err(error) => Check::bad(name, Status::Failed, error.to_string(), "no container starts until that is right"),
    }
}

pub fn account(config: &Config) -> Check {
    let (name, wanted) = ("import account", &config.import.user);
    match unprivileged::account(wanted) {
        Some(account) if account.uid == 0 => {
            let remedy = format!("set import.user to an account without rights, not to {wanted}");
            Check::bad(name, Status::Failed, "imports would run as root", remedy)
        }
        Some(account) => Check::ok(name, format!("{wanted}, uid {}", account.uid)),
        None => {
            let remedy = format!("imports run as nobody until: useradd --system --shell /usr/sbin/nologin {wanted}");
            Check::bad(name, Status::Warning, format!("there is no user {wanted}"), remedy)
        }
    }
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

pub fn user_namespaces() -> Check {
    let name = "user namespaces";
    let most = match number("/proc/sys/user/max_user_namespaces") {
        None => return Check::bad(name, Status::Failed, "the kernel has none", "use a kernel with CONFIG_USER_NS"),
        Some(0) => {
            let remedy = "set the sysctl user.max_user_namespaces to 10000 or more";
            return Check::bad(name, Status::Failed, "none are allowed", remedy);
        }
        Some(most) => most,
    };
    // A container's start needs two for a moment, and one as long as it lives.
    if most < 100 {
        let remedy = "set the sysctl user.max_user_namespaces to 10000 or more";
        return Check::bad(name, Status::Warning, format!("{most} are too few for a busy node"), remedy);
    }
    let restricted = [
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", 1, "kernel.apparmor_restrict_unprivileged_userns=1"),
        ("/proc/sys/kernel/unprivileged_userns_clone", 0, "kernel.unprivileged_userns_clone=0"),
    ];
    let found = restricted.iter().find(|(path, value, _)| number(path) == Some(*value));
    match found {
        None => Check::ok(name, format!("up to {most}")),
        // Container init holds CAP_SYS_ADMIN where it makes its own.
        Some((.., setting)) => Check::ok(
            name,
            format!(
                "up to {most}; {setting} keeps users from enroot's commands outside of jobs, and steps are not concerned"
            ),
        ),
    }
}

pub fn fuse(mode: SquashfsMode, path: &Path) -> Check {
    let name = "FUSE";
    let open = fs::metadata(path)
        .is_ok_and(|node| node.file_type().is_char_device() && node.permissions().mode() & 0o006 == 0o006);
    let shown = path.display();
    match (mode, open) {
        (SquashfsMode::Kernel | SquashfsMode::Convert, _) => Check::ok(name, "not used by squashfs.mode"),
        (_, true) => Check::ok(name, format!("{shown} is open to users")),
        (SquashfsMode::Auto, false) => {
            Check::ok(name, format!("{shown} is not open to users: squashfs files are converted"))
        }
        (SquashfsMode::Fuse, false) => Check::bad(
            name,
            Status::Warning,
            format!("{shown} is not open to users, and squashfs.mode is \"fuse\": squashfs files cannot be run"),
            format!("modprobe fuse; chmod 666 {shown}; or set squashfs.mode to \"auto\""),
        ),
    }
}

pub fn certificates(config: &Config) -> Check {
    let name = "certificates";
    for (variable, value) in &config.import.environment {
        if ["SSL_CERT_FILE", "SSL_CERT_DIR"].contains(&variable.as_str()) {
            // SAFETY: the check's process has one thread.
            unsafe { std::env::set_var(variable, value) };
        }
    }
    match rustls_native_certs::load_native_certs().certs.len() {
        0 => Check::bad(
            name,
            Status::Warning,
            "no certificate authority is trusted: registries with TLS are refused",
            "install ca-certificates, or set SSL_CERT_FILE in import.environment",
        ),
        count => Check::ok(name, format!("{count} certificate authorities")),
    }
}

pub fn devices(config: &Config) -> Check {
    let (name, host) = ("devices", Host::default());
    let driver = Driver::read(&host);
    let gpus: Vec<String> = driver.iter().flat_map(|driver| &driver.gpus).map(|gpu| gpu.node()).collect();
    if let Some(missing) = gpus.iter().find(|node| !Path::new(node).exists()) {
        let remedy = "run nvidia-modprobe or nvidia-smi once, or start nvidia-persistenced";
        return Check::bad(name, Status::Warning, format!("the driver has a GPU whose {missing} is missing"), remedy);
    }
    let registry = Registry::load(&config.devices.cdi_directories, None);
    if let Some(problem) = registry.problems.first() {
        let remedy = "\"pyxis devices\" lists all of them";
        return Check::bad(name, Status::Warning, format!("CDI: {problem}"), remedy);
    }
    let specified = registry.devices().count();
    Check::ok(name, format!("{} NVIDIA GPUs, {specified} devices by CDI", gpus.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fuse_matters_where_it_is_wanted() {
        let (open, closed) = (Path::new("/dev/null"), Path::new("/dev/no-such-device"));
        assert_eq!(fuse(SquashfsMode::Fuse, open).status, Status::Ok);
        assert_eq!(fuse(SquashfsMode::Fuse, closed).status, Status::Warning);
        assert_eq!(fuse(SquashfsMode::Auto, closed).status, Status::Ok);
        assert_eq!(fuse(SquashfsMode::Convert, closed).status, Status::Ok);
        assert_eq!(fuse(SquashfsMode::Fuse, Path::new("/etc/passwd")).status, Status::Warning);
    }
}
