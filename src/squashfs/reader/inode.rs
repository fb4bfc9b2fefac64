//! Inodes.

use zerocopy::little_endian::U32;

use super::format::{
    self, BasicDirectory, BasicFile, DIRECTORY_EXTRA, Device, EXTENDED, ExtendedDirectory, ExtendedFile, FileType,
    InodeHeader, NONE_32,
};
use super::metadata::Position;
use super::{Error, Image};

/// Most bytes of a symbolic link's target: `PATH_MAX` less its NUL.
const SYMLINK_MAX: u32 = 4095;

/// Where an inode is: the same for all names of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InodeRef(u64);

impl InodeRef {
    /// From a number that [`InodeRef::number`] gave. Any number is safe: what is no inode is an error when it is read.
    pub fn new(number: u64) -> Self {
        Self(number)
    }

    /// As a number below 2⁴⁸ in a sound image.
    pub fn number(self) -> u64 {
        self.0
    }
}

/// A file of any type, without its names.
#[derive(Debug, Clone)]
pub struct Inode {
    /// Where it is.
    pub reference: InodeRef,
    /// Permissions: 0 to 0o7777.
    pub permissions: u16,
    /// Owner in the image.
    pub uid: u32,
    /// Group in the image.
    pub gid: u32,
    /// Modification time, seconds since 1970.
    pub mtime: u32,
    /// A serial number; nothing keeps a hostile image from using one twice.
    pub number: u32,
    /// Number of names.
    pub nlink: u32,
    pub(super) xattr: Option<u32>,
    pub(super) content: Content,
}

/// What depends on the type.
#[derive(Debug, Clone)]
pub(super) enum Content {
    Directory(DirectoryContent),
    File(FileContent),
    Symlink { size: u32, target: Position },
    Device { character: bool, number: u32 },
    Fifo,
    Socket,
}

#[derive(Debug, Clone)]
pub(super) struct DirectoryContent {
    /// Where the listing begins.
    pub listing: Position,
    /// Its bytes.
    pub size: u32,
    /// Entries of the index, and where they are.
    pub index: (u16, Position),
    /// Number of the directory it is in.
    pub parent: u32,
}

#[derive(Debug, Clone)]
pub(super) struct FileContent {
    pub size: u64,
    /// Address of the first data block.
    pub start: u64,
    /// Number of the fragment with the end, and offset in it.
    pub fragment: Option<(u32, u32)>,
    /// Where the sizes of the blocks are.
    pub blocks: Position,
    /// Whether the image says that there are holes.
    pub sparse: bool,
}

impl Inode {
    /// Its type.
    pub fn file_type(&self) -> FileType {
        match self.content {
            Content::Directory(_) => FileType::Directory,
            Content::File(_) => FileType::Regular,
            Content::Symlink { .. } => FileType::Symlink,
            Content::Device { character: true, .. } => FileType::Character,
            Content::Device { .. } => FileType::Block,
            Content::Fifo => FileType::Fifo,
            Content::Socket => FileType::Socket,
        }
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        matches!(self.content, Content::Directory(_))
    }

    /// Bytes of a file, of a link's target, or of a directory's listing.
    pub fn size(&self) -> u64 {
        match &self.content {
            Content::Directory(directory) => directory.size.into(),
            Content::File(file) => file.size,
            Content::Symlink { size, .. } => (*size).into(),
            Content::Device { .. } | Content::Fifo | Content::Socket => 0,
        }
    }

    /// Of a directory, the number of the one it is in, as the image says.
    pub fn parent(&self) -> Option<u32> {
        match &self.content {
            Content::Directory(directory) => Some(directory.parent),
            _ => None,
        }
    }

    /// Whether it has holes, as the image says.
    pub fn is_sparse(&self) -> bool {
        matches!(&self.content, Content::File(FileContent { sparse: true, .. }))
    }

    /// Major and minor number of a device.
    pub fn device(&self) -> Option<(u32, u32)> {
        match self.content {
            Content::Device { number, .. } => Some((number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xfff00)),
            _ => None,
        }
    }
}

