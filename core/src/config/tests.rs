use std::fmt::Write as _;

use proptest::prelude::*;
use serde_json::json;

use super::*;

mod carriers;
mod files;
mod tls;

const FILE: &str = "/etc/sidelane/test.yaml";

fn source(text: &str) -> Source {
    Source::from_text(Path::new(FILE), text)
}

fn env(name: &str) -> Option<String> {
    match name {
        "PORT" => Some("9080".to_owned()),
        "WORD" => Some("word".to_owned()),
        "TOKEN" => Some("0123456789abcdef".to_owned()),
        _ => None,
    }
}

#[track_caller]
fn good(text: &str) -> Config {
    parse(&source(text), &env).unwrap_or_else(|errors| panic!("{}", errors.report()))
}

#[track_caller]
fn bad(text: &str) -> ConfigErrors {
    parse(&source(text), &env).expect_err("the file is faulty")
}

/// Errors about which there is nothing to choose from.
const NOT_ASKED: [&str; 5] =
    ["not valid YAML", "twice", "is taken by", "(declared: ", "cannot read "];

/// Each case of `broken.txt` begins with `=== title`, then the file, `---`, then the errors as
/// `check` prints them. `SIDELANE_BLESS=1` writes the errors anew: read the difference.
#[test]
fn broken_files_are_told_with_place_value_and_what_is_accepted() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/config/tests/broken.txt");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut blessed = String::new();
    let mut vague = Vec::new();
    let mut cases = 0;
    let directory = files::directory();
    for case in text.split("=== ").skip(1) {
        let (title, rest) = case.split_once('\n').unwrap();
        let (file, expected) = rest.split_once("---\n").unwrap();
        let source = Source::from_text(&directory.path().join("test.yaml"), file);
        let Err(errors) = parse(&source, &env) else { panic!("no error: {title}") };
        for error in errors.errors() {
            let told = error.message.contains("accepted: ");
            let said = NOT_ASKED.iter().any(|text| error.message.contains(text));
            let has_place = error.position.line > 0 || error.path.is_empty();
            if !(told || said) || !has_place {
                vague.push(format!("{title}: {error}"));
            }
        }
        let report = errors.report().replace(&format!("{}/", directory.path().display()), "");
        write!(blessed, "=== {title}\n{file}---\n{report}\n").unwrap();
        if std::env::var_os("SIDELANE_BLESS").is_none() {
            assert_eq!(report.trim_end(), expected.trim_end(), "case: {title}");
        }
        cases += 1;
    }
    assert!(vague.is_empty(), "no place, or nothing accepted:\n{}", vague.join("\n"));
    assert!(cases >= 150, "{cases} cases");
    if std::env::var_os("SIDELANE_BLESS").is_some() {
        std::fs::write(&path, blessed).unwrap();
    }
}

/// The tree of a file with its comments, where defaults stand, made part of it.
fn with_comments_read(text: &str) -> String {
    // Alternatives to what stands there, not defaults.
    let not_defaults = [
        "protocol_type: LINE",
        "token_file:",
        "name: laptop",
        "relays:",
        "protocols:",
        "- {",
        "sha256:",
        "protocol_types:",
        "config:",
        "max_connection_age:",
        "advertise:",
        "pool:",
        "proxy_protocol:",
        "health_check:",
        "tls:",
        "acme:",
        "credentials:",
        "principal:",
        "tokens:",
        "subdomains:",
        "tunnels: [demo]",
    ];
    let mut example = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        let comment = line.trim_start().strip_prefix("# ");
        // An item of a list, and what is indented below it, is one more.
        example = comment
            .is_some_and(|rest| rest.starts_with("- ") || (example && rest.starts_with("  ")));
        let is_default = |rest: &str| {
            format!("{rest} ").split_once(": ").is_some_and(|(key, _)| {
                key.trim_start().bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
            }) && !not_defaults.iter().any(|text| rest.contains(text))
        };
        lines.push(match comment {
            Some(rest) if !example && is_default(rest) => line.replacen("# ", "", 1),
            _ => line.to_owned(),
        });
    }
    lines.join("\n")
}

fn default_file() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../sidecar.yaml");
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn the_default_file_runs_both_roles_and_the_demo() {
    let config = good(&default_file());
    let relay = config.relay.unwrap();
    assert_eq!(relay.listeners[0].address.to_string(), "127.0.0.1:9080");
    assert_eq!(relay.tunnel.address.unwrap().to_string(), "127.0.0.1:9081");
    assert_eq!(config.sidecar.unwrap().relays, Relays::Embedded);
    assert_eq!(*config.routes[0].name, *"demo");
    assert_eq!(config.routes[0].matches.host, HostMatch::Subdomain("demo".into()));
    assert_eq!(config.tunnels[0].service.to_string(), "127.0.0.1:3000");
    let library = &config.plugins.libraries[0];
    assert_eq!(library.path, Path::new("/etc/sidelane/target/release/libsidelane_http.so"));
}

#[test]
fn the_default_file_takes_the_founding_documents_variables() {
    let env = |name: &str| {
        Some(match name {
            "HTTP_PORT" => "1080".to_owned(),
            "WS_PORT" => "1081".to_owned(),
            "BASE_DOMAIN" => "example.org".to_owned(),
            _ => return None,
        })
    };
    let config = parse(&source(&default_file()), &env).unwrap();
    let relay = config.relay.unwrap();
    assert_eq!(relay.listeners[0].address.port(), 1080);
    assert_eq!(relay.tunnel.address.unwrap().port(), 1081);
    assert_eq!(&*relay.base_domains[0], "example.org");
}

