//! Connections to the service: kept, used again, and replaced where the service closed them.

use std::collections::HashMap;
use std::sync::Mutex;

use sidelane_e2e::client::{Client, request};
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::{Stage, get};

/// Threads of a sidecar that may each keep a pool; more than any default.
const SHARDS_MAX: usize = 4;

#[test]
fn connections_to_the_service_are_used_again() {
    let stage = Stage::ok();
    for number in 0..50 {
        assert_eq!(stage.get(&format!("/{number}")).head.status, 200);
    }
    assert_eq!(stage.service.requests().len(), 50);
    let connections = stage.service.records().len();
    assert!(connections <= SHARDS_MAX, "{connections} connections for 50 requests in turn");
}

#[test]
fn connection_that_the_service_ends_is_not_used_again() {
    let stage = Stage::script(|connection| {
        connection.exchange()?;
        connection.write("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok")
    });
    for _ in 0..20 {
        assert_eq!(stage.get("/").head.status, 200);
    }
    assert_eq!(stage.service.records().len(), 20);
}

#[test]
fn idle_connection_closed_by_the_service_costs_no_answer() {
    // Each connection answers once, keeps silent about its end, and closes.
    let stage = Stage::script(|connection| {
        connection.exchange()?;
        connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    });
    for number in 0..100 {
        let method = if number % 2 == 0 { "GET" } else { "POST" };
        let body = if number % 2 == 0 { "" } else { "Content-Length: 3\r\n" };
        let bytes = format!(
            "{method} / HTTP/1.1\r\nHost: api.localhost\r\n{body}\r\n{}",
            if body.is_empty() { "" } else { "abc" }
        );
        // Between two requests the close is on its way: the pool may or may not have seen it.
        let answer = stage.ask(method, bytes);
        if method == "GET" {
            assert_eq!(answer.head.status, 200, "{number}");
        } else {
            // A POST whose bytes were already on the wire may have been processed.
            assert!(matches!(answer.head.status, 200 | 502), "{number}: {answer:?}");
        }
    }
}

/// A service whose connections answer their first request, and close on reading their second.
fn closing_on_reuse() -> Stage {
    let first = Mutex::new(HashMap::<usize, ()>::new());
    Stage::script(move |connection| {
        while let Some(request) = connection.exchange()? {
            let again = first.lock().expect("no panic").insert(connection.index(), ()).is_some();
            if again || request.target == b"/never" {
                return connection.crash();
            }
            connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        }
        Ok(())
    })
}

#[test]
fn get_on_a_closed_pooled_connection_is_repeated_once() {
    let stage = closing_on_reuse();
    assert_eq!(stage.get("/first").head.status, 200);
    assert_eq!(stage.get("/second").head.status, 200);
    let targets: Vec<_> =
        stage.service.requests().into_iter().map(|request| request.target).collect();
    assert_eq!(targets, [b"/first".to_vec(), b"/second".to_vec(), b"/second".to_vec()]);
}

#[test]
fn get_that_no_connection_answers_is_502_after_one_repeat() {
    let stage = closing_on_reuse();
    assert_eq!(stage.get("/first").head.status, 200);
    let answer = stage.get("/never");
    assert_eq!(answer.head.status, 502);
    assert_eq!(answer.head.first("x-sidelane-error"), Some("service-reset"));
    let repeats =
        stage.service.requests().iter().filter(|request| request.target == b"/never").count();
    assert!((1..=2).contains(&repeats), "{repeats}");
}

#[test]
fn request_that_may_have_been_processed_is_not_repeated() {
    let stage = closing_on_reuse();
    assert_eq!(stage.get("/first").head.status, 200);
    let answer = stage
        .ask("POST", "POST /pay HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 3\r\n\r\nabc");
    assert_eq!(answer.head.status, 502);
    let count = stage.service.requests().iter().filter(|request| request.target == b"/pay").count();
    assert_eq!(count, 1);
}

#[test]
fn many_clients_share_few_connections() {
    let stage = Stage::ok();
    let relay = stage.sidelane.web();
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(move || {
                let mut client = Client::connect(relay);
                for _ in 0..50 {
                    client.send(get("/"));
                    assert_eq!(client.answer("GET").head.status, 200);
                }
            });
        }
    });
    assert_eq!(stage.service.requests().len(), 800);
    let connections = stage.service.records().len();
    assert!(connections <= 64, "{connections} connections for 16 clients");
}

#[test]
fn unused_connection_is_closed_after_its_time() {
    let service = Service::ok();
    let mut setup = Setup::of(service.address());
    setup.http_config = "{ idle_timeout: 300ms }".to_owned();
    let sidelane = Sidelane::both(&setup);
    assert_eq!(request(sidelane.web(), "GET", get("/")).head.status, 200);
    service.until("the unused connection to close", |records| records[0].closed);
    assert_eq!(request(sidelane.web(), "GET", get("/")).head.status, 200);
}

#[test]
fn connections_to_the_service_are_bounded() {
    // More requests at once than all threads together may have connections for.
    const CLIENTS: usize = SHARDS_MAX + 4;
    let service = Service::start(|connection| {
        connection.request()?;
        connection.closed()
    });
    let mut setup = Setup::of(service.address());
    setup.http_config = "{ connections_max: 1, idle_per_service: 1 }".to_owned();
    let sidelane = Sidelane::both(&setup);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let mut client = Client::connect(sidelane.web());
            client.send(get("/"));
            client
        })
        .collect();
    sidelane.until_metric("sidelane_exchanges_total", &["code=\"overloaded\""], |count| {
        count >= (CLIENTS - SHARDS_MAX) as f64
    });
    assert!(service.records().len() <= SHARDS_MAX);
    drop(clients);
    service.until("the held requests to be cancelled", |records| {
        records.iter().all(|record| record.closed)
    });
}
