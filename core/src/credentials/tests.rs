use std::net::Ipv4Addr;
use std::time::UNIX_EPOCH;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as URL_SAFE;
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose, SanType,
};
use serde_json::{Value as Json, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;
use crate::config::credentials::{
    CertificatePattern, Issuer, JwtRule, Keys, Pattern, Principal, TokenHash,
};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const ISS: &str = "https://issuer.test";

fn patterns(texts: &[&str]) -> Vec<Pattern> {
    texts.iter().map(|text| Pattern::new(text)).collect()
}

fn principal(name: &str) -> Principal {
    Principal {
        name: name.into(),
        tokens: vec![],
        certificates: vec![],
        jwt: vec![],
        claims: Claims { subdomains: patterns(&[name]), ..Claims::default() },
    }
}

fn rules(principals: Vec<Principal>, issuers: Vec<Issuer>) -> Rules {
    Rules {
        credentials: Credentials {
            principals: principals.into_iter().map(Arc::new).collect(),
            issuers: issuers.into_iter().map(Arc::new).collect(),
        },
        wait: Duration::from_secs(10),
        ..Rules::default()
    }
}

fn authenticator(rules: Rules) -> Arc<Authenticator> {
    Arc::new(Authenticator::new(rules, Arc::new(Metrics::new())))
}

fn presented(credential: &[u8]) -> Presented<'_> {
    Presented { credential, chain: &[], peer: LOOPBACK, local: LOOPBACK }
}

/// A key that signs tokens.
struct Signer {
    key: EncodingKey,
    kid: &'static str,
}

impl Signer {
    fn new(kid: &'static str) -> Self {
        let pair = KeyPair::generate().expect("a key");
        Self { key: EncodingKey::from_ec_der(pair.serialized_der()), kid }
    }

    fn jwk(&self) -> Json {
        let mut jwk = Jwk::from_encoding_key(&self.key, Algorithm::ES256).expect("a key");
        jwk.common.key_id = Some(self.kid.to_owned());
        serde_json::to_value(jwk).expect("JSON")
    }

    fn set(&self) -> String {
        json!({ "keys": [self.jwk()] }).to_string()
    }

    fn sign(&self, claims: &Json) -> String {
        let header = Header { kid: Some(self.kid.to_owned()), ..Header::new(Algorithm::ES256) };
        jsonwebtoken::encode(&header, claims, &self.key).expect("a token")
    }
}

fn seconds_from_now(seconds: i64) -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    i64::try_from(now).expect("not so far") + seconds
}

fn claims(change: Json) -> Json {
    let mut claims = json!({
        "iss": ISS, "aud": ["sidelane"], "sub": "system:serviceaccount:shop:web",
        "exp": seconds_from_now(600), "nbf": seconds_from_now(-5),
    });
    for (key, value) in change.as_object().expect("an object") {
        claims[key] = value.clone();
    }
    claims
}

fn issuer(keys: Keys) -> Issuer {
    Issuer {
        name: "cluster".into(),
        issuer: ISS.into(),
        audiences: vec!["sidelane".into(), "other".into()],
        keys,
        leeway: Duration::from_secs(30),
    }
}

fn of_account(name: &str, namespace: &str, account: &str) -> Principal {
    let rule = JwtRule {
        issuer: "cluster".into(),
        subject: None,
        namespace: Some(Pattern::new(namespace)),
        service_account: Some(Pattern::new(account)),
    };
    Principal { jwt: vec![rule], ..principal(name) }
}

async fn name(authenticator: &Authenticator, credential: &[u8]) -> Result<String, AuthError> {
    let known = authenticator.authenticate(presented(credential)).await?;
    Ok(known.grant.principal.to_string())
}

#[tokio::test]
async fn a_relay_without_credentials_lets_loopback_in_alone() {
    let authenticator = authenticator(Rules::default());
    let known = authenticator.authenticate(presented(b"")).await.expect("let in");
    assert_eq!(&*known.grant.principal, "local");
    let far = Presented { peer: "192.0.2.1".parse().expect("an address"), ..presented(b"") };
    assert_eq!(authenticator.authenticate(far).await.unwrap_err(), AuthError::LoopbackOnly);
    // Credentials that came meanwhile end that.
    authenticator.set(rules(vec![principal("shop")], vec![]));
    assert_eq!(authenticator.regrant(&known).unwrap_err(), AuthError::Missing);
}

