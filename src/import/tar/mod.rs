//! Reads a tar stream, entry by entry.
//!
//! Our own reader, because what a layer needs is not to be had from the `tar` crate: sparse maps as maps (it shows sparse
//! files with their holes filled), all three PAX sparse versions, content that goes from the stream straight into the
//! image's buffer, and a bound on everything that a header can ask for. Dialects: v7, ustar, GNU (long names, base-256
//! numbers, sparse files), PAX with global and local headers, star's prefix. Where readers differ on malformed archives
//! it follows Go's archive/tar, which is what images are built with: the size of an entry that can have no content
//! (links, directories, devices, pipes) is ignored, and headers may end without the two blocks of zeros.
//!
//! The stream is always read to its end, padding included: the caller's digest covers everything.

use std::io::{self, BufRead, BufReader, Read};

mod header;
mod pax;
mod sparse;

use header::{BLOCK, Header, sparse_extension, text};
use pax::Pax;
use sparse::{MAX_PIECES, MapReader, extents};

use super::error::LayerError;
use crate::erofs::{Extent, Xattrs};

/// Most bytes of a PAX header or a GNU long name.
const MAX_EXTENDED: u64 = 1 << 20;
/// What is read at once where not content of large files: headers and small files.
const BUFFER: usize = 128 << 10;

/// An entry of the archive, its extended headers applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// As the archive has it.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u16,
    /// Modification time: seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Those with the prefix `user.`.
    pub xattrs: Xattrs,
}

/// The kinds of entries. Content is read with [`Archive::read`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File {
        /// Bytes of its content.
        size: u64,
    },
    /// A regular file with holes; the content is that of the extents.
    Sparse {
        /// Bytes of the file.
        size: u64,
        /// In order, apart from each other, within the file.
        extents: Vec<Extent>,
    },
    /// Another name for an earlier entry.
    HardLink {
        /// The earlier entry's path.
        target: Vec<u8>,
    },
    /// A symbolic link.
    Symlink {
        /// Where it leads.
        target: Vec<u8>,
    },
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
    /// A character or block device.
    Device,
}

/// A tar stream.
#[derive(Debug)]
pub struct Archive<R> {
    source: BufReader<R>,
    /// Bytes taken from the source.
    position: u64,
    /// Most bytes of the stream.
    limit: u64,
    /// Global extended headers.
    globals: Pax,
    /// Content of the current entry that is still to be read, and the padding behind it.
    rest: u64,
    padding: u64,
    /// The current entry's path.
    current: Vec<u8>,
}

impl<R: Read> Archive<R> {
    /// Reads `stream`, which may have at most `limit` bytes.
    pub fn new(stream: R, limit: u64) -> Self {
        let source = BufReader::with_capacity(BUFFER, stream);
        let (globals, current) = (Pax::default(), Vec::new());
        Self { source, position: 0, limit, globals, rest: 0, padding: 0, current }
    }

    /// Bytes read so far: all of the stream once [`Archive::next`] has returned `None`.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The next entry; what was not read of the one before is skipped. `None`: the stream has been read to its end.
    pub fn next(&mut self) -> Result<Option<Entry>, LayerError> {
        self.skip_rest()?;
        let mut local = None;
        let (mut long_path, mut long_link) = (None, None);
        loop {
            let offset = self.position;
            let problem = |problem| LayerError::header(offset, problem);
            let Some(block) = self.header()? else {
                if local.is_some() || long_path.is_some() || long_link.is_some() {
                    return Err(problem("an extended header is followed by no entry"));
                }
                return self.drain().map(|()| None);
            };
            let header = Header::new(&block).map_err(problem)?;
            match header.typeflag() {
                b'x' | b'X' => local = Some(Pax::parse(&self.extended(&header, offset)?).map_err(problem)?),
                b'g' => {
                    let newer = Pax::parse(&self.extended(&header, offset)?).map_err(problem)?;
                    self.globals.update(newer);
                    // Bounds what many of them add up to.
                    self.globals.xattrs().map_err(|error| LayerError::header(offset, error.to_string()))?;
                }
                b'L' => long_path = Some(text(&self.extended(&header, offset)?).to_vec()),
                b'K' => long_link = Some(text(&self.extended(&header, offset)?).to_vec()),
                // A volume label.
                b'V' => {
                    self.content(header.size().map_err(problem)?)?;
                    self.skip_rest()?;
                }
                _ => {
                    let mut pax = self.globals.clone();
                    let sparse = local.as_mut().map(|local| std::mem::take(&mut local.sparse));
                    pax.update(local.unwrap_or_default());
                    pax.sparse = sparse.unwrap_or_default();
                    pax.path = pax.path.or(long_path);
                    pax.linkpath = pax.linkpath.or(long_link);
                    return self.entry(&header, pax).map(Some);
                }
            }
        }
    }

