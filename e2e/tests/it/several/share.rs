//! How exchanges are shared out.

use sidelane_e2e::client::{Answer, request};
use sidelane_e2e::process::Sidelane;
use sidelane_e2e::wait;

use super::{Named, Two, get, relay_yaml, sidecar_yaml, text, until_serving};

#[test]
fn two_sidecars_share_a_tunnel_by_weight_and_never_fight() {
    let two = Two::with(&relay_yaml(""), ["", ", weight: 20"], "");
    let answers = two.answers(300);
    assert_eq!(answers.values().sum::<usize>(), 300);
    // The second has just come, and begins slowly, but not that slowly.
    assert!(answers["two"] > 2 * answers.get("one").copied().unwrap_or(1), "{answers:?}");
    let page = two.relay.admin_page("/tunnels");
    let serving = page["tunnels"][0]["serving"].as_array().expect("a list");
    let weights: Vec<_> = serving.iter().map(|one| one["weight"].clone()).collect();
    assert_eq!(weights, [1, 20]);
    // Both have the same name, and neither has taken the other's place.
    assert_eq!(serving[0]["sidecar"], serving[1]["sidecar"]);
    for sidecar in [&two.one, &two.two] {
        assert_eq!(sidecar.metric("sidelane_session_dials_total", &[]), Some(1.0));
    }
    assert_eq!(two.relay.metric("sidelane_sessions", &["role=\"relay\""]), Some(2.0));
}

#[test]
fn an_unhealthy_service_gets_nothing_until_it_is_well() {
    let check =
        ", health_check: { type: http, path: /health, interval: 100ms, unhealthy_after: 1 }";
    let two = Two::with(&relay_yaml(""), [check, check], "");
    two.services[0].set_well(false);
    until_serving(&two.relay, 1);
    assert_eq!(two.answers(50)["two"], 50);
    two.services[0].set_well(true);
    until_serving(&two.relay, 2);
    wait::until("an answer of the one that is well again", || {
        (text(&two.get("/")) == "one").then_some(())
    });
    // Both are not: the client is told why.
    two.services.iter().for_each(|service| service.set_well(false));
    until_serving(&two.relay, 0);
    assert_eq!(two.get("/").head.status, 503);
}

/// The affinity cookie of an answer: `name=value`, and what stands behind it.
fn cookie(answer: &Answer) -> Option<(String, String)> {
    let cookie = answer.head.first("set-cookie")?;
    let (pair, rest) = cookie.split_once("; ")?;
    Some((pair.to_owned(), rest.to_owned()))
}

#[test]
fn a_clients_exchanges_go_to_one_sidecar_by_a_cookie_at_every_relay() {
    let route = ", affinity: { cookie: stick, max_age: 1h }";
    let services = [Named::start("one"), Named::start("two")];
    let relays =
        [Sidelane::spawn("relay 1", &relay_yaml("")), Sidelane::spawn("relay 2", &relay_yaml(""))];
    let listed = format!("relays: [\"{}\", \"{}\"]", relays[0].tunnel(), relays[1].tunnel());
    let start = |index: usize, name: &'static str| {
        let (service, relay) = (services[index].service.address(), relays[0].tunnel());
        let yaml = sidecar_yaml(service, relay, "", route);
        Sidelane::start(name, &yaml.replace(&format!("relays: [\"{relay}\"]"), &listed))
    };
    let sidecars = [start(0, "sidecar 1"), start(1, "sidecar 2")];
    relays.iter().for_each(|relay| until_serving(relay, 2));

    let first = get(relays[0].web(), "/", "cookie: a=1\r\n");
    let (pair, rest) = cookie(&first).expect("a cookie");
    assert!(pair.starts_with("stick="), "{pair}");
    assert_eq!(rest, "Path=/; Max-Age=3600; HttpOnly; SameSite=Lax");
    let chosen = text(&first);
    for relay in relays.iter().cycle().take(40) {
        let answer = get(relay.web(), "/", &format!("cookie: a=1; {pair}; b=2\r\n"));
        assert_eq!(text(&answer), chosen);
        assert_eq!(cookie(&answer), None, "it has it already");
    }
    for service in &services {
        for request in service.service.take_requests() {
            let cookies: Vec<_> = request.all("cookie").collect();
            assert!(cookies == [b"a=1; b=2".as_slice()] || cookies == [b"a=1".as_slice()]);
        }
    }
    // One that is made up is as good as none.
    let made_up = get(relays[0].web(), "/", "cookie: stick=AAAAAAAAAAAAAAAAAAAAAA\r\n");
    assert!(cookie(&made_up).is_some() && made_up.head.status == 200);

    let index = services.iter().position(|service| service.name == chosen).expect("a name");
    let [one, two] = sidecars;
    let (gone, stays) = if index == 0 { (one, two) } else { (two, one) };
    gone.signal("TERM");
    relays.iter().for_each(|relay| until_serving(relay, 1));
    let answer = get(relays[1].web(), "/", &format!("cookie: {pair}\r\n"));
    assert_eq!(text(&answer), services[1 - index].name);
    let (other, _) = cookie(&answer).expect("another cookie");
    assert_ne!(other, pair);
    let answer = get(relays[0].web(), "/", &format!("cookie: {other}\r\n"));
    assert_eq!((text(&answer), cookie(&answer)), (services[1 - index].name.to_owned(), None));
    drop((gone, stays));
}

