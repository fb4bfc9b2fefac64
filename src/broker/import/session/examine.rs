//! What rules ask for besides an image's name.

use super::Session;
use crate::broker::import::{ImportError, one_line, permit};
use crate::image::digest::Digest;
use crate::importer::protocol::{Command, Report};
use crate::policy::{Evidence, Keys, Subject};

/// Most documents by which an image may have been found.
const MAX_DOCUMENTS: usize = 8;
/// Longest description of what an image has instead of a signature.
const MAX_PROBLEM: usize = 500;

impl Session<'_, '_> {
    /// Whether the image with this manifest, which has been resolved, may be used, and by what that is known: the first digest
    /// is what its name means. It was found before by the indexes `ancestors`, which its manifest's digest does not lead to.
    ///
    /// The importer is believed about it, as it is about which layers belong to a manifest: who could make it lie could
    /// make it deliver anything.
    pub fn examine(
        &mut self,
        subject: &Subject,
        manifest: Digest,
        ancestors: Vec<Digest>,
    ) -> Result<Evidence, ImportError> {
        let (mut digests, _) = self.ask(None, &[])?;
        if !digests.contains(&manifest) {
            return Err(self.misbehaves("the manifest is not among its digests"));
        }
        for digest in ancestors.iter().take(MAX_DOCUMENTS) {
            if !digests.contains(digest) {
                digests.push(*digest);
            }
        }
        let mut evidence = Evidence { digests, keys: vec![] };
        let Some(keys) = permit::known(self.settings, subject, &evidence)? else { return Ok(evidence) };
        let (_, signature) = self.ask(Some(&keys), &evidence.digests)?;
        match signature {
            Ok(key) => evidence.keys.push(key),
            Err(problem) => return Err(ImportError::Policy(keys.refusal(&one_line(&problem, MAX_PROBLEM)))),
        }
        Ok(evidence)
    }

    /// The image's digests, and the digest of a key that has signed one of `signed`, or why there is none.
    fn ask(
        &mut self,
        keys: Option<&Keys>,
        signed: &[Digest],
    ) -> Result<(Vec<Digest>, Result<Digest, String>), ImportError> {
        let texts = keys.map(|keys| keys.texts.clone()).unwrap_or_default();
        let sent = self.importer.channel.send(&Command::Examine { keys: texts, digests: signed.to_vec() }, &[]);
        self.sent(sent)?;
        loop {
            match self.next_report(None)? {
                Some((Report::Examined { digests, signed_by, problem }, _)) if digests.len() <= MAX_DOCUMENTS => {
                    let key = signed_by.map(|index| keys.and_then(|keys| keys.digests.get(index)).copied());
                    let signature = match key {
                        Some(Some(key)) => Ok(key),
                        Some(None) => return Err(self.misbehaves("a key that it was not given")),
                        None => Err(problem),
                    };
                    return Ok((digests, signature));
                }
                Some((report, _)) => return Err(self.unexpected(&report)),
                None => {}
            }
        }
    }
}
