//! The file behind an image: written once, from front to back, in large pieces, past the page cache.
//!
//! `O_DIRECT` saves the copy into the page cache, which is most of what writing costs: a layer of 3.6 GB and 88,000 files
//! took 1.2 s of CPU time instead of 3 to 8. Nothing is lost: EROFS reads the file directly, too. So offsets, lengths and
//! memory of every transfer are multiples of the block size. Where the file system has no direct I/O, or wants a larger
//! alignment, the page cache is used.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::Error;
use super::format::{BLOCK, MAX_BLOCKS};

/// Memory of one block, aligned like one.
#[derive(Debug)]
#[repr(align(4096))]
pub struct Block(pub [u8; BLOCK]);

impl Block {
    /// A block of zeros.
    pub fn zeroed() -> Box<Self> {
        Box::new(Self([0; BLOCK]))
    }
}

/// Bytes of the buffer. A write of 1 MiB costs no more than a larger one, and the buffer stays in the processor's cache
/// between being filled and being copied.
const BUFFER: usize = 1 << 20;

/// A file that is being filled from its start.
#[derive(Debug)]
pub struct Output<'a> {
    file: &'a File,
    direct: Direct<'a>,
    /// A block longer than [`BUFFER`], and where in it the first aligned byte is.
    memory: Vec<u8>,
    start: usize,
    /// Bytes in the buffer.
    used: usize,
    /// Bytes in the file.
    written: u64,
    /// Most bytes of the file.
    limit: u64,
}

impl<'a> Output<'a> {
    /// Writes to `file`, which must be empty, at most `limit` bytes.
    pub fn new(file: &'a File, limit: u64) -> Self {
        let memory = vec![0; BUFFER + BLOCK];
        let start = memory.as_ptr().addr().wrapping_neg() % BLOCK;
        Self {
            file,
            direct: Direct::new(file),
            memory,
            start,
            used: 0,
            written: 0,
            limit: limit.min(MAX_BLOCKS * BLOCK as u64),
        }
    }

    /// Offset of the next byte.
    pub fn position(&self) -> u64 {
        self.written + self.used as u64
    }

    /// Number of the next block, at a block boundary.
    pub fn block(&self) -> u32 {
        debug_assert_eq!(self.used % BLOCK, 0);
        // `limit` keeps addresses within 32 bits.
        (self.position() / BLOCK as u64) as u32
    }

    /// Fails if `length` more bytes are too many: to be asked once for each run of blocks, before its first byte.
    pub fn reserve(&self, length: u64) -> Result<(), Error> {
        match self.position().checked_add(length) {
            Some(end) if end <= self.limit => Ok(()),
            _ => Err(Error::TooLarge),
        }
    }

    /// Room for the next bytes, at least one and at most `most`: to be filled completely, then [`Output::advance`].
    pub fn space(&mut self, most: u64) -> Result<&mut [u8], Error> {
        if self.used == BUFFER {
            self.flush()?;
        }
        let rest = &mut self.memory[self.start..][..BUFFER][self.used..];
        let length = usize::try_from(most).unwrap_or(usize::MAX).min(rest.len());
        Ok(&mut rest[..length])
    }

    /// The next `length` bytes of [`Output::space`] are filled.
    pub fn advance(&mut self, length: usize) {
        self.used += length;
    }

