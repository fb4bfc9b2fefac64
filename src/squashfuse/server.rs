//! Answers the kernel's requests from a squashfs image.
//!
//! There is no state about what the kernel knows: a node's number is where its inode is in the image, plus 2 (the root's
//! is 1), so forgetting is nothing to do. Files and directories are not opened; what makes reading on cheap (where the
//! blocks of a file are, how far a listing has come) is cached by node.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::abi::{self, Attr, AttrOut, Dirent, EntryOut, InHeader, InitIn, InitOut, OutHeader, ReadIn, StatfsOut};
use crate::squashfs::reader::{Entries, Entry, Error, File, FileType, Image, Inode, InodeRef};

/// The image never changes: everything may be remembered for years.
const FOREVER: u64 = 10 * 365 * 86_400;
/// Most bytes of one read, in pages of 4096: what the kernel takes at most.
const MAX_PAGES: u16 = 256;
/// Most bytes of an answer.
const MAX_READ: usize = MAX_PAGES as usize * 4096;
/// Requests of read-ahead that may wait.
const MAX_BACKGROUND: u16 = 64;
/// Files and listings whose place is remembered.
const FILES: usize = 512;
const LISTINGS: usize = 64;

/// A file system.
#[derive(Debug)]
pub struct Server<'a> {
    image: &'a Image,
    /// Whose all files are, in the user namespace of the mount.
    owner: (u32, u32),
    files: Mutex<VecDeque<(u64, Arc<File>)>>,
    /// By directory and offset: what comes next.
    listings: Mutex<VecDeque<(u64, u64, Entries<'a>)>>,
}

/// What a thread works with.
#[derive(Debug)]
struct Buffers {
    request: Vec<u8>,
    answer: Vec<u8>,
}

impl Buffers {
    fn new() -> Self {
        // Requests to write are longer, and refused by the kernel.
        Self { request: vec![0; 4 * abi::MIN_READ_BUFFER], answer: vec![0; MAX_READ] }
    }
}

/// What becomes of a request.
enum Answer {
    /// These first bytes of the answer's buffer.
    Bytes(usize),
    Nothing,
}

impl<'a> Server<'a> {
    /// A file system of `image` in which everything belongs to `owner`.
    pub fn new(image: &'a Image, owner: (u32, u32)) -> Self {
        Self { image, owner, files: Mutex::default(), listings: Mutex::default() }
    }

