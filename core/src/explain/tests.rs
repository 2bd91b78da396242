use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::config::policy::{
    Addresses, Affinity, BasicAuth, Compression, Hsts, Redirect, Retries, Rewrite, RouteLimits,
    RouteTimeouts,
};
use crate::config::{Match, MatchSpec, Share};

struct Nothing;

impl Facts for Nothing {
    fn from(&self, _: &Route) -> String {
        "file".to_owned()
    }
    fn protocol_types(&self) -> Option<Vec<Arc<str>>> {
        Some(vec!["HTTP".into(), "GRPC".into()])
    }
    fn service(&self, tunnel: &str) -> Option<String> {
        (tunnel == "web").then(|| "127.0.0.1:3000".to_owned())
    }
    fn is_served(&self, _: &str, _: Option<&str>) -> Option<bool> {
        None
    }
    fn unavailable(&self, tunnel: &str) -> Vec<(String, String)> {
        let sidecars = if tunnel == "canary" { 0..20 } else { 0..0 };
        sidecars.map(|index| (format!("s{index}"), "waiting for the service".to_owned())).collect()
    }
    fn carries(&self, tunnel: &str, protocol_type: &str) -> Option<bool> {
        (tunnel == "web").then_some(protocol_type == "HTTP")
    }
}

fn public() -> Public {
    let listener = |name: &str, port, is_http| PublicListener {
        name: name.into(),
        port,
        is_http,
        is_tls: false,
        redirects: false,
    };
    Public {
        base_domains: vec!["localhost".into(), "example.org".into()],
        listeners: vec![
            listener("web", 9080, true),
            listener("plain", 80, true),
            listener("lines", 9090, false),
        ],
    }
}

fn route(spec: &MatchSpec<'_>, policies: Policies) -> Route {
    Route {
        name: "r".into(),
        tunnels: vec![
            Share { tunnel: "web".into(), weight: 90 },
            Share { tunnel: "canary".into(), weight: 10 },
        ],
        matches: Match::parse(spec).unwrap(),
        options: Default::default(),
        policies: (!policies.is_default()).then(|| Arc::new(policies)),
    }
}

fn ask(policies: Policies, prefix: Option<&str>, url: &str) -> Json {
    let spec = MatchSpec { subdomain: Some("shop"), path_prefix: prefix, ..MatchSpec::default() };
    let routes = [Arc::new(route(&spec, policies))];
    answer(&routes, &public(), &Question::parse(url, None, None).unwrap(), &Nothing).unwrap()
}

#[test]
fn what_is_not_there_is_refused() {
    let ask = |url: &str, protocol_type, listener| {
        let question = Question::parse(url, protocol_type, listener)?;
        answer(&[], &public(), &question, &Nothing)
    };
    assert_eq!(
        ask("x", None, Some("wbe")).unwrap_err(),
        "there is no listener \"wbe\" (those are web, plain, lines); did you mean \"web\"?"
    );
    assert_eq!(
        ask("x", Some("LINE"), None).unwrap_err(),
        "no plugin serves protocol type \"LINE\" (served: HTTP, GRPC)"
    );
    assert!(ask("ws://x", None, None).unwrap_err().contains("\"WEBSOCKET\" (served"));
    let error = ask("x", Some("http"), None).unwrap_err();
    assert!(error.starts_with("\"http\" is not a protocol type"), "{error}");
    assert!(error.ends_with("did you mean \"HTTP\"?"), "{error}");
    ask("", Some("GRPC"), Some("lines")).unwrap();
}

#[test]
fn a_port_that_no_listener_has_is_noted() {
    let notes = |url: &str, listener: Option<&str>| {
        let question = Question::parse(url, None, listener).unwrap();
        answer(&[], &public(), &question, &Nothing).unwrap()["notes"].clone()
    };
    let note = "no listener for HTTP has port 9090 (those are web 9080, plain 80); taken for web";
    assert_eq!(notes("x:9090", None), json!([note]));
    for (url, listener) in
        [("x:9080", None), ("x", None), ("https://x", None), ("x:1", Some("web"))]
    {
        assert_eq!(notes(url, listener), json!([]), "{url}");
    }
}

