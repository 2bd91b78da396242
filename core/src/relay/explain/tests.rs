use super::*;
use crate::config::MatchSpec;
use crate::config::tls::{ServerTls, TlsVersion};
use crate::config::{Balance, Carries};
use crate::tunnel::test_tls::Ca;

fn listener(name: &str, tls: Option<ServerTls>) -> Listener {
    Listener {
        name: name.into(),
        address: SocketAddr::from(([127, 0, 0, 1], 443)),
        carries: Carries::Http,
        proxy_protocol: false,
        balance: Balance::Kernel,
        tls,
        https_redirect: None,
    }
}

fn route(spec: &MatchSpec<'_>) -> Route {
    Route {
        name: "r".into(),
        tunnels: Vec::new(),
        matches: Match::parse(spec).unwrap(),
        options: Default::default(),
        policies: None,
    }
}

#[test]
fn notes_name_hosts_that_no_certificate_is_for() {
    let tls = ServerTls {
        certificates: vec![Ca::new("ca").certificate("*.tunnel.localhost")],
        acme: vec!["own.example.org".into()],
        min_version: TlsVersion::default(),
        clients: None,
    };
    let bytes = Listener {
        carries: Carries::Type("LINES".into()),
        ..listener("lines", Some(ServerTls { certificates: Vec::new(), ..tls.clone() }))
    };
    let (https, plain) = (listener("https", Some(tls)), listener("http", None));
    let all = [&https, &plain, &bytes];
    let base_domains = ["tunnel.localhost".into()];
    let spec = MatchSpec::default();
    let table = [
        (MatchSpec { subdomain: Some("shop"), ..spec }, None),
        (MatchSpec { wildcard: Some("*"), ..spec }, None),
        (MatchSpec { wildcard: Some("*.shop"), ..spec }, Some("*.shop.tunnel.localhost")),
        (MatchSpec { subdomain: Some("a.shop"), ..spec }, Some("a.shop.tunnel.localhost")),
        (MatchSpec { host: Some("own.example.org"), ..spec }, None),
        (MatchSpec { host: Some("x.example.org"), ..spec }, Some("x.example.org")),
        (MatchSpec { host: Some("x.example.org"), listener: Some("http"), ..spec }, None),
        (MatchSpec { host: Some("x.example.org"), listener: Some("lines"), ..spec }, None),
    ];
    for (spec, expected) in table {
        let told = uncovered(&route(&spec), &base_domains, &all);
        let expected = expected.map(|host| {
            format!(
                "route r: no certificate of listener https is for {host}; clients are answered 421"
            )
        });
        assert_eq!(told, Vec::from_iter(expected), "{spec:?}");
    }
}
