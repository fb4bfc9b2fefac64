//! `ENROOT_SQUASH_OPTIONS`: the options of mksquashfs that concern the image, as people write them (behaviour reference,
//! section 10.2).

use std::num::NonZero;

use super::compress::Compression;

/// What enroot passes to mksquashfs unless told otherwise.
pub const DEFAULT_OPTIONS: &str = "-comp lzo -noD -exit-on-error";

const MIN_BLOCK: usize = 4096;
const MAX_BLOCK: usize = 1 << 20;

/// How an image is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Compression of everything that is compressed.
    pub compression: Compression,
    /// `-Xcompression-level`
    pub level: Option<u32>,
    /// `-b`: bytes of a block, a power of two from 4 KiB to 1 MiB.
    pub block_size: usize,
    /// Not `-noI`.
    pub compress_inodes: bool,
    /// Not `-noD`.
    pub compress_data: bool,
    /// Not `-noF`.
    pub compress_fragments: bool,
    /// Not `-noX`.
    pub compress_xattrs: bool,
    /// Not `-noId`.
    pub compress_ids: bool,
    /// Not `-no-fragments`: what is smaller than a block shares one with others.
    pub fragments: bool,
    /// `-tailends`: so does the last block of larger files.
    pub tail_ends: bool,
    /// Not `-no-exports`: the image can be exported by NFS, and overlayfs can find its files again.
    pub exports: bool,
    /// Not `-no-xattrs`.
    pub xattrs: bool,
    /// Not `-no-sparse`.
    pub sparse: bool,
    /// Not `-nopad`: to whole pages, so that it can be mounted by a loop device.
    pub pad: bool,
    /// `-processors`: threads that compress.
    pub threads: usize,
    /// `SOURCE_DATE_EPOCH` or `-mkfs-time`: seconds since 1970 that the image says it was made at; later times of files
    /// become this one. The clock decides if it is `None`.
    pub time: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            compression: Compression::Lzo,
            level: None,
            block_size: 128 << 10,
            compress_inodes: true,
            compress_data: false,
            compress_fragments: true,
            compress_xattrs: true,
            compress_ids: true,
            fragments: true,
            tail_ends: false,
            exports: true,
            xattrs: true,
            sparse: true,
            pad: true,
            threads: std::thread::available_parallelism().map_or(1, NonZero::get),
            time: None,
        }
    }
}

/// Why mksquashfs would refuse them, too.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// A compression of another program, or none at all.
    #[error("ENROOT_SQUASH_OPTIONS: unknown compression \"{0}\"; known are gzip, lzo, xz, lz4 and zstd")]
    Compression(String),
    /// A number that is none, or out of range.
    #[error("ENROOT_SQUASH_OPTIONS: {0}: \"{1}\" is not {2}")]
    Value(String, String, &'static str),
    /// The last word wants another one.
    #[error("ENROOT_SQUASH_OPTIONS: {0}: argument missing")]
    Missing(String),
}

impl Options {
    /// Reads `text` (words separated by blanks) and returns with the options the words that are ignored because nobody
    /// here knows them. What is none of the image's business (`-progress`, `-mem`, …) has no effect.
    pub fn parse(text: &str) -> Result<(Self, Vec<String>), OptionsError> {
        // Without `-noD`, mksquashfs compresses data; without `-comp`, with gzip.
        let mut options = Self { compression: Compression::Gzip, compress_data: true, ..Self::default() };
        let mut unknown = Vec::new();
        let mut words = text.split_ascii_whitespace();
        while let Some(word) = words.next() {
            let mut argument = || words.next().ok_or_else(|| OptionsError::Missing(word.to_owned()));
            let name = word.strip_prefix('-').unwrap_or_default();
            match name.strip_prefix('-').unwrap_or(name) {
                "comp" => {
                    let name = argument()?;
                    options.compression = name.parse().map_err(|()| OptionsError::Compression(name.to_owned()))?;
                    options.level = None;
                }
                "b" => {
                    let text = argument()?;
                    options.block_size = size(text)
                        .and_then(|size| usize::try_from(size).ok())
                        .filter(|size| size.is_power_of_two() && (MIN_BLOCK..=MAX_BLOCK).contains(size))
                        .ok_or_else(|| value(word, text, "a power of two from 4K to 1M"))?;
                }
                "Xcompression-level" => {
                    let text = argument()?;
                    let (levels, _) = options
                        .compression
                        .levels()
                        .ok_or_else(|| value(word, text, "an option of this compression"))?;
                    let level = text.parse().ok().filter(|level| levels.contains(level));
                    options.level = Some(level.ok_or_else(|| value(word, text, "a level of this compression"))?);
                }
                "processors" => {
                    let text = argument()?;
                    let count = text.parse().ok().filter(|count| (1..=1024).contains(count));
                    options.threads = count.ok_or_else(|| value(word, text, "a number of processors"))?;
                }
                "mkfs-time" | "fstime" => {
                    let text = argument()?;
                    let time = text.parse().map_err(|_| value(word, text, "a number of seconds since 1970"))?;
                    options.time = Some(time);
                }
                "noI" | "noInodeCompression" => options.compress_inodes = false,
                "noId" | "noIdTableCompression" => options.compress_ids = false,
                "noD" | "noDataCompression" => options.compress_data = false,
                "noF" | "noFragmentCompression" => options.compress_fragments = false,
                "noX" | "noXattrCompression" => options.compress_xattrs = false,
                "no-compression" => {
                    options.compress_inodes = false;
                    options.compress_ids = false;
                    options.compress_data = false;
                    options.compress_fragments = false;
                    options.compress_xattrs = false;
                }
                "no-fragments" => options.fragments = false,
                "no-tailends" => options.tail_ends = false,
                "tailends" | "always-use-fragments" => options.tail_ends = true,
                "no-exports" => options.exports = false,
                "exports" => options.exports = true,
                "no-xattrs" => options.xattrs = false,
                "xattrs" => options.xattrs = true,
                "no-sparse" => options.sparse = false,
                "nopad" => options.pad = false,
                // How mksquashfs works and what it says; what is always so here.
                "exit-on-error" | "noappend" | "all-root" | "root-owned" | "no-duplicates" | "no-progress"
                | "progress" | "quiet" | "info" | "percentage" | "no-recovery" | "reproducible"
                | "not-reproducible" | "Xhc" => {}
                "mem" | "mem-percent" | "read-queue" | "write-queue" | "fragment-queue" | "throttle" | "limit"
                | "recovery-path" | "Xalgorithm" | "Xdict-size" | "Xwindow-size" | "Xstrategy" | "Xbcj" => {
                    argument()?;
                }
                _ => unknown.push(word.to_owned()),
            }
        }
        Ok((options, unknown))
    }

