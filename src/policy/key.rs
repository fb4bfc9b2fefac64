//! Public keys in PEM (RFC 7468), as `cosign generate-key-pair` and `openssl pkey -pubout` write them: a
//! SubjectPublicKeyInfo (RFC 5280, section 4.1) of an ECDSA key on P-256, of an RSA key or of an Ed25519 key.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{self, UnparsedPublicKey, VerificationAlgorithm};

const BEGIN: &str = "-----BEGIN PUBLIC KEY-----";
const END: &str = "-----END PUBLIC KEY-----";

/// The contents of an AlgorithmIdentifier: id-ecPublicKey with prime256v1 (RFC 5480), rsaEncryption with NULL (RFC 3279),
/// id-Ed25519 (RFC 8410).
const P256: &[u8] = b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07";
const RSA: &[u8] = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00";
const ED25519: &[u8] = b"\x06\x03\x2b\x65\x70";

/// A public key.
pub struct PublicKey {
    algorithm: &'static dyn VerificationAlgorithm,
    key: Vec<u8>,
}

impl std::fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PublicKey").field("algorithm", &self.algorithm).finish_non_exhaustive()
    }
}

/// Why a text is no key that can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKey {
    /// No PEM.
    #[error("not a public key in PEM (\"{BEGIN}\")")]
    Pem,
    /// Not the structure it should be.
    #[error("malformed public key")]
    Malformed,
    /// Another algorithm.
    #[error("a public key of another kind than ECDSA P-256, RSA and Ed25519")]
    Algorithm,
}

impl PublicKey {
    /// Reads the first public key in `text`.
    pub fn from_pem(text: &str) -> Result<Self, InvalidKey> {
        let (_, rest) = text.split_once(BEGIN).ok_or(InvalidKey::Pem)?;
        let (body, _) = rest.split_once(END).ok_or(InvalidKey::Pem)?;
        let body: String = body.split_ascii_whitespace().collect();
        let der = STANDARD.decode(body).map_err(|_| InvalidKey::Pem)?;
        Self::from_der(&der).ok_or(InvalidKey::Malformed)?
    }

    /// Reads a SubjectPublicKeyInfo. `None` if it is none.
    fn from_der(der: &[u8]) -> Option<Result<Self, InvalidKey>> {
        let (info, rest) = element(der, 0x30)?;
        let (algorithm, bits) = element(info, 0x30)?;
        let (bits, behind) = element(bits, 0x03)?;
        let (unused, key) = bits.split_first()?;
        if !rest.is_empty() || !behind.is_empty() || *unused != 0 {
            return None;
        }
        let algorithm: &'static dyn VerificationAlgorithm = match algorithm {
            // An uncompressed point.
            P256 if key.len() == 65 && key.first() == Some(&4) => &signature::ECDSA_P256_SHA256_ASN1,
            ED25519 if key.len() == 32 => &signature::ED25519,
            RSA => &signature::RSA_PKCS1_2048_8192_SHA256,
            P256 | ED25519 => return None,
            _ => return Some(Err(InvalidKey::Algorithm)),
        };
        Some(Ok(Self { algorithm, key: key.to_vec() }))
    }

    /// Whether `signature` is one of `message` made with this key.
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(self.algorithm, &self.key).verify(message, signature).is_ok()
    }
}

/// The contents of the DER element with `tag` at the beginning of `bytes`, and what follows it.
fn element(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (first, rest) = bytes.split_first()?;
    let (&length, rest) = rest.split_first()?;
    if *first != tag {
        return None;
    }
    let (length, rest) = match length {
        0..=0x7f => (usize::from(length), rest),
        0x81 | 0x82 => {
            let (digits, rest) = rest.split_at_checked(usize::from(length & 0x7f))?;
            (digits.iter().fold(0, |sum, digit| sum << 8 | usize::from(*digit)), rest)
        }
        _ => return None,
    };
    rest.split_at_checked(length)
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    /// Runs OpenSSL, an independent judge.
    fn openssl(arguments: &[&str]) {
        let output = Command::new("openssl").args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn text(path: &Path) -> &str {
        path.to_str().unwrap()
    }

    /// A new key pair `NAME.key`, `NAME.pub` in `directory`; returns the public key's text.
    pub fn generate(directory: &Path, name: &str, kind: &[&str]) -> String {
        let (private, public) = (directory.join(format!("{name}.key")), directory.join(format!("{name}.pub")));
        openssl(&[&["genpkey"], kind, &["-out", text(&private)]].concat());
        openssl(&["pkey", "-in", text(&private), "-pubout", "-out", text(&public)]);
        std::fs::read_to_string(public).unwrap()
    }

    pub const EC: [&str; 4] = ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"];

    /// A signature of `message` with the key `NAME.key`.
    pub fn sign(directory: &Path, name: &str, message: &[u8], prehash: bool) -> Vec<u8> {
        let (input, output) = (directory.join("message"), directory.join("signature"));
        std::fs::write(&input, message).unwrap();
        let key = directory.join(format!("{name}.key"));
        let (key, input, output_name) = (text(&key), text(&input), text(&output));
        if prehash {
            openssl(&["dgst", "-sha256", "-sign", key, "-out", output_name, input]);
        } else {
            openssl(&["pkeyutl", "-sign", "-rawin", "-inkey", key, "-in", input, "-out", output_name]);
        }
        std::fs::read(output).unwrap()
    }

    #[test]
    fn verifies_what_openssl_signs() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let rsa = ["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"];
        let mut keys = Vec::new();
        for (name, kind, prehash) in
            [("ec", &EC[..], true), ("rsa", &rsa, true), ("ed", &["-algorithm", "ED25519"], false)]
        {
            let pem = generate(directory, name, kind);
            let key = PublicKey::from_pem(&format!("comment\n{pem}")).unwrap();
            let signature = sign(directory, name, b"message", prehash);
            assert!(key.verifies(b"message", &signature), "{name}");
            assert!(!key.verifies(b"massage", &signature), "{name}");
            assert!(!key.verifies(b"message", &signature[1..]), "{name}");
            keys.push((key, signature));
        }
        for (at, (key, _)) in keys.iter().enumerate() {
            for (_, signature) in keys.iter().enumerate().filter(|(other, _)| *other != at).map(|(_, pair)| pair) {
                assert!(!key.verifies(b"message", signature));
            }
        }
    }

    #[test]
    fn other_keys_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let p384 = generate(directory.path(), "p384", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"]);
        assert_eq!(PublicKey::from_pem(&p384).unwrap_err(), InvalidKey::Algorithm);
        let pem = |der: &[u8]| format!("{BEGIN}\n{}\n{END}\n", STANDARD.encode(der));
        for (text, reason) in [
            (String::new(), InvalidKey::Pem),
            (pem(b"").replace("END", "ENE"), InvalidKey::Pem),
            (format!("{BEGIN}!{END}"), InvalidKey::Pem),
            (pem(b""), InvalidKey::Malformed),
            (pem(b"\x30\x80"), InvalidKey::Malformed),
            (pem(b"\x30\x83\x00\x00\x00"), InvalidKey::Malformed),
        ] {
            assert_eq!(PublicKey::from_pem(&text).unwrap_err(), reason, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = PublicKey::from_der(&bytes);
            let _ = PublicKey::from_pem(&String::from_utf8_lossy(&bytes));
        }
    }
}
