//! What a route asks of the sidecar's end: retries and timeouts of the handshake.

use std::time::Duration;

use sidelane_plugin::{Reset, failure};
use sidelane_testkit::{Outcome, TestMeta, TestService};

use crate::wire::{WebSocketRequest, read_response};
use crate::{kit, meta, read_head, switching, values};

#[test]
fn a_service_that_refuses_connections_is_asked_again_as_often_as_allowed() {
    for (retries, budget, connects) in [(0, 9, 1), (1, 9, 2), (3, 9, 4), (5, 2, 3), (5, 0, 1)] {
        let (kit, service) = (kit(), TestService::default().with_retries(retries, budget));
        service.refuse();
        kit.block_on(async {
            let delivery = kit.deliver(&meta(), &service);
            WebSocketRequest::new("/").send(&delivery.peer);
            let outcome = delivery.running.outcome().await;
            assert_eq!(outcome, Outcome::Ended(failure::SERVICE_UNREACHABLE));
            let refused = Some(Reset::new(failure::SERVICE_UNREACHABLE));
            assert_eq!(delivery.peer.was_refused(), refused);
        });
        assert_eq!(service.connects(), connects, "{retries} retries, budget {budget}");
    }
}

#[test]
fn a_service_that_is_back_in_time_gets_the_handshake() {
    let (kit, service) = (kit(), TestService::default().with_retries(1, 1));
    service.refuse();
    let delivery = kit.deliver(&meta(), &service);
    WebSocketRequest::new("/").send(&delivery.peer);
    kit.run_until_idle();
    service.accept_again();
    kit.block_on(async {
        let mut stream = service.accept().await;
        let head = read_head(&mut stream).await;
        stream.write(&switching(&head, "")).await;
        assert!(read_response(&delivery.peer.message().await).accepted);
        delivery.running.cancel();
    });
}

#[test]
fn a_handshake_that_was_sent_is_not_sent_again() {
    let (kit, service) = (kit(), TestService::default().with_retries(9, 9));
    kit.block_on(async {
        let delivery = kit.deliver(&meta(), &service);
        WebSocketRequest::new("/").send(&delivery.peer);
        let mut stream = service.accept().await;
        read_head(&mut stream).await;
        drop(stream);
        let outcome = delivery.running.outcome().await;
        assert_eq!(outcome, Outcome::Ended(failure::SERVICE_RESET));
    });
    assert_eq!((service.connects(), service.retries_asked()), (1, 0));
}

#[test]
fn a_routes_timeouts_bound_the_handshake() {
    // Response head, deadline from now (0: none), when it ends; all in milliseconds.
    for (timeout, deadline, ends) in [(100, 0, 100), (100, 50, 50), (0, 50, 50)] {
        let (kit, service) = (kit(), TestService::default());
        let meta = TestMeta {
            response_head_timeout_ns: timeout * 1_000_000,
            // The fake host's clock begins at one second.
            deadline_ns: if deadline == 0 { 0 } else { 1_000_000_000 + deadline * 1_000_000 },
            ..meta()
        };
        let delivery = kit.deliver(&meta, &service);
        WebSocketRequest::new("/").send(&delivery.peer);
        kit.run_until_idle();
        kit.advance(Duration::from_millis(ends - 1));
        kit.run_until_idle();
        assert_eq!(delivery.running.ended(), None, "{timeout} {deadline}");
        kit.advance(Duration::from_millis(1));
        kit.run_until_idle();
        let ended = delivery.running.ended();
        assert_eq!(ended, Some(Outcome::Ended(failure::SERVICE_TIMEOUT)), "{timeout} {deadline}");
    }
}

#[test]
fn a_trusted_proxys_word_of_the_client_passes_and_is_added_to() {
    let (kit, service) = (kit(), TestService::default());
    let meta = TestMeta {
        trusted_proxy: true,
        client_address: "198.51.100.1:0".to_owned(),
        peer_address: "192.0.2.9:1".to_owned(),
        ..meta()
    };
    let delivery = kit.deliver(&meta, &service);
    WebSocketRequest::new("/").header("x-forwarded-for", "198.51.100.1").send(&delivery.peer);
    kit.block_on(async {
        let head = read_head(&mut service.accept().await).await;
        assert_eq!(values(&head, "x-forwarded-for"), ["198.51.100.1, 192.0.2.9"]);
        delivery.running.cancel();
    });
}
