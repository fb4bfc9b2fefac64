use proptest::prelude::*;

use super::*;

/// `alice` is 1000 and `staff` 50.
struct Known;

impl Accounts for Known {
    fn uid(&self, name: &str) -> Result<u32, String> {
        if name == "alice" { Ok(1000) } else { Err(format!("there is no user {name}")) }
    }

    fn gid(&self, name: &str) -> Result<u32, String> {
        if name == "staff" { Ok(50) } else { Err(format!("there is no group {name}")) }
    }
}

#[derive(Deserialize)]
struct File {
    policy: Policy,
}

fn policy(text: &str) -> Policy {
    let policy = toml::from_str::<File>(text).unwrap().policy;
    policy.check().unwrap();
    policy
}

fn user() -> User {
    User { uid: 1000, gid: 100, groups: vec![50, 60] }
}

fn image(typed: &str) -> Subject {
    Subject::registry(&user(), &ImageReference::parse(typed).unwrap())
}

fn digest(byte: u8) -> Digest {
    Digest::from_bytes([byte; 32])
}

/// Whether `subject` is allowed, or else the message.
fn judged(policy: &Policy, subject: &Subject, digests: &[Digest]) -> Result<(), String> {
    let evidence = Evidence { digests: digests.to_vec(), keys: vec![] };
    match policy.judge(subject, Some(&evidence), &Known) {
        Verdict::Allowed => Ok(()),
        Verdict::Denied(message) => Err(message),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_first_rule_that_fits_decides() {
    let policy = policy(
        r#"
        [[policy]]
        action = "allow"
        registry = ["docker.io"]
        repository = ["library/*"]
        [[policy]]
        name = "no hub"
        action = "deny"
        registry = ["docker.io", "*.evil.io"]
        message = "use our mirror"
        [[policy]]
        action = "deny"
        registry = ["nvcr.io"]
        repository = ["nvidia/**"]
        "#,
    );
    for allowed in ["alpine", "index.docker.io#library/x", "reg.io/a/b", "nvcr.io/other/x", "nvcr.io:5000/nvidia/x"] {
        assert_eq!(judged(&policy, &image(allowed), &[]), Ok(()), "{allowed}");
    }
    for denied in ["a/b", "registry-1.docker.io/a/b", "x.evil.io/a/b", "nvcr.io:443/nvidia/a/b", "NVCR.io/nvidia/x"] {
        assert!(judged(&policy, &image(denied), &[]).is_err(), "{denied}");
    }
    assert_eq!(
        judged(&policy, &image("a/b:1"), &[]).unwrap_err(),
        "image docker.io/a/b:1 is denied by rule 2 (\"no hub\") of this site's policy: use our mirror"
    );
    assert!(judged(&policy, &image("nvcr.io/nvidia/x"), &[]).unwrap_err().contains("by rule 3 of"));
}

#[test]
fn users_and_groups_are_those_of_the_job() {
    let denies = |condition: &str, user: User| {
        let policy = policy(&format!("[[policy]]\naction = \"deny\"\n{condition}"));
        let subject = Subject { user, ..image("x") };
        matches!(policy.judge(&subject, None, &Known), Verdict::Denied(_))
    };
    let other = User { uid: 1001, gid: 50, groups: vec![] };
    for (condition, mine, theirs) in [
        ("user = [\"alice\"]", true, false),
        ("user = [1001, 7]", false, true),
        ("user = [\"1000\"]", true, false),
        ("group = [\"staff\"]", true, true),
        ("group = [60]", true, false),
        ("group = [100]", true, false),
        ("user = [1000]\ngroup = [61]", false, false),
    ] {
        assert_eq!((denies(condition, user()), denies(condition, other.clone())), (mine, theirs), "{condition}");
    }
}

#[test]
fn an_unknown_name_denies_whomever_it_may_be_about() {
    let policy = policy("[[policy]]\naction = \"allow\"\nregistry = [\"a.io\"]\ngroup = [\"gone\"]\n");
    assert_eq!(judged(&policy, &image("b.io/x"), &[]), Ok(()));
    let message = judged(&policy, &image("a.io/x"), &[]).unwrap_err();
    assert_eq!(
        message,
        "image a.io/x:latest is denied because rule 1 of this site's policy cannot be applied: there is no group gone"
    );
}

#[test]
fn digests_are_those_of_manifest_and_index() {
    let text = format!("[[policy]]\naction = \"deny\"\ndigest = [\"{}\"]\n", digest(1));
    let policy = policy(&text);
    assert_eq!(policy.judge(&image("x"), None, &Known), Verdict::Undecided);
    assert!(judged(&policy, &image("x"), &[digest(2), digest(1)]).is_err());
    assert_eq!(judged(&policy, &image("x"), &[digest(2)]), Ok(()));
    // A squashfs file.
    assert_eq!(judged(&policy, &image("x"), &[]), Ok(()));
}

#[test]
fn files_and_engines_have_rules_of_their_own() {
    let policy = policy(
        "[[policy]]\naction = \"allow\"\nsource = [\"engine\"]\n[[policy]]\naction = \"allow\"\nregistry = [\"**\"]\n\
         [[policy]]\naction = \"deny\"\n",
    );
    let path = LocalImage::Path { path: "/x.sqsh".into(), form: None, name: None };
    let engine = LocalImage::Engine { engine: crate::request::Engine::Docker, name: "x".into() };
    assert!(judged(&policy, &Subject::local(&user(), &path, "/x.sqsh"), &[]).unwrap_err().contains("image /x.sqsh is"));
    assert_eq!(judged(&policy, &Subject::local(&user(), &engine, "dockerd://x"), &[]), Ok(()));
    assert_eq!(judged(&policy, &image("x"), &[]), Ok(()));
}

#[test]
fn a_signature_is_demanded_with_the_keys_of_the_rule() {
    let directory = tempfile::tempdir().unwrap();
    let key = directory.path().join("a.pub");
    std::fs::write(&key, "PEM").unwrap();
    let policy = policy(&format!("[[policy]]\naction = \"allow\"\nsigned_by = [\"{}\"]\n", key.display()));
    let Verdict::IfSigned(keys) = policy.judge(&image("x"), None, &Known) else { panic!() };
    assert_eq!(keys.texts, ["PEM"]);
    assert_eq!(
        keys.refusal("it has no signatures"),
        "image docker.io/library/x:latest is denied by rule 1 of this site's policy: it is not signed with a key of \
         that rule (it has no signatures)"
    );
    let signed = Evidence { digests: vec![], keys: keys.digests };
    assert_eq!(policy.judge(&image("x"), Some(&signed), &Known), Verdict::Allowed);
    // The key was replaced: what the old one has signed counts no more.
    std::fs::write(&key, "another").unwrap();
    assert!(matches!(policy.judge(&image("x"), Some(&signed), &Known), Verdict::IfSigned(_)));
    std::fs::remove_file(&key).unwrap();
    let Verdict::Denied(message) = policy.judge(&image("x"), None, &Known) else { panic!() };
    assert!(
        message.contains("cannot be applied") && message.ends_with("a.pub: No such file or directory"),
        "{message}"
    );
    let path = LocalImage::Path { path: "/x.sqsh".into(), form: None, name: None };
    let file = policy.judge(&Subject::local(&user(), &path, "/x.sqsh"), None, &Known);
    assert!(matches!(file, Verdict::Denied(message) if message.contains("demands a signature")));
}

#[test]
fn rules_without_sense_are_named() {
    for (rule, reason) in [
        ("action = \"deny\"\nsigned_by = [\"/x\"]", "policy: rule 1: signed_by says what is allowed"),
        ("action = \"allow\"\nsigned_by = [\"x\"]", "policy: rule 1: signed_by: must be absolute"),
        (
            "name = \"a\"\naction = \"deny\"\nsource = [\"file\"]\nregistry = [\"x\"]",
            "policy: rule 1 (\"a\"): only images",
        ),
    ] {
        let error = toml::from_str::<File>(&format!("[[policy]]\n{rule}\n")).unwrap().policy.check().unwrap_err();
        assert!(error.starts_with(reason), "{error}");
    }
    for rule in [
        "registry = [\"x\"]",
        "action = \"perhaps\"",
        "action = \"deny\"\nregistry = \"x\"",
        "action = \"deny\"\nregistry = [\"A b\"]",
        "action = \"deny\"\ndigest = [\"x\"]",
        "action = \"deny\"\nuser = [-1]",
        "action = \"deny\"\nuser = [\"a:b\"]",
        "action = \"deny\"\nsource = [\"tape\"]",
        "action = \"deny\"\nrepo = [\"x\"]",
    ] {
        assert!(toml::from_str::<File>(&format!("[[policy]]\n{rule}\n")).is_err(), "{rule}");
    }
}

proptest! {
    /// Everything but the order of rules is fixed here: the first that fits decides, by hand.
    #[test]
    fn order_is_all_that_counts(rules in proptest::collection::vec((any::<bool>(), 0usize..4), 0..8), at in 0usize..3) {
        let names = ["a.io", "b.io", "c.io", "**"];
        let text: String = rules
            .iter()
            .map(|(allow, name)| {
                let action = if *allow { "allow" } else { "deny" };
                format!("[[policy]]\naction = \"{action}\"\nregistry = [\"{}\"]\n", names[*name])
            })
            .collect();
        let policy = if rules.is_empty() { Policy::default() } else { policy(&text) };
        let expected = rules.iter().find(|(_, name)| *name == at || *name == 3).is_none_or(|(allow, _)| *allow);
        let verdict = policy.judge(&image(&format!("{}/x", names[at])), None, &Known);
        prop_assert_eq!(verdict == Verdict::Allowed, expected);
    }
}
