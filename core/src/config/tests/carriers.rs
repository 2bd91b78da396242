//! How relays are dialled, as a file says it: carriers, other ways, proxies.

use super::*;
use crate::config::{Relays, hold_back};

/// A sidecar's file with these relays and this environment.
fn read(relays: &str, environment: &[(&str, &str)]) -> Result<Config, String> {
    let text = format!("version: 1\nsidecar:\n  token: correct-horse-battery\n{relays}");
    let env = |name: &str| {
        let given = environment.iter().find(|(given, _)| *given == name);
        given.map(|(_, value)| (*value).to_owned())
    };
    parse(&source(&text), &env).map_err(|errors| errors.report())
}

fn dialled(relays: &str, environment: &[(&str, &str)]) -> Vec<String> {
    let config = read(relays, environment).unwrap_or_else(|report| panic!("{report}"));
    let Relays::Listed(relays) = config.sidecar.unwrap().relays else { panic!("they are listed") };
    let shown = |relay: &RelayAddress| {
        let tls = if relay.tls.is_some() { " tls" } else { "" };
        let proxy = relay.proxy.as_ref().map(|proxy| format!(" by {proxy}")).unwrap_or_default();
        format!("{relay}{tls}{proxy}")
    };
    relays
        .iter()
        .flat_map(|relay| std::iter::once(relay).chain(&relay.fallback))
        .map(shown)
        .collect()
}

#[test]
fn a_relay_has_a_carrier_and_other_ways() {
    assert_eq!(
        dialled("  relays: [\"wss://a.example\", \"grpc://127.0.0.1:1\", \"b.example:2\"]\n", &[]),
        ["wss://a.example:443/tunnel tls", "grpc://127.0.0.1:1", "b.example:2 tls"],
    );
    let relays = "  relays:
    - address: a.example:1
      tls: { server_name: relay.internal }
      fallback: [\"wss://a.example/x\", \"grpcs://b.example\", \"ws://127.0.0.1:1\"]
";
    assert_eq!(
        dialled(relays, &[]),
        [
            "a.example:1 tls",
            "wss://a.example:443/x tls",
            "grpcs://b.example:443 tls",
            "ws://127.0.0.1:1/tunnel"
        ],
    );
    let config = read(relays, &[]).unwrap();
    let Relays::Listed(listed) = &config.sidecar.as_ref().unwrap().relays else { panic!("listed") };
    let name = listed[0].fallback[0].tls.as_ref().unwrap().server_name.clone();
    assert_eq!(name.as_deref(), Some("relay.internal"), "one `tls` for all ways");
    let shown = config.to_masked_json()["sidecar"]["relays"][0].to_string();
    assert!(shown.contains("\"wss://a.example:443/x\""), "{shown}");
}

#[test]
fn a_proxy_comes_from_the_file_or_the_environment() {
    let both = "  relays: [\"wss://a.example\", \"tls://127.0.0.1:1\"]\n";
    let (a, own) = ("wss://a.example:443/tunnel tls", "127.0.0.1:1 tls");
    let by = |what: &str, proxy: &str| format!("{what} by {proxy}");
    let variable = ("HTTPS_PROXY", "http://me:secret@proxy:3128");
    for (relays, environment, expected) in [
        (both.to_owned(), &[][..], [a.to_owned(), own.to_owned()]),
        (both.to_owned(), &[variable], [by(a, "http://***@proxy:3128"), own.to_owned()]),
        (both.to_owned(), &[("https_proxy", "proxy:1")], [by(a, "http://proxy:1"), own.to_owned()]),
        (both.to_owned(), &[variable, ("NO_PROXY", "b,.example")], [a.to_owned(), own.to_owned()]),
        (format!("{both}  proxy: none\n"), &[variable], [a.to_owned(), own.to_owned()]),
        (
            format!("{both}  proxy: \"http://other:1\"\n"),
            &[variable, ("no_proxy", "*")],
            [by(a, "http://other:1"), by(own, "http://other:1")],
        ),
        (
            "  relays: [{ address: \"wss://a.example\", proxy: none }, { address: \"tls://127.0.0.1:1\", proxy: \
             \"http://own:2\" }]\n"
                .to_owned(),
            &[variable],
            [a.to_owned(), by(own, "http://own:2")],
        ),
    ] {
        assert_eq!(dialled(&relays, environment), expected, "{relays} {environment:?}");
    }
    let config = read(&format!("{both}  proxy: \"http://me:secret@proxy:1\"\n"), &[]).unwrap();
    let shown = format!("{:?}{}", config.sidecar, config.to_masked_json());
    assert!(shown.contains("http://***@proxy:1") && !shown.contains("secret"), "{shown}");
}

#[test]
fn faults_of_carriers_and_proxies_have_their_place_and_show_no_password() {
    for (relays, environment, expected) in [
        ("relays: [\"ws://a.example\"]", &[][..], "accepted: wss://, or insecure: true"),
        ("relays: [\"grpc://a.example\"]", &[], "accepted: grpcs://, or insecure: true"),
        (
            "relays: [{ address: \"ws://127.0.0.1:1\", tls: {} }]",
            &[],
            "accepted: wss:// or grpcs://",
        ),
        (
            "relays: [{ address: \"wss://a.example\", insecure: true }]",
            &[],
            "stands beside an address that is dialled by TLS",
        ),
        (
            "relays: [{ address: \"a.example:1\", fallback: [\"http://a.example\"] }]",
            &[],
            "sidecar.relays[0].fallback[0]: \"http://a.example\" is not a relay",
        ),
        (
            "relays: [{ address: \"a.example:1\", fallback: [\"ws://a.example\"] }]",
            &[],
            "sidecar.relays[0].fallback[0]: ws://a.example:80/tunnel is another machine",
        ),
        (
            "relays: [{ address: \"wss://a.example\", fallback: [\"wss://a.example:443/tunnel\"] }]",
            &[],
            "stands here twice",
        ),
        ("relays: [\"wss://a.example\", \"wss://a.example/tunnel\"]", &[], "stands here twice"),
        (
            "relays: [\"wss://a.example\"]\n  proxy: \"socks5://me:secret@proxy:1\"",
            &[],
            "sidecar.proxy: a proxy by socks5:// cannot be used",
        ),
        (
            "relays: [\"wss://a.example\"]",
            &[("HTTPS_PROXY", "https://me:secret@proxy:1")],
            "environment variable HTTPS_PROXY a proxy by https:// cannot be used",
        ),
    ] {
        let report = read(&format!("  {relays}\n"), environment).expect_err(relays);
        let first = report.lines().next().unwrap_or_default();
        assert!(report.contains(expected), "{report}");
        assert!(!first.contains("secret"), "{first}");
        assert!(first.starts_with("/etc/sidelane/test.yaml:"), "{first}");
    }
}

#[test]
fn a_reload_takes_proxies_and_other_ways_and_keeps_where_relays_are() {
    let old = read("  relays: [\"wss://a.example\"]\n", &[]).unwrap();
    let ways =
        "{ address: \"wss://a.example\", fallback: [\"grpcs://a.example\"], proxy: \"proxy:1\" }";
    let mut new = read(&format!("  relays: [{ways}]\n"), &[]).unwrap();
    assert_eq!(hold_back(&mut new, &old), Vec::<&str>::new());
    let mut new = read("  relays: [\"grpcs://a.example\"]\n", &[]).unwrap();
    assert_eq!(hold_back(&mut new, &old), ["sidecar.relays"]);
}
