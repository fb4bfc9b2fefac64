//! Builds archives header by header, so that every oddity can be written down.

/// A tar archive being built.
#[derive(Debug, Clone, Default)]
pub struct Archive(pub Vec<u8>);

/// An entry's header in the GNU dialect.
#[derive(Debug, Clone)]
pub struct Header(pub [u8; 512]);

impl Header {
    pub fn new(path: &[u8], flag: u8, size: u64) -> Self {
        let mut header = Self([0; 512]);
        header.0[257..265].copy_from_slice(b"ustar  \0");
        header.0[156] = flag;
        header.put(0, &path[..path.len().min(100)]).mode(0o644).size(size).mtime(1_600_000_000)
    }

    pub fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub fn link(self, target: &[u8]) -> Self {
        self.put(157, &target[..target.len().min(100)])
    }

    pub fn mode(self, mode: u32) -> Self {
        self.put(100, format!("{mode:07o}\0").as_bytes())
    }

    pub fn size(self, size: u64) -> Self {
        match size {
            0..0o100000000000 => self.put(124, format!("{size:011o}\0").as_bytes()),
            _ => self.put(124, &[&b"\x80\0\0\0"[..], &size.to_be_bytes()].concat()),
        }
    }

    pub fn mtime(self, mtime: u64) -> Self {
        self.put(136, format!("{mtime:011o}\0").as_bytes())
    }

    /// With its checksum.
    pub fn done(self) -> [u8; 512] {
        let header = self.put(148, b"        ");
        let sum: u32 = header.0.iter().map(|&byte| u32::from(byte)).sum();
        header.put(148, format!("{sum:06o}\0 ").as_bytes()).0
    }
}

impl Archive {
    pub fn header(mut self, header: Header) -> Self {
        self.0.extend(header.done());
        self
    }

    /// Content and its padding.
    pub fn data(mut self, data: &[u8]) -> Self {
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// Any entry; long names in GNU's way.
    pub fn entry(self, path: &str, flag: u8, link: &str, mode: u32, data: &[u8]) -> Self {
        let long = |archive: Self, flag, text: &str| match text.len() {
            0..=100 => archive,
            _ => {
                let text = [text.as_bytes(), b"\0"].concat();
                archive.header(Header::new(b"././@LongLink", flag, text.len() as u64)).data(&text)
            }
        };
        long(long(self, b'L', path), b'K', link)
            .header(Header::new(path.as_bytes(), flag, data.len() as u64).link(link.as_bytes()).mode(mode))
            .data(data)
    }

    pub fn file(self, path: &str, data: &[u8]) -> Self {
        self.entry(path, b'0', "", 0o644, data)
    }

    pub fn directory(self, path: &str) -> Self {
        self.entry(path, b'5', "", 0o755, b"")
    }

    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(path, b'2', target, 0o777, b"")
    }

    pub fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(path, b'1', target, 0o644, b"")
    }

    /// An extended header; `flag` is `x` or `g`.
    pub fn pax(self, flag: u8, records: &[(&str, &[u8])]) -> Self {
        let mut text = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let length = (rest..).find(|length| length.to_string().len() + rest == *length).unwrap();
            text.extend(format!("{length} {key}=").as_bytes());
            text.extend(*value);
            text.push(b'\n');
        }
        self.header(Header::new(b"pax", flag, text.len() as u64)).data(&text)
    }

    /// All entries of `other`.
    pub fn append(mut self, other: &Self) -> Self {
        self.0.extend(&other.0);
        self
    }

    /// With the blocks that end an archive.
    pub fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}
