//! What refers to a document (OCI distribution specification 1.1, "Listing Referrers").

#![forbid(unsafe_code)]

use ureq::http::header::{ACCEPT, LINK};
use ureq::http::{HeaderMap, HeaderValue, Method, StatusCode};

use super::client::Client;
use super::error::RegistryError;
use crate::image::digest::Digest;
use crate::image::manifest::MAX_MANIFEST_BYTES;

/// Most pages of a list that are looked at.
const MAX_PAGES: usize = 8;
const INDEX: HeaderValue = HeaderValue::from_static("application/vnd.oci.image.index.v1+json");

impl Client {
    /// The pages of the list of what refers to `digest`: indexes. A registry that keeps no such list has it under `tag`, or not
    /// at all.
    pub fn referrers(&self, digest: &Digest, tag: &str) -> Result<Vec<Vec<u8>>, RegistryError> {
        let list = format!("referrers/{digest}");
        let (mut pages, mut path) = (Vec::new(), list.clone());
        while pages.len() < MAX_PAGES {
            let mut ask = self.ask(Method::GET, &path, format!("what refers to {digest}"))?;
            ask.headers.insert(ACCEPT, INDEX);
            let (bytes, headers) = match self.whole(&ask, MAX_MANIFEST_BYTES, &mut self.backoff()) {
                Err(error) if pages.is_empty() && knows_no_referrers(&error) => return self.tagged(tag),
                answer => answer?,
            };
            pages.push(bytes);
            match next_page(&headers, &format!("/v2/{}/", self.endpoint().repository), &list) {
                Some(next) => path = next,
                None => break,
            }
        }
        Ok(pages)
    }

    fn tagged(&self, tag: &str) -> Result<Vec<Vec<u8>>, RegistryError> {
        match self.manifest(tag) {
            Ok(index) => Ok(vec![index.bytes]),
            Err(error) if error.is_not_found() => Ok(vec![]),
            Err(error) => Err(error),
        }
    }
}

/// Whether an answer is that of a registry from before there was such a list: what it knows of the path is nothing.
fn knows_no_referrers(error: &RegistryError) -> bool {
    let RegistryError::Status { status, .. } = error else { return false };
    [StatusCode::NOT_FOUND, StatusCode::BAD_REQUEST, StatusCode::METHOD_NOT_ALLOWED, StatusCode::NOT_IMPLEMENTED]
        .contains(status)
}

/// Where the list goes on, behind `base`: as RFC 8288 says it, and in the same list only.
fn next_page(headers: &HeaderMap, base: &str, list: &str) -> Option<String> {
    let link = headers.get(LINK)?.to_str().ok()?;
    let (target, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
    if !parameters.replace('"', "").contains("rel=next") {
        return None;
    }
    let (_, path) = target.split_once(base)?;
    path.strip_prefix(list).is_some_and(|query| query.starts_with('?')).then(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_go_on_where_they_say() {
        let next = |link: &str| {
            let headers = HeaderMap::from_iter([(LINK, HeaderValue::from_str(link).unwrap())]);
            next_page(&headers, "/v2/team/image/", "referrers/sha256:00")
        };
        let good = Some("referrers/sha256:00?n=5&last=x".to_owned());
        assert_eq!(next("</v2/team/image/referrers/sha256:00?n=5&last=x>; rel=\"next\""), good);
        assert_eq!(next("<https://reg.io/v2/team/image/referrers/sha256:00?n=5&last=x>;rel=next"), good);
        for link in [
            "</v2/team/image/referrers/sha256:00?n=5>; rel=\"prev\"",
            "</v2/team/image/referrers/sha256:00>; rel=\"next\"",
            "</v2/team/image/referrers/sha256:01?n=5>; rel=\"next\"",
            "</v2/team/other/referrers/sha256:00?n=5>; rel=\"next\"",
            "</v2/team/image/manifests/latest?x>; rel=\"next\"",
            "rel=\"next\"",
        ] {
            assert_eq!(next(link), None, "{link}");
        }
        assert_eq!(next_page(&HeaderMap::new(), "/", "x"), None);
    }
}
