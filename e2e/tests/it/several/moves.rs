//! What becomes of exchanges whose sidecar dies.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use sidelane_e2e::client::{Answer, request};
use sidelane_e2e::load::Load;
use sidelane_e2e::stage;
use sidelane_e2e::wait;

use super::{Two, get, relay_yaml, text};

/// A relay waits so long for a killed sidecar to come back: no time at all, that tests may end.
const GRACE: &str = ", grace: 200ms";

/// Sends a request to `/hold` until one is held by the first service, and returns its answer's thread.
fn held(two: &Two, ask: fn(SocketAddr) -> Answer) -> thread::JoinHandle<Answer> {
    let relay = two.relay.web();
    loop {
        let before = two.services[0].holds();
        let asked = thread::spawn(move || ask(relay));
        let is_held = wait::until("an answer, or that it is held", || {
            let is_held = two.services[0].holds() > before;
            (is_held || asked.is_finished()).then_some(is_held)
        });
        if is_held {
            return asked;
        }
        assert_eq!(asked.join().expect("an answer").head.status, 200);
    }
}

#[test]
fn a_get_moves_when_its_sidecar_is_killed_and_a_post_fails_and_is_not_doubled() {
    let two = Two::with(&relay_yaml(GRACE), ["", ""], "");
    two.services[1].let_go();
    let asked = held(&two, |relay| get(relay, "/hold", ""));
    let posted = held(&two, |relay| {
        request(
            relay,
            "POST",
            "POST /hold HTTP/1.1\r\nhost: api.localhost\r\ncontent-length: 1\r\n\
             connection: close\r\n\r\nx",
        )
    });
    let posts = |index: usize| two.services[index].count("POST");
    let before = posts(1);
    let Two { relay, one, two: other, services } = two;
    one.kill();
    let answer = asked.join().expect("an answer");
    assert_eq!((answer.head.status, text(&answer).as_str()), (200, "two"));
    let answer = posted.join().expect("an answer");
    assert_eq!(answer.head.status, 502);
    assert_eq!(answer.head.first("x-sidelane-error"), Some("tunnel-lost"));
    assert_eq!(services[0].count("POST"), 1, "once");
    assert_eq!(services[1].count("POST"), before, "and never again");
    assert_eq!(
        relay.metric("sidelane_exchanges_moved_total", &["reason=\"idempotent\""]),
        Some(1.0)
    );
    services.iter().for_each(super::Named::let_go);
    drop(other);
}

#[test]
fn under_load_no_get_fails_when_a_sidecar_is_killed_and_no_post_is_doubled() {
    let two = Two::with(&relay_yaml(GRACE), ["", ""], "");
    let target = Arc::new(Mutex::new(two.relay.web()));
    let gets: Vec<Load> =
        (0..6).map(|_| Load::keeping(Arc::clone(&target), stage::get("/"))).collect();
    let is_over = Arc::new(AtomicBool::new(false));
    let sent = Arc::new(AtomicUsize::new(0));
    let relay = two.relay.web();
    let posting: Vec<_> = (0..4)
        .map(|client| {
            let (is_over, sent) = (Arc::clone(&is_over), Arc::clone(&sent));
            thread::spawn(move || {
                let mut statuses = Vec::new();
                while !is_over.load(Ordering::SeqCst) {
                    let head = format!(
                        "POST /{client}-{} HTTP/1.1\r\nhost: api.localhost\r\ncontent-length: 1\r\n\
                         connection: close\r\n\r\nx",
                        statuses.len()
                    );
                    statuses.push(request(relay, "POST", head).head.status);
                    sent.fetch_add(1, Ordering::SeqCst);
                }
                statuses
            })
        })
        .collect();
    let goes_on = |count: usize| {
        gets.iter().for_each(|load| load.goes_on(count as u64));
        let from = sent.load(Ordering::SeqCst);
        wait::until("posts", || (sent.load(Ordering::SeqCst) >= from + count).then_some(()));
    };
    goes_on(20);
    let Two { relay, one, two: other, services } = two;
    one.kill();
    goes_on(20);
    for load in gets {
        load.end().expect("no GET fails");
    }
    is_over.store(true, Ordering::SeqCst);
    let statuses: Vec<Vec<u16>> =
        posting.into_iter().map(|posting| posting.join().expect("answers")).collect();
    let mut counts: HashMap<Vec<u8>, usize> = HashMap::new();
    for request in services.iter().flat_map(|service| service.service.requests()) {
        if request.method == "POST" {
            *counts.entry(request.target).or_default() += 1;
        }
    }
    for (client, statuses) in statuses.iter().enumerate() {
        for (number, status) in statuses.iter().enumerate() {
            let count = counts.get(format!("/{client}-{number}").as_bytes()).copied().unwrap_or(0);
            match status {
                200 => assert_eq!(count, 1, "{client}-{number}"),
                502 => assert!(count <= 1, "{client}-{number} was sent {count} times"),
                other => panic!("{client}-{number}: {other}"),
            }
        }
    }
    drop((relay, other));
}

#[test]
fn a_sidecar_that_leaves_under_load_costs_nothing() {
    let two = Two::with(&relay_yaml(""), ["", ""], "");
    let target = Arc::new(Mutex::new(two.relay.web()));
    let loads: Vec<Load> = (0..4)
        .map(|index| match index % 2 {
            0 => Load::keeping(Arc::clone(&target), stage::get("/")),
            _ => Load::connecting(Arc::clone(&target), stage::get("/")),
        })
        .collect();
    let goes_on = || loads.iter().for_each(|load| load.goes_on(20));
    goes_on();
    let Two { relay, mut one, two: other, services } = two;
    one.signal("TERM");
    assert_eq!(one.ended().code(), Some(0));
    goes_on();
    for load in loads {
        load.end().expect("no request fails");
    }
    drop((relay, other, services));
}

#[test]
fn a_tunnel_that_one_sidecar_withdraws_costs_nothing() {
    let two = Two::with(&relay_yaml(""), ["", ""], "");
    let target = Arc::new(Mutex::new(two.relay.web()));
    let load = Load::keeping(target, stage::get("/"));
    let whole = std::fs::read_to_string(two.one.file()).expect("a file");
    let service = two.services[0].service.address();
    let other = whole
        .replace(
            &format!("{{ name: api, service: \"{service}\" }}"),
            &format!("{{ name: other, service: \"{service}\" }}"),
        )
        .replace("subdomain: api, tunnel: api", "subdomain: other, tunnel: other");
    assert_ne!(whole, other);
    for _ in 0..5 {
        for yaml in [&other, &whole] {
            two.one.rewrite(yaml);
            assert_eq!(two.one.reload().0, 200);
            load.goes_on(10);
        }
    }
    load.end().expect("no request fails");
}
