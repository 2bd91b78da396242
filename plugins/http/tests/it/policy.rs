//! What a tunnel and a route ask of the sidecar's end: retries, timeouts, connections.

use std::time::Duration;

use serde_json::json;
use sidelane_plugin::{Reset, ServiceSettings, failure};
use sidelane_testkit::{Deliver, Kit, Outcome, TestMeta, TestService};

use crate::wire::{HttpRequest, read_response};
use crate::{kit, kit_with, meta, read_head, values};

const WELL: Outcome = Outcome::Ended(failure::NONE);

fn deliver(kit: &Kit, service: &TestService, request: &HttpRequest, end: bool) -> Deliver {
    deliver_with(kit, service, &meta(), request, end)
}

fn deliver_with(
    kit: &Kit,
    service: &TestService,
    meta: &TestMeta,
    request: &HttpRequest,
    end: bool,
) -> Deliver {
    let delivery = kit.deliver(meta, service);
    request.send(&delivery.peer, end);
    delivery
}

#[test]
fn a_service_that_refuses_connections_is_asked_again_as_often_as_allowed() {
    // Retries of the exchange, budget, connections tried, times asked.
    for (retries, budget, connects, asked) in
        [(0, 9, 1, 0), (1, 9, 2, 2), (3, 9, 4, 4), (5, 2, 3, 3), (5, 0, 1, 1)]
    {
        let (kit, service) = (kit(), TestService::default().with_retries(retries, budget));
        service.refuse();
        let delivery = deliver(&kit, &service, &HttpRequest::new("POST", "/"), true);
        kit.block_on(async {
            let outcome = delivery.running.outcome().await;
            assert_eq!(outcome, Outcome::Ended(failure::SERVICE_UNREACHABLE));
        });
        let refused = Some(Reset::new(failure::SERVICE_UNREACHABLE));
        assert_eq!(delivery.peer.was_refused(), refused, "nothing was sent");
        assert_eq!(service.connects(), connects, "{retries} retries, budget {budget}");
        assert_eq!(service.retries_asked(), asked, "{retries} retries, budget {budget}");
    }
}

#[test]
fn a_body_that_is_still_coming_survives_a_refused_connection() {
    let (kit, service) = (kit(), TestService::default().with_retries(1, 1));
    service.refuse();
    let request = HttpRequest::new("POST", "/").body(Some(6), b"abc");
    let delivery = deliver(&kit, &service, &request, false);
    kit.run_until_idle();
    assert_eq!(service.connects(), 1);
    service.accept_again();
    kit.block_on(async {
        let mut stream = service.accept().await;
        read_head(&mut stream).await;
        crate::wire::send_data(&delivery.peer, b"def", true);
        assert_eq!(stream.read(6).await, b"abcdef");
        stream.write(b"HTTP/1.1 204 No Content\r\n\r\n").await;
        assert_eq!(read_response(&delivery.peer.message().await).status, 204);
        assert_eq!(delivery.running.outcome().await, WELL);
    });
}

#[test]
fn what_a_service_may_have_processed_is_sent_again_only_where_that_does_no_harm() {
    let get = || HttpRequest::new("GET", "/");
    let whole = |method| HttpRequest::new(method, "/").body(Some(3), b"abc");
    let partial = || HttpRequest::new("PUT", "/").body(Some(6), b"abc");
    for (request, end, answer, is_sent_again) in [
        (get(), true, &b""[..], true),
        (whole("PUT"), true, b"", true),
        (whole("DELETE"), true, b"", true),
        (whole("POST"), true, b"", false),
        (partial(), false, b"", false),
        // A response has begun.
        (get(), true, b"HTTP/1.1 2", false),
        (get(), true, b"HTTP/1.1 103 Early Hints\r\n\r\n", false),
    ] {
        for reset in [false, true] {
            let (kit, service) = (kit(), TestService::default().with_retries(3, 1));
            let delivery = deliver(&kit, &service, &request, end);
            kit.block_on(async {
                let mut stream = service.accept().await;
                read_head(&mut stream).await;
                stream.write(answer).await;
                if reset {
                    kit.run_until_idle();
                    stream.fail(104);
                }
                drop(stream);
                if is_sent_again {
                    let mut stream = service.accept().await;
                    let head = read_head(&mut stream).await;
                    assert!(head.starts_with(&request.method), "{head}");
                    assert_eq!(stream.read(request.body.len()).await, request.body);
                    stream.write(b"HTTP/1.1 204 No Content\r\n\r\n").await;
                    assert_eq!(delivery.running.outcome().await, WELL);
                } else {
                    let outcome = delivery.running.outcome().await;
                    assert_ne!(outcome, WELL, "{request:?}");
                }
            });
            let connects = if is_sent_again { 2 } else { 1 };
            assert_eq!(service.connects(), connects, "{request:?} {answer:?} reset: {reset}");
        }
    }
}

#[test]
fn the_wait_before_a_retry_ends_with_the_exchange() {
    let (kit, service) = (kit(), TestService::default().with_retries(3, 3));
    service.refuse();
    let delivery = deliver(&kit, &service, &HttpRequest::new("GET", "/"), true);
    kit.run_until_idle();
    delivery.peer.reset(Reset::new(failure::CLIENT_GONE));
    kit.run_until_idle();
    assert_eq!(delivery.running.ended(), Some(Outcome::Ended(failure::CLIENT_GONE)));
    assert_eq!(service.connects(), 1);
}

