//! Services that are spoken to by TLS, and choose HTTP's version.

use sidelane_plugin::{HttpVersion, failure};
use sidelane_testkit::{Deliver, Kit, Outcome, TestService, TestStream};

use crate::h2::{Served, deliver, respond};
use crate::wire::{HttpRequest, read_data, read_response};
use crate::{kit, kit_with, meta, read_head};

const WELL: Outcome = Outcome::Ended(failure::NONE);
const BOTH: &[&str] = &["h2", "http/1.1"];
const ECONNRESET: i32 = 104;

fn get(kit: &Kit, service: &TestService) -> Deliver {
    deliver(kit, service, &HttpRequest::new("GET", "/"), true)
}

/// Answers one request over HTTP/1.1.
async fn answer(stream: &mut TestStream, delivery: &Deliver) {
    assert!(read_head(stream).await.starts_with("GET / HTTP/1.1\r\n"));
    stream.write(b"HTTP/1.1 204 No Content\r\n\r\n").await;
    assert_eq!(read_response(&delivery.peer.message().await).status, 204);
}

async fn answer_h2(served: &mut Served, delivery: &Deliver) {
    let (got, mut response) = served.request().await;
    assert_eq!(got.uri().scheme_str(), Some("https"));
    respond(&mut response, 204);
    assert_eq!(read_response(&served.drive(delivery.peer.message()).await).status, 204);
}

#[test]
fn a_service_that_chooses_http_2_gets_all_over_one_connection() {
    let (kit, service) = (kit(), TestService::default().with_tls(BOTH));
    kit.block_on(async {
        let first = get(&kit, &service);
        let second = get(&kit, &service);
        let mut served = Served::accept(&service).await;
        answer_h2(&mut served, &first).await;
        answer_h2(&mut served, &second).await;
        let third = get(&kit, &service);
        answer_h2(&mut served, &third).await;
        assert_eq!(served.drive(third.running.outcome()).await, WELL);
        assert_eq!(service.offered(), [BOTH]);
    });
}

#[test]
fn a_service_that_chooses_http_1_1_or_nothing_wastes_no_connection() {
    for speaks in [&["http/1.1"][..], &[]] {
        let (kit, service) = (kit(), TestService::default().with_tls(speaks));
        kit.block_on(async {
            let first = get(&kit, &service);
            let mut stream = service.accept().await;
            answer(&mut stream, &first).await;
            assert_eq!(first.running.outcome().await, WELL);
            // The connection is kept, and the choice remembered.
            let second = get(&kit, &service);
            answer(&mut stream, &second).await;
            assert_eq!(second.running.outcome().await, WELL);
            assert_eq!(service.connects(), 1);
            assert_eq!(kit.metric("http_connections"), Some(1.0));
        });
    }
}

#[test]
fn those_who_waited_for_the_choice_have_connections_of_their_own() {
    let (kit, service) = (kit(), TestService::default().with_tls(&["http/1.1"]));
    kit.block_on(async {
        let (first, second) = (get(&kit, &service), get(&kit, &service));
        let (mut a, mut b) = (service.accept().await, service.accept().await);
        for stream in [&mut a, &mut b] {
            assert!(read_head(stream).await.starts_with("GET / HTTP/1.1\r\n"));
            stream.write(b"HTTP/1.1 204 No Content\r\n\r\n").await;
        }
        for delivery in [first, second] {
            assert_eq!(read_response(&delivery.peer.message().await).status, 204);
            assert_eq!(delivery.running.outcome().await, WELL);
        }
        assert_eq!(service.connects(), 2);
    });
}

#[test]
fn a_service_that_changes_its_mind_is_followed() {
    // Nothing is kept, so that each request dials.
    let kit = kit_with(&serde_json::json!({ "idle_per_service": 0 }));
    let service = TestService::default().with_tls(&["http/1.1"]);
    kit.block_on(async {
        let first = get(&kit, &service);
        answer(&mut service.accept().await, &first).await;
        assert_eq!(first.running.outcome().await, WELL);

        service.speak(BOTH);
        let second = get(&kit, &service);
        // Dialled for HTTP/1.1; what is used is the next.
        let mut unused = service.accept().await;
        unused.closed().await;
        let mut served = Served::accept(&service).await;
        answer_h2(&mut served, &second).await;
        assert_eq!(served.drive(second.running.outcome()).await, WELL);
        let third = get(&kit, &service);
        answer_h2(&mut served, &third).await;
        assert_eq!(served.drive(third.running.outcome()).await, WELL);
        assert_eq!(service.connects(), 3);
        drop(served);

        service.speak(&["http/1.1"]);
        let fourth = get(&kit, &service);
        answer(&mut service.accept().await, &fourth).await;
        assert_eq!(fourth.running.outcome().await, WELL);
        assert_eq!(service.connects(), 4);
        for offered in service.offered() {
            assert_eq!(offered, BOTH);
        }
    });
}

