//! Secrets stay secret: whatever goes wrong, no log, page, metric or message holds one.

use std::fs;
use std::io::Write as _;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use sidelane_e2e::client::request;
use sidelane_e2e::process::{self, Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::signer::{Authority, Signer, token_hash};
use sidelane_e2e::wait;

const SHORTHAND: &str = "s3cret-shorthand-of-the-relay";
const TOKEN: &str = "s3cret-token-of-a-sidecar";
const WRONG: &str = "s3cret-token-that-is-wrong";
const IN_HELLO: &str = "s3cret-in-a-hello-that-is-broken";
const PASSWORD_HASH: &str = "$2y$05$bvIG6Nmid91Mu9RcmmWZfO5HJIMCT8riNW0hEp8f6/FuA2/mHZFpe";
const BEARER: &str = "s3cret-bearer-for-the-keys";
const EAB_KEY: &str = "czNjcmV0LWVhYi1rZXktb2YtYWNtZQ";
const PLUGIN_SECRET: &str = "s3cret-password-of-a-plugin";

/// Everything that people read of a process.
fn told(process: &Sidelane) -> String {
    let mut all = format!("{}\n{}", process.log(), process.metrics());
    for page in ["/config", "/tunnels", "/routes", "/plugins", "/explain?url=http://api.localhost/"]
    {
        let answer = process.get(process.admin(), page);
        all += &format!("\n{page}: {}", String::from_utf8_lossy(&answer.body));
    }
    let ready = process.get(process.health(), "/ready");
    all + &String::from_utf8_lossy(&ready.body)
}

fn check(file: &Path) -> String {
    let output = Command::new(process::program()).arg("check").arg(file).output();
    let output = output.expect("the program starts");
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
fn no_secret_is_told_by_logs_pages_metrics_or_checks() {
    let files = tempfile::tempdir().expect("a directory");
    let write = |name: &str, text: &str| {
        let path = files.path().join(name);
        fs::write(&path, text).expect("a file");
        path.display().to_string()
    };
    let signer = Signer::new("key");
    let hour = Duration::from_secs(3600);
    let jwt = signer.account("shop", "web", hour);
    let foreign = Signer::new("other").account("shop", "web", hour);
    let (chain, key) = Authority::new().certificate(&["localhost"]);
    let pem_key = key.clone();
    let (cert, key) = (write("tls.crt", &chain), write("tls.key", &key));
    let (keys, bearer) = (write("keys.json", &signer.set()), write("bearer", BEARER));
    // Asks for the bearer token, and gives nothing.
    let issuer = Service::answering("HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n");

    let service = Service::ok();
    let mut setup = Setup::of(service.address());
    setup.http_config = "{}".to_owned();
    let relay_section = format!(
        "relay:
  credentials:
    - {{ principal: shop, tokens: [\"{}\"], subdomains: [api], tunnels: [api] }}
    - {{ principal: cluster, jwt: [{{ issuer: k8s, subject: \"*\" }}], subdomains: [api], tunnels: [api] }}
  token_issuers:
    - {{ name: k8s, issuer: \"{}\", audiences: [sidelane], jwks_file: \"{keys}\" }}
    - {{ name: far, issuer: \"https://far.test\", audiences: [sidelane], jwks_url: \"http://{}/keys\", token_file: \"{bearer}\" }}
  acme: {{ directory: \"https://127.0.0.1:1/directory\", storage: \"{}\", accept_terms: true, external_account: {{ key_id: id, key: \"{EAB_KEY}\" }} }}
",
        token_hash(TOKEN),
        Signer::ISSUER,
        issuer.address(),
        files.path().join("acme").display(),
    );
    let listeners = format!(
        "    - {{ name: https, address: \"127.0.0.1:0\", tls: {{ certificates: [{{ cert: \"{cert}\", key: \"{key}\" }}], acme: [acme.localhost] }} }}\n"
    );
    let route = format!(
        "routes:\n  - {{ subdomain: own, tunnel: api, basic_auth: {{ realm: r, users: {{ eve: \"{PASSWORD_HASH}\" }} }} }}\n"
    );
    let yaml = setup
        .relay()
        .replacen("relay:\n", &relay_section, 1)
        .replacen("  base_domains", &format!("{listeners}  base_domains"), 1)
        .replace(
            "  tunnel: { address: \"127.0.0.1:0\" }",
            &format!("  tunnel: {{ address: \"127.0.0.1:0\", token: \"{SHORTHAND}\" }}"),
        )
        .replace("level: debug", "level: trace")
        + &route;
    let relay = Sidelane::spawn("relay", &yaml);
    let tunnel = relay.tunnel();
    let with_token = |token: &str| {
        let setup = Setup { sidecar_token: Some(token.to_owned()), ..setup.clone() };
        setup.sidecar(tunnel).replace("level: debug", "level: trace")
    };

    let good = Sidelane::start("good", &with_token(&jwt));
    wait::until("an answer", || {
        let answer = request(relay.web(), "GET", "GET / HTTP/1.1\r\nHost: api.localhost\r\n\r\n");
        (answer.head.status == 200).then_some(())
    });
    let mut refused = Vec::new();
    for (name, token, reason) in
        [("wrong", WRONG, "unknown_token"), ("foreign", &*foreign, "unknown_key")]
    {
        refused.push(Sidelane::spawn(name, &with_token(token)));
        let label = format!("reason=\"{reason}\"");
        relay.until_metric("sidelane_credentials_refused_total", &[&label], |count| count >= 1.0);
    }
    relay.until_metric(
        "sidelane_issuer_key_fetches_total",
        &["issuer=\"far\"", "result=\"failure\""],
        |count| count >= 1.0,
    );
    // What is no sidecar's request, and holds a token.
    let mut stream = TcpStream::connect(tunnel).expect("a connection");
    let _ = stream.write_all(
        format!("GET /{IN_HELLO} HTTP/1.1\r\nAuthorization: {IN_HELLO}\r\n\r\n").as_bytes(),
    );
    let labels = ["reason=\"http\""];
    relay.until_metric("sidelane_handshakes_refused_total", &labels, |count| count >= 1.0);
    // What is no hello, and holds a token.
    let before = relay.metric("sidelane_handshakes_refused_total", &["reason=\"hello\""]);
    let mut stream = TcpStream::connect(tunnel).expect("a connection");
    let _ = stream.write_all(format!("\u{1}hello {IN_HELLO}").as_bytes());
    relay.until_metric("sidelane_handshakes_refused_total", &["reason=\"hello\""], |count| {
        count > before.unwrap_or(0.0)
    });
    // Wrong passwords, at a route that asks for one.
    let answer = request(
        relay.web(),
        "GET",
        format!(
            "GET / HTTP/1.1\r\nHost: own.localhost\r\nAuthorization: Basic {PLUGIN_SECRET}\r\n\r\n"
        ),
    );
    assert_eq!(answer.head.status, 401);

    // Files with faults at and beside every secret.
    let mut texts = String::new();
    let faulty = |from: &str, to: &str| {
        assert!(yaml.contains(from), "{from}: {yaml}");
        yaml.replacen(from, to, 1)
    };
    let faults = [
        faulty(&token_hash(TOKEN), TOKEN),
        faulty("token: \"", "token: [\"").replacen(
            &format!("{SHORTHAND}\""),
            &format!("{SHORTHAND}\"]"),
            1,
        ),
        faulty(&format!("key: \"{EAB_KEY}\""), &format!("key: \"{EAB_KEY}!\"")),
        faulty(PASSWORD_HASH, &format!("{PASSWORD_HASH}x")),
        faulty("config: {}", &format!("config: {{ password: \"{PLUGIN_SECRET}\" }}")),
        faulty("accept_terms: true", "accept_terms: false"),
        faulty("tunnels: [api] }", &format!("tunnels: [api], token: \"{TOKEN}\" }}")),
    ];
    for (index, fault) in faults.iter().enumerate() {
        let path = files.path().join(format!("faulty-{index}.yaml"));
        fs::write(&path, fault).expect("a file");
        let said = check(&path);
        assert!(said.contains("faulty-"), "a fault is told: {said}");
        texts += &said;
        relay.rewrite(fault);
        let (status, answer) = relay.reload();
        assert_ne!(status, 200, "{index}: {answer}");
        texts += &answer.to_string();
    }
    // A key that is another certificate's, and one that is none.
    let other_key = Authority::new().certificate(&["localhost"]).1;
    for text in [&*other_key, "s3cret-that-is-no-key"] {
        write("tls.key", text);
        relay.rewrite(&yaml);
        let (status, answer) = relay.reload();
        assert_ne!(status, 200, "{answer}");
        texts += &answer.to_string();
    }

    let mut processes = vec![("relay", &relay), ("good", &good)];
    processes.extend(refused.iter().map(|process| ("refused", process)));
    for (name, process) in &processes {
        texts += &format!("\n==== {name}\n{}", told(process));
    }
    assert!(texts.contains("the token is not one that this relay accepts"), "the logs are there");
    let line = |pem: &str| pem.lines().nth(1).expect("a second line").to_owned();
    let (own_line, other_line) = (line(&pem_key), line(&other_key));
    let signature = |token: &str| token.rsplit('.').next().expect("three parts").to_owned();
    let (jwt_signature, foreign_signature) = (signature(&jwt), signature(&foreign));
    let secrets: &[(&str, &str)] = &[
        ("the relay's token", SHORTHAND),
        ("a sidecar's token", TOKEN),
        ("its hash", &token_hash(TOKEN)["sha256:".len()..]),
        ("a wrong token", WRONG),
        ("a signed token", &jwt),
        ("a signed token's signature", &jwt_signature),
        ("a foreign token's signature", &foreign_signature),
        ("what came in place of a hello", IN_HELLO),
        ("a password's hash", PASSWORD_HASH),
        ("a bearer token", BEARER),
        ("a key of ACME's account", EAB_KEY),
        ("a plugin's secret", PLUGIN_SECRET),
        ("a certificate's key", &own_line),
        ("another certificate's key", &other_line),
        ("what stands in a key's file", "s3cret-that-is-no-key"),
        ("any of them", "s3cret"),
    ];
    for (what, secret) in secrets {
        if let Some(at) = texts.find(secret) {
            let begin = texts[..at].rfind('\n').map_or(0, |at| at + 1);
            let end = texts[at..].find('\n').map_or(texts.len(), |end| at + end);
            panic!("{what} is told: {}", &texts[begin..end]);
        }
    }
}
