//! The places that may have the blobs of an image: where it was found, and the others that are configured for it.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;

use super::TROUBLE;
use super::client::Client;
use super::stream::BlobStream;
use crate::image::manifest::Descriptor;

/// How often a blob is downloaded that arrives damaged, or cannot be had.
const DOWNLOADS: usize = 3;

/// The places.
#[derive(Debug)]
pub struct Places {
    found: Arc<Client>,
    /// In the order in which they are configured.
    others: Vec<Arc<Client>>,
}

/// Why a download was of no use.
#[derive(Debug)]
pub enum Useless<E> {
    /// Other bytes came than were asked for: the next time they may be the right ones.
    Damaged(E),
    /// It cannot be had here.
    Unavailable(E),
    /// It would be of no use from anywhere.
    Anyway(E),
}

/// A blob that cannot be had.
#[derive(Debug)]
pub struct Undelivered<E> {
    /// Why not.
    pub error: E,
    /// If it came damaged: how often, from where, and what helps.
    pub again: Option<String>,
}

impl Places {
    /// The image was `found` at the first of them.
    pub fn new(found: Client, others: Vec<Client>) -> Self {
        Self { found: Arc::new(found), others: others.into_iter().map(Arc::new).collect() }
    }

    /// Where the image was found.
    pub fn found(&self) -> &Arc<Client> {
        &self.found
    }

    /// The other places.
    pub fn others(&self) -> impl Iterator<Item = &Client> + Clone {
        self.others.iter().map(AsRef::as_ref)
    }

    /// What `work` makes of a blob, and where it came from: again if it arrives damaged, and from another place, if there is
    /// one, in either case in which this one is of no use. `work` begins anew each time.
    pub fn download<T, E>(
        &self,
        blob: &Descriptor,
        mut work: impl FnMut(BlobStream) -> Result<T, Useless<E>>,
    ) -> Result<(T, &Arc<Client>), Undelivered<E>> {
        let mut waiting: VecDeque<&Arc<Client>> = self.others.iter().collect();
        let mut client = &self.found;
        let mut worst: Option<(bool, E)> = None;
        let mut asked: Vec<&str> = Vec::new();
        loop {
            asked.push(&client.endpoint().host);
            let this = match work(Arc::clone(client).blob_stream(blob)) {
                Ok(done) => return Ok((done, client)),
                Err(Useless::Anyway(error)) => return Err(Undelivered { error, again: None }),
                Err(Useless::Damaged(error)) => {
                    waiting.push_back(client);
                    (true, error)
                }
                Err(Useless::Unavailable(error)) => (false, error),
            };
            // That something came, and not the right thing, says more than that nothing came.
            let (damaged, error) = match worst.take() {
                Some(before) if before.0 || !this.0 => before,
                _ => this,
            };
            let Some(next) = waiting.pop_front().filter(|_| asked.len() < DOWNLOADS) else {
                let told =
                    || format!("downloaded {} times from {}: push the image again", asked.len(), asked.join(", "));
                return Err(Undelivered { error, again: damaged.then(told) });
            };
            client = next;
            let what = if damaged { "arrived damaged" } else { "cannot be had where its image is" };
            let host = &client.endpoint().host;
            tracing::info!(target: TROUBLE, "layer {} {what}: downloading it from {host}", blob.digest);
            worst = Some((damaged, error));
        }
    }
}