#[test]
fn another_version_of_the_service_chooses_anew() {
    let (kit, mut service) = (kit(), TestService::default().with_tls(&["http/1.1"]));
    kit.block_on(async {
        let first = get(&kit, &service);
        answer(&mut service.accept().await, &first).await;
        assert_eq!(first.running.outcome().await, WELL);
        service.version = 2;
        service.speak(BOTH);
        let second = get(&kit, &service);
        let mut served = Served::accept(&service).await;
        answer_h2(&mut served, &second).await;
        assert_eq!(service.connects(), 2);
    });
}

#[test]
fn a_version_that_is_asked_for_is_the_only_one_offered() {
    let (kit, mut service) = (kit(), TestService::default().with_tls(BOTH));
    service.settings.http_version = HttpVersion::Http1;
    kit.block_on(async {
        let delivery = get(&kit, &service);
        answer(&mut service.accept().await, &delivery).await;
        assert_eq!(service.offered(), [["http/1.1"]]);
    });
    let (kit, mut service) = (crate::kit(), TestService::default().with_tls(BOTH));
    service.settings.http_version = HttpVersion::Http2;
    kit.block_on(async {
        let delivery = get(&kit, &service);
        let mut served = Served::accept(&service).await;
        answer_h2(&mut served, &delivery).await;
        assert_eq!(service.offered(), [["h2"]]);
    });
}

#[test]
fn a_service_that_does_not_agree_on_http_2_where_that_must_be_is_invalid() {
    // Knows nothing of ALPN; says that it speaks no such thing.
    for (speaks, code) in
        [(&[][..], failure::SERVICE_INVALID), (&["http/1.1"], failure::SERVICE_UNREACHABLE)]
    {
        let (kit, mut service) = (kit(), TestService::default().with_tls(speaks));
        service.settings.http_version = HttpVersion::Http2;
        kit.block_on(async {
            let delivery = get(&kit, &service);
            assert_eq!(delivery.running.outcome().await, Outcome::Ended(code));
            assert_eq!(delivery.peer.was_reset().map(|reset| reset.code), Some(code));
            assert!(!delivery.peer.was_dispatched());
        });
    }
}

#[test]
fn a_connection_of_one_client_alone_is_used_whatever_is_chosen() {
    let (kit, mut service) = (kit(), TestService::default().with_tls(&["http/1.1"]));
    service.settings.shared = false;
    kit.block_on(async {
        for count in 1..=2 {
            let delivery = get(&kit, &service);
            let mut stream = service.accept().await;
            answer(&mut stream, &delivery).await;
            assert_eq!(delivery.running.outcome().await, WELL);
            stream.closed().await;
            assert_eq!(service.connects(), count);
        }
    });
}

#[test]
fn a_body_that_ends_with_the_connection_is_cut_where_that_fails() {
    let (kit, service) = (kit(), TestService::default().with_tls(&["http/1.1"]));
    kit.block_on(async {
        let delivery = kit.deliver(&meta(), &service);
        HttpRequest::new("GET", "/").send(&delivery.peer, true);
        let mut stream = service.accept().await;
        read_head(&mut stream).await;
        stream.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhalf").await;
        let first = delivery.peer.message().await;
        let mut come = read_response(&first).body;
        while come.len() < 4 {
            come.extend(read_data(&delivery.peer.message().await));
        }
        assert!(!first.end);
        // The end of the bytes without TLS's own: as the host reports it.
        stream.fail(ECONNRESET);
        let outcome = delivery.running.outcome().await;
        assert_eq!(outcome, Outcome::Ended(failure::SERVICE_RESET));
        let reset = delivery.peer.was_reset().expect("the peer is told");
        assert_eq!(reset.code, failure::SERVICE_RESET);
    });
}
