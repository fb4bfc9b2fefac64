//! The administrator's rules: asked before anything of an image is used, whether a registry has to be asked for it or not.

use std::path::Path;

use spank_pyxis::broker::import::{AcquiredImage, ImportError};
use spank_pyxis::config::Config;
use spank_pyxis::importer::protocol::{Command, Report};
use spank_pyxis::policy::Policy;

use crate::fake::{Answer, FakeImporter, Registries, Repository, answer, digest};
use crate::{Site, site};

const UID: u32 = 1001;
const IMAGE: &str = "host.example/app";

fn policy(text: &str) -> Policy {
    Config::parse(text, Path::new("/x.toml")).unwrap().policy
}

fn registries() -> Registries {
    Registries::new([(IMAGE, Repository::with("gzip", &["base", "top"]))])
}

fn denied(result: Result<AcquiredImage, ImportError>) -> String {
    match result {
        Err(ImportError::Policy(message)) => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_denied_is_not_even_asked_for() {
    let mut site = site();
    let registries = registries();
    let importer = FakeImporter::honest(&registries);
    let deny = policy("[[policy]]\nname = \"ours only\"\naction = \"deny\"\nrepository = [\"a*\"]\n");
    site.settings.policy = deny.clone();
    let message = denied(site.acquire(&importer, UID, IMAGE));
    assert_eq!(message, "image host.example/app:latest is denied by rule 1 (\"ours only\") of this site's policy");
    assert_eq!(registries.counts(), (0, 0, 0));
    // That it is in the store changes nothing.
    site.settings.policy = Policy::default();
    site.acquire(&importer, UID, IMAGE).unwrap();
    registries.counts();
    site.settings.policy = deny;
    denied(site.acquire(&importer, UID, IMAGE));
    assert_eq!(registries.counts(), (0, 0, 0));
}

#[test]
fn a_digest_is_denied_however_the_image_is_called() {
    let mut site = site();
    let registries = registries();
    let importer = FakeImporter::honest(&registries);
    let manifest = site.acquire(&importer, UID, IMAGE).unwrap().manifest;
    let deny = policy(&format!("[[policy]]\naction = \"deny\"\ndigest = [\"{manifest}\"]\n"));
    registries.change("host.example/other", |other| *other = Repository::with("gzip", &["base", "top"]));
    registries.counts();
    site.settings.policy = deny;
    // From the store, and from a registry: where it is known before any layer is asked for.
    denied(site.acquire(&importer, UID, IMAGE));
    assert_eq!(registries.counts(), (0, 0, 0));
    denied(site.acquire(&importer, UID, "host.example/other"));
    assert_eq!(registries.counts(), (1, 0, 0));
    registries.change(IMAGE, |app| app.push("next", "gzip", &["base", "new"]));
    site.acquire(&importer, UID, "host.example/app:next").unwrap();
}

/// Honest, except that it has seen a signature of the first key.
const SIGNED: Answer = |served, command, descriptors| match command {
    Command::Examine { keys, .. } => {
        let Report::Resolved { manifest, .. } = served.resolved() else { unreachable!() };
        let signed_by = (!keys.is_empty()).then_some(0);
        served.report(&Report::Examined { digests: vec![manifest], signed_by, problem: String::new() });
    }
    command => answer(served, command, descriptors),
};

fn demanding(site: &Site, text: &str) -> Policy {
    let key = site.directory.path().join("key.pub");
    std::fs::write(&key, text).unwrap();
    policy(&format!("[[policy]]\naction = \"allow\"\nsigned_by = [\"{}\"]\n", key.display()))
}

#[test]
fn a_signature_counts_as_long_as_its_key_does() {
    let mut site = site();
    let registries = registries();
    let unsigned = FakeImporter::honest(&registries);
    let signed = FakeImporter { registries: registries.clone(), answer: SIGNED };
    site.acquire(&unsigned, UID, IMAGE).unwrap();
    site.settings.policy = demanding(&site, "one");
    registries.counts();
    // Nobody has looked for a signature so far: the registry is asked for one.
    let message = denied(site.acquire(&unsigned, UID, IMAGE));
    assert!(message.ends_with("not signed with a key of that rule (it has no signatures)"), "{message}");
    assert_eq!(registries.counts(), (1, 0, 0));
    site.acquire(&signed, UID, IMAGE).unwrap();
    registries.counts();
    // It is remembered like the confirmation.
    assert!(!site.acquire(&unsigned, UID, IMAGE).unwrap().from_network);
    assert_eq!(registries.counts(), (0, 0, 0));
    demanding(&site, "two");
    denied(site.acquire(&unsigned, UID, IMAGE));
}

#[test]
fn an_importer_cannot_make_up_an_answer() {
    let mut site = site();
    site.settings.policy = demanding(&site, "one");
    let lies: [(&str, Answer); 3] = [
        ("a key that it was not given", |served, command, descriptors| match command {
            Command::Examine { .. } => {
                let Report::Resolved { manifest, .. } = served.resolved() else { unreachable!() };
                let signed_by = Some(7);
                served.report(&Report::Examined { digests: vec![manifest], signed_by, problem: String::new() });
            }
            command => answer(served, command, descriptors),
        }),
        ("the manifest is not among its digests", |served, command, descriptors| match command {
            Command::Examine { .. } => {
                let digests = vec![digest("something else")];
                served.report(&Report::Examined { digests, signed_by: None, problem: String::new() });
            }
            command => answer(served, command, descriptors),
        }),
        ("digests that nobody asked for", |served, command, descriptors| match command {
            Command::Examine { .. } => {
                let digests = vec![digest("x"); 9];
                served.report(&Report::Examined { digests, signed_by: None, problem: String::new() });
            }
            command => answer(served, command, descriptors),
        }),
    ];
    for (expected, answer) in lies {
        let importer = FakeImporter { registries: registries(), answer };
        let error = site.acquire(&importer, UID, IMAGE).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        site.assert_tidy();
        assert!(site.layers().is_empty());
    }
}

#[test]
fn users_and_groups_have_names() {
    let mut site = site();
    site.settings.executable = env!("CARGO_BIN_EXE_pyxis").into();
    let importer = FakeImporter::honest(&registries());
    let deny = |condition: &str| policy(&format!("[[policy]]\naction = \"deny\"\n{condition}\n"));
    for (condition, is_denied) in [
        ("user = [\"nobody\"]", false),
        ("user = [\"root\", 1001]", true),
        ("group = [\"root\", \"daemon\"]", false),
        ("group = [\"1001\"]", true),
    ] {
        site.settings.policy = deny(condition);
        assert_eq!(site.acquire(&importer, UID, IMAGE).is_err(), is_denied, "{condition}");
    }
    // Neither a file nor a directory service knows it.
    site.settings.policy = deny("group = [\"no-such-group\"]");
    let message = denied(site.acquire(&importer, UID, IMAGE));
    assert!(message.ends_with("cannot be applied: this node knows no group no-such-group"), "{message}");
}