impl Image {
    /// Reads an inode.
    pub fn inode(&self, reference: InodeRef) -> Result<Inode, Error> {
        let start = self.inode_position(reference.number());
        let mut cursor = self.blocks.cursor("inode", start);
        let header: InodeHeader = cursor.read()?;
        let number = header.inode_type.get();
        let extended = number > EXTENDED;
        let kind = FileType::new(if extended { number - EXTENDED } else { number });
        let kind = kind.ok_or_else(|| cursor.damaged("an unknown type"))?;
        let owner =
            |index: u16| self.id(index).ok_or(Error::damaged("inode", start.block, "an owner that is not there"));
        let (mut nlink, mut xattr) = (1, NONE_32);
        let directory_table = self.superblock().directory_table.get();
        let content = match (kind, extended) {
            (FileType::Directory, false) => {
                let directory: BasicDirectory = cursor.read()?;
                nlink = directory.nlink.get();
                Content::Directory(DirectoryContent {
                    listing: Position {
                        block: directory_table.saturating_add(directory.block.get().into()),
                        offset: directory.offset.get().into(),
                    },
                    size: u32::from(directory.size.get()).saturating_sub(DIRECTORY_EXTRA),
                    index: (0, cursor.position()),
                    parent: directory.parent.get(),
                })
            }
            (FileType::Directory, true) => {
                let directory: ExtendedDirectory = cursor.read()?;
                (nlink, xattr) = (directory.nlink.get(), directory.xattr.get());
                Content::Directory(DirectoryContent {
                    listing: Position {
                        block: directory_table.saturating_add(directory.block.get().into()),
                        offset: directory.offset.get().into(),
                    },
                    size: directory.size.get().saturating_sub(DIRECTORY_EXTRA),
                    index: (directory.index.get(), cursor.position()),
                    parent: directory.parent.get(),
                })
            }
            (FileType::Regular, false) => {
                let file: BasicFile = cursor.read()?;
                Content::File(FileContent {
                    size: file.size.get().into(),
                    start: file.start.get().into(),
                    fragment: fragment(file.fragment, file.offset),
                    blocks: cursor.position(),
                    sparse: false,
                })
            }
            (FileType::Regular, true) => {
                let file: ExtendedFile = cursor.read()?;
                (nlink, xattr) = (file.nlink.get(), file.xattr.get());
                if i64::try_from(file.size.get()).is_err() {
                    return Err(cursor.damaged("a file larger than any file can be"));
                }
                Content::File(FileContent {
                    size: file.size.get(),
                    start: file.start.get(),
                    fragment: fragment(file.fragment, file.offset),
                    blocks: cursor.position(),
                    sparse: file.sparse.get() > 0,
                })
            }
            (FileType::Symlink, _) => {
                let link: format::Symlink = cursor.read()?;
                nlink = link.nlink.get();
                let (size, target) = (link.size.get(), cursor.position());
                if size == 0 || size > SYMLINK_MAX {
                    return Err(cursor.damaged("a symbolic link to an empty or too long path"));
                }
                if extended {
                    cursor.skip(size.into())?;
                    xattr = cursor.read::<U32>()?.get();
                }
                Content::Symlink { size, target }
            }
            (FileType::Block | FileType::Character, _) => {
                let device: Device = cursor.read()?;
                nlink = device.nlink.get();
                if extended {
                    xattr = cursor.read::<U32>()?.get();
                }
                Content::Device { character: kind == FileType::Character, number: device.number.get() }
            }
            (FileType::Fifo | FileType::Socket, _) => {
                nlink = cursor.read::<U32>()?.get();
                if extended {
                    xattr = cursor.read::<U32>()?.get();
                }
                if kind == FileType::Fifo { Content::Fifo } else { Content::Socket }
            }
        };
        Ok(Inode {
            reference,
            permissions: header.mode.get() & 0o7777,
            uid: owner(header.uid.get())?,
            gid: owner(header.gid.get())?,
            mtime: header.mtime.get(),
            number: header.number.get(),
            nlink,
            xattr: (xattr != NONE_32).then_some(xattr),
            content,
        })
    }

    /// The target of a symbolic link.
    pub fn read_link(&self, inode: &Inode) -> Result<Vec<u8>, Error> {
        let Content::Symlink { size, target } = inode.content else {
            return Err(Error::damaged("inode", inode.reference.number(), "not a symbolic link"));
        };
        let mut bytes = vec![0; size as usize];
        let mut cursor = self.blocks.cursor("symbolic link", target);
        cursor.read_exact(&mut bytes)?;
        match bytes.contains(&0) {
            true => Err(cursor.damaged("a NUL in the target")),
            false => Ok(bytes),
        }
    }
}

fn fragment(index: U32, offset: U32) -> Option<(u32, u32)> {
    (index.get() != NONE_32).then_some((index.get(), offset.get()))
}
