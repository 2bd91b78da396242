//! One sidecar at several relays, and relays that begin.

use std::time::Duration;

use sidelane_e2e::authority::{Authority, Files};
use sidelane_e2e::client::Client;
use sidelane_e2e::connect::{self, ConnectProxy};
use sidelane_e2e::fault::Wire;
use sidelane_e2e::process::{Route, Sidelane};
use sidelane_e2e::wait;

use super::{Named, get, relay_yaml, setup, sidecar_yaml, text, until_serving};

/// A relay that tells of `peers` to whoever comes from here on.
fn tell(relay: &Sidelane, peers: &[std::net::SocketAddr]) {
    let peers: Vec<String> = peers.iter().map(|peer| format!("\"{peer}\"")).collect();
    relay.rewrite(&relay_yaml(&format!(", peers: [{}]", peers.join(", "))));
    assert_eq!(relay.reload().0, 200);
}

#[test]
fn a_relay_tells_of_others_which_are_dialled_too_and_nobody_goes_in_circles() {
    let relays = [
        Sidelane::spawn("relay 1", &relay_yaml("")),
        Sidelane::spawn("relay 2", &relay_yaml("")),
        Sidelane::spawn("relay 3", &relay_yaml("")),
    ];
    let [one, two, three] = relays.each_ref().map(Sidelane::tunnel);
    // Each tells of the next, and the last of the first, which the file names.
    tell(&relays[0], &[one, two]);
    tell(&relays[1], &[one, three]);
    tell(&relays[2], &[one, two]);
    let service = Named::start("web");
    let address = service.service.address();
    let sidecar = Sidelane::start("sidecar", &sidecar_yaml(address, one, "", ""));
    for relay in &relays {
        until_serving(relay, 1);
        assert_eq!(text(&get(relay.web(), "/", "")), "web");
        assert_eq!(relay.metric("sidelane_sessions", &["role=\"relay\""]), Some(1.0));
    }
    assert_eq!(sidecar.metric("sidelane_session_dials_total", &[]), Some(3.0));
    let page = sidecar.admin_page("/tunnels");
    let told: Vec<_> =
        page["relays"].as_array().expect("a list").iter().map(|one| &one["told_by"]).collect();
    assert_eq!(told.len(), 3);
    assert_eq!(told.iter().filter(|by| **by == &one.to_string()).count(), 2);

    // A session of its own with each: one relay's end is nothing to the others.
    let [first, second, third] = relays;
    drop(second);
    for relay in [&first, &third] {
        assert_eq!(text(&get(relay.web(), "/", "")), "web");
    }
}

#[test]
fn a_sidecar_follows_nobody_where_its_file_says_so_or_the_way_is_plain() {
    let relays =
        [Sidelane::spawn("relay 1", &relay_yaml("")), Sidelane::spawn("relay 2", &relay_yaml(""))];
    let [one, two] = relays.each_ref().map(Sidelane::tunnel);
    // A host that the file does not name, on a plain way; loopback all the same.
    let elsewhere = std::net::SocketAddr::from(([127, 0, 0, 2], 1));
    tell(&relays[0], &[two, elsewhere]);
    let service = Named::start("web");
    let yaml = sidecar_yaml(service.service.address(), one, "", "");
    let stays = yaml.replace("  name: e2e\n", "  name: e2e\n  follow_peers: false\n");
    let sidecar = Sidelane::start("sidecar", &stays);
    until_serving(&relays[0], 1);
    assert!(sidecar.log().contains("the relay tells of others"));
    let dialled = |sidecar: &Sidelane| {
        let page = sidecar.admin_page("/tunnels");
        page["relays"].as_array().map_or(0, Vec::len)
    };
    assert_eq!(dialled(&sidecar), 1);
    // A reload changes that, both ways.
    sidecar.rewrite(&yaml);
    assert_eq!(sidecar.reload().0, 200);
    until_serving(&relays[1], 1);
    assert_eq!(dialled(&sidecar), 2, "the plain one is left out");
    assert_eq!(text(&get(relays[1].web(), "/", "")), "web");
    sidecar.rewrite(&stays);
    assert_eq!(sidecar.reload().0, 200);
    wait::until("the end of the way there", || {
        sidecar.log().contains("no relay tells of this one any more").then_some(())
    });
}