#[tokio::test]
async fn a_token_is_the_first_principals_that_has_its_hash() {
    let with = |name: &str, tokens: &[&str]| Principal {
        tokens: tokens.iter().map(|token| TokenHash(hash(token.as_bytes()))).collect(),
        ..principal(name)
    };
    let both = vec![with("shop", &["old", "new"]), with("bank", &["new", "bank"])];
    let authenticator =
        authenticator(Rules { token: Some(Secret::new("all")), ..rules(both, vec![]) });
    for (token, expected) in [
        ("all", Ok("token".to_owned())),
        ("old", Ok("shop".to_owned())),
        ("new", Ok("shop".to_owned())),
        ("bank", Ok("bank".to_owned())),
        ("none", Err(AuthError::UnknownToken)),
        ("", Err(AuthError::Missing)),
        ("a.b.c", Err(AuthError::UnknownToken)),
    ] {
        assert_eq!(name(&authenticator, token.as_bytes()).await, expected, "{token}");
    }
    let embedded = authenticator.embedded_token().expose().to_owned();
    assert_eq!(name(&authenticator, embedded.as_bytes()).await, Ok("embedded".to_owned()));

    // Tokens are told apart by their hashes, but for the one that may be a word of somebody's own.
    let shorthand = authenticator.authenticate(presented(b"all")).await.expect("let in");
    assert_eq!(shorthand.credential(), "token");
    let known = authenticator.authenticate(presented(b"old")).await.expect("let in");
    let hex: String = hash(b"old")[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(known.credential(), format!("token sha256:{hex}…"));
    let again = authenticator.regrant(&known).expect("as before");
    assert!(Arc::ptr_eq(&again.grant, &known.grant), "nothing has changed");
    let mut wider = with("shop", &["old"]);
    wider.claims.subdomains = patterns(&["shop", "shop-*"]);
    authenticator.set(rules(vec![wider], vec![]));
    let wider = authenticator.regrant(&known).expect("still known");
    assert_eq!(wider.grant.claims.subdomains, patterns(&["shop", "shop-*"]));
    authenticator.set(rules(vec![with("shop", &["new"])], vec![]));
    assert_eq!(authenticator.regrant(&known).unwrap_err(), AuthError::UnknownToken);
}

#[tokio::test]
async fn signed_tokens_are_checked_in_every_part() {
    let (signer, other) = (Signer::new("one"), Signer::new("one"));
    let unknown = Signer::new("two");
    let principals = vec![of_account("shop", "shop", "web"), of_account("all", "ops*", "*")];
    let authenticator =
        authenticator(rules(principals, vec![issuer(Keys::Set(signer.set().into()))]));
    let good = signer.sign(&claims(json!({})));
    let (head, tail) = good.split_at(good.len() - 8);
    let broken = format!("{head}AAAAAAAA");
    let header = |json: Json| URL_SAFE.encode(json.to_string());
    let payload = good.split('.').nth(1).expect("three parts").to_owned();
    let none = format!("{}.{payload}.", header(json!({ "alg": "none" })));
    let hmac = {
        // By the public key, as a verifier that mixes up kinds of keys would.
        let key = EncodingKey::from_secret(signer.set().as_bytes());
        let header = Header { kid: Some("one".to_owned()), ..Header::new(Algorithm::HS256) };
        jsonwebtoken::encode(&header, &claims(json!({})), &key).expect("a token")
    };
    let critical = format!("{}.{payload}.{tail}", header(json!({ "alg": "ES256", "crit": ["x"] })));
    let kubernetes = json!({ "sub": "x", "kubernetes.io": {
        "namespace": "ops-1", "serviceaccount": { "name": "any", "uid": "1" }, "pod": {} } });
    let table: Vec<(&str, String, Result<&str, AuthError>)> = vec![
        ("good", good.clone(), Ok("shop")),
        ("other audience", signer.sign(&claims(json!({ "aud": "other" }))), Ok("shop")),
        ("kubernetes' own claims", signer.sign(&claims(kubernetes)), Ok("all")),
        (
            "expired within leeway",
            signer.sign(&claims(json!({ "exp": seconds_from_now(-10) }))),
            Ok("shop"),
        ),
        (
            "expired",
            signer.sign(&claims(json!({ "exp": seconds_from_now(-60) }))),
            Err(AuthError::Expired),
        ),
        (
            "early",
            signer.sign(&claims(json!({ "nbf": seconds_from_now(90) }))),
            Err(AuthError::NotYetValid),
        ),
        ("no audience", signer.sign(&claims(json!({ "aud": [] }))), Err(AuthError::Audience)),
        (
            "wrong audience",
            signer.sign(&claims(json!({ "aud": "relay" }))),
            Err(AuthError::Audience),
        ),
        (
            "wrong issuer",
            signer.sign(&claims(json!({ "iss": "https://evil.test" }))),
            Err(AuthError::UnknownIssuer),
        ),
        (
            "list of issuers",
            signer.sign(&claims(json!({ "iss": [ISS] }))),
            Err(AuthError::MalformedJwt),
        ),
        ("no end", signer.sign(&claims(json!({ "exp": null }))), Err(AuthError::MalformedJwt)),
        ("huge end", signer.sign(&claims(json!({ "exp": 1e300 }))), Err(AuthError::MalformedJwt)),
        ("no subject", signer.sign(&claims(json!({ "sub": null }))), Err(AuthError::MalformedJwt)),
        (
            "long subject",
            signer.sign(&claims(json!({ "sub": "x".repeat(2000) }))),
            Err(AuthError::MalformedJwt),
        ),
        (
            "other account",
            signer.sign(&claims(json!({ "sub": "system:serviceaccount:shop:db" }))),
            Err(AuthError::UnknownSubject),
        ),
        (
            "no account",
            signer.sign(&claims(json!({ "sub": "web" }))),
            Err(AuthError::UnknownSubject),
        ),
        ("another's signature", other.sign(&claims(json!({}))), Err(AuthError::Signature)),
        ("another key", unknown.sign(&claims(json!({}))), Err(AuthError::UnknownKey)),
        ("changed", broken, Err(AuthError::Signature)),
        ("unsigned", none, Err(AuthError::Algorithm)),
        ("symmetric", hmac, Err(AuthError::Algorithm)),
        ("critical", critical, Err(AuthError::MalformedJwt)),
        ("opaque", "secret-token".to_owned(), Err(AuthError::UnknownToken)),
    ];
    for (what, token, expected) in table {
        let found = name(&authenticator, token.as_bytes()).await;
        assert_eq!(found, expected.map(str::to_owned), "{what}");
        if let Err(error) = found {
            let refusal = error.refusal().detail;
            assert!(!refusal.contains(&token), "{what}: {refusal}");
        }
    }

    let known = authenticator.authenticate(presented(good.as_bytes())).await.expect("let in");
    let exp = seconds_from_now(600 + 30);
    let expires = known.expires.expect("it ends").duration_since(UNIX_EPOCH).expect("after 1970");
    assert!((exp - 5..=exp).contains(&i64::try_from(expires.as_secs()).expect("not so far")));
    assert!(!format!("{known:?} {}", known.proof).contains(&good));
    // A key that is withdrawn takes what it signed along.
    authenticator.set(rules(
        vec![of_account("shop", "shop", "web")],
        vec![issuer(Keys::Set(unknown.set().into()))],
    ));
    assert_eq!(authenticator.regrant(&known).unwrap_err(), AuthError::UnknownKey);
}

#[tokio::test]
async fn two_accounts_that_share_an_entry_are_two_principals() {
    let signer = Signer::new("one");
    let mut cluster = of_account("cluster", "*", "*");
    cluster.claims.subdomains = patterns(&["{service_account}.{namespace}"]);
    let authenticator =
        authenticator(rules(vec![cluster], vec![issuer(Keys::Set(signer.set().into()))]));
    let grant = async |sub: &str| {
        let token = signer.sign(&claims(json!({ "sub": sub })));
        authenticator.authenticate(presented(token.as_bytes())).await.expect("let in").grant
    };
    let web = grant("system:serviceaccount:shop:web").await;
    assert_eq!(&*web.principal, "cluster/shop/web");
    assert_eq!(web.claims.subdomains, patterns(&["web.shop"]));
    let db = grant("system:serviceaccount:shop:db").await;
    assert_eq!(&*db.principal, "cluster/shop/db");
    // What is no label fills nothing.
    let dots = grant("system:serviceaccount:shop:a.b").await;
    assert_eq!(dots.claims, Claims::default());
}

/// A client's certificate for these names.
fn client(
    ca: &CertifiedIssuer<'static, KeyPair>,
    names: &[SanType],
) -> Vec<CertificateDer<'static>> {
    let mut params = CertificateParams::default();
    params.subject_alt_names = names.to_vec();
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().expect("a key");
    vec![params.signed_by(&key, ca).expect("a certificate").der().clone()]
}