    /// Goes behind the current entry without reading it: `source` gives the stream from a position on.
    pub fn skip_to(&mut self, source: impl FnOnce(u64) -> R) {
        self.position += std::mem::take(&mut self.rest) + std::mem::take(&mut self.padding);
        self.source = BufReader::with_capacity(BUFFER, source(self.position));
    }

    /// Fills `buffer` with the content that comes next: no more than is left of the entry.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<(), LayerError> {
        debug_assert!(buffer.len() as u64 <= self.rest);
        self.fill(buffer)?;
        self.position += buffer.len() as u64;
        self.rest -= buffer.len() as u64;
        Ok(())
    }

    /// What a header means, with `pax` applied.
    fn entry(&mut self, header: &Header<'_>, mut pax: Pax) -> Result<Entry, LayerError> {
        let sparse = std::mem::take(&mut pax.sparse);
        let path = sparse.name.clone().or(pax.path.take()).unwrap_or_else(|| header.path());
        self.current.clone_from(&path);
        let problem = |problem: &'static str| LayerError::entry(&path, problem);
        let stored = match pax.size {
            Some(size) => Ok(size),
            None => header.size(),
        };
        let link = pax.linkpath.take().unwrap_or_else(|| header.link().to_vec());
        let kind = match header.typeflag() {
            b'1' => Kind::HardLink { target: link },
            b'2' => Kind::Symlink { target: link },
            b'3' | b'4' => Kind::Device,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            b'0' | 0 | b'7' => {
                let stored = stored.map_err(problem)?;
                self.content(stored)?;
                if path.ends_with(b"/") {
                    // How v7 wrote directories.
                    Kind::Directory
                } else if sparse.is_some() {
                    let size = sparse.size.ok_or_else(|| problem("a sparse file without its size"))?;
                    let pieces = match sparse.version {
                        (Some(1), Some(0)) => self.pax_map()?,
                        (None, None) | (Some(0), Some(0 | 1)) => sparse.pieces,
                        _ => return Err(problem("a sparse file in an unknown version of the format")),
                    };
                    let extents = extents(&pieces, size, self.rest).map_err(problem)?;
                    Kind::Sparse { size, extents }
                } else {
                    Kind::File { size: stored }
                }
            }
            b'S' => {
                let (mut pieces, mut more, size) = header.gnu_sparse().map_err(problem)?;
                while more {
                    if pieces.len() > MAX_PIECES {
                        return Err(problem("its sparse map is too long"));
                    }
                    let (further, another) = sparse_extension(&self.block()?).map_err(problem)?;
                    pieces.extend(further);
                    more = another;
                }
                self.content(stored.map_err(problem)?)?;
                Kind::Sparse { size, extents: extents(&pieces, size, self.rest).map_err(problem)? }
            }
            // GNU incremental backup: the names in a directory, as content.
            b'D' => {
                self.content(stored.map_err(problem)?)?;
                Kind::Directory
            }
            flag => {
                let flag = char::from(flag).escape_default();
                return Err(LayerError::entry(&path, format!("unsupported type of entry '{flag}'")));
            }
        };
        let mode = header.mode().map_err(problem)?;
        let mtime = match pax.mtime {
            Some(mtime) => mtime,
            None => (header.mtime().map_err(problem)?, 0),
        };
        let xattrs = match kind {
            Kind::File { .. } | Kind::Sparse { .. } | Kind::Directory => pax.xattrs(),
            _ => Ok(Xattrs::default()),
        };
        let xattrs = xattrs.map_err(|error| LayerError::entry(&path, error.to_string()))?;
        Ok(Entry { path, kind, mode, mtime, xattrs })
    }

    /// The map in front of the content of a PAX 1.0 sparse file.
    fn pax_map(&mut self) -> Result<Vec<sparse::RawExtent>, LayerError> {
        let mut map = MapReader::default();
        loop {
            if self.rest < BLOCK as u64 {
                return Err(LayerError::entry(&self.current, "its sparse map is cut off"));
            }
            let block = self.block()?;
            self.rest -= BLOCK as u64;
            for byte in block {
                if map.push(byte).map_err(|problem| LayerError::entry(&self.current, problem))? {
                    return Ok(map.pieces().to_vec());
                }
            }
        }
    }

    /// `size` bytes of content follow.
    fn content(&mut self, size: u64) -> Result<(), LayerError> {
        let end = size.checked_next_multiple_of(BLOCK as u64).and_then(|padded| self.position.checked_add(padded));
        if end.is_none_or(|end| end > self.limit) {
            return Err(LayerError::TooLarge);
        }
        self.rest = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(())
    }

    /// The content of an extended header.
    fn extended(&mut self, header: &Header<'_>, offset: u64) -> Result<Vec<u8>, LayerError> {
        let size = header.size().map_err(|problem| LayerError::header(offset, problem))?;
        if size > MAX_EXTENDED {
            return Err(LayerError::header(offset, format!("an extended header of more than {MAX_EXTENDED} bytes")));
        }
        self.current.clear();
        self.content(size)?;
        let mut bytes = vec![0; size as usize];
        self.read(&mut bytes)?;
        self.skip_rest()?;
        Ok(bytes)
    }

    /// Skips what is left of the current entry. The padding of a last one may be missing: `umoci insert` leaves it out.
    fn skip_rest(&mut self) -> Result<(), LayerError> {
        let padding = std::mem::take(&mut self.padding);
        let mut left = std::mem::take(&mut self.rest) + padding;
        while left > 0 {
            let available = retry(|| self.source.fill_buf().map(<[u8]>::len)).map_err(LayerError::Read)?;
            if available == 0 {
                return if left <= padding { Ok(()) } else { Err(self.cut_off()) };
            }
            let now = left.min(available as u64);
            self.source.consume(now as usize);
            self.position += now;
            left -= now;
        }
        Ok(())
    }

    /// One block in the middle of an entry.
    fn block(&mut self) -> Result<[u8; BLOCK], LayerError> {
        let mut block = [0; BLOCK];
        self.fill(&mut block)?;
        self.advance(BLOCK)?;
        Ok(block)
    }

    /// The next header block; `None` at the end of the archive: two blocks of zeros, or the end of the stream.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, LayerError> {
        let offset = self.position;
        let Some(block) = self.block_or_end()? else { return Ok(None) };
        if block.iter().any(|&byte| byte != 0) {
            return Ok(Some(block));
        }
        match self.block_or_end()? {
            Some(second) if second.iter().any(|&byte| byte != 0) => {
                Err(LayerError::header(offset, "a block of zeros in the middle of the archive"))
            }
            _ => Ok(None),
        }
    }

    fn block_or_end(&mut self) -> Result<Option<[u8; BLOCK]>, LayerError> {
        let mut block = [0; BLOCK];
        match self.read_up_to(&mut block)? {
            0 => Ok(None),
            BLOCK => self.advance(BLOCK).map(|()| Some(block)),
            _ => Err(LayerError::header(self.position, "the archive is cut off inside it")),
        }
    }

    /// Fills `buffer` in the middle of an entry.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), LayerError> {
        if self.read_up_to(buffer)? < buffer.len() { Err(self.cut_off()) } else { Ok(()) }
    }

    /// Fills `buffer` as far as the stream goes. Only a stream that ends without an error is one that is cut off.
    fn read_up_to(&mut self, buffer: &mut [u8]) -> Result<usize, LayerError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match retry(|| self.source.read(&mut buffer[filled..])).map_err(LayerError::Read)? {
                0 => break,
                count => filled += count,
            }
        }
        Ok(filled)
    }

    /// Reads what follows the archive.
    fn drain(&mut self) -> Result<(), LayerError> {
        loop {
            let available = retry(|| self.source.fill_buf().map(<[u8]>::len)).map_err(LayerError::Read)?;
            if available == 0 {
                return Ok(());
            }
            self.source.consume(available);
            self.advance(available)?;
        }
    }

    fn advance(&mut self, count: usize) -> Result<(), LayerError> {
        self.position += count as u64;
        if self.position > self.limit { Err(LayerError::TooLarge) } else { Ok(()) }
    }

    fn cut_off(&self) -> LayerError {
        if self.current.is_empty() {
            LayerError::header(self.position, "the archive is cut off in an extended header")
        } else {
            LayerError::entry(&self.current, "the archive is cut off inside it")
        }
    }
}

/// Calls `read` until no signal interrupts it.
fn retry<T>(mut read: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match read() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests;
