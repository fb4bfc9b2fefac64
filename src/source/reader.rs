//! The source reader: opens what the user names, with the user's own rights, and passes it on.
//!
//! It looks at the first bytes of a file only to know who is to read it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::engine::Engines;
use super::{FromReader, SourceForm, ToReader, layout};
use crate::request::{Environment, LocalImage};
use crate::store::FileIdentity;
use crate::sys::channel::{self, Channel};

/// The channel as this end has it.
pub type BrokerChannel = Channel<FromReader, ToReader>;

/// Why an image cannot be had: one line for the user.
#[derive(Debug)]
pub(super) struct Refusal(pub String);

/// Opens `image` and serves it until nobody needs it any more. The process is the user's already.
pub fn run(channel: &BrokerChannel, image: &LocalImage, cwd: &Path, environment: &Environment) -> io::Result<()> {
    let outcome = match image {
        LocalImage::Path { path, .. } => serve_path(channel, path, cwd),
        LocalImage::Engine { engine, name } => Engines::new(*engine, environment, cwd, channel).serve(name),
    };
    match outcome {
        Err(Refusal(message)) => channel.send(&FromReader::Failed { message }, &[]),
        Ok(()) => Ok(()),
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self(format!("cannot pass the image on: {}", crate::sys::reason(error)))
    }
}

pub(super) fn serve_path(channel: &BrokerChannel, path: &Path, cwd: &Path) -> Result<(), Refusal> {
    let shown = path.display().to_string().escape_debug().to_string();
    let opened = open(path, cwd).map_err(|error| match error {
        // The words of enroot, which scripts may look for.
        Errno::NOENT | Errno::NOTDIR => Refusal(format!("No such file or directory: {shown}")),
        error => Refusal(format!("cannot open {shown}: {}", crate::sys::reason(error))),
    })?;
    match opened {
        Opened::File(file, stat) => {
            let form = recognise(&file).map_err(|reason| Refusal(format!("Invalid image format: {shown}{reason}")))?;
            let file = OwnedFd::from(file);
            channel.send(&FromReader::Opened { form, file: FileIdentity::of(&stat) }, &[file.as_fd()])?;
            Ok(())
        }
        Opened::Directory(directory) => {
            let missing = |error: io::Error| {
                let reason = crate::sys::reason(error);
                Refusal(format!(
                    "No such file or directory: {shown} (it is a directory, and no OCI layout: {}: {reason})",
                    layout::MARKER
                ))
            };
            layout::open(directory.as_fd(), layout::MARKER).map_err(missing)?;
            let index = layout::open(directory.as_fd(), layout::INDEX).map(|(index, _)| index);
            let index = index.and_then(|index| Ok(rustix::fs::fstat(&index)?)).map_err(|error| {
                Refusal(format!("cannot open {shown}/{}: {}", layout::INDEX, crate::sys::reason(error)))
            })?;
            let (own, importer) = channel::pair()?;
            let importer = OwnedFd::from(importer);
            let report = FromReader::Opened { form: SourceForm::Layout, file: FileIdentity::of(&index) };
            channel.send(&report, &[importer.as_fd()])?;
            drop(importer);
            Ok(layout::serve(&directory, &own)?)
        }
        Opened::Other => {
            Err(Refusal(format!("No such file or directory: {shown} (it is neither a file nor a directory)")))
        }
    }
}

enum Opened {
    File(std::fs::File, rustix::fs::Stat),
    Directory(OwnedFd),
    Other,
}

/// Opens `path` without waiting for the other end of a pipe, and without waking a device up.
fn open(path: &Path, cwd: &Path) -> Result<Opened, Errno> {
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let place = if path.is_absolute() {
        rustix::fs::open("/", directory, Mode::empty())?
    } else {
        rustix::fs::open(cwd, directory, Mode::empty())?
    };
    let stat = rustix::fs::statat(&place, path, rustix::fs::AtFlags::empty())?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            rustix::fs::openat(&place, path, flags | OFlags::DIRECTORY, Mode::empty()).map(Opened::Directory)
        }
        FileType::RegularFile => {
            let file = rustix::fs::openat(&place, path, flags, Mode::empty())?;
            // Another file may have taken its place.
            let stat = rustix::fs::fstat(&file)?;
            let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
            Ok(if regular { Opened::File(file.into(), stat) } else { Opened::Other })
        }
        _ => Ok(Opened::Other),
    }
}

