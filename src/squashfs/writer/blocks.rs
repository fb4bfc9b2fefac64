//! Data blocks: what files consist of, compressed by several threads and written in order.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufWriter, Write};

use super::Options;
use super::compress::Compressor;
use super::pool::{Block, Pool, compress};

/// In the size of a block: it is stored as it is.
const STORED: u32 = 1 << 24;

/// A regular file's data: an index into [`BlockWriter::data`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataId(pub u32);

/// Where a regular file's data is.
#[derive(Debug, Clone, Default)]
pub struct Data {
    /// Bytes of the file.
    pub size: u64,
    /// Bytes in blocks that are not stored, all of them zero.
    pub sparse: u64,
    /// Offset of the first block in the image.
    pub start: u64,
    /// Stored size of each block with [`STORED`]; 0 for one that is not.
    pub blocks: Vec<u32>,
    /// Number of the fragment block with the rest of the file, and offset in it.
    pub fragment: Option<(u32, u32)>,
}

#[derive(Debug)]
struct Pending {
    target: Target,
    /// `None` until a thread is done with it.
    block: Option<Block>,
}

#[derive(Debug, Clone, Copy)]
enum Target {
    Data(DataId),
    Fragment,
}

/// Writes data and fragment blocks, and remembers where they are.
#[derive(Debug)]
pub struct BlockWriter {
    output: BufWriter<File>,
    position: u64,
    block_size: usize,
    compress_data: bool,
    compress_fragments: bool,
    fragments: bool,
    tail_ends: bool,
    sparse: bool,
    data: Vec<Data>,
    /// Offset and stored size of the fragment blocks.
    fragment_table: Vec<(u64, u32)>,
    /// The fragment block being filled, and how many are before it.
    fragment: Vec<u8>,
    fragments_begun: u32,
    workers: Workers,
    pending: VecDeque<Pending>,
    /// Number of the first pending block.
    first: u64,
    /// Most pending blocks.
    limit: usize,
    spare: Vec<Vec<u8>>,
}

#[derive(Debug)]
enum Workers {
    /// Compresses where it stands.
    None(Compressor),
    Pool(Pool),
}