#[test]
fn questions_are_read_from_urls_and_hosts() {
    let check = |url: &str, scheme: &str, host: &str, target: &str, protocol_type: &str| {
        let question = Question::parse(url, None, None).unwrap();
        assert_eq!(question.scheme, scheme, "{url}");
        assert_eq!(question.host.as_deref(), Some(host), "{url}");
        assert_eq!(question.target, target, "{url}");
        assert_eq!(question.protocol_type, protocol_type, "{url}");
    };
    check("demo.localhost", "http", "demo.localhost", "/", "HTTP");
    check("demo.localhost:9080/a?b#c", "http", "demo.localhost:9080", "/a?b", "HTTP");
    check("HTTPS://u:p@demo.localhost?b", "https", "demo.localhost", "/?b", "HTTP");
    check("ws://[::1]:80/ws", "http", "[::1]:80", "/ws", "WEBSOCKET");
    check("grpcs://x/p.S/M", "https", "x", "/p.S/M", "GRPC");
    for (url, why) in [
        ("", "has no host"),
        ("http:///x", "has no host"),
        ("ftp://x/", "has an unknown scheme"),
        ("a b", "has white space"),
        ("a\nb", "has white space"),
    ] {
        let error = Question::parse(url, None, None).unwrap_err();
        assert!(error.contains(why), "{url}: {error}");
    }
    let question = Question::parse("", Some("LINE"), Some("lines")).unwrap();
    assert_eq!((question.host, &*question.protocol_type), (None, "LINE"));
}

#[test]
fn what_the_front_refuses_is_no_question() {
    for url in [
        "http://demo.localhost:99999/",
        "http://demo.localhost:abc/",
        "http://[::1/",
        "http://::1/",
        "http://demo%zz.localhost/",
        "http://ÿ.localhost/",
    ] {
        assert!(Question::parse(url, None, None).is_err(), "{url}");
    }
    for url in ["http://user@demo.localhost/", "http://[::1]:80/", "demo.localhost.:80/%C3%A9"] {
        assert!(Question::parse(url, None, None).is_ok(), "{url}");
    }
    let question = Question::parse("http://demo.localhost/é", None, None).unwrap();
    assert_eq!(question.target, "/%C3%A9");
}

#[test]
fn a_question_comes_in_by_the_listener_of_its_port() {
    let public = public();
    let listener = |url: &str| {
        Question::parse(url, None, None).unwrap().listener(&public.listeners).to_owned()
    };
    assert_eq!(listener("x:80"), "plain");
    assert_eq!(listener("x:9080"), "web");
    assert_eq!(listener("x:9090"), "web", "a byte-born listener takes no HTTP");
    assert_eq!(listener("[::1]:80"), "plain");
    assert_eq!(listener("x"), "web");
    let named = Question::parse("x", None, Some("plain")).unwrap();
    assert_eq!(named.listener(&public.listeners), "plain");
    assert_eq!(Question::parse("x", None, None).unwrap().listener(&[]), "web");
}

#[test]
fn routes_are_told_by_their_addresses() {
    let urls = |spec: MatchSpec<'_>| public().urls(&route(&spec, Policies::default()));
    let none = MatchSpec::default();
    assert_eq!(
        urls(MatchSpec { subdomain: Some("a"), path_prefix: Some("/b"), ..none }),
        ["http://a.localhost:9080/b/", "http://a.example.org:9080/b/"]
    );
    assert_eq!(
        urls(MatchSpec { host: Some("a.org"), listener: Some("plain"), ..none }),
        ["http://a.org/"]
    );
    assert_eq!(urls(MatchSpec { host: Some("::1"), ..none }), ["http://[::1]:9080/"]);
    assert_eq!(urls(MatchSpec { host: Some("*.a.org"), ..none }), ["http://*.a.org:9080/"]);
    assert_eq!(urls(MatchSpec { wildcard: Some("*"), ..none })[0], "http://*.localhost:9080/");
    assert_eq!(urls(MatchSpec { wildcard: Some("*.x"), ..none })[0], "http://*.x.localhost:9080/");
    assert_eq!(urls(MatchSpec { listener: Some("lines"), ..none }), ["tcp://*:9090"]);
}

#[test]
fn addresses_of_tls_are_those_of_https() {
    let mut public = public();
    public.base_domains.truncate(1);
    let spec = MatchSpec { subdomain: Some("shop"), ..MatchSpec::default() };
    let shop = route(&spec, Policies::default());
    let lines = route(&MatchSpec { listener: Some("lines"), ..spec }, Policies::default());
    public.listeners[0].redirects = true;
    public.listeners[1].is_tls = true;
    public.listeners[2].is_tls = true;
    assert_eq!(public.urls(&shop), ["https://shop.localhost:80/"]);
    public.listeners[1].port = 443;
    assert_eq!(public.urls(&shop), ["https://shop.localhost/"]);
    assert_eq!(public.urls(&lines), ["tls://shop.localhost:9090"]);
    let asked = |url: &str| {
        let question = Question::parse(url, None, None).unwrap();
        let answer = answer(&[], &public, &question, &Nothing).unwrap();
        (answer["asked"]["listener"].clone(), answer["notes"].clone())
    };
    assert_eq!(asked("https://shop.localhost"), ("plain".into(), json!([])));
    assert_eq!(asked("shop.localhost"), ("plain".into(), json!([])));
    let (listener, notes) = asked("http://shop.localhost:9080");
    assert_eq!(listener, "web");
    assert!(notes[0].as_str().is_some_and(|note| note.contains("to https")), "{notes}");
}

