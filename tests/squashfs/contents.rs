//! What our own reader finds in an image.

use std::collections::HashMap;

use spank_pyxis::squashfs::reader::{self, FileType, Image, Inode};

use crate::tree::{self, Content, Kind, Node, Tree};

/// Most entries.
pub const LIMIT: u64 = 1_000_000;

/// All that is in an image.
pub fn read(image: &Image) -> Result<Tree, reader::Error> {
    let (mut tree, mut inodes) = (Tree::new(), HashMap::new());
    let root = image.inode(image.root())?;
    inodes.insert(Vec::new(), root.reference);
    tree.insert(Vec::new(), node(image, &root)?);
    let mut names: Vec<Box<[u8]>> = Vec::new();
    for visit in image.walk(LIMIT)? {
        let visit = visit?;
        names.truncate(visit.depth);
        names.push(visit.entry.name);
        assert_eq!(visit.entry.number, visit.inode.number);
        assert_eq!(visit.entry.file_type, visit.inode.file_type());
        let path = names.join(&b'/');
        inodes.insert(path.clone(), visit.inode.reference);
        tree.insert(path, node(image, &visit.inode)?);
    }
    tree::link(&mut tree, &inodes);
    Ok(tree)
}

fn node(image: &Image, inode: &Inode) -> Result<Node, reader::Error> {
    let kind = match inode.file_type() {
        FileType::Regular => Kind::File { size: inode.size(), content: content(image, inode)? },
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink(image.read_link(inode)?),
        FileType::Fifo => Kind::Fifo,
        FileType::Character if inode.device() == Some((0, 0)) => Kind::Whiteout,
        FileType::Character | FileType::Block | FileType::Socket => Kind::Device,
    };
    let xattrs = match kind {
        Kind::File { .. } | Kind::Directory => image.xattrs(inode)?,
        _ => Vec::new(),
    };
    Ok(Node {
        kind,
        mode: inode.permissions.into(),
        owner: (inode.uid, inode.gid),
        mtime: (inode.mtime.into(), 0),
        nlink: inode.nlink.into(),
        xattrs: xattrs.into_iter().map(|xattr| (xattr.name, xattr.value)).collect(),
        same_as: Vec::new(),
    })
}

/// The content, read in odd pieces; what is in no extent must be zeros.
fn content(image: &Image, inode: &Inode) -> Result<u64, reader::Error> {
    let file = image.file(inode)?;
    let mut content = Content::default();
    let mut buffer = vec![0; (37 * Content::BLOCK).min(file.size() + 1) as usize];
    for (offset, length) in image.data_extents(&file)? {
        let mut at = offset;
        while at < offset + length {
            let wanted = buffer.len().min((offset + length - at) as usize);
            let read = image.read_at(&file, at, &mut buffer[..wanted])?;
            assert_eq!(read, wanted);
            for (block, number) in buffer[..read].chunks(Content::BLOCK as usize).zip(at / Content::BLOCK..) {
                content.block(number, block);
            }
            at += read as u64;
        }
    }
    assert_eq!(image.read_at(&file, file.size(), &mut buffer)?, 0);
    Ok(content.finish())
}