fn ca() -> (CertifiedIssuer<'static, KeyPair>, Authorities) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let key = KeyPair::generate().expect("a key");
    let ca = CertifiedIssuer::self_signed(params, key).expect("an authority");
    let authorities = Authorities::from_pem("ca.pem", &ca.pem()).expect("a certificate");
    (ca, authorities)
}

#[tokio::test]
async fn a_client_certificate_is_known_by_its_names() {
    let (authority, authorities) = ca();
    let with = |name: &str, certificates: Vec<CertificatePattern>| Principal {
        certificates,
        tokens: vec![TokenHash(hash(name.as_bytes()))],
        ..principal(name)
    };
    let mut mesh =
        with("mesh", vec![CertificatePattern::Uri(Pattern::new("spiffe://example.org/ns/*/sa/*"))]);
    mesh.claims.subdomains = patterns(&["{service_account}.{namespace}"]);
    let shop = with("shop", vec![CertificatePattern::Dns(Pattern::new("*.shop.internal"))]);
    let known = Rules { authorities: Some(authorities), ..rules(vec![shop, mesh], vec![]) };
    let authenticator = authenticator(known.clone());
    let dns = |name: &str| SanType::DnsName(name.try_into().expect("a name"));
    let uri = |uri: &str| SanType::URI(uri.try_into().expect("a URI"));
    let chain = client(&authority, &[dns("a.shop.internal")]);
    let by = |chain| Presented { chain, ..presented(b"") };
    let known_shop = authenticator.authenticate(by(&chain)).await.expect("let in");
    assert_eq!(&*known_shop.grant.principal, "shop");
    assert_eq!(known_shop.proof.to_string(), "certificate a.shop.internal");
    assert!(known_shop.expires.is_some());
    let pod = client(&authority, &[uri("spiffe://example.org/ns/bank/sa/web")]);
    let known_pod = authenticator.authenticate(by(&pod)).await.expect("let in");
    assert_eq!(&*known_pod.grant.principal, "mesh/bank/web");
    assert_eq!(known_pod.grant.claims.subdomains, patterns(&["web.bank"]));
    let nobody = client(&authority, &[dns("a.bank.internal")]);
    let error = authenticator.authenticate(by(&nobody)).await.unwrap_err();
    assert_eq!(error, AuthError::UnknownCertificate);
    // What is presented beside it and wrong is refused all the same.
    let wrong = Presented { chain: &chain, ..presented(b"wrong") };
    let error = authenticator.authenticate(wrong).await.unwrap_err();
    assert_eq!(error, AuthError::UnknownToken);
    let right = Presented { chain: &chain, ..presented(b"mesh") };
    let other = authenticator.authenticate(right).await.expect("let in");
    assert_eq!(&*other.grant.principal, "mesh");

    // The authority is another one: what it signed is worth nothing.
    let (_, others) = ca();
    authenticator.set(Rules { authorities: Some(others), ..known.clone() });
    let error = authenticator.regrant(&known_shop).unwrap_err();
    assert_eq!(error.label(), "untrusted_certificate");
    authenticator.set(Rules { authorities: None, ..known });
    let error = authenticator.regrant(&known_shop).unwrap_err();
    assert_eq!(error.label(), "untrusted_certificate");
}