#[test]
fn comments_of_the_default_file_are_the_defaults() {
    let plain = default_file();
    let full = with_comments_read(&plain);
    let keys = |text: &str| text.lines().filter(|l| !l.trim_start().starts_with('#')).count();
    assert!(keys(&full) > keys(&plain) + 30, "comments were read:\n{full}");
    assert_eq!(good(&full).to_masked_json(), good(&plain).to_masked_json());
}

#[test]
fn sections_left_empty_hold_the_defaults_that_the_default_file_shows() {
    let shown = good(&default_file());
    let empty = good("version: 1\nrelay: {}\nsidecar: {}\nhealth: {}\nadmin:\n");
    assert_eq!(empty.relay, shown.relay);
    assert_eq!(empty.sidecar, shown.sidecar);
    assert_eq!((empty.health, empty.admin), (shown.health, shown.admin));
    assert_eq!(empty.drain_timeout, shown.drain_timeout);
    assert_eq!(empty.withdraw_timeout, shown.withdraw_timeout);
    assert_eq!(empty.log, shown.log);
}

const TWO_ROUTES: &str = "version: 1
relay: {}
tunnels:
  - { name: api, service: \"127.0.0.1:3000\" }
  - { name: web, service: \"127.0.0.1:3001\" }
routes:
  - { name: one, subdomain: one, tunnel: api, options: { HTTP: { a: [1, { b: 2 }] } } }
  - { name: two, subdomain: two, tunnel: web }
";

#[test]
fn what_a_reload_leaves_unchanged_stays_the_same_object() {
    let old = good(TWO_ROUTES);
    // Other lines, another order, one route changed.
    let mut new = good(
        &TWO_ROUTES
            .replace("tunnels:", "\n# moved\ntunnels:")
            .replace("two, tunnel: web", "two, tunnel: api"),
    );
    new.reuse(&old);
    assert!(Arc::ptr_eq(&old.routes[0], &new.routes[0]));
    assert!(!Arc::ptr_eq(&old.routes[1], &new.routes[1]));
    assert!(Arc::ptr_eq(&old.tunnels[0], &new.tunnels[0]));
    assert!(Arc::ptr_eq(
        &old.relay.as_ref().unwrap().listeners[0],
        &new.relay.as_ref().unwrap().listeners[0]
    ));
    let changes = diff(&old, &new);
    assert_eq!(changes.routes.changed, [(old.routes[1].clone(), new.routes[1].clone())]);
    assert!(changes.tunnels.is_empty() && changes.routes.added.is_empty());
}

#[test]
fn a_diff_tells_added_removed_and_what_needs_a_restart() {
    let old = good(TWO_ROUTES);
    assert!(diff(&old, &good(TWO_ROUTES)).is_empty());
    let mut new = good(
        "version: 1
relay: { threads: 2, base_domains: [example.org] }
sidecar: {}
tunnels: [{ name: web, service: \"127.0.0.1:3001\" }]
routes: [{ name: three, subdomain: one, tunnel: web }]
health: {}
drain_timeout: 1s
withdraw_timeout: 1s
log: { level: debug }
plugins: { panics: 9 }
",
    );
    let held = hold_back(&mut new, &old);
    assert_eq!(held, ["relay.threads", "sidecar", "plugins.panics"]);
    // What was put back differs no more.
    assert_eq!(hold_back(&mut new.clone(), &old), [""; 0]);
    let changes = diff(&old, &new);
    assert_eq!(changes.routes.added, new.routes);
    assert_eq!(changes.routes.removed, old.routes);
    assert_eq!(changes.tunnels.removed, [old.tunnels[0].clone()]);
    assert!(changes.base_domains && changes.log && changes.drain_timeout && changes.health);
    assert!(changes.withdraw_timeout);
    assert!(!changes.plugins && !changes.admin && changes.relay.is_empty());
}

/// A key that a file knows and an announcement does not would have whole documents refused.
#[test]
fn a_route_has_every_policy_that_is_announced() {
    let missing: Vec<_> =
        read::policies::POLICY_KEYS.iter().filter(|key| !read::ROUTE_KEYS.contains(key)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    let others = read::ROUTE_KEYS.len() - read::policies::POLICY_KEYS.len();
    assert_eq!(
        others, 10,
        "what a route has beside: match, tunnels, options; else a policy is missing"
    );
}

#[test]
fn a_token_waits_for_nothing() {
    let both = |token: &str| {
        good(&format!(
            "version: 1\nrelay: {{ tunnel: {{ token: {token} }} }}\nsidecar: {{ token: {token} }}\n"
        ))
    };
    let (old, mut new) = (both("a-token-of-the-tests"), both("another-token-of-tests"));
    assert_eq!(hold_back(&mut new, &old), [""; 0]);
    let changes = diff(&old, &new);
    assert_eq!(changes.relay, ["relay.tunnel.token"]);
    assert_eq!(changes.sidecar, ["sidecar.token"]);
}

#[test]
fn options_reach_plugins_as_json_with_their_yaml_types() {
    let config = good(
        "version: 1
relay: {}
routes:
  - subdomain: a
    tunnel: t
    options:
      HTTP: { n: 1, f: 1.5, b: true, s: \"1\", v: \"1.10\", z: ~, list: [a], port: \"${PORT}\" }
      WEBSOCKET:
        port: ${PORT}
        on: ${YES:-true}
        none: ${NONE:-}
",
    );
    let text = config.routes[0].options_for("HTTP");
    let value: Json = serde_json::from_str(&text).unwrap();
    assert_eq!(
        value,
        json!({
            "n": 1, "f": 1.5, "b": true, "s": "1", "v": "1.10", "z": null, "list": ["a"],
            "port": "9080",
        })
    );
    assert_eq!(
        config.routes[0].options["WEBSOCKET"].value,
        json!({ "port": 9080, "on": true, "none": null })
    );
    assert_eq!(&*config.routes[0].options_for("GRPC"), "");
}

struct Checked;

impl PluginCheck for Checked {
    fn types(&self) -> Vec<Arc<str>> {
        vec!["HTTP".into(), "WEBSOCKET".into()]
    }

    fn validate_route(&self, protocol_type: &str, options_json: &str) -> Result<(), Fault> {
        assert_eq!(protocol_type, "HTTP");
        let value: Json = serde_json::from_str(options_json).unwrap();
        if value["a"][1]["b"] == 2 {
            let path = "a[1].b".to_owned();
            return Err(Fault { message: "2 is not accepted (accepted: 1)".to_owned(), path });
        }
        Ok(())
    }
}

#[test]
fn faults_that_plugins_find_have_their_place_in_the_file() {
    let text = TWO_ROUTES
        .replace("two, tunnel: web", "two, tunnel: api, protocol_type: WEBSOCKT")
        .replace("3001\" }", "3001\", protocols: [HTTP, GRPC] }");
    let errors = good(&text).check_plugins(&Checked).unwrap_err();
    assert_eq!(
        errors.to_string(),
        "/etc/sidelane/test.yaml:5:63: tunnels[1].protocols[1]: no plugin serves protocol type \
         \"GRPC\" (served: HTTP, WEBSOCKET)\n\
         /etc/sidelane/test.yaml:7:78: routes[0].options.HTTP.a[1].b: 2 is not accepted (accepted: \
         1)\n\
         /etc/sidelane/test.yaml:8:62: routes[1].protocol_type: no plugin serves protocol type \
         \"WEBSOCKT\" (served: HTTP, WEBSOCKET); did you mean \"WEBSOCKET\"?"
    );
    good(&TWO_ROUTES.replace("b: 2", "b: 1")).check_plugins(&Checked).unwrap();
}

#[test]
fn a_plugins_fault_in_its_own_block_has_its_place() {
    let config = good(
        "version: 1\nrelay: {}\nplugins:\n  libraries:\n    - name: http\n      library: a.so\n      config:\n        idle: 5\n",
    );
    let fault = |path: &str| Fault { message: "bad".into(), path: path.into() };
    let place = |fault| {
        let error = config.library_fault("http", &fault);
        (error.position.line, error.position.column)
    };
    assert_eq!(place(fault("idle")), (8, 15));
    assert_eq!(place(fault("idle.deeper")), (8, 15));
    assert_eq!(place(fault("elsewhere")).0, 8);
    let error = config.library_error("http", "no such file");
    assert_eq!(error.position.line, 6, "{error}");
    assert!(error.to_string().contains("plugins.libraries[0].library: no such file"), "{error}");
}

#[test]
fn secrets_are_masked_everywhere() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("secret"), "f1le-s3cret-0123456\n").unwrap();
    let text = "version: 1
relay: { tunnel: { address: \"0.0.0.0:1\", insecure: true, token: \"${TOKEN}\" } }
sidecar: { token_file: secret }
routes:
  - { subdomain: a, tunnel: t, options: { HTTP: { x: \"${file:secret}\", password: pl4in } } }
tunnels: [{ name: t, service: \"127.0.0.1:3000\" }]
";
    let source = Source::from_text(&directory.path().join("c.yaml"), text);
    let config = parse(&source, &env).unwrap();
    assert_eq!(config.files, [directory.path().join("secret")]);
    assert_eq!(config.sidecar.as_ref().unwrap().token, Some(Secret::new("f1le-s3cret-0123456")));
    for shown in [config.to_masked_json().to_string(), format!("{config:?} {source:?}")] {
        for secret in ["s3cret", "0123456789abcdef", "pl4in"] {
            assert!(!shown.contains(secret), "{secret} in {shown}");
        }
    }
    assert!(config.routes[0].options_for("HTTP").contains("f1le-s3cret-0123456"));
}

#[test]
fn snippets_do_not_show_secrets() {
    for token in [
        "token: s3cret",
        "token:\n        s3cret",
        "token: |\n        s3cret",
        "token: >-\n\n        s3cret",
    ] {
        let report = bad(&format!("version: 1\nrelay:\n    tunnel:\n      {token}\n")).report();
        assert!(report.contains("is a token of"), "{report}");
        assert!(!report.contains("s3cret"), "{report}");
    }
}

#[test]
fn errors_do_not_show_what_came_from_a_file() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("secret"), "s3cret").unwrap();
    let text = "version: 1
relay: { threads: \"${file:secret}\", tunnel: \"${file:secret}\" }
log: { level: \"info,x=${file:secret}\" }
drain_timeout: \"${file:secret}\"
routes:
  - { subdomain: a, tunnel: t, response_headers: { set: { x: \"a\\n${file:secret}\" } } }
";
    let source = Source::from_text(&directory.path().join("c.yaml"), text);
    let report = parse(&source, &env).unwrap_err().report();
    assert!(report.contains("relay.threads") && report.contains("relay.tunnel"), "{report}");
    assert!(report.contains("drain_timeout: \"***\" is not accepted (accepted: whole"), "{report}");
    assert!(report.contains("log.level: \"***\" is not accepted (accepted: error"), "{report}");
    assert!(!report.contains("s3cret"), "{report}");
}

#[test]
fn a_file_that_cannot_be_read_is_an_error_with_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.yaml");
    let error = load(&path).unwrap_err().to_string();
    assert!(error.ends_with("c.yaml: cannot be read: No such file or directory (os error 2)"));
    std::fs::write(&path, b"version: 1\n\xff\n").unwrap();
    assert!(load(&path).unwrap_err().to_string().ends_with("is not UTF-8 text (line 2)"));
    let len = usize::try_from(FILE_BYTES_MAX).unwrap() + 1;
    std::fs::write(&path, vec![b' '; len]).unwrap();
    assert!(load(&path).unwrap_err().to_string().ends_with("is larger than 4MiB"));
}

#[test]
fn errors_beyond_a_hundred_are_counted() {
    let mut text = String::from("version: 1\nrelay: {}\n");
    for index in 0..150 {
        writeln!(text, "x{index}: 1").unwrap();
    }
    let errors = bad(&text);
    assert_eq!(errors.errors().len(), 100);
    assert!(errors.to_string().ends_with("\nand 50 more"));
}

#[test]
fn expansions_of_aliases_are_bounded() {
    let mut text = String::from("version: 1\na0: &a0 [x, x, x, x, x, x, x, x, x]\n");
    for level in 1..9 {
        let item = format!("*a{}", level - 1);
        writeln!(text, "a{level}: &a{level} [{}]", vec![item; 9].join(", ")).unwrap();
    }
    let error = bad(&text).to_string();
    assert!(!error.contains("unknown key"), "{error}");
}

#[test]
fn aliases_point_at_their_use() {
    let errors = bad("version: 1\nrelay:\n  timeouts:\n    idle: &t 5\n    open_wait: *t\n");
    let places: Vec<_> =
        errors.errors().iter().map(|error| (error.position.line, error.position.column)).collect();
    assert_eq!(places, [(4, 14), (5, 16)]);
}

#[test]
fn a_match_reads_what_it_shows() {
    for spec in [
        MatchSpec { subdomain: Some("a"), path_prefix: Some("/x"), ..Default::default() },
        MatchSpec { host: Some("a.example.org"), listener: Some("web"), ..Default::default() },
        MatchSpec { host: Some("*.example.org"), ..Default::default() },
        MatchSpec { wildcard: Some("*.a"), protocol_type: Some("HTTP"), ..Default::default() },
        MatchSpec { wildcard: Some("*"), ..Default::default() },
    ] {
        let host = Match::parse(&spec).unwrap().host;
        let (key, value) = host.to_key_value().unwrap();
        let value = Some(value.as_str());
        let again = match key {
            "subdomain" => MatchSpec { subdomain: value, ..Default::default() },
            "host" => MatchSpec { host: value, ..Default::default() },
            _ => MatchSpec { wildcard: value, ..Default::default() },
        };
        assert_eq!(Match::parse(&again).unwrap().host, host);
    }
}

static ANNOUNCED: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| {
    good(EVERYTHING).routes[0].policies.as_deref().unwrap().to_json().to_string()
});

proptest! {
    #[test]
    fn no_announced_policies_are_a_panic(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), 0..20usize, "[ -~]{0,4}|\\PC"), 0..6),
    ) {
        let mut text: Vec<char> = ANNOUNCED.chars().collect();
        for (at, remove, insert) in edits {
            let at = at.index(text.len() + 1);
            let end = (at + remove).min(text.len());
            text.splice(at..end, insert.chars());
        }
        let text: String = text.into_iter().collect();
        match Policies::parse_json(&text) {
            Ok(policies) => {
                let again = Policies::parse_json(&policies.to_json().to_string());
                prop_assert_eq!(again.as_ref(), Ok(&policies));
            }
            Err(errors) => prop_assert!(!errors.is_empty()),
        }
    }

    #[test]
    fn no_file_is_a_panic(
        which in 0..3,
        edits in proptest::collection::vec((any::<prop::sample::Index>(), 0..40usize, "[ -~\n\t]{0,4}|[&*!|>{\\[\"']|\\PC"), 1..12),
    ) {
        let base = match which {
            0 => default_file(),
            1 => EVERYTHING.to_owned(),
            _ => format!("version: 1\n{}", tls::EVERYTHING),
        };
        let mut text: Vec<char> = base.chars().collect();
        for (at, remove, insert) in edits {
            let at = at.index(text.len() + 1);
            let end = (at + remove).min(text.len());
            text.splice(at..end, insert.chars());
        }
        let text: String = text.into_iter().collect();
        if let Err(errors) = parse(&source(&text), &env) {
            prop_assert!(!errors.report().is_empty());
        }
    }
}

/// A file that uses every key of policies, tunnels and listeners.
const EVERYTHING: &str = "version: 1
relay:
  trusted_proxies: [10.0.0.0/8, \"192.0.2.7\"]
  max_connection_age: 1h
  warmup: { time: 30s, sessions: 2 }
  tunnel: { peers: [\"relay-2.example.org:9081\", \"[2001:db8::2]:9081\"] }
  listeners:
    - { name: web, address: \"0.0.0.0:9080\", proxy_protocol: true, balance: exact }
    - { name: any, address: \"0.0.0.0:9443\", sniff: true }
sidecar:
  relays: [\"localhost:9081\"]
  follow_peers: false
  resolve_interval: 10s
tunnels:
  - name: web
    service: 127.0.0.1:3000
    http_version: 2
    pool: { idle_timeout: 55s, idle: 64, connections: 1024 }
    health_check: { type: http, path: /healthz, host: app.local, interval: 6s, timeout: 2s, healthy_after: 2, unhealthy_after: 4 }
    wait: 30s
    weight: 3
  - { name: canary, service: \"unix:/run/app.sock\", proxy_protocol: v2, health_check: { type: grpc, service: a.B } }
routes:
  - name: shop
    subdomain: shop
    path_prefix: /api
    tunnels: [{ name: web, weight: 90 }, { name: canary, weight: 10 }]
    timeouts: { connect: 2s, response_head: 10s, idle: 60s, total: 5m }
    retries: { attempts: 2, budget: 25%, budget_min: 11 }
    request_headers: { set: { X-Env: prod, x-two: [a, b] }, add: { x-tag: a, x-tags: [c, d] }, remove: [x-debug] }
    response_headers: { set: { x-a: \"1\" }, remove: [server] }
    rewrite: { host: \"App.internal:80\", path_prefix: / }
    basic_auth: { realm: Shop, users: { bob: $2y$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW, alice: $2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW } }
    addresses: { allow: [10.0.0.0/8, \"2001:db8::1\"], deny: [10.1.0.0/16] }
    limits: { rate: { count: 100, per: 2s, burst: 200 }, rate_per_client: { count: 5 }, concurrent: 50, body: 10MiB }
    compression: { level: 6, min_size: 2KiB }
    hsts: { max_age: 24h, preload: false }
    affinity: { cookie: stick, max_age: 1h }
  - { subdomain: old, redirect: { status: 308, scheme: https, host: new.example.org, path_prefix: /x } }
";

#[test]
fn every_new_key_reaches_its_type() {
    let config = good(EVERYTHING);
    let relay = config.relay.as_ref().unwrap();
    assert_eq!(
        relay.trusted_proxies.iter().map(network_text).collect::<Vec<_>>(),
        ["10.0.0.0/8", "192.0.2.7"]
    );
    assert_eq!(relay.max_connection_age, Some(Duration::from_secs(3600)));
    assert!(relay.listeners[0].proxy_protocol);
    assert_eq!(relay.listeners[0].balance, Balance::Exact);
    assert_eq!(relay.listeners[1].carries, Carries::Sniffed);
    assert_eq!(config.sidecar.as_ref().unwrap().resolve_interval, Duration::from_secs(10));
    let tunnel = &config.tunnels[0];
    assert_eq!(tunnel.http_version, HttpVersion::Http2);
    assert_eq!(
        tunnel.pool,
        Pool {
            idle_timeout: Some(Duration::from_secs(55)),
            idle: Some(64),
            connections: Some(1024)
        }
    );
    assert_eq!(
        tunnel.health_check,
        Some(HealthCheck {
            probe: Probe::Http { path: "/healthz".into(), host: Some("app.local".into()) },
            interval: Duration::from_secs(6),
            timeout: Duration::from_secs(2),
            healthy_after: 2,
            unhealthy_after: 4,
        })
    );
    assert_eq!(tunnel.wait, Duration::from_secs(30));
    assert_eq!((tunnel.weight, config.tunnels[1].weight), (3, 1));
    assert_eq!(relay.warmup, Warmup { time: Duration::from_secs(30), sessions: 2 });
    let peers: Vec<_> = relay.tunnel.peers.iter().map(ToString::to_string).collect();
    assert_eq!(peers, ["relay-2.example.org:9081", "[2001:db8::2]:9081"]);
    assert!(!config.sidecar.as_ref().unwrap().follow_peers);
    let canary = &config.tunnels[1];
    assert_eq!(canary.service, ServiceAddress::Unix(Path::new("/run/app.sock").into()));
    assert_eq!(canary.proxy_protocol, Some(ProxyVersion::V2));
    let route = &config.routes[0];
    assert_eq!(route.tunnels_text(), "web 90, canary 10");
    let policies = route.policies.as_ref().unwrap();
    assert_eq!(policies.retries.unwrap().budget_percent, 25);
    assert_eq!(policies.rewrite.host.as_deref(), Some("app.internal:80"));
    assert_eq!(policies.rewrite.path_prefix.as_deref(), Some(""));
    let affinity = policies.affinity.as_ref().unwrap();
    assert_eq!((&*affinity.cookie, affinity.max_age), ("stick", Duration::from_secs(3600)));
    let users: Vec<&str> =
        policies.basic_auth.as_ref().unwrap().users.iter().map(|(name, _)| &**name).collect();
    assert_eq!(users, ["alice", "bob"]);
    // The first of several takes the place of what is there.
    assert_eq!(policies.request_headers.set.len(), 2);
    assert_eq!(policies.request_headers.add.len(), 4);
    assert_eq!(policies.limits.rate_per_client.unwrap().burst, 5);
    assert_eq!(config.routes[1].policies.as_ref().unwrap().redirect.as_ref().unwrap().status, 308);
    assert!(config.routes[1].tunnels.is_empty());
}

#[test]
fn policies_read_what_they_print() {
    for route in &good(EVERYTHING).routes {
        let policies = route.policies.as_deref().unwrap();
        let text = policies.to_json().to_string();
        assert_eq!(Policies::parse_json(&text).as_ref(), Ok(policies), "{text}");
    }
    assert_eq!(Policies::parse_json("{}"), Ok(Policies::default()));
    assert_eq!(Policies::default().to_json().to_string(), "{}");
}

#[test]
fn policies_of_an_announcement_are_checked_by_the_same_rules() {
    let check = |json: &str, expected: &str| {
        let errors = Policies::parse_json(json).unwrap_err().join("\n");
        assert!(errors.contains(expected), "{json}: {errors}");
    };
    check("[]", "a list is not accepted");
    check("{", "not valid JSON");
    check("{\"timeout\":{}}", "timeout: unknown key \"timeout\"");
    check("{\"limits\":{\"body\":5}}", "limits.body: \"5\" is not a size");
    check("{\"basic_auth\":{\"users_file\":\"/etc/passwd\"}}", "names a file of another machine");
    check("{\"basic_auth\":{\"users\":{\"a\":\"s3cret\"}}}", "is not a bcrypt hash");
    check("{\"request_headers\":{\"remove\":[\"Host\"]}}", "use rewrite.host");
}

#[test]
fn hashes_are_masked_for_people() {
    let config = good(EVERYTHING);
    for shown in [config.to_masked_json().to_string(), format!("{config:?}")] {
        assert!(!shown.contains("$2"), "{shown}");
    }
    let report = bad(&EVERYTHING.replace("alice: $2a$05$CCCC", "alice: s3cret")).report();
    assert!(report.contains("basic_auth.users.alice: is not a bcrypt hash"), "{report}");
    assert!(!report.contains("s3cret") && !report.contains("CCCC"), "{report}");
}

/// A directory's files, by name.
fn several(files: &[(&str, &str)]) -> (tempfile::TempDir, Source) {
    let directory = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(directory.path().join(name), text).unwrap();
    }
    let source = Source::read(directory.path()).unwrap();
    (directory, source)
}

#[test]
fn a_directorys_files_are_one_configuration() {
    let (_directory, source) = several(&[
        (
            "10-base.yaml",
            "version: 1\nrelay: { threads: 2, timeouts: { idle: 5s } }\nsidecar:\nplugins: { panics: 3 }\n",
        ),
        (
            "20-shop.yaml",
            "version: 1\nsidecar: { lanes: 3 }\ntunnels: [{ name: shop, service: \"127.0.0.1:1\" }]\nroutes: [{ subdomain: shop, tunnel: shop }]\n",
        ),
        (
            "30-blog.yml",
            "relay: { timeouts: { handshake: 5s }, listeners: [{ name: web, address: \"127.0.0.1:0\" }] }\ntunnels: [{ name: blog, service: \"127.0.0.1:2\" }]\nroutes: [{ subdomain: blog, tunnel: blog }]\nplugins: { libraries: [{ name: http, library: a.so }] }\n",
        ),
        ("40-empty.yaml", "# nothing\n"),
    ]);
    let config = parse(&source, &env).unwrap_or_else(|errors| panic!("{}", errors.report()));
    let relay = config.relay.as_ref().unwrap();
    assert_eq!((relay.threads, relay.listeners.len()), (2, 1));
    assert_eq!(relay.timeouts.idle, Duration::from_secs(5));
    assert_eq!(relay.timeouts.handshake, Duration::from_secs(5));
    assert_eq!(config.sidecar.as_ref().unwrap().lanes, 3);
    assert_eq!(config.routes.iter().map(|r| &*r.name).collect::<Vec<_>>(), ["shop", "blog"]);
    assert_eq!((config.plugins.panics, config.plugins.libraries.len()), (3, 1));
    assert!(config.plugins.libraries[0].path.starts_with(&source.path));
    let error = config.origin.error("routes[1].tunnel", "x").to_string();
    assert!(error.contains("30-blog.yml:3:37: routes[1].tunnel"), "{error}");
}

#[test]
fn what_two_files_give_is_told_with_both_places() {
    let (directory, source) = several(&[
        (
            "a.yaml",
            "version: 1\nrelay: { threads: 2, base_domains: [a] }\ntunnels: [{ name: t, service: \"a:1\" }]\n",
        ),
        (
            "b.yaml",
            "version: 2\nrelay: { threads: 3, base_domains: [b] }\ntunnels: [{ name: t, service: \"a:2\" }]\nroutes: [{ subdomain: x, tunnel: u }]\n",
        ),
        ("c.yaml", "relay: 5\nroutes: [{ subdomain: x, tunnel: t }]\n"),
    ]);
    let errors = parse(&source, &env).unwrap_err();
    let text = errors.to_string().replace(&format!("{}/", directory.path().display()), "");
    assert_eq!(
        text,
        "b.yaml:1:10: version: is given already, at a.yaml:1:10 (accepted: in one file)\n\
         b.yaml:2:19: relay.threads: is given already, at a.yaml:2:19 (accepted: in one file)\n\
         b.yaml:2:36: relay.base_domains: is given already, at a.yaml:2:36 (accepted: in one file)\n\
         b.yaml:3:19: tunnels[1].name: tunnel \"t\" is declared already, as tunnels[0], at a.yaml:3:11 \
         (accepted: a name of its own)\n\
         b.yaml:4:34: routes[0].tunnel: unknown tunnel \"u\" (declared: t)\n\
         c.yaml:1:8: relay: is given already, at a.yaml:2:8 (accepted: in one file)\n\
         c.yaml:2:10: routes[1]: route \"x\" takes the same exchanges as \"x\", routes[0], at b.yaml:4:10 \
         (accepted: another host, path_prefix, listener or protocol_type)"
    );
    assert!(errors.report().contains(" 1 | version: 2\n"), "{}", errors.report());
}

#[test]
fn each_file_that_is_not_yaml_is_told() {
    let (_directory, source) =
        several(&[("a.yaml", "a: ["), ("b.yaml", "version: 1"), ("c.yaml", "b: }")]);
    let errors = parse(&source, &env).unwrap_err();
    assert_eq!(errors.errors().len(), 2, "{errors}");
    let (directory, source) = several(&[("a.yaml", ""), ("b.yaml", "log: {}")]);
    let text = parse(&source, &env).unwrap_err().to_string();
    // What all together lack stands in none of them.
    let name = directory.path().display();
    assert!(text.contains(&format!("{name}: `version` is missing")), "{text}");
}

#[test]
fn a_faulty_file_is_asked_about_as_far_as_it_goes() {
    let text = TWO_ROUTES
        .replace("two, tunnel: web", "two, tunnel: wep")
        .replace("name: one, ", "name: one, timeouts: { idle: 5 }, ");
    let draft = draft(&source(&text), &env).unwrap();
    let refused = draft.to_ask().unwrap().refused_by(&Checked);
    let errors = draft.finish(refused).unwrap_err();
    let paths: Vec<&str> = errors.errors().iter().map(|error| error.path.as_str()).collect();
    assert_eq!(
        paths,
        ["routes[0].timeouts.idle", "routes[0].options.HTTP.a[1].b", "routes[1].tunnel"]
    );
    for typo in ["plugins: { panics: x }\n", "plugin: {}\n"] {
        let draft = super::draft(&source(&format!("{TWO_ROUTES}{typo}")), &env).unwrap();
        assert!(draft.to_ask().is_none(), "{typo}");
    }
}

#[test]
fn what_runs_and_is_likely_a_mistake_is_a_warning() {
    let check = |text: &str, expected: &[&str]| {
        let told: Vec<String> =
            good(text).warnings.iter().map(|w| format!("{}: {}", w.path, w.message)).collect();
        assert_eq!(told.len(), expected.len(), "{text}: {told:#?}");
        for (told, expected) in told.iter().zip(expected) {
            assert!(told.contains(expected), "{told}: {expected}");
        }
    };
    check(EVERYTHING, &[]);
    check(&default_file(), &[]);
    let relay = "version: 1\nrelay: {}\n";
    check(
        "version: 1\nrelay:\n  listeners: [{ name: web, address: \"127.0.0.1:1\", proxy_protocol: true }]\n",
        &["relay.listeners[0].proxy_protocol: takes no header, since no proxy is trusted"],
    );
    check(
        "version: 1\nrelay: { trusted_proxies: [\"0.0.0.0/0\"] }\n",
        &["relay.trusted_proxies: 0.0.0.0/0 is everybody"],
    );
    check(
        "version: 1\nrelay: {}\nsidecar: {}\ntunnels: [{ name: a, service: \"localhost:1\" }]\n",
        &["tunnels[0].name: no route goes to tunnel \"a\""],
    );
    // The relay's own file may have the routes.
    check(
        "version: 1\nsidecar: { relays: [\"127.0.0.1:1\"] }\ntunnels: [{ name: a, service: \"localhost:1\" }]\n",
        &[],
    );
    check(
        "version: 1\nsidecar: { relays: [\"127.0.0.1:1\"], resolve_interval: 5s }\n",
        &["sidecar.resolve_interval: has no effect"],
    );
    check(
        &format!(
            "{relay}tunnels: [{{ name: a, service: \"localhost:1\", proxy_protocol: v1, pool: {{ idle: 9, connections: 8 }} }}]\n"
        ),
        &[
            "tunnels[0].pool.idle: 9 is more than connections",
            "tunnels[0].pool.idle: has no effect",
        ],
    );
    let policies = |text: &str| format!("{relay}routes: [{{ subdomain: a, tunnel: t, {text} }}]\n");
    check(
        &policies("timeouts: { response_head: 5s, idle: 1s, total: 5s }"),
        &["routes[0].timeouts.response_head: has no effect: `total`"],
    );
    check(
        &policies("rewrite: { path_prefix: / }"),
        &["routes[0].rewrite.path_prefix: changes nothing"],
    );
    check(
        &policies("limits: { rate: { count: 5 }, rate_per_client: { count: 300, per: 1m } }"),
        &["routes[0].limits.rate_per_client: has no effect"],
    );
    check(
        &policies("addresses: { allow: [10.1.0.0/16], deny: [10.0.0.0/8, 192.0.2.1] }"),
        &[
            "routes[0].addresses.allow: 10.1.0.0/16 lets nobody in",
            "routes[0].addresses.deny: 192.0.2.1 is not allowed anyway",
        ],
    );
    check(
        &policies("request_headers: { set: { x-a: b }, remove: [x-a] }"),
        &["routes[0].request_headers.remove: \"x-a\" is set as well"],
    );
    check(
        &format!(
            "{relay}routes: [{{ subdomain: a, redirect: {{ scheme: https }}, retries: {{}} }}]\n"
        ),
        &["routes[0].retries: has no effect: the route redirects"],
    );
}

#[test]
fn routes_that_take_something_are_no_shadows() {
    let routes = |listeners: &str, bases: &str, routes: &str| {
        good(&format!(
            "version: 1\nrelay: {{ base_domains: [{bases}], listeners: [{listeners}] }}\nroutes:\n{routes}"
        ))
    };
    let a = "{ name: a, address: \"127.0.0.1:1\" }";
    let ab =
        "{ name: a, address: \"127.0.0.1:1\" }, { name: b, address: \"127.0.0.1:2\", sniff: true }";
    let exact = "  - { host: x.localhost, tunnel: t, ";
    let subdomain = "  - { subdomain: x, tunnel: t, ";
    // Another base domain is left.
    routes(a, "localhost, example.org", &format!("{exact} name: e }}\n{subdomain} name: s }}\n"));
    // Other paths, another type, another listener are left.
    for narrower in ["path_prefix: /a", "protocol_type: HTTP", "listener: a"] {
        let listeners = if narrower.starts_with("listener") { ab } else { a };
        let text = format!("{exact} name: e, {narrower} }}\n{subdomain} name: s }}\n");
        routes(listeners, "localhost", &text);
        let text = format!("{subdomain} name: e, {narrower} }}\n{subdomain} name: s }}\n");
        routes(listeners, "localhost", &text);
    }
    // A path below the other's is shadowed by an exact host, not by an equal one.
    let text = format!("{subdomain} name: e }}\n{subdomain} name: s, path_prefix: /a }}\n");
    routes(a, "localhost", &text);
}

#[test]
fn a_merged_mapping_gives_way_to_what_stands_there() {
    let config = good(
        "version: 1\nrelay:\n  timeouts: &t { idle: 5s, handshake: 5s }\n  tunnel: {}\nsidecar:\n  timeouts: { <<: { dial: 1s, handshake: 2s }, handshake: 3s }\n",
    );
    let timeouts = &config.sidecar.unwrap().timeouts;
    assert_eq!((timeouts.dial.as_secs(), timeouts.handshake.as_secs()), (1, 3));
}

/// Of wrong names a hundred are told with suggestions, the rest are counted.
#[test]
fn thousands_of_routes_are_read_and_thousands_of_faults_counted() {
    let file = |tunnel: &str| {
        let mut text = String::from("version: 1\nrelay: {}\ntunnels:\n");
        for index in 0..3_000 {
            writeln!(text, "- {{ name: tunnel-{index}, service: \"localhost:1\" }}").unwrap();
        }
        text += "routes:\n";
        for index in 0..3_000 {
            writeln!(text, "- {{ subdomain: s{index}, tunnel: {tunnel}-{index} }}").unwrap();
            writeln!(text, "- {{ host: s{index}.example.org, tunnel: {tunnel}-{index} }}").unwrap();
        }
        text
    };
    assert_eq!(good(&file("tunnel")).routes.len(), 6_000);
    assert!(bad(&file("unknown")).to_string().ends_with("\nand 5900 more"));
}

#[test]
fn secrets_in_fields_are_masked_and_go_with_an_announcement() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("secret"), "f1le").unwrap();
    let text = "version: 1
relay: {}
routes:
  - subdomain: a
    tunnel: t
    request_headers:
      set: { authorization: Bearer s3cret, x-env: prod, x-file: \"${file:secret}\" }
      add: { x-api-key: [k3y, other] }
";
    let path = directory.path().join("c.yaml");
    let config = parse(&Source::from_text(&path, text), &env).unwrap();
    for shown in [config.to_masked_json().to_string(), format!("{config:?}")] {
        for secret in ["s3cret", "f1le", "k3y"] {
            assert!(!shown.contains(secret), "{secret} in {shown}");
        }
        assert!(shown.contains("prod"), "{shown}");
    }
    let policies = config.routes[0].policies.as_deref().unwrap();
    let announced = policies.to_json().to_string();
    assert!(announced.contains("s3cret") && announced.contains("f1le"), "{announced}");
    let read = Policies::parse_json(&announced).unwrap();
    assert_eq!(read, *policies);
    assert!(!format!("{read:?}").contains("f1le"));
    let bad = text.replace("Bearer s3cret", "\"s3cret \"").replace("k3y", "\"k3y\\n\"");
    let report = parse(&Source::from_text(&path, bad), &env).unwrap_err().report();
    assert_eq!(report.matches("\"***\" is not accepted").count(), 2, "{report}");
    assert!(!report.contains("s3cret") && !report.contains("k3y"), "{report}");
}