#[test]
fn an_answer_says_where_the_request_goes_and_what_the_service_sees() {
    let rewrite = Rewrite { host: Some("app.internal".into()), path_prefix: Some("/v1".into()) };
    let policies = Policies { rewrite, ..Policies::default() };
    let answer = ask(policies, Some("/api"), "http://shop.localhost:9080/api/x?y=/api");
    assert_eq!(answer["route"], "r");
    assert_eq!(answer["from"], "file");
    assert_eq!(answer["tunnels"][0]["service"], "127.0.0.1:3000");
    assert_eq!(answer["tunnels"][0]["carries"], true);
    assert_eq!(answer["tunnels"][1]["weight"], 10);
    assert_eq!(answer["tunnels"][1]["carries"], Json::Null);
    assert_eq!(answer["tunnels"][0]["unavailable"], Json::Null);
    let unavailable = answer["tunnels"][1]["unavailable"].as_array().unwrap();
    assert_eq!(unavailable.len(), UNAVAILABLE_MAX);
    assert_eq!(unavailable[0], json!({ "sidecar": "s0", "reason": "waiting for the service" }));
    assert_eq!(answer["service_sees"], json!({ "host": "app.internal", "path": "/v1/x?y=/api" }));
    let sees = |prefix: &str, own: Option<&str>, url: &str| {
        let rewrite = Rewrite { host: None, path_prefix: Some(prefix.into()) };
        let answer = ask(Policies { rewrite, ..Policies::default() }, own, url);
        answer["service_sees"]["path"].as_str().unwrap().to_owned()
    };
    assert_eq!(sees("", Some("/api"), "shop.localhost/api"), "/");
    assert_eq!(sees("", Some("/api"), "shop.localhost/api/x"), "/x");
    assert_eq!(sees("", Some("/api"), "shop.localhost/api?q"), "/?q");
    assert_eq!(sees("/", Some("/api"), "shop.localhost/api//x"), "/x");
    assert_eq!(sees("/v1", None, "shop.localhost/x"), "/v1/x");
}

#[test]
fn an_answer_says_where_the_client_is_sent() {
    let redirect = Redirect {
        status: 308,
        scheme: Some("https".into()),
        host: Some("new.example.org".into()),
        path_prefix: Some("/x".into()),
    };
    let policies = Policies { redirect: Some(redirect), ..Policies::default() };
    let answer = ask(policies, Some("/old"), "http://shop.localhost/old/a?b");
    assert_eq!(
        answer["policies"][0]["says"],
        "status 308; scheme https; host new.example.org; path_prefix /x"
    );
    assert_eq!(answer["client_sees"], "308 to https://new.example.org/x/a?b");
    assert_eq!(answer["service_sees"], Json::Null);
    let sent = |scheme: Option<&str>, url: &str| {
        let scheme = scheme.map(Into::into);
        let redirect = Redirect { status: 301, scheme, host: None, path_prefix: None };
        let policies = Policies { redirect: Some(redirect), ..Policies::default() };
        ask(policies, None, url)["client_sees"].as_str().unwrap().to_owned()
    };
    assert_eq!(sent(Some("https"), "shop.localhost:9080/a"), "301 to https://shop.localhost/a");
    assert_eq!(sent(None, "shop.localhost:9080/a"), "301 to /a");
}

