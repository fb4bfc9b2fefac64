//! Importers that say anything.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec};
use spank_pyxis::broker::import::{AcquireRequest, ImportError, ImportEvent, ImportSettings, Importer, StartImporter};
use spank_pyxis::importer::protocol::{Command, FailureKind, LayerDescriptor, Report};
use spank_pyxis::sys::channel::{self, Channel};
use spank_pyxis::sys::memfile;

use crate::fake::layer;
use crate::site;

/// One thing that an importer says.
#[derive(Debug, Clone)]
enum Say {
    Image(Vec<LayerDescriptor>, String),
    Confirmed(usize, bool),
    Progress(usize, u64),
    /// A layer, after writing so many bytes and announcing so many.
    Fetched(usize, usize, u64),
    Failed(String),
    Bytes(Vec<u8>),
}

/// Answers each command with one script, then hangs up.
#[derive(Debug)]
struct Scripted(Vec<Vec<Say>>);

impl StartImporter for Scripted {
    fn start(
        &self,
        _: &ImportSettings,
        _: AcquireRequest<'_>,
        _: &mut dyn FnMut(ImportEvent),
    ) -> Result<Importer, ImportError> {
        let (channel, end) = channel::pair().unwrap();
        let (credentials, _) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let scripts = self.0.clone();
        std::thread::spawn(move || {
            for script in scripts {
                // Broker and importer may both wait for the other: then this one hangs up.
                let mut command = [PollFd::new(&end, PollFlags::IN)];
                let pause = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
                if !matches!(rustix::event::poll(&mut command, Some(&pause)), Ok(1..)) {
                    return;
                }
                let Ok(Some((_, descriptors))) = end.receive() else { return };
                let mut descriptors = descriptors.into_iter();
                for say in script {
                    speak(&end, say, descriptors.next());
                }
            }
        });
        Ok(Importer { channel, descriptors: vec![credentials], site_files: vec![], process: None, reader: None })
    }
}

fn speak(channel: &Channel<Report, Command>, say: Say, file: Option<OwnedFd>) {
    let report = match say {
        Say::Image(layers, origin) => {
            let config = memfile::sealed("config", b"{}").unwrap();
            let manifest = layer("", "manifest").blob;
            let report = Report::Resolved { manifest, origin, layers, warnings: vec![] };
            let _ = channel.send(&report, &[config.as_fd()]);
            return;
        }
        Say::Confirmed(layer, allowed) => Report::Confirmed { layer, allowed },
        Say::Progress(layer, bytes) => Report::Progress { layer, bytes },
        Say::Fetched(layer, written, announced) => {
            let _ = file.map(|file| File::from(file).write_all(&vec![b'x'; written]));
            Report::Fetched { layer, unpacked: announced, image: announced }
        }
        Say::Failed(message) => Report::Failed { kind: FailureKind::Local, message },
        Say::Bytes(bytes) => {
            let _ = rustix::net::send(channel, &bytes, rustix::net::SendFlags::NOSIGNAL);
            return;
        }
    };
    let _ = channel.send(&report, &[]);
}

fn image() -> impl Strategy<Value = Say> {
    let layers = prop::collection::vec((0..3_u8, 0..3_u8, any::<u64>()), 0..5);
    let origin = prop_oneof![9 => Just("host.example/app".to_owned()), 1 => ".*"];
    (layers, origin).prop_map(|(layers, origin)| {
        let descriptor = |(blob, content, size): (u8, u8, u64)| LayerDescriptor {
            blob: layer("blob", &blob.to_string()).blob,
            size: size % 1000,
            ..layer("", &content.to_string())
        };
        Say::Image(layers.into_iter().map(descriptor).collect(), origin)
    })
}

fn say() -> impl Strategy<Value = Say> {
    prop_oneof![
        1 => image(),
        2 => (0..4_usize, any::<bool>()).prop_map(|(layer, allowed)| Say::Confirmed(layer, allowed)),
        2 => (0..4_usize, any::<u64>()).prop_map(|(layer, bytes)| Say::Progress(layer, bytes)),
        4 => (0..4_usize, 0..3_usize, 0..3_u64).prop_map(|(layer, written, announced)| Say::Fetched(layer, written, announced)),
        1 => ".*".prop_map(Say::Failed),
        1 => prop::collection::vec(any::<u8>(), 1..100).prop_map(Say::Bytes),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn whatever_an_importer_says_the_store_is_sound(
        first in image(),
        scripts in prop::collection::vec(prop::collection::vec(say(), 0..4), 0..8),
    ) {
        let site = site();
        let scripts = std::iter::once(vec![first]).chain(scripts).collect();
        match site.acquire(&Scripted(scripts), 1001, "host.example/app") {
            Ok(image) => prop_assert!(image.layers.iter().all(|layer| layer.file.metadata().unwrap().len() > 0)),
            Err(error) => prop_assert!(!error.to_string().contains('\n')),
        }
        site.assert_tidy();
        for name in site.layers() {
            prop_assert!(["0", "1", "2"].iter().any(|content| layer("", content).diff_id.hex() == name));
        }
    }
}