#[test]
fn a_cookie_survives_a_reconnect_of_its_sidecar() {
    let route = ", affinity: { cookie: stick }";
    let two = Two::with(&relay_yaml(", grace: 0s"), ["", ""], route);
    let first = two.get("/");
    let (pair, rest) = cookie(&first).expect("a cookie");
    assert_eq!(rest, "Path=/; HttpOnly; SameSite=Lax", "until the client ends");
    // The relay's reload of its limits leaves sessions; a restart of the relay does not.
    let yaml = relay_yaml(&format!(", grace: 0s, address: \"{}\"", two.relay.tunnel()));
    let yaml = yaml.replace("address: \"127.0.0.1:0\", ", "");
    let Two { mut relay, one, two, services } = two;
    relay.signal("TERM");
    relay.ended();
    let relay = Sidelane::spawn("relay again", &yaml);
    until_serving(&relay, 2);
    for _ in 0..20 {
        let answer = get(relay.web(), "/", &format!("cookie: {pair}\r\n"));
        assert_eq!((text(&answer), cookie(&answer)), (text(&first), None));
    }
    drop((one, two, services));
}

#[test]
fn a_sidecar_whose_service_is_gone_is_left_aside_and_no_client_notices() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").expect("an address");
    let gone = nobody.local_addr().expect("bound");
    drop(nobody);
    let well = Named::start("well");
    let relay = Sidelane::spawn("relay", &relay_yaml(""));
    let start =
        |name, service| Sidelane::start(name, &sidecar_yaml(service, relay.tunnel(), "", ""));
    let sidecars = [start("sidecar 1", gone), start("sidecar 2", well.service.address())];
    until_serving(&relay, 2);
    wait::until("the one that fails to be left aside", || {
        let answer = post(relay.web(), "/", "x");
        assert_eq!((answer.head.status, text(&answer).as_str()), (200, "well"));
        let ejected = relay.metric("sidelane_sidecar_ejections_total", &["tunnel=\"api\""]);
        (ejected >= Some(1.0)).then_some(())
    });
    assert!(relay.metric("sidelane_exchanges_moved_total", &["reason=\"refused\""]) >= Some(5.0));
    assert!(relay.log().contains("it is left aside for a while"));
    // Never the last: what it cannot take is refused as if nobody was left aside.
    let [failing, other] = sidecars;
    drop(other);
    until_serving(&relay, 1);
    let answer = get(relay.web(), "/", "");
    assert_eq!(answer.head.first("x-sidelane-error"), Some("service-unreachable"));
    drop(failing);
}

pub(super) fn post(relay: std::net::SocketAddr, path: &str, body: &str) -> Answer {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: api.localhost\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    request(relay, "POST", head)
}