    /// Appends `bytes`.
    pub fn append(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let space = self.space(bytes.len() as u64)?;
            let (now, later) = bytes.split_at(space.len());
            space.copy_from_slice(now);
            self.advance(now.len());
            bytes = later;
        }
        Ok(())
    }

    /// Appends zeros.
    pub fn zeros(&mut self, mut count: u64) -> Result<(), Error> {
        while count > 0 {
            let space = self.space(count)?;
            space.fill(0);
            let length = space.len();
            self.advance(length);
            count -= length as u64;
        }
        Ok(())
    }

    /// Appends zeros up to the next block boundary.
    pub fn pad(&mut self) -> Result<(), Error> {
        self.zeros((self.used.next_multiple_of(BLOCK) - self.used) as u64)
    }

    /// Writes what is in the buffer: whole blocks.
    fn flush(&mut self) -> Result<(), Error> {
        debug_assert_eq!(self.used % BLOCK, 0);
        let mut rest = &self.memory[self.start..][..self.used];
        while !rest.is_empty() {
            match self.file.write_at(rest, self.written) {
                Ok(0) => return Err(Error::Write(io::ErrorKind::WriteZero.into())),
                Ok(count) => {
                    self.written += count as u64;
                    rest = &rest[count..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Direct I/O that this file system cannot do.
                Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) && self.direct.end() => {}
                Err(error) => return Err(Error::Write(error)),
            }
        }
        self.used = 0;
        Ok(())
    }

    /// Writes what is left: from here on, single blocks can be rewritten (through the page cache, which gathers them).
    pub fn complete(&mut self) -> Result<(), Error> {
        self.flush()?;
        self.direct.end();
        Ok(())
    }

    /// Changes blocks that are in the file: `change` gets each block of `blocks` in turn.
    pub fn rewrite(
        &self,
        blocks: impl IntoIterator<Item = u32>,
        mut change: impl FnMut(u32, &mut [u8; BLOCK]),
    ) -> Result<(), Error> {
        let mut memory = Block::zeroed();
        for block in blocks {
            let offset = u64::from(block) * BLOCK as u64;
            self.file.read_exact_at(&mut memory.0, offset).map_err(Error::Write)?;
            change(block, &mut memory.0);
            self.file.write_all_at(&memory.0, offset).map_err(Error::Write)?;
        }
        Ok(())
    }
}

/// Direct I/O on a file, for a while.
#[derive(Debug)]
struct Direct<'a> {
    file: &'a File,
    /// The flags to go back to, if they were changed.
    before: Option<OFlags>,
}

impl<'a> Direct<'a> {
    /// Turns it on, where that is possible.
    fn new(file: &'a File) -> Self {
        let flags = rustix::fs::fcntl_getfl(file).ok().filter(|flags| !flags.contains(OFlags::DIRECT));
        let before = flags.filter(|flags| rustix::fs::fcntl_setfl(file, *flags | OFlags::DIRECT).is_ok());
        Self { file, before }
    }

    /// Turns it off again; `false` if there was nothing to turn off.
    fn end(&mut self) -> bool {
        self.before.take().is_some_and(|flags| rustix::fs::fcntl_setfl(self.file, flags).is_ok())
    }
}

impl Drop for Direct<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_direct(file: &File) -> bool {
        rustix::fs::fcntl_getfl(file).unwrap().contains(OFlags::DIRECT)
    }

    #[test]
    fn direct_io_ends_with_the_output() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = directory.path().join("image");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let mut output = Output::new(&file, u64::MAX);
        assert!(is_direct(&file), "/var/tmp is on a file system without direct I/O");
        output.append(&[7; 3_000_000]).unwrap();
        output.pad().unwrap();
        drop(output);
        assert!(!is_direct(&file));
        let mut output = Output::new(&file, u64::MAX);
        output.zeros(BLOCK as u64).unwrap();
        output.append(&[9; 2 * BLOCK]).unwrap();
        output.complete().unwrap();
        assert!(!is_direct(&file));
        output.rewrite([1], |block, memory| memory.fill(block as u8)).unwrap();
        let bytes = std::fs::read(path).unwrap();
        let written = [&[0; BLOCK][..], &[1; BLOCK], &[9; BLOCK]].concat();
        assert!(bytes.starts_with(&written) && bytes.len() > 2_000_000);
    }

    #[test]
    fn the_limit_holds() {
        let file = tempfile::tempfile().unwrap();
        let mut output = Output::new(&file, 3 * BLOCK as u64);
        output.zeros(BLOCK as u64).unwrap();
        assert!(output.reserve(2 * BLOCK as u64).is_ok());
        assert!(matches!(output.reserve(2 * BLOCK as u64 + 1), Err(Error::TooLarge)));
        assert!(matches!(output.reserve(u64::MAX), Err(Error::TooLarge)));
    }
}
