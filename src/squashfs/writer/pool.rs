//! Threads that compress blocks.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::compress::Compressor;

/// A block as it goes into the image.
#[derive(Debug)]
pub struct Block {
    /// Compressed, unless that would have made it larger.
    pub bytes: Vec<u8>,
    /// Whether it is.
    pub compressed: bool,
    /// A buffer that is free again.
    pub spare: Vec<u8>,
}

struct Job {
    number: u64,
    input: Vec<u8>,
    output: Vec<u8>,
}

/// Threads that compress blocks. They end with it.
#[derive(Debug)]
pub struct Pool {
    jobs: Option<Sender<Job>>,
    results: Receiver<(u64, io::Result<Block>)>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// One thread for each of `compressors`.
    pub fn new(compressors: Vec<Compressor>) -> io::Result<Self> {
        let (jobs, queue) = channel::<Job>();
        let (done, results) = channel();
        let queue = Arc::new(Mutex::new(queue));
        let mut pool = Self { jobs: Some(jobs), results, threads: Vec::new() };
        for mut compressor in compressors {
            let (queue, done) = (Arc::clone(&queue), done.clone());
            let work = move || {
                while let Some(job) = next(&queue) {
                    let Job { number, input, mut output } = job;
                    let block = compress(&mut compressor, input, &mut output);
                    if done.send((number, block)).is_err() {
                        return;
                    }
                }
            };
            pool.threads.push(std::thread::Builder::new().name("squashfs".into()).spawn(work)?);
        }
        Ok(pool)
    }

    /// Has `input` compressed; `output` is a buffer to use. The caller bounds how many are under way.
    pub fn submit(&self, number: u64, input: Vec<u8>, output: Vec<u8>) -> io::Result<()> {
        let jobs = self.jobs.as_ref().ok_or_else(ended)?;
        jobs.send(Job { number, input, output }).map_err(|_| ended())
    }

    /// The next block that is done, in any order.
    pub fn receive(&self) -> io::Result<(u64, Block)> {
        let (number, block) = self.results.recv().map_err(|_| ended())?;
        Ok((number, block?))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Compresses one block.
pub fn compress(compressor: &mut Compressor, input: Vec<u8>, output: &mut Vec<u8>) -> io::Result<Block> {
    let compressed = compressor.compress(&input, output)?;
    let (bytes, spare) = if compressed { (std::mem::take(output), input) } else { (input, std::mem::take(output)) };
    Ok(Block { bytes, compressed, spare })
}

fn next(queue: &Mutex<Receiver<Job>>) -> Option<Job> {
    queue.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

fn ended() -> io::Error {
    io::Error::other("a compressing thread has ended")
}
