//! The files of an OCI layout (image-spec, image-layout.md), for an importer that must not open the user's files itself.
//!
//! The importer may have been talked into anything by an earlier image. It names files by what they are, never by paths,
//! and gets none outside the layout.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::{LayoutAnswer, LayoutAsk};
use crate::sys::channel::Channel;

/// The file that every layout has.
pub(super) const MARKER: &str = "oci-layout";
/// The file that says which images there are.
pub(super) const INDEX: &str = "index.json";

/// Answers until the importer is gone.
pub(super) fn serve(directory: &OwnedFd, channel: &Channel<LayoutAnswer, LayoutAsk>) -> io::Result<()> {
    while let Some((ask, _)) = channel.receive()? {
        let opened = match ask {
            LayoutAsk::Index => open(directory.as_fd(), INDEX),
            LayoutAsk::Blob(digest) => open(directory.as_fd(), &format!("blobs/sha256/{}", digest.hex())),
        };
        let sent = match opened {
            Ok((file, size)) => channel.send(&LayoutAnswer::File { size }, &[file.as_fd()]),
            Err(error) => channel.send(&LayoutAnswer::None { reason: crate::sys::reason(error) }, &[]),
        };
        match sent {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
            other => other?,
        }
    }
    Ok(())
}

/// A regular file below `directory`, and its length. Symbolic links count as long as they stay inside.
pub(super) fn open(directory: BorrowedFd<'_>, path: &str) -> io::Result<(OwnedFd, u64)> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let file = loop {
        match rustix::fs::openat2(directory, path, flags, Mode::empty(), resolve) {
            // Somebody renamed something meanwhile.
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::XDEV) => return Err(io::Error::other("it leads out of the layout")),
            other => break other?,
        }
    };
    let stat = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("not a file"));
    }
    Ok((file, u64::try_from(stat.st_size).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::symlink;

    use rustix::fs::CWD;

    use super::*;
    use crate::image::digest::Digest;
    use crate::sys::channel;

    #[test]
    fn only_files_of_the_layout_are_handed_out() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = directory.path().join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(directory.path().join(INDEX), "{}").unwrap();
        let digest = |byte| Digest::from_bytes([byte; 32]);
        let blob = |byte| blobs.join(digest(byte).hex());
        fs::write(blob(1), "blob").unwrap();
        symlink(digest(1).hex(), blob(2)).unwrap();
        symlink("/etc/passwd", blob(3)).unwrap();
        symlink("../../../../../../../../etc/passwd", blob(4)).unwrap();
        rustix::fs::mknodat(CWD, blob(5), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();

        let (importer, reader) = channel::pair::<LayoutAsk, LayoutAnswer>().unwrap();
        let layout = OwnedFd::from(File::open(directory.path()).unwrap());
        let server = std::thread::spawn(move || serve(&layout, &reader));
        let ask = |ask| {
            importer.send(&ask, &[]).unwrap();
            importer.receive().unwrap().unwrap()
        };
        for (what, length) in [(LayoutAsk::Index, 2), (LayoutAsk::Blob(digest(1)), 4), (LayoutAsk::Blob(digest(2)), 4)]
        {
            let (answer, files) = ask(what);
            assert!(matches!(answer, LayoutAnswer::File { size } if size == length), "{answer:?}");
            assert_eq!(files.len(), 1);
        }
        for (byte, expected) in [(3, "leads out"), (4, "leads out"), (5, "not a file"), (6, "No such file")] {
            let (answer, files) = ask(LayoutAsk::Blob(digest(byte)));
            assert!(matches!(&answer, LayoutAnswer::None { reason } if reason.contains(expected)), "{answer:?}");
            assert!(files.is_empty());
        }
        drop(importer);
        server.join().unwrap().unwrap();
    }
}