    /// Answers the kernel on `device` until the file system is unmounted.
    pub fn serve(&self, device: BorrowedFd<'_>) -> io::Result<()> {
        let mut buffers = Buffers::new();
        loop {
            match rustix::io::read(device, &mut *buffers.request) {
                Ok(length) => self.answer(device, length, &mut buffers)?,
                // NOENT: the request was interrupted just now.
                Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => {}
                Err(Errno::NODEV) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Answers the request of `length` bytes in the buffer.
    fn answer(&self, device: BorrowedFd<'_>, length: usize, buffers: &mut Buffers) -> io::Result<()> {
        let request = buffers.request.get(..length).unwrap_or_default();
        let (header, body) = InHeader::read_from_prefix(request).map_err(|_| io::ErrorKind::InvalidData)?;
        let (error, size) = match self.handle(&header, body, &mut buffers.answer) {
            Ok(Answer::Bytes(size)) => (0, size),
            Ok(Answer::Nothing) => return Ok(()),
            Err(errno) => (-errno.raw_os_error(), 0),
        };
        let answer = buffers.answer.get(..size).unwrap_or_default();
        // An answer is at most 1 MiB.
        let len = (size_of::<OutHeader>() + answer.len()) as u32;
        let header = OutHeader { len, error, unique: header.unique };
        match rustix::io::writev(device, &[IoSlice::new(header.as_bytes()), IoSlice::new(answer)]) {
            // Nobody waits for the answer any more, or the file system is being unmounted: the next read tells.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV | Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn handle(&self, header: &InHeader, body: &[u8], to: &mut [u8]) -> Result<Answer, Errno> {
        match header.opcode {
            abi::INIT => init(body, to),
            abi::LOOKUP => {
                let name = body.split(|&byte| byte == 0).next().unwrap_or_default();
                put(to, self.lookup(header.node, name)?.as_bytes())
            }
            abi::GETATTR => {
                let attr = self.attr(&self.inode(header.node)?);
                put(to, AttrOut { attr_valid: FOREVER, attr, ..AttrOut::default() }.as_bytes())
            }
            abi::READLINK => put(to, &self.image.read_link(&self.inode(header.node)?).map_err(errno)?),
            abi::READ => {
                let request = read_in(body)?;
                let to = to.get_mut(..request.size as usize).ok_or(Errno::INVAL)?;
                let file = self.file(header.node)?;
                self.image.read_at(&file, request.offset, to).map(Answer::Bytes).map_err(errno)
            }
            abi::READDIR | abi::READDIRPLUS => {
                let request = read_in(body)?;
                let to = to.get_mut(..request.size as usize).ok_or(Errno::INVAL)?;
                let plus = header.opcode == abi::READDIRPLUS;
                self.read_dir(header.node, request.offset, plus, to).map(Answer::Bytes)
            }
            abi::STATFS => put(to, self.statfs().as_bytes()),
            abi::FORGET | abi::BATCH_FORGET | abi::INTERRUPT => Ok(Answer::Nothing),
            abi::DESTROY => Ok(Answer::Bytes(0)),
            // Among them OPEN, OPENDIR and all that is about extended attributes: the kernel does not ask again.
            _ => Err(Errno::NOSYS),
        }
    }

    fn lookup(&self, node: u64, name: &[u8]) -> Result<EntryOut, Errno> {
        match self.image.lookup(&self.inode(node)?, name).map_err(errno)? {
            Some(entry) => Ok(self.entry(&self.image.inode(entry.inode).map_err(errno)?)),
            None => Ok(EntryOut { entry_valid: FOREVER, ..EntryOut::default() }),
        }
    }

    fn entry(&self, inode: &Inode) -> EntryOut {
        EntryOut {
            node: self.node(inode.reference),
            entry_valid: FOREVER,
            attr_valid: FOREVER,
            attr: self.attr(inode),
            ..EntryOut::default()
        }
    }

    /// As an unpacked image would have them: the owner may read everything, and enter and change directories.
    fn attr(&self, inode: &Inode) -> Attr {
        let permissions = u32::from(inode.permissions);
        let permissions = match inode.file_type() {
            FileType::Directory => permissions | 0o700,
            FileType::Symlink => 0o777,
            _ if permissions & 0o111 != 0 => permissions | 0o500,
            _ => permissions | 0o400,
        };
        let (major, minor) = inode.device().unwrap_or_default();
        let time = inode.mtime.into();
        Attr {
            ino: inode.number.into(),
            size: inode.size(),
            blocks: inode.size().div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            mode: inode.file_type().mode() | permissions,
            nlink: inode.nlink,
            uid: self.owner.0,
            gid: self.owner.1,
            // `new_encode_dev()`
            rdev: minor & 0xff | major << 8 | (minor & !0xff) << 12,
            block_size: 4096,
            ..Attr::default()
        }
    }

    fn inode(&self, node: u64) -> Result<Inode, Errno> {
        let reference = match node {
            abi::ROOT => self.image.root(),
            other => InodeRef::new(other.checked_sub(2).ok_or(Errno::STALE)?),
        };
        self.image.inode(reference).map_err(errno)
    }

    fn node(&self, reference: InodeRef) -> u64 {
        if reference == self.image.root() { abi::ROOT } else { reference.number().saturating_add(2) }
    }

    fn file(&self, node: u64) -> Result<Arc<File>, Errno> {
        {
            let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(at) = files.iter().position(|(known, _)| *known == node)
                && let Some(known) = files.remove(at)
            {
                let file = Arc::clone(&known.1);
                files.push_front(known);
                return Ok(file);
            }
        }
        let file = Arc::new(self.image.file(&self.inode(node)?).map_err(errno)?);
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.truncate(FILES - 1);
        files.push_front((node, Arc::clone(&file)));
        Ok(file)
    }

    /// Entries from `offset` on, as many as `to` holds: 0 is `.`, 1 is `..`, the others follow.
    fn read_dir(&self, node: u64, offset: u64, plus: bool, to: &mut [u8]) -> Result<usize, Errno> {
        let directory = self.inode(node)?;
        let mut out = Listing { to, used: 0 };
        let mut at = offset;
        for name in [&b"."[..], b".."].into_iter().skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
            let number = if name == b"." { directory.number } else { directory.parent().unwrap_or(directory.number) };
            if !out.add(name, number, FileType::Directory, at + 1, plus.then(EntryOut::default)) {
                return Ok(out.used);
            }
            at += 1;
        }
        let mut entries = self.listing(&directory, node, at)?;
        loop {
            let here = entries.clone();
            let Some(entry) = entries.next() else { break };
            let entry = entry.map_err(errno)?;
            // What cannot be read is shown, and says so when it is used.
            let known = plus.then(|| {
                self.image.inode(entry.inode).map_or_else(|_| EntryOut::default(), |inode| self.entry(&inode))
            });
            if !out.add_entry(&entry, at + 1, known) {
                let mut listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
                listings.truncate(LISTINGS - 1);
                listings.push_front((node, at, here));
                break;
            }
            at += 1;
        }
        Ok(out.used)
    }

    /// What comes at `offset` in a listing.
    fn listing(&self, directory: &Inode, node: u64, offset: u64) -> Result<Entries<'a>, Errno> {
        {
            let mut listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(at) = listings.iter().position(|known| (known.0, known.1) == (node, offset))
                && let Some((_, _, entries)) = listings.remove(at)
            {
                return Ok(entries);
            }
        }
        let mut entries = self.image.read_dir(directory).map_err(errno)?;
        for _ in 2..offset {
            match entries.next() {
                Some(entry) => entry.map_err(errno)?,
                None => break,
            };
        }
        Ok(entries)
    }

    fn statfs(&self) -> StatfsOut {
        let block = self.image.block_size();
        StatfsOut {
            blocks: self.image.size().div_ceil(block.into()),
            files: self.image.inodes().into(),
            block_size: block,
            fragment_size: block,
            name_length: 255,
            ..StatfsOut::default()
        }
    }
}

/// An answer to READDIR or READDIRPLUS.
struct Listing<'b> {
    to: &'b mut [u8],
    used: usize,
}

impl Listing<'_> {
    fn add_entry(&mut self, entry: &Entry, next: u64, known: Option<EntryOut>) -> bool {
        self.add(&entry.name, entry.number, entry.file_type, next, known)
    }