/// Answers each request with the next of `answers`, then with the last again and again. Returns its
/// address, and the heads of requests as they come.
async fn server(answers: Vec<String>) -> (String, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind((LOOPBACK, 0)).await.expect("a socket");
    let address = listener.local_addr().expect("an address");
    let (heads, seen) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut next = 0;
        loop {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.expect("a head"));
            }
            let _ = heads.send(String::from_utf8(head).expect("text"));
            let answer = answers.get(next).or_else(|| answers.last()).expect("an answer");
            next += 1;
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    (format!("http://{address}/keys"), seen)
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

fn by_url(url: &str, token_file: Option<std::path::PathBuf>) -> Issuer {
    issuer(Keys::Url {
        url: url.into(),
        authorities: None,
        token_file,
        interval: Duration::from_secs(300),
    })
}

#[tokio::test]
async fn keys_are_fetched_once_for_all_who_miss_them_and_kept_where_that_fails() {
    let (first, second) = (Signer::new("one"), Signer::new("two"));
    let both = json!({ "keys": [first.jwk(), second.jwk()] }).to_string();
    let answers = vec![
        "HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n".to_owned(),
        ok(&first.set()),
        ok("{}"),
        ok(&both),
    ];
    let (url, mut seen) = server(answers).await;
    let directory = tempfile::tempdir().expect("a directory");
    let bearer = directory.path().join("token");
    std::fs::write(&bearer, "first-bearer\n").expect("a file");
    let principals = vec![of_account("shop", "shop", "web")];
    let authenticator =
        authenticator(rules(principals.clone(), vec![by_url(&url, Some(bearer.clone()))]));
    let (_stop, stopping) = watch::channel(false);
    let mut changed = authenticator.keys_changed();
    let by_first = first.sign(&claims(json!({})));
    let by_second = second.sign(&claims(json!({})));
    // Nothing is known yet, and the first fetch fails.
    let waiting = name(&authenticator, by_first.as_bytes());
    let keeper = tokio::spawn(Arc::clone(&authenticator).keep_keys(stopping));
    assert_eq!(waiting.await, Err(AuthError::KeysUnavailable));
    assert!(
        seen.recv().await.expect("a request").contains("authorization: Bearer first-bearer\r\n")
    );
    std::fs::write(&bearer, "second-bearer\n").expect("a file");
    changed.changed().await.expect("keys");
    let head = seen.recv().await.expect("a request");
    assert!(head.starts_with("GET /keys HTTP/1.1\r\n"), "{head}");
    assert!(head.contains("authorization: Bearer second-bearer\r\n"), "{head}");
    let known = authenticator.authenticate(presented(by_first.as_bytes())).await.expect("let in");
    // Just fetched: whoever names another key fetches nothing.
    assert_eq!(name(&authenticator, by_second.as_bytes()).await, Err(AuthError::UnknownKey));
    assert!(seen.try_recv().is_err());

    // Other settings of the same URL keep the keys, fetch anew, and keep them where that fails.
    authenticator.set(rules(
        principals.clone(),
        vec![Issuer { leeway: Duration::ZERO, ..by_url(&url, None) }],
    ));
    let mut fetched = authenticator.state.load().issuers[0].fetched.subscribe();
    authenticator.regrant(&known).expect("the key is known");
    assert!(!seen.recv().await.expect("a request").contains("authorization"));
    fetched.changed().await.expect("a fetch that fails");
    authenticator.regrant(&known).expect("the key is known");
    authenticator.set(rules(principals, vec![by_url(&url, None)]));
    changed.changed().await.expect("other keys");
    assert_eq!(name(&authenticator, by_second.as_bytes()).await, Ok("shop".to_owned()));
    let mut text = String::new();
    authenticator.metrics.encode(&mut text);
    for line in [
        "sidelane_issuer_keys{issuer=\"cluster\"} 2",
        "sidelane_issuer_key_fetches_total{issuer=\"cluster\",result=\"success\"} 2",
        "sidelane_issuer_key_fetches_total{issuer=\"cluster\",result=\"failure\"} 2",
        "sidelane_credentials_refused_total{reason=\"unknown_key\"} 1",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    keeper.abort();
}

#[tokio::test]
async fn keys_of_an_issuer_stay_until_those_of_its_new_source_are_there() {
    let (first, second) = (Signer::new("one"), Signer::new("two"));
    let failed = || "HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n".to_owned();
    let both = json!({ "keys": [first.jwk(), second.jwk()] }).to_string();
    let (url, _seen) = server(vec![failed(), ok(&both)]).await;
    let (other_url, _other_seen) = server(vec![failed(), ok(&second.set())]).await;
    let principals = || vec![of_account("shop", "shop", "web")];
    let by = |keys: Issuer| rules(principals(), vec![keys]);
    let authenticator = authenticator(by(issuer(Keys::Set(first.set().into()))));
    let (_stop, stopping) = watch::channel(false);
    let keeper = tokio::spawn(Arc::clone(&authenticator).keep_keys(stopping));
    let by_first = first.sign(&claims(json!({})));
    let known = authenticator.authenticate(presented(by_first.as_bytes())).await.expect("let in");
    let mut changed = authenticator.keys_changed();

    // From a file to a URL that fails first, and from that to another.
    for (url, is_kept) in [(&url, true), (&other_url, false)] {
        authenticator.set(by(by_url(url, None)));
        authenticator.regrant(&known).expect("its key is known before anything is fetched");
        let mut fetched = authenticator.state.load().issuers[0].fetched.subscribe();
        fetched.changed().await.expect("a fetch that fails");
        authenticator.regrant(&known).expect("its key is still known");
        changed.changed().await.expect("other keys");
        let after = authenticator.regrant(&known).map(|_| ());
        let expected = if is_kept { Ok(()) } else { Err(AuthError::UnknownKey) };
        assert_eq!(after, expected);
    }
    // What an issuer of another name, or `iss`, has signed says nothing of this one.
    for changed in [
        Issuer { name: "other".into(), ..by_url("http://127.0.0.1:1/", None) },
        Issuer { issuer: "https://other".into(), ..by_url("http://127.0.0.1:1/", None) },
    ] {
        authenticator.set(by(changed));
        assert_eq!(authenticator.state.load().issuers[0].len(), 0);
        authenticator.set(by(issuer(Keys::Set(first.set().into()))));
    }
    keeper.abort();
}

#[tokio::test]
async fn keys_are_fetched_by_tls_from_whom_is_trusted_alone() {
    use crate::config::tls::{Certificate, ServerTls, TlsVersion};
    let (authority, authorities) = ca();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::IpAddress(LOOPBACK)];
    let key = KeyPair::generate().expect("a key");
    let certificate = params.signed_by(&key, &authority).expect("a certificate");
    let certificate = Certificate::from_pem("tls", &certificate.pem(), &key.serialize_pem());
    let server = ServerTls {
        certificates: vec![Arc::new(certificate.expect("a pair"))],
        acme: vec![],
        min_version: TlsVersion::V1_3,
        clients: None,
    };
    let resolver = crate::tls::Resolver::new(&server, Arc::default()).expect("certificates");
    let config = crate::tls::server_config(&server, Arc::new(resolver), &[b"http/1.1"]);
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config.expect("a configuration")));
    let listener = TcpListener::bind((LOOPBACK, 0)).await.expect("a socket");
    let url = format!("https://{}/keys", listener.local_addr().expect("an address"));
    let set = Signer::new("one").set();
    let answer = ok(&set);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.expect("a connection");
            // Whoever does not trust us goes.
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.expect("a head"));
            }
            stream.write_all(answer.as_bytes()).await.expect("taken");
        }
    });
    let source = |authorities| fetch::Source { url: &url, authorities, token_file: &None };
    assert_eq!(source(Some(&authorities)).fetch().await.expect("a set"), set);
    let (_, others) = ca();
    let error = source(Some(&others)).fetch().await.expect_err("not trusted");
    assert!(crate::error::chain(&error).contains("invalid peer certificate"), "{error:?}");
}