#[test]
fn every_policy_has_its_line() {
    let rate = Rate { count: 100, per: Duration::from_secs(1), burst: 200 };
    let name = http::HeaderName::from_static;
    let value = http::HeaderValue::from_static;
    let policies = Policies {
        timeouts: RouteTimeouts {
            connect: Some(Duration::from_secs(2)),
            total: Some(Duration::from_secs(300)),
            ..RouteTimeouts::default()
        },
        retries: Some(Retries { attempts: 2, budget_percent: 20, budget_min: 10 }),
        request_headers: HeaderChanges {
            set: vec![(name("x-env"), value("secret"))],
            add: vec![(name("x-tag"), value("a"))],
            remove: vec![name("x-debug")],
        },
        response_headers: HeaderChanges { remove: vec![name("server")], ..Default::default() },
        rewrite: Rewrite { host: Some("app".into()), path_prefix: Some("".into()) },
        redirect: None,
        hsts: Some(Hsts {
            max_age: Duration::from_secs(24 * 3600),
            include_subdomains: true,
            preload: false,
        }),
        basic_auth: Some(BasicAuth {
            realm: "Shop".into(),
            users: vec![("alice".into(), "$2y$05$hash".into())],
        }),
        addresses: Addresses {
            allow: vec!["10.0.0.0/8".parse().unwrap()],
            deny: vec!["10.1.0.0/16".parse().unwrap()],
        },
        limits: RouteLimits {
            rate: Some(rate),
            rate_per_client: Some(Rate { burst: 100, ..rate }),
            concurrent: Some(50),
            body: Some(10 << 20),
        },
        compression: Some(Compression { level: 5, min_size: 1024 }),
        affinity: Some(Affinity { cookie: "stick".into(), max_age: Duration::from_secs(3600) }),
    };
    let answer = ask(policies, None, "shop.localhost");
    let told: Vec<String> = answer["policies"]
        .as_array()
        .unwrap()
        .iter()
        .map(|line| {
            format!("{}: {}", line["policy"].as_str().unwrap(), line["says"].as_str().unwrap())
        })
        .collect();
    insta::assert_snapshot!(told.join("\n"), @r#"
    addresses: only from 10.0.0.0/8, not from 10.1.0.0/16; else 403
    basic_auth: realm "Shop", users: 1; else 401
    limits: 100 per 1s, 200 at once, else 429; 100 per 1s per client, else 429; 50 at once, else 503; bodies of 10MiB, else 413
    timeouts: connect 2s; total 5m
    retries: 2 times at most, 20 % of the route's exchanges or 10 per second
    request_headers: remove x-debug; set x-env; add x-tag
    response_headers: remove server
    rewrite: host app; path_prefix removed
    compression: gzip level 5, from 1KiB
    hsts: max_age 24h, on https alone; include_subdomains
    affinity: one sidecar for each client, by the cookie stick; max_age 1h
    "#);
    assert!(!answer.to_string().contains("secret") && !answer.to_string().contains("hash"));
}

#[test]
fn a_sidecar_tells_addresses_of_the_route_that_they_are_of() {
    let file = "\
version: 1
sidecar: { relays: ['127.0.0.1:9081'] }
tunnels: [{ name: web, service: '127.0.0.1:3000' }]
routes:
  - { name: a, subdomain: a, tunnel: web }
  - { name: api, subdomain: a, path_prefix: /api, tunnel: web }
  - { name: apps, wildcard: '*.apps', tunnel: web }
  - { name: own, host: own.org, tunnel: web }
  - { name: six, host: '::1', tunnel: web }
  - { name: twice, host: twice.org, tunnel: web }
  - { name: twice-rpc, host: twice.org, protocol_type: GRPC, tunnel: web }
";
    let source = config::Source::from_text("c.yaml".as_ref(), file);
    let config = config::parse(&source, &|_| None).unwrap_or_else(|errors| panic!("{errors}"));
    let public = public();
    let answer = RelayAnswer {
        relay: "r".to_owned(),
        is_connected: true,
        accepted: Some(1),
        refused: Vec::new(),
        notes: Vec::new(),
        addresses: config.routes.iter().flat_map(|route| public.urls(route)).collect(),
        last_error: None,
    };
    let described = announced(&config, &[answer.clone(), answer]);
    for (index, route) in config.routes.iter().enumerate() {
        // Of two with the same address it is not known whose it is.
        let is_told = !route.name.starts_with("twice");
        let expected = if is_told { public.urls(route) } else { Vec::new() };
        assert_eq!(described[index]["urls"], json!(expected), "{}", route.name);
    }
}

#[test]
fn a_sidecar_tells_which_relays_refuse_its_document() {
    let answer = |relay: &str, refused: &[&str], accepted| RelayAnswer {
        relay: relay.to_owned(),
        is_connected: true,
        accepted,
        refused: refused.iter().map(|reason| (*reason).to_owned()).collect(),
        notes: Vec::new(),
        addresses: Vec::new(),
        last_error: None,
    };
    let mut told = json!({ "notes": [] });
    let gone = RelayAnswer { is_connected: false, ..answer("c:1", &["old"], None) };
    let relays =
        [answer("a:1", &["not yours", "nor that"], Some(3)), answer("b:1", &[], Some(4)), gone];
    tell_refusals(&mut told, &relays);
    let expected = "relay a:1 refuses what this sidecar announces, and version 3 of it is in force \
                    there: not yours; nor that";
    assert_eq!(told["notes"], json!([expected]));
}
