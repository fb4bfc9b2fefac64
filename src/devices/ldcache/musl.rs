//! musl's counterpart of the cache: a file with the directories in which its linker looks, in order (ldso/dynlink.c).

/// What it looks through without such a file.
const DEFAULT: &str = "/lib:/usr/local/lib:/usr/lib";

/// Architecture of the host, as musl names it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "powerpc64" if cfg!(target_endian = "little") => "powerpc64le",
        other => other,
    }
}

/// musl's linker and its file, in an image that has it.
pub fn musl_path_file() -> (String, String) {
    let architecture = architecture();
    (format!("/lib/ld-musl-{architecture}.so.1"), format!("/etc/ld-musl-{architecture}.path"))
}

/// The file's content, with `directory` before what the image has; none if musl looks there anyway.
pub fn musl_path(image: Option<&str>, directory: &str) -> Option<String> {
    let own = image.unwrap_or(DEFAULT).trim_end();
    let looks_there = own.split([':', '\n']).any(|part| part == directory);
    (!looks_there).then(|| format!("{directory}\n{own}\n"))
}
