//! One layer: blob in, verified EROFS image out, in one pass and three threads.
//!
//! ```text
//! network ─▶ sha256 ═pipe═▶ inflate ─▶ sha256 ═pipe═▶ tar ─▶ EROFS ─▶ file
//! ```

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::thread;

use sha2::{Digest as _, Sha256};

use super::inflate::Inflate;
use super::pipe::{self, Broken, Reader, Writer};
use super::protocol::LayerDescriptor;
use crate::image::digest::Digest;
use crate::import::{LayerError, LayerLimits, LayerSummary, write_layer};
use crate::registry::places::Useless;

/// Enough for the deepest stage, TLS included, also without optimisation.
const STACK: usize = 1 << 20;
/// How many bytes are read for nothing but to know whether a blob that cannot be used is the right one.
const MOST_TO_DIAGNOSE: usize = 64 << 20;

/// Why a layer could not be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The blob could not be read. The source says why.
    #[error("{0}")]
    Download(#[source] io::Error),
    /// Other bytes than the descriptor's.
    #[error("its blob has the digest {0}: somebody changed it, or it was damaged on its way")]
    BlobDigest(Digest),
    /// Another tar stream than the config's.
    #[error("it unpacks to {0} and not to {1}, which the image config names: the image is broken, build it again")]
    DiffId(Digest, Digest),
    /// The compressed stream is damaged.
    #[error("malformed {0} stream: {1}")]
    Inflate(&'static str, #[source] io::Error),
    /// The tar stream is no layer, exceeds a limit, or the image cannot be written.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// Another stage failed and knows why.
    #[error(transparent)]
    Broken(#[from] Broken),
    /// The stream is malformed, and of the blob too much was left to see whether it was damaged.
    #[error(transparent)]
    Undiagnosed(Box<ImportError>),
    /// No threads.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
}

impl ImportError {
    /// Whether another download may help, as far as one can tell.
    pub fn sorted(self) -> Useless<Self> {
        match self {
            Self::BlobDigest(_) | Self::Undiagnosed(_) => Useless::Damaged(self),
            Self::Download(_) => Useless::Unavailable(self),
            _ => Useless::Anyway(self),
        }
    }
}

/// Imports the layer `descriptor`, whose blob `blob` reads, into `out`. `progress` is called with the bytes that have
/// arrived. On failure the content of `out` is undefined.
pub fn import(
    blob: impl Read + Send,
    descriptor: &LayerDescriptor,
    out: &File,
    limits: &LayerLimits,
    progress: impl FnMut(u64) + Send,
) -> Result<LayerSummary, ImportError> {
    stream(blob, Some(&descriptor.blob), &descriptor.diff_id, progress, |tar| write_layer(tar, out, limits))
}

/// The same for a layer whose blob has no digest of its own, as in an archive of `docker save`: the diffID tells whether
/// it is the right one.
pub fn import_by_diff_id(
    blob: impl Read + Send,
    diff_id: &Digest,
    out: &File,
    limits: &LayerLimits,
    progress: impl FnMut(u64) + Send,
) -> Result<LayerSummary, ImportError> {
    stream(blob, None, diff_id, progress, |tar| write_layer(tar, out, limits))
}

/// Gives `consume` the uncompressed stream of the layer whose blob `blob` reads. The blob's digest, if it has one, and the
/// diffID have been checked if this succeeds, not before: `consume` has to read to the end, and what it made is of no use
/// otherwise.
pub fn stream<T>(
    mut blob: impl Read + Send,
    digest: Option<&Digest>,
    diff_id: &Digest,
    mut progress: impl FnMut(u64) + Send,
    consume: impl FnOnce(Reader) -> Result<T, LayerError>,
) -> Result<T, ImportError> {
    let (to_inflate, from_download) = pipe::pipe();
    let (to_tar, from_inflate) = pipe::pipe();
    thread::scope(|scope| {
        let start = |name: &str| thread::Builder::new().name(name.to_owned()).stack_size(STACK);
        let download = start("download")
            .spawn_scoped(scope, move || download(&mut blob, to_inflate, digest, &mut progress))
            .map_err(ImportError::Thread)?;
        let inflate = start("inflate")
            .spawn_scoped(scope, move || inflate(from_download, to_tar, diff_id))
            .map_err(ImportError::Thread)?;
        // Consumes the reader: the other stages fail if this one does.
        let written = consume(from_inflate).map_err(|error| match error {
            LayerError::Read(error) if pipe::is_broken(&error) => Broken.into(),
            error => ImportError::Layer(error),
        });
        // A stage does not panic; if one did, its peers see a broken pipe.
        let downloaded = download.join().unwrap_or(Err(Broken.into()));
        let inflated = inflate.join().unwrap_or(Err(Broken.into()));
        let undiagnosed = matches!(downloaded, Err(ImportError::Broken(_)));
        // A stage that only saw its neighbour go does not know the reason.
        let outcomes = [downloaded, inflated, written.as_ref().map(|_| ()).map_err(|_| Broken.into())];
        match outcomes.into_iter().filter_map(Result::err).find(|error| !matches!(error, ImportError::Broken(_))) {
            Some(error @ (ImportError::Inflate(..) | ImportError::Layer(LayerError::Malformed { .. })))
                if undiagnosed =>
            {
                Err(ImportError::Undiagnosed(error.into()))
            }
            Some(error) => Err(error),
            None => written,
        }
    })
}

fn download(
    blob: &mut impl Read,
    to: Writer,
    expected: Option<&Digest>,
    progress: &mut impl FnMut(u64),
) -> Result<(), ImportError> {
    let Some(expected) = expected else {
        pump_all(blob, &to, ImportError::Download, |bytes| progress(bytes.len() as u64))?;
        to.finish();
        return Ok(());
    };
    let mut hash = Sha256::new();
    let inspect = |bytes: &[u8]| {
        hash.update(bytes);
        progress(bytes.len() as u64);
    };
    let passed_on = pump_all(blob, &to, ImportError::Download, inspect);
    if matches!(passed_on, Err(ImportError::Broken(_))) {
        // What a later stage could not read may have been damaged on its way here: that is the better reason.
        hash_the_rest(blob, &mut hash)?;
    } else {
        passed_on?;
    }
    match digest(hash) {
        actual if actual == *expected => {
            to.finish();
            Ok(())
        }
        actual => Err(ImportError::BlobDigest(actual)),
    }
}

/// Reads what is left of a blob, if it is not much.
fn hash_the_rest(blob: &mut impl Read, hash: &mut Sha256) -> Result<(), Broken> {
    let mut buffer = vec![0; pipe::BUFFER];
    for _ in 0..MOST_TO_DIAGNOSE / pipe::BUFFER {
        match blob.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => hash.update(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(Broken),
        }
    }
    Err(Broken)
}

fn inflate(from: Reader, to: Writer, expected: &Digest) -> Result<(), ImportError> {
    let failed = |name| {
        move |error: io::Error| {
            if pipe::is_broken(&error) { Broken.into() } else { ImportError::Inflate(name, error) }
        }
    };
    let mut stream = Inflate::new(from).map_err(failed("compressed"))?;
    let name = stream.name();
    let mut hash = Sha256::new();
    pump_all(&mut stream, &to, failed(name), |bytes| hash.update(bytes))?;
    match digest(hash) {
        actual if actual == *expected => {
            to.finish();
            Ok(())
        }
        actual => Err(ImportError::DiffId(actual, *expected)),
    }
}

fn pump_all(
    from: &mut impl Read,
    to: &Writer,
    failed: impl Fn(io::Error) -> ImportError,
    mut inspect: impl FnMut(&[u8]),
) -> Result<(), ImportError> {
    while to.pump(from, &failed, &mut inspect)? {}
    Ok(())
}

fn digest(hash: Sha256) -> Digest {
    Digest::from_bytes(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;
    use crate::registry::sha256;

    const LIMITS: LayerLimits = LayerLimits { max_bytes: 64 << 20, max_entries: 1000 };

    /// A ustar archive with one file of `size` bytes.
    fn tar(size: usize) -> Vec<u8> {
        let mut header = [0u8; 512];
        header[..4].copy_from_slice(b"file");
        header[100..107].copy_from_slice(b"0000644");
        header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        header[136..147].copy_from_slice(b"00000000000");
        header[156] = b'0';
        header[257..263].copy_from_slice(b"ustar\0");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        let mut archive = header.to_vec();
        archive.extend((0..size).map(|at| (at * 7 % 253) as u8));
        archive.resize(archive.len().next_multiple_of(512) + 1024, 0);
        archive
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn descriptor(blob: &[u8], tar: &[u8]) -> LayerDescriptor {
        LayerDescriptor { blob: sha256(blob), diff_id: sha256(tar), size: blob.len() as u64 }
    }

    fn run(blob: &[u8], descriptor: &LayerDescriptor, limits: &LayerLimits) -> Result<LayerSummary, ImportError> {
        let out = tempfile::tempfile().unwrap();
        let mut received = 0;
        let outcome = import(blob, descriptor, &out, limits, |bytes| received += bytes);
        if outcome.is_ok() {
            assert_eq!(received, blob.len() as u64);
        }
        outcome
    }

    #[test]
    fn compressed_or_not_it_is_the_same_image() {
        let tar = tar(3_000_000);
        for blob in [tar.clone(), gzip(&tar), zstd::encode_all(&tar[..], 3).unwrap()] {
            let summary = run(&blob, &descriptor(&blob, &tar), &LIMITS).unwrap();
            assert_eq!(summary.unpacked, tar.len() as u64);
            assert!(summary.image > 3_000_000);
        }
    }

    #[test]
    fn damage_on_the_way_is_the_reason_wherever_it_shows() {
        let tar = tar(5_000_000);
        for (blob, at) in [(tar.clone(), 100), (tar.clone(), 3_000_000), (gzip(&tar), 20), (gzip(&tar), 2_000)] {
            let mut damaged = blob.clone();
            damaged[at] ^= 0x55;
            let error = run(&damaged, &descriptor(&blob, &tar), &LIMITS).unwrap_err();
            assert!(matches!(error, ImportError::BlobDigest(_)), "{error}");
        }
    }

    #[test]
    fn what_follows_the_archive_counts_for_the_digest() {
        let mut tar = tar(10);
        tar.extend(b"garbage".repeat(100_000));
        let blob = gzip(&tar);
        let summary = run(&blob, &descriptor(&blob, &tar), &LIMITS).unwrap();
        assert_eq!(summary.unpacked, tar.len() as u64);
    }

    #[test]
    fn lies_are_found_out() {
        let (tar, other) = (tar(2_000_000), tar(2_000_001));
        let blob = gzip(&tar);
        let good = descriptor(&blob, &tar);
        let wrong_blob = LayerDescriptor { blob: sha256(b"x"), ..good.clone() };
        let wrong_diff = LayerDescriptor { diff_id: sha256(&other), ..good.clone() };
        let cut = &blob[..blob.len() - 9];
        let limit = |max_bytes, max_entries| LayerLimits { max_bytes, max_entries };
        for (blob, descriptor, limits, message) in [
            (&blob[..], &wrong_blob, LIMITS, format!("its blob has the digest {}", good.blob)),
            (&blob, &wrong_diff, LIMITS, format!("it unpacks to {} and not to {}", good.diff_id, wrong_diff.diff_id)),
            (cut, &descriptor(cut, &tar), LIMITS, "malformed gzip stream".into()),
            (b"no tar", &descriptor(b"no tar", b"no tar"), LIMITS, "malformed layer".into()),
            (&blob, &good, limit(1_000_000, 1000), "larger than the limit".into()),
            (&blob, &good, limit(64 << 20, 0), "more files".into()),
        ] {
            let error = run(blob, descriptor, &limits).unwrap_err().to_string();
            assert!(error.contains(&message), "{message}: {error}");
            assert!(!error.contains('\n'));
        }
    }

    #[test]
    fn a_failing_source_is_the_reason() {
        struct Failing;
        impl Read for Failing {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("the cable was cut"))
            }
        }
        let tar = tar(5_000_000);
        let source = (&tar[..4_000_000]).chain(Failing);
        let out = tempfile::tempfile().unwrap();
        let error = import(source, &descriptor(&tar, &tar), &out, &LIMITS, |_| {}).unwrap_err();
        assert!(matches!(&error, ImportError::Download(cause) if cause.to_string() == "the cable was cut"), "{error}");
    }

    #[test]
    fn a_file_that_cannot_be_written_is_the_reason() {
        let tar = tar(5_000_000);
        let out = File::open("/dev/null").unwrap();
        let error = import(&tar[..], &descriptor(&tar, &tar), &out, &LIMITS, |_| {}).unwrap_err();
        assert!(matches!(error, ImportError::Layer(LayerError::Write(_))), "{error}");
    }
}