#[tokio::test]
async fn what_is_no_set_of_keys_is_not_taken() {
    let signer = Signer::new("one");
    let elsewhere = "HTTP/1.1 302 Found\r\nlocation: /other\r\ncontent-length: 0\r\n\r\n";
    let long = format!("{{\"keys\":[], \"x\":\"{}\"}}", "x".repeat(1 << 20));
    let table = [
        (elsewhere.to_owned(), "answered 302 Found; redirects are not followed (accepted: 200)"),
        (ok(&long), "breaks off or is longer than 1048576 bytes"),
    ];
    assert!(!table.is_empty());
    for (answer, expected) in table {
        let (url, _seen) = server(vec![answer]).await;
        let source = fetch::Source { url: &url, authorities: None, token_file: &None };
        let error = source.fetch().await.unwrap_err().to_string();
        assert!(error.ends_with(expected), "{error}");
    }
    for (url, expected) in [
        ("ftp://127.0.0.1/", "ftp://127.0.0.1/ cannot be asked (accepted: https://…)"),
        ("keys.json", "keys.json cannot be asked (accepted: https://…)"),
    ] {
        let source = fetch::Source { url, authorities: None, token_file: &None };
        assert_eq!(source.fetch().await.unwrap_err().to_string(), expected);
    }
    for (text, expected) in [
        ("", "is not a JSON object with a list of keys"),
        ("{\"keys\": 1}", "is not a JSON object with a list of keys"),
        ("{\"keys\": []}", "holds no key that verifies signatures"),
        (
            "{\"keys\": [{\"kty\": \"oct\", \"k\": \"c2VjcmV0\"}]}",
            "holds no key that verifies signatures",
        ),
    ] {
        let error = jwks::parse(text).unwrap_err();
        assert!(error.starts_with(expected), "{error}");
        assert!(!error.contains("c2VjcmV0"), "{error}");
    }
    let many = json!({ "keys": vec![signer.jwk(); 65] }).to_string();
    assert_eq!(jwks::parse(&many).unwrap_err(), "holds 65 keys (accepted: at most 64)");
    let mut encrypts = signer.jwk();
    encrypts["use"] = "enc".into();
    let mixed = json!({ "keys": [encrypts, { "kty": "new" }, signer.jwk()] }).to_string();
    assert_eq!(jwks::parse(&mixed).expect("one of use").len(), 1);
}