#[test]
fn a_fresh_relay_is_not_ready_before_its_sessions_are_there() {
    let warm = "  warmup: { time: 10m, sessions: 1 }\n  tunnel: {";
    let yaml = relay_yaml("").replace("  tunnel: {", warm);
    let relay = Sidelane::spawn("relay", &yaml);
    let ready = || relay.get(relay.health(), "/ready");
    let answer = ready();
    assert_eq!(answer.head.status, 503);
    assert!(text(&answer).contains("warming up: 0 of 1 sessions are there"), "{answer:?}");
    let service = Named::start("web");
    let yaml = sidecar_yaml(service.service.address(), relay.tunnel(), "", "");
    let sidecar = Sidelane::start("sidecar", &yaml);
    until_serving(&relay, 1);
    assert_eq!(ready().head.status, 200);
    assert_eq!(relay.get(relay.health(), "/live").head.status, 200);
    drop(sidecar);
}

#[test]
fn a_session_whose_lanes_are_lost_holds_no_name_against_a_newcomer() {
    let relay = Sidelane::spawn("relay", &relay_yaml(", grace: 5m"));
    let wire = Wire::to(relay.tunnel());
    let services = [Named::start("one"), Named::start("two")];
    let yaml = sidecar_yaml(services[0].service.address(), wire.address(), "", "");
    let ghost = Sidelane::start("sidecar 1", &yaml);
    until_serving(&relay, 1);
    wire.down();
    until_serving(&relay, 0);
    // The same name, for another tunnel.
    let mut other = setup(services[1].service.address());
    other.tunnels[0].0 = "other".to_owned();
    other.routes = vec![Route { tunnel: "other".to_owned(), ..Route::new("api", "other") }];
    let newcomer = Sidelane::start("sidecar 2", &other.sidecar(relay.tunnel()));
    wait::within(Duration::from_secs(30), "the newcomer's service", || {
        (text(&get(relay.web(), "/", "")) == "two").then_some(())
    });
    // It is back, and waits like whoever comes second.
    wire.up();
    wait::until("the ghost to be told", || {
        ghost.log().contains("announcement waits").then_some(())
    });
    assert_eq!(text(&get(relay.web(), "/", "")), "two");
    drop(newcomer);
    wait::until("the first again", || (text(&get(relay.web(), "/", "")) == "one").then_some(()));
}

/// A relay could send a sidecar anywhere: it presents itself to those only that the same authority knows.
#[test]
fn by_tls_a_sidecar_follows_to_other_hosts_that_its_authority_knows() {
    let token = "correct-horse-battery-staple";
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let yaml = |files: &Files, peers: &str| {
        let tls = format!(
            ", token: \"{token}\", tls: {{ certificates: [{{ cert: \"{}\", key: \"{}\" }}] }}{peers}",
            files.cert.display(),
            files.key.display()
        );
        relay_yaml(&tls)
    };
    let good = Sidelane::spawn("good relay", &yaml(&ours.sign(&["localhost"]), ""));
    let evil = Sidelane::spawn("evil relay", &yaml(&theirs.sign(&["localhost"]), ""));
    let [good_port, evil_port] = [&good, &evil].map(|relay| relay.tunnel().port());
    let peers = format!(", peers: [\"localhost:{good_port}\", \"localhost:{evil_port}\"]");
    let teller = Sidelane::spawn("relay", &yaml(&ours.sign(&["127.0.0.1"]), &peers));
    let service = Named::start("web");
    let address = teller.tunnel();
    let ca = ours.ca();
    let relays = format!(
        "relays: [{{ address: \"{address}\", tls: {{ ca: \"{}\" }} }}]\n  token: {token}",
        ca.display()
    );
    let yaml = sidecar_yaml(service.service.address(), address, "", "");
    let plain = format!("relays: [\"{address}\"]");
    assert!(yaml.contains(&plain), "{yaml}");
    let sidecar = Sidelane::start("sidecar", &yaml.replace(&plain, &relays));
    for relay in [&teller, &good] {
        until_serving(relay, 1);
        assert_eq!(text(&get(relay.web(), "/", "")), "web");
    }
    let refused = format!("no TLS with relay localhost:{evil_port}");
    wait::until("the other to be refused", || sidecar.log().contains(&refused).then_some(()));
    assert_eq!(evil.metric("sidelane_sessions", &["role=\"relay\""]).unwrap_or_default(), 0.0);
}