    /// Takes the time from the value of `SOURCE_DATE_EPOCH`, if it is a number.
    #[must_use]
    pub fn with_source_date_epoch(mut self, value: Option<&str>) -> Self {
        self.time = value.and_then(|value| value.parse().ok()).or(self.time);
        self
    }

    /// The level in use; 0 for a compression without levels.
    pub(super) fn level(&self) -> u32 {
        let default = self.compression.levels().map_or(0, |(_, default)| default);
        self.level.unwrap_or(default)
    }
}

fn value(word: &str, text: &str, expected: &'static str) -> OptionsError {
    OptionsError::Value(word.to_owned(), text.to_owned(), expected)
}

/// A number of bytes, with `K` or `M`.
fn size(text: &str) -> Option<u64> {
    let (number, unit) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 1 << 10),
        b'M' | b'm' => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Options {
        let (options, unknown) = Options::parse(text).unwrap();
        assert_eq!(unknown, Vec::<String>::new(), "{text}");
        options
    }

    #[test]
    fn the_default_is_that_of_enroot() {
        assert_eq!(parse(DEFAULT_OPTIONS), Options::default());
        let plain = parse("");
        assert_eq!((plain.compression, plain.compress_data), (Compression::Gzip, true));
    }

    #[test]
    fn options_people_use() {
        let options =
            parse("-comp zstd -Xcompression-level 3 -b 1M -processors 2 -no-fragments -noI -noF -noX -mem 4G");
        assert_eq!(options.compression, Compression::Zstd);
        assert_eq!((options.level(), options.block_size, options.threads), (3, 1 << 20, 2));
        assert!(!options.fragments && !options.compress_inodes && !options.compress_fragments);
        assert!(options.compress_data);
        assert_eq!(parse("-comp gzip -b 131072 -noappend -no-progress").block_size, 128 << 10);
        assert_eq!(parse("-mkfs-time 7").with_source_date_epoch(Some("9")).time, Some(9));
        assert_eq!(parse("-mkfs-time 7").with_source_date_epoch(Some("x")).time, Some(7));
    }

    #[test]
    fn what_is_not_known_is_named() {
        let (_, unknown) = Options::parse("-comp gzip -e dev stray").unwrap();
        assert_eq!(unknown, ["-e", "dev", "stray"]);
        for (text, message) in [
            ("-comp lzma", "unknown compression \"lzma\""),
            ("-comp", "-comp: argument missing"),
            ("-b 5K", "-b: \"5K\" is not a power of two"),
            ("-b 2M", "-b: \"2M\""),
            ("-b K", "-b: \"K\""),
            ("-comp gzip -Xcompression-level 10", "-Xcompression-level: \"10\""),
            ("-comp lz4 -Xcompression-level 1", "not an option of this compression"),
            ("-processors 0", "-processors: \"0\""),
        ] {
            let error = Options::parse(text).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_judged(text in "(-[a-zA-Z-]{0,8}|[0-9KMµ]{0,5}| ){0,8}") {
            let _ = Options::parse(&text);
        }
    }
}