#[test]
fn a_routes_response_head_timeout_goes_before_the_plugins() {
    for (timeout, waits) in [(100, 100), (90_000, 90_000), (0, 60_000)] {
        let (kit, service) = (kit(), TestService::default());
        let meta = TestMeta { response_head_timeout_ns: timeout * 1_000_000, ..meta() };
        let delivery = deliver_with(&kit, &service, &meta, &HttpRequest::new("GET", "/"), true);
        kit.run_until_idle();
        kit.advance(Duration::from_millis(waits - 1));
        kit.run_until_idle();
        assert_eq!(delivery.running.ended(), None, "{timeout}");
        kit.advance(Duration::from_millis(1));
        kit.run_until_idle();
        let ended = delivery.running.ended();
        assert_eq!(ended, Some(Outcome::Ended(failure::SERVICE_TIMEOUT)), "{timeout}");
    }
}

#[test]
fn an_exchange_ends_at_its_deadline_whatever_it_waits_for() {
    /// What has happened by then.
    #[derive(Clone, Copy, Debug)]
    enum Stage {
        Connecting,
        Sent,
        Retrying,
        Answering,
    }
    for stage in [Stage::Connecting, Stage::Sent, Stage::Retrying, Stage::Answering] {
        let (kit, service) = (kit(), TestService::default().with_retries(9, 9));
        match stage {
            Stage::Connecting => service.hang(),
            Stage::Retrying => service.refuse(),
            Stage::Sent | Stage::Answering => {}
        }
        // The fake host's clock begins at one second.
        let meta = TestMeta { deadline_ns: 1_020_000_000, ..meta() };
        let delivery = deliver_with(&kit, &service, &meta, &HttpRequest::new("GET", "/"), true);
        kit.run_until_idle();
        let mut stream = None;
        if matches!(stage, Stage::Answering) {
            kit.block_on(async {
                let stream = stream.insert(service.accept().await);
                stream.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc").await;
                assert_eq!(read_response(&delivery.peer.message().await).body, b"abc");
            });
        }
        kit.advance(Duration::from_millis(20));
        kit.run_until_idle();
        let late = Reset::new(failure::SERVICE_TIMEOUT);
        let ended = delivery.running.ended();
        assert_eq!(ended, Some(Outcome::Ended(failure::SERVICE_TIMEOUT)), "{stage:?}");
        let told = delivery.peer.was_reset().or_else(|| delivery.peer.was_refused());
        assert_eq!(told, Some(late), "{stage:?}");
    }
}

#[test]
fn a_connection_that_names_a_client_serves_one_exchange() {
    let (kit, mut service) = (kit(), TestService::default());
    service.settings = ServiceSettings { shared: false, ..ServiceSettings::default() };
    for _ in 0..2 {
        let delivery = deliver(&kit, &service, &HttpRequest::new("GET", "/"), true);
        kit.block_on(async {
            let mut stream = service.accept().await;
            read_head(&mut stream).await;
            stream.write(b"HTTP/1.1 204 No Content\r\n\r\n").await;
            assert_eq!(delivery.running.outcome().await, WELL);
            stream.closed().await;
        });
    }
    assert_eq!(service.connects(), 2);
}

#[test]
fn a_tunnels_pool_settings_go_before_the_plugins() {
    let kit = kit_with(&json!({ "connections_max": 1, "idle_per_service": 1 }));
    let (plain, mut own) = (TestService::default(), TestService::default());
    own.id = 2;
    own.settings = ServiceSettings {
        pool_connections: Some(2),
        pool_idle: Some(2),
        pool_idle_timeout: Some(Duration::from_secs(1)),
        ..ServiceSettings::default()
    };
    let request = HttpRequest::new("GET", "/");
    let start = |service| deliver(&kit, service, &request, true);
    let running = [start(&plain), start(&own), start(&own)];
    kit.run_until_idle();
    // The plugin's bound is for all services that have none of their own.
    for service in [&plain, &own] {
        let refused = deliver(&kit, service, &request, true);
        kit.run_until_idle();
        let ended = refused.running.ended();
        assert_eq!(ended, Some(Outcome::Ended(failure::OVERLOADED)), "{}", service.id);
    }
    kit.block_on(async {
        let mut streams = Vec::new();
        for service in [&plain, &own, &own] {
            let mut stream = service.accept().await;
            read_head(&mut stream).await;
            stream.write(b"HTTP/1.1 204 No Content\r\n\r\n").await;
            streams.push(stream);
        }
        for running in &running {
            assert_eq!(running.running.outcome().await, WELL);
        }
        assert_eq!(kit.metric("http_connections_idle"), Some(3.0));
        // Those of the tunnel go first; the plugin's stay.
        streams[1].closed().await;
        streams[2].closed().await;
        assert_eq!(kit.metric("http_connections_idle"), Some(1.0));
        assert!(!streams[0].is_closed());
    });
    assert_eq!((plain.connects(), own.connects()), (1, 2));
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
    let request = HttpRequest::new("GET", "/")
        .header("x-forwarded-for", "198.51.100.1")
        .header("x-forwarded-proto", "https")
        .header("forwarded", "for=198.51.100.1")
        .header("x-forwarded-port", "443");
    let _delivery = deliver_with(&kit, &service, &meta, &request, true);
    kit.block_on(async {
        let head = read_head(&mut service.accept().await).await;
        for (name, value) in [
            ("x-forwarded-for", "198.51.100.1, 192.0.2.9"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "test.localhost:9080"),
            ("x-forwarded-port", "443"),
            (
                "forwarded",
                "for=198.51.100.1, for=192.0.2.9;host=\"test.localhost:9080\";proto=http",
            ),
        ] {
            assert_eq!(values(&head, name), [value], "{head}");
        }
    });
}