    /// Says whether there was room.
    fn add(&mut self, name: &[u8], number: u32, file_type: FileType, next: u64, known: Option<EntryOut>) -> bool {
        let dirent = Dirent {
            ino: number.into(),
            offset: next,
            name_length: name.len() as u32,
            file_type: file_type.mode() >> 12,
        };
        let known = known.as_ref().map(IntoBytes::as_bytes).unwrap_or_default();
        let size = (known.len() + size_of::<Dirent>() + name.len()).next_multiple_of(8);
        let Some(to) = self.to.get_mut(self.used..).and_then(|rest| rest.get_mut(..size)) else { return false };
        to.fill(0);
        let mut to = to.iter_mut();
        for (byte, &value) in to.by_ref().zip(known.iter().chain(dirent.as_bytes()).chain(name)) {
            *byte = value;
        }
        self.used += size;
        true
    }
}

fn init(body: &[u8], to: &mut [u8]) -> Result<Answer, Errno> {
    let (request, _) = InitIn::read_from_prefix(body).map_err(|_| Errno::INVAL)?;
    let wanted = abi::ASYNC_READ
        | abi::DO_READDIRPLUS
        | abi::READDIRPLUS_AUTO
        | abi::NO_OPEN_SUPPORT
        | abi::PARALLEL_DIROPS
        | abi::MAX_PAGES
        | abi::CACHE_SYMLINKS
        | abi::NO_OPENDIR_SUPPORT;
    let answer = InitOut {
        major: abi::MAJOR,
        minor: abi::MINOR,
        max_readahead: request.max_readahead,
        flags: wanted & request.flags,
        max_background: MAX_BACKGROUND,
        congestion_threshold: MAX_BACKGROUND / 4 * 3,
        max_write: 4096,
        time_gran: 1_000_000_000,
        max_pages: MAX_PAGES,
        ..InitOut::default()
    };
    put(to, answer.as_bytes())
}

fn put(to: &mut [u8], bytes: &[u8]) -> Result<Answer, Errno> {
    to.get_mut(..bytes.len()).ok_or(Errno::OVERFLOW)?.copy_from_slice(bytes);
    Ok(Answer::Bytes(bytes.len()))
}

fn read_in(body: &[u8]) -> Result<ReadIn, Errno> {
    ReadIn::read_from_prefix(body).map(|(request, _)| request).map_err(|_| Errno::INVAL)
}

fn errno(error: Error) -> Errno {
    match error {
        Error::Read(code) => Errno::from_raw_os_error(code),
        _ => Errno::IO,
    }
}