/// Two relays, each behind an address of its own, and the way to both that is left to whoever does not
/// reach that: it leads to whichever of them is there.
#[test]
fn a_way_that_leads_to_a_relay_with_a_session_already_ends_none_of_it() {
    let one = Sidelane::spawn("relay 1", &relay_yaml(""));
    let two = Sidelane::spawn("relay 2", &relay_yaml(""));
    let ingress = Wire::to(one.tunnel());
    let service = Named::start("web");
    let yaml = sidecar_yaml(service.service.address(), one.tunnel(), "", "");
    let alone = format!("relays: [\"{}\"]", one.tunnel());
    assert!(yaml.contains(&alone), "{yaml}");
    let fallback = format!("fallback: [\"ws://{}/tunnel\"]", ingress.address());
    let address = two.tunnel();
    let both = format!(
        "relays: [{{ address: \"{}\" }}, {{ address: \"{address}\", {fallback} }}]",
        one.tunnel()
    );
    let sidecar = Sidelane::start("sidecar", &yaml.replace(&alone, &both));
    until_serving(&one, 1);
    until_serving(&two, 1);

    let mut held = Client::connect(one.web());
    held.send("POST /hold HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 0\r\n\r\n");
    wait::until("the request", || (service.holds() == 1).then_some(()));
    two.kill();
    wait::until("the other way to be tried", || {
        sidecar.log().contains("has a session with this relay already").then_some(())
    });
    service.let_go();
    let answer = held.answer("POST");
    assert_eq!((answer.head.status, text(&answer).as_str()), (200, "web"), "{answer:?}");
    assert!(!one.log().contains("replaces the older"), "{}", one.log());

    // The relay that went is found once it is back.
    let listens = relay_yaml("").replace(
        "tunnel: { address: \"127.0.0.1:0\"",
        &format!("tunnel: {{ address: \"{address}\""),
    );
    let two = Sidelane::spawn("relay 2 again", &listens);
    wait::within(Duration::from_secs(30), "the sidecar at the relay that came back", || {
        let sessions = two.metric("sidelane_sessions", &["role=\"relay\""]);
        (sessions == Some(1.0)).then_some(())
    });
    until_serving(&two, 1);
    assert_eq!(one.metric("sidelane_sessions", &["role=\"relay\""]), Some(1.0));
}

/// Where there is a proxy, names are for that to look up: this machine may know none.
#[test]
fn a_relay_that_is_told_of_by_name_is_reached_through_the_tellers_proxy() {
    let token = "correct-horse-battery-staple";
    let authority = Authority::new("e2e");
    let yaml = |files: &Files, peers: &str| {
        relay_yaml(&format!(
            ", token: \"{token}\", tls: {{ certificates: [{{ cert: \"{}\", key: \"{}\" }}] }}{peers}",
            files.cert.display(),
            files.key.display()
        ))
    };
    let told = Sidelane::spawn("told relay", &yaml(&authority.sign(&[connect::HOST]), ""));
    let peers = format!(", peers: [\"{}:{}\"]", connect::HOST, told.tunnel().port());
    let teller = Sidelane::spawn("relay", &yaml(&authority.sign(&["127.0.0.1"]), &peers));
    let (service, proxy) = (Named::start("web"), ConnectProxy::start(None));
    let address = teller.tunnel();
    let yaml = sidecar_yaml(service.service.address(), address, "", "");
    let plain = format!("relays: [\"{address}\"]");
    assert!(yaml.contains(&plain), "{yaml}");
    let relays = format!(
        "relays: [{{ address: \"{address}\", tls: {{ ca: \"{}\" }} }}]\n  token: {token}\n  proxy: \"http://{}\"",
        authority.ca().display(),
        proxy.address()
    );
    let _sidecar = Sidelane::start("sidecar", &yaml.replace(&plain, &relays));
    for relay in [&teller, &told] {
        until_serving(relay, 1);
        assert_eq!(text(&get(relay.web(), "/", "")), "web");
    }
}