#[test]
fn every_cause_has_a_text_and_a_label_of_its_own() {
    let causes = [
        AuthError::Missing,
        AuthError::UnknownToken,
        AuthError::LoopbackOnly,
        AuthError::UnknownCertificate,
        AuthError::UntrustedCertificate("why".to_owned()),
        AuthError::MalformedJwt,
        AuthError::Algorithm,
        AuthError::UnknownIssuer,
        AuthError::UnknownKey,
        AuthError::KeysUnavailable,
        AuthError::Signature,
        AuthError::Audience,
        AuthError::Expired,
        AuthError::NotYetValid,
        AuthError::UnknownSubject,
    ];
    let mut texts: Vec<String> = causes.iter().map(ToString::to_string).collect();
    texts.sort();
    texts.dedup();
    assert_eq!(texts.len(), AuthError::LABELS.len());
    let labels: Vec<_> = causes.iter().map(AuthError::label).collect();
    assert_eq!(labels, AuthError::LABELS);
}

proptest! {
    /// Whatever is presented is read, or is not: nothing panics, and only three parts with a header are
    /// a signed token.
    #[test]
    fn shapes_of_tokens_are_told_apart(parts in prop::collection::vec("[A-Za-z0-9_.{}\"-]{0,40}", 0..5)) {
        let text = parts.join(".");
        let is_token = jwt::Token::parse(text.as_bytes()).is_some();
        if is_token {
            prop_assert_eq!(text.matches('.').count(), 2);
        }
    }

    #[test]
    fn any_bytes_may_be_presented(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = jwt::Token::parse(&bytes);
    }

    #[test]
    fn headers_make_tokens(header in "\\{\"alg\":\"[A-Z0-9a-z]{0,8}\"\\}", rest in "[A-Za-z0-9_-]{0,20}") {
        let text = format!("{}.{rest}.{rest}", URL_SAFE.encode(header));
        prop_assert!(jwt::Token::parse(text.as_bytes()).is_some());
    }

    /// What a pattern fits it fits whole: it never reaches over a dot but by its first label.
    #[test]
    fn patterns_hold_to_labels(pattern in "[a*-]{1,4}(\\.[a*-]{1,4}){0,2}", name in "[a-]{1,4}(\\.[a-]{1,4}){0,3}") {
        let fits = Pattern::new(&pattern).fits(&name);
        if fits && !pattern.starts_with("*.") && pattern != "*" {
            prop_assert_eq!(pattern.matches('.').count(), name.matches('.').count());
        }
        if !pattern.contains('*') {
            prop_assert_eq!(fits, pattern == name);
        }
    }
}