/// What a file is, by its first bytes; else what the user may want to know about it.
fn recognise(file: &std::fs::File) -> Result<SourceForm, String> {
    let mut start = [0; 512];
    let mut length = 0;
    while length < start.len() {
        match file.read_at(start.get_mut(length..).unwrap_or_default(), length as u64) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(format!(" (it cannot be read: {})", crate::sys::reason(error))),
        }
    }
    match start.get(..length).unwrap_or_default() {
        [b'h', b's', b'q', b's', ..] => Ok(SourceForm::Squashfs),
        [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(SourceForm::Stream),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Err(" (compressed with xz: decompress it first)".into()),
        [b'B', b'Z', b'h', ..] => Err(" (compressed with bzip2: decompress it first)".into()),
        block if block.get(257..262) == Some(b"ustar") => Ok(SourceForm::Archive),
        [] => Err(" (the file is empty)".into()),
        _ => Err(" (neither a squashfs file nor an archive of an image)".into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// What a reader says of `path` below a directory with one of everything.
    fn ask(path: &str) -> (FromReader, usize) {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let mut tar = [0; 1024];
        tar[257..262].copy_from_slice(b"ustar");
        fs::write(at("x.tar"), tar).unwrap();
        fs::write(at("x.sqsh"), b"hsqs and more").unwrap();
        fs::write(at("x.tar.gz"), [0x1f, 0x8b, 8]).unwrap();
        fs::write(at("x.tar.xz"), b"\xfd7zXZ\0").unwrap();
        fs::write(at("text"), "some text").unwrap();
        fs::write(at("empty"), "").unwrap();
        fs::create_dir_all(at("layout/blobs")).unwrap();
        fs::write(at("layout/oci-layout"), "{}").unwrap();
        fs::write(at("layout/index.json"), "{}").unwrap();
        fs::create_dir(at("half")).unwrap();
        fs::write(at("half/oci-layout"), "{}").unwrap();
        fs::create_dir(at("dir")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();

        let (broker, reader) = channel::pair::<ToReader, FromReader>().unwrap();
        let image = LocalImage::Path { path: path.into(), form: None, name: None };
        let cwd = directory.path().to_owned();
        let thread = std::thread::spawn(move || run(&reader, &image, &cwd, &Environment::default()));
        let (report, descriptors) = broker.receive().unwrap().unwrap();
        let count = descriptors.len();
        drop(descriptors);
        thread.join().unwrap().unwrap();
        (report, count)
    }

    #[test]
    fn what_there_is_is_recognised_and_passed_on() {
        for (path, expected) in [
            ("x.tar", SourceForm::Archive),
            ("./dir/../x.sqsh", SourceForm::Squashfs),
            ("x.tar.gz", SourceForm::Stream),
            ("layout", SourceForm::Layout),
        ] {
            let (report, descriptors) = ask(path);
            // Made just now: not to be remembered.
            assert!(
                matches!(report, FromReader::Opened { form, file: None } if form == expected),
                "{path}: {report:?}"
            );
            assert_eq!(descriptors, 1);
        }
    }

    #[test]
    fn what_is_no_image_has_a_reason() {
        for (path, expected) in [
            ("missing", "No such file or directory: missing"),
            ("./text/x", "No such file or directory: ./text/x"),
            ("text", "Invalid image format: text (neither a squashfs"),
            ("empty", "Invalid image format: empty (the file is empty)"),
            ("x.tar.xz", "Invalid image format: x.tar.xz (compressed with xz"),
            ("./dir", "No such file or directory: ./dir (it is a directory, and no OCI layout"),
            ("half", "cannot open half/index.json: No such file"),
            ("fifo", "No such file or directory: fifo (it is neither"),
            ("/dev/urandom", "No such file or directory: /dev/urandom (it is neither"),
        ] {
            let (report, _) = ask(path);
            assert!(
                matches!(&report, FromReader::Failed { message } if message.starts_with(expected)),
                "{path}: {report:?}"
            );
        }
    }

    #[test]
    fn a_settled_file_has_an_identity() {
        let (broker, reader) = channel::pair::<ToReader, FromReader>().unwrap();
        let image = LocalImage::Path { path: "/bin/busybox".into(), form: None, name: None };
        run(&reader, &image, Path::new("/"), &Environment::default()).unwrap();
        assert!(matches!(broker.receive().unwrap(), Some((FromReader::Failed { .. }, _))));
        let stat = rustix::fs::stat("/bin/busybox").unwrap();
        assert_eq!(FileIdentity::of(&stat), FileIdentity::of(&rustix::fs::stat("/bin/busybox").unwrap()));
        assert!(FileIdentity::of(&stat).is_some());
    }
}
