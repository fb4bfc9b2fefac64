//! Challenges, tokens and passwords.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use spank_pyxis::importer::protocol::FailureKind;

use crate::broker::{Entries, Import};
use crate::content::{Compression, Content, tar};
use crate::server::{Reply, Request, Server};

const SECRET: &str = "s3cret:with colon";

/// A token server that gives `user` with [`SECRET`] the token `t1`, then `t2`, …, and others `anonymous`.
fn token_server(field: &'static str) -> (Server, Arc<AtomicUsize>) {
    let issued = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&issued);
    let server = Server::start(move |request| {
        let token = match request.header("authorization") {
            None => "anonymous".to_owned(),
            // user:s3cret:with colon
            Some("Basic dXNlcjpzM2NyZXQ6d2l0aCBjb2xvbg==") => {
                format!("t{}", counter.fetch_add(1, Ordering::SeqCst) + 1)
            }
            Some(_) => return Reply::status(401).body(r#"{"errors": [{"code": "UNAUTHORIZED", "message": "bad"}]}"#),
        };
        Reply::ok(format!(r#"{{"{field}": "{token}", "expires_in": 300}}"#))
    });
    (server, issued)
}

fn bearer(request: &Request) -> Option<&str> {
    request.header("authorization")?.strip_prefix("Bearer ")
}

/// A registry that wants a token which `accepts`, from the token server at `realm`.
fn guarded(content: Content, realm: String, accepts: impl Fn(&str) -> bool + Send + Sync + 'static) -> Server {
    Server::start(move |request| match bearer(request) {
        Some(token) if accepts(token) => content.answer(request),
        _ => Reply::status(401).header("WWW-Authenticate", "Negotiate").header(
            "WWW-Authenticate",
            format!(r#"Bearer realm="http://{realm}/token?x=y", service="a, b" ,scope="repository:some/image:pull""#),
        ),
    })
}

#[test]
fn an_anonymous_token_is_enough_for_public_images() {
    for field in ["token", "access_token"] {
        let (tokens, _) = token_server(field);
        let registry = guarded(Content::simple(1000), tokens.host(), |token| token == "anonymous");
        Import::new("some/image", &[&registry.host()]).run().unwrap();
        let requests = tokens.requests();
        assert_eq!(requests.len(), 1, "one token for everything");
        assert_eq!(requests[0].query["service"], "a, b");
        assert_eq!(requests[0].query["scope"], "repository:some/image:pull");
        assert_eq!(requests[0].query["x"], "y");
        assert!(registry.requests()[0].header("authorization").is_none(), "nothing unasked");
    }
}

#[test]
fn the_users_password_buys_a_token() {
    let (tokens, issued) = token_server("token");
    let registry = guarded(Content::simple(1000), tokens.host(), |token| token.starts_with('t'));
    let import = Import::new("some/image", &[&registry.host()]);
    let named = Import { image: format!("user@{}", import.image), ..import.clone() };
    for import in [
        import.clone().credential(&registry.host(), "user", SECRET),
        // enroot's file goes by the host of the token server.
        import.clone().entries(&[(&tokens.host(), "user", SECRET), (&registry.host(), "user", "outdated")]),
        named.entries(&[(&registry.host(), "other", "x"), (&registry.host(), "user", SECRET)]),
    ] {
        import.run().unwrap();
    }
    assert_eq!(issued.load(Ordering::SeqCst), 3);
    assert!(registry.requests().iter().all(|request| request.header("authorization") != Some(SECRET)));
    assert_eq!(tokens.requests()[0].query["account"], "user");

    let wrong = import.clone().credential(&registry.host(), "user", "outdated");
    let (kind, message) = wrong.fail();
    assert_eq!(kind, FailureKind::Denied);
    let expected = format!(
        "{} refuses the password of user user (from /home/u/.docker/config.json): renew it with \"pyxis login {}\" \
         (UNAUTHORIZED: bad)",
        tokens.host(),
        registry.host()
    );
    assert_eq!(message, expected);
}

#[test]
fn a_private_image_without_credentials_says_where_they_were_looked_for() {
    let (tokens, _) = token_server("token");
    let registry = guarded(Content::simple(1000), tokens.host(), |token| token.starts_with('t'));
    let mut import = Import::new("some/image", &[&registry.host()]);
    let warnings = vec!["/home/u/.docker/config.json: the credential store \"x\" is unknown".into()];
    import.keyring = Arc::new(Entries { warnings, ..Entries::default() });
    let (kind, message) = import.fail();
    assert_eq!(kind, FailureKind::Denied);
    assert_eq!(
        message,
        format!(
            "{0} requires credentials for some/image, or has no such repository: no credentials found for it; check \
             the name, or run \"pyxis login {0}\"; tried /home/u/.docker/config.json; /home/u/.docker/config.json: the \
             credential store \"x\" is unknown",
            registry.host()
        )
    );
    let import = Import { image: format!("me@{}/some/image", registry.host()), ..import };
    let (kind, message) = import.fail();
    assert_eq!(kind, FailureKind::Denied);
    let expected =
        format!("no password of user me for {0} found: run \"pyxis login {0} --username=me\"; tried ", registry.host());
    assert!(message.starts_with(&expected), "{message}");
}

#[test]
fn a_token_that_is_good_for_too_little_is_a_refusal() {
    let (tokens, _) = token_server("token");
    let registry = guarded(Content::simple(1000), tokens.host(), |token| token == "never");
    let import = Import::new("some/image", &[&registry.host()]).credential(&registry.host(), "user", SECRET);
    let (kind, message) = import.fail();
    assert_eq!(kind, FailureKind::Denied);
    assert_eq!(
        message,
        format!(
            "{} does not let user user (from /home/u/.docker/config.json) pull some/image, or has no such repository: \
             check the name, or ask its owner for access",
            registry.host()
        )
    );
    assert!(!message.contains(SECRET));
}

#[test]
fn tokens_that_expire_in_the_middle_are_renewed() {
    let (tokens, issued) = token_server("token");
    let layers: Vec<_> = (0..6).map(|number| (tar(100_000 + number), Compression::Gzip)).collect();
    let uses = AtomicUsize::new(0);
    let current = Arc::clone(&issued);
    // Only the newest token counts, and only for two requests.
    let registry = guarded(Content::image(&layers), tokens.host(), move |token| {
        token == format!("t{}", current.load(Ordering::SeqCst)) && uses.fetch_add(1, Ordering::SeqCst) % 3 != 2
    });
    let mut import = Import::new("some/image", &[&registry.host()]).credential(&registry.host(), "user", SECRET);
    import.limits.max_connections = 1;
    import.run().unwrap();
    assert!(issued.load(Ordering::SeqCst) >= 3);
}

fn basic_registry() -> Server {
    let content = Content::simple(1000);
    Server::start(move |request| match request.header("authorization") {
        Some("Basic dXNlcjpzM2NyZXQ6d2l0aCBjb2xvbg==") => content.answer(request),
        _ => Reply::status(401).header("WWW-Authenticate", "Basic realm=\"Registry, the\""),
    })
}

#[test]
fn basic_authentication() {
    let registry = basic_registry();
    let import = Import::new("some/image", &[&registry.host()]);
    import.clone().credential(&registry.host(), "user", SECRET).run().unwrap();
    // In the reference itself.
    let inline = Import { image: format!("user:s3cret@{}/some/image", registry.host()), ..import.clone() };
    let (kind, message) = inline.fail();
    assert_eq!(kind, FailureKind::Denied);
    let host = registry.host();
    assert_eq!(message, format!("{host} refuses the password of user user (from the image reference): correct it"));
    let (kind, message) = import.clone().credential(&registry.host(), "user", "wrong").fail();
    assert_eq!(kind, FailureKind::Denied);
    let expected = "refuses the password of user user (from /home/u/.docker/config.json): renew it with";
    assert_eq!(message, format!("{host} {expected} \"pyxis login {host}\""));
    assert!(import.fail().1.contains("no credentials found"));
}

#[test]
fn a_challenge_that_cannot_be_met_is_named() {
    for (challenge, reason) in
        [(Some("Negotiate"), "negotiate"), (Some("Bearer service=\"x\""), "no URL"), (None, "401 without a challenge")]
    {
        let registry = Server::start(move |_| match challenge {
            Some(challenge) => Reply::status(401).header("WWW-Authenticate", challenge),
            None => Reply::status(401),
        });
        let (kind, message) = Import::new("some/image", &[&registry.host()]).fail();
        assert!(kind == FailureKind::Denied && message.contains(reason), "{message}");
    }
}

#[test]
fn a_redirect_to_another_host_does_not_get_the_password() {
    let content = Content::simple(500_000);
    let store = {
        let content = content.clone();
        Server::start(move |request| match request.query.get("signature").map(String::as_str) {
            Some("good|one") if request.header("authorization").is_none() => content.answer(request),
            _ => Reply::status(400),
        })
    };
    let target = store.host();
    let registry = Server::start(move |request| {
        if request.header("authorization") != Some("Basic dXNlcjpzM2NyZXQ6d2l0aCBjb2xvbg==") {
            return Reply::status(401).header("WWW-Authenticate", "Basic realm=x");
        }
        match request.path.split_once("/blobs/") {
            // To itself first: there the password may go.
            Some((_, digest)) if !request.path.contains("moved") => {
                Reply::status(308).header("Location", format!("/v2/moved/blobs/{digest}"))
            }
            Some((_, digest)) => {
                Reply::status(307).header("Location", format!("http://{target}/x/blobs/{digest}?signature=good|one"))
            }
            None => content.answer(request),
        }
    });
    Import::new("some/image", &[&registry.host()]).credential(&registry.host(), "user", SECRET).run().unwrap();
    assert_eq!(store.count("blobs"), 2);
    assert!(store.requests().iter().all(|request| request.header("authorization").is_none()));
}

#[test]
fn whether_a_user_may_have_a_layer_is_asked() {
    let content = Content::simple(1000);
    let layer = content.layer(0);
    for (status, allowed) in [(200, true), (307, true), (401, false), (403, false), (404, false)] {
        let (content, layer) = (content.clone(), layer.clone());
        let registry = Server::start(move |request| {
            if request.method == "HEAD" && request.path.ends_with(&layer) {
                return Reply::status(status)
                    .header("Location", "http://127.0.0.1:1/")
                    .header("WWW-Authenticate", "Basic realm=x");
            }
            content.answer(request)
        });
        let (conversation, _) = Import::new("some/image", &[&registry.host()]).resolve().unwrap();
        assert_eq!(conversation.confirm(), Ok(allowed), "{status}");
    }
}