impl BlockWriter {
    /// Writes to `file`, from offset 0 on: `header` first, which has the superblock in it.
    pub fn new(file: File, header: &[u8], options: &Options) -> io::Result<Self> {
        let compressor = || Compressor::new(options.compression, options.level(), options.block_size);
        let compresses = options.compress_data || options.compress_fragments;
        let workers = match options.threads {
            threads if threads > 1 && compresses => {
                Workers::Pool(Pool::new((0..threads).map(|_| compressor()).collect::<io::Result<_>>()?)?)
            }
            _ => Workers::None(compressor()?),
        };
        let mut output = BufWriter::with_capacity(64 << 10, file);
        output.write_all(header)?;
        Ok(Self {
            output,
            position: header.len() as u64,
            block_size: options.block_size,
            compress_data: options.compress_data,
            compress_fragments: options.compress_fragments,
            fragments: options.fragments,
            tail_ends: options.tail_ends,
            sparse: options.sparse,
            data: Vec::new(),
            fragment_table: Vec::new(),
            fragment: Vec::with_capacity(options.block_size),
            fragments_begun: 0,
            workers,
            pending: VecDeque::new(),
            first: 0,
            limit: 2 * options.threads + 2,
            spare: Vec::new(),
        })
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Begins a file.
    pub fn begin(&mut self) -> io::Result<DataId> {
        let id = u32::try_from(self.data.len()).map_err(|_| io::Error::other("too many files"))?;
        self.data.push(Data::default());
        Ok(DataId(id))
    }

    fn entry(&mut self, id: DataId) -> &mut Data {
        &mut self.data[id.0 as usize]
    }

    /// A buffer of [`BlockWriter::block_size`] bytes' capacity, empty.
    pub fn buffer(&mut self) -> Vec<u8> {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.reserve_exact(self.block_size);
        buffer
    }

    /// Takes back a buffer that was not used.
    pub fn recycle(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < self.limit && buffer.capacity() > 0 {
            self.spare.push(buffer);
        }
    }

    /// Appends a whole block to a file.
    pub fn block(&mut self, id: DataId, block: Vec<u8>) -> io::Result<()> {
        self.entry(id).size += block.len() as u64;
        if self.sparse && is_zero(&block) {
            let length = block.len() as u64;
            self.recycle(block);
            return self.hole(id, length);
        }
        self.push(Target::Data(id), block, self.compress_data)
    }

    /// Appends `count` whole blocks of zeros to a file.
    pub fn holes(&mut self, id: DataId, count: u64) -> io::Result<()> {
        for _ in 0..count {
            let length = self.block_size as u64;
            self.entry(id).size += length;
            self.hole(id, length)?;
        }
        Ok(())
    }

    fn hole(&mut self, id: DataId, length: u64) -> io::Result<()> {
        self.entry(id).sparse += length;
        // In turn: the sizes of the blocks before it may not be known yet.
        self.queue(Pending {
            target: Target::Data(id),
            block: Some(Block { bytes: Vec::new(), compressed: true, spare: Vec::new() }),
        })
    }

    /// Ends a file with what is left of it, less than a block.
    pub fn end(&mut self, id: DataId, rest: Vec<u8>) -> io::Result<()> {
        let whole = self.entry(id).size > 0;
        if rest.is_empty() {
            self.recycle(rest);
            return Ok(());
        }
        if !self.fragments || whole && !self.tail_ends {
            return self.block(id, rest);
        }
        if self.fragment.len() + rest.len() > self.block_size {
            self.flush_fragment()?;
        }
        let place = (self.fragments_begun, self.fragment.len() as u32);
        self.fragment.extend_from_slice(&rest);
        let entry = self.entry(id);
        entry.size += rest.len() as u64;
        entry.fragment = Some(place);
        self.recycle(rest);
        Ok(())
    }

    fn flush_fragment(&mut self) -> io::Result<()> {
        let next = self.buffer();
        let block = std::mem::replace(&mut self.fragment, next);
        self.fragments_begun =
            self.fragments_begun.checked_add(1).ok_or_else(|| io::Error::other("too many fragments"))?;
        self.push(Target::Fragment, block, self.compress_fragments)
    }

    fn push(&mut self, target: Target, block: Vec<u8>, compressed: bool) -> io::Result<()> {
        let block = if !compressed {
            Some(Block { bytes: block, compressed: false, spare: Vec::new() })
        } else {
            let mut output = self.spare.pop().unwrap_or_default();
            match &mut self.workers {
                Workers::None(compressor) => Some(compress(compressor, block, &mut output)?),
                Workers::Pool(pool) => {
                    pool.submit(self.first + self.pending.len() as u64, block, output)?;
                    None
                }
            }
        };
        self.queue(Pending { target, block })
    }

    fn queue(&mut self, pending: Pending) -> io::Result<()> {
        self.pending.push_back(pending);
        while self.pending.front().is_some_and(|first| first.block.is_some()) || self.pending.len() >= self.limit {
            self.write_first()?;
        }
        Ok(())
    }

    /// Writes the first pending block, when it is ready.
    fn write_first(&mut self) -> io::Result<()> {
        while self.pending.front().is_some_and(|first| first.block.is_none()) {
            let Workers::Pool(pool) = &self.workers else { return Err(io::Error::other("a block is missing")) };
            let (number, block) = pool.receive()?;
            let index = usize::try_from(number - self.first).unwrap_or(usize::MAX);
            if let Some(pending) = self.pending.get_mut(index) {
                pending.block = Some(block);
            }
        }
        let Some(Pending { target, block: Some(block) }) = self.pending.pop_front() else { return Ok(()) };
        self.first += 1;
        self.output.write_all(&block.bytes)?;
        let start = self.position;
        self.position += block.bytes.len() as u64;
        // Blocks have 1 MiB at most.
        let size = block.bytes.len() as u32 | if block.compressed { 0 } else { STORED };
        match target {
            Target::Data(id) => {
                let entry = self.entry(id);
                if entry.blocks.is_empty() {
                    entry.start = start;
                }
                entry.blocks.push(size);
            }
            Target::Fragment => self.fragment_table.push((start, size)),
        }
        self.recycle(block.bytes);
        self.recycle(block.spare);
        Ok(())
    }

    /// Writes what is left.
    pub fn finish(mut self) -> io::Result<Blocks> {
        if !self.fragment.is_empty() {
            self.flush_fragment()?;
        }
        while !self.pending.is_empty() {
            self.write_first()?;
        }
        Ok(Blocks { output: self.output, position: self.position, data: self.data, fragments: self.fragment_table })
    }
}

/// All blocks of an image, written.
#[derive(Debug)]
pub struct Blocks {
    /// The image, for what follows.
    pub output: BufWriter<File>,
    /// Its length.
    pub position: u64,
    /// By [`DataId`].
    pub data: Vec<Data>,
    /// Offset and stored size of the fragment blocks.
    pub fragments: Vec<(u64, u32)>,
}

/// Whether there is nothing but zeros.
fn is_zero(bytes: &[u8]) -> bool {
    // The first words decide almost always.
    let (head, rest) = bytes.split_at(bytes.len().min(64));
    head.iter().all(|&byte| byte == 0) && rest.chunks(4096).all(|chunk| chunk.iter().fold(0, |or, byte| or | byte) == 0)
}
