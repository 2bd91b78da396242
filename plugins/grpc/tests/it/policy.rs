//! What a tunnel and a route ask of the sidecar's end: retries, deadlines, connections.

use std::future::poll_fn;
use std::time::Duration;

use h2::Reason;
use serde_json::json;
use sidelane_plugin::{Reset, ServiceSettings, failure};
use sidelane_testkit::{Outcome, TestMeta, TestService};

use crate::service::{Served, answer};
use crate::wire::{GrpcRequest, read_response};
use crate::{kit, kit_with, message, meta};

#[test]
fn a_service_that_refuses_connections_is_asked_again_as_often_as_allowed() {
    // Retries of the RPC, budget, connections tried.
    for (retries, budget, connects) in [(0, 9, 1), (1, 9, 2), (3, 9, 4), (5, 2, 3), (5, 0, 1)] {
        let (kit, service) = (kit(), TestService::default().with_retries(retries, budget));
        service.refuse();
        kit.block_on(async {
            let delivery = kit.deliver(&meta(), &service);
            GrpcRequest::call(&message(0, 1)).last().send(&delivery.peer);
            let outcome = delivery.running.outcome().await;
            assert_eq!(outcome, Outcome::Ended(failure::SERVICE_UNREACHABLE));
            let refused = Some(Reset::new(failure::SERVICE_UNREACHABLE));
            assert_eq!(delivery.peer.was_refused(), refused);
        });
        assert_eq!(service.connects(), connects, "{retries} retries, budget {budget}");
    }
}

#[test]
fn a_stream_refused_twice_takes_from_the_budget() {
    for (retries, tries) in [(0, 2), (1, 3), (2, 4)] {
        let (kit, service) = (kit(), TestService::default().with_retries(retries, 9));
        kit.block_on(async {
            let delivery = kit.deliver(&meta(), &service);
            GrpcRequest::call(&message(0, 1)).last().send(&delivery.peer);
            for _ in 0..tries {
                // The next goes beside the connection that refused.
                let mut served = Served::accept(&service).await;
                let (_request, mut respond) = served.request().await;
                served.go_away();
                respond.send_reset(Reason::REFUSED_STREAM);
                served.drive(poll_fn(|cx| respond.poll_reset(cx))).await.ok();
                served.closed().await;
            }
            let reset = delivery.peer.reset_reason().await;
            assert_eq!(reset, Reset { code: failure::SERVICE_RESET, protocol_code: Some(7) });
        });
        assert_eq!(service.connects(), tries, "{retries}");
    }
}

#[test]
fn the_earlier_of_two_deadlines_counts() {
    for (route_ms, client, ends_ms) in [(20, "50m", 20), (50, "20m", 20), (30, "", 30)] {
        let (kit, service) = (kit(), TestService::default());
        // The fake host's clock begins at one second.
        let meta = TestMeta { deadline_ns: 1_000_000_000 + route_ms * 1_000_000, ..meta() };
        let delivery = kit.deliver(&meta, &service);
        let call = GrpcRequest::call(&message(0, 1)).last();
        let call = if client.is_empty() { call } else { call.header("grpc-timeout", client) };
        call.send(&delivery.peer);
        kit.run_until_idle();
        kit.advance(Duration::from_millis(ends_ms - 1));
        kit.run_until_idle();
        assert_eq!(delivery.running.ended(), None, "{route_ms} {client}");
        kit.advance(Duration::from_millis(1));
        kit.run_until_idle();
        let ended = delivery.running.ended();
        assert_eq!(ended, Some(Outcome::Ended(failure::SERVICE_TIMEOUT)), "{route_ms} {client}");
    }
}

#[test]
fn a_connection_that_names_a_client_serves_one_rpc() {
    let (kit, mut service) = (kit(), TestService::default());
    service.settings =
        ServiceSettings { shared: false, pool_connections: Some(2), ..ServiceSettings::default() };
    kit.block_on(async {
        let deliveries: Vec<_> = (0..2).map(|_| kit.deliver(&meta(), &service)).collect();
        for delivery in &deliveries {
            GrpcRequest::call(&message(0, 1)).last().send(&delivery.peer);
        }
        let mut first = Served::accept(&service).await;
        let (_request, mut respond) = first.request().await;
        let mut second = first.drive(Served::accept(&service)).await;
        let (_request, mut respond_second) = second.request().await;
        // As many as the tunnel allows.
        let third = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).last().send(&third.peer);
        assert_eq!(third.running.outcome().await, Outcome::Ended(failure::OVERLOADED));
        for (served, respond, delivery) in [
            (&mut first, &mut respond, &deliveries[0]),
            (&mut second, &mut respond_second, &deliveries[1]),
        ] {
            answer(respond, message(1, 2));
            let answered = served.drive(delivery.peer.message()).await;
            assert_eq!(read_response(&answered).body, message(1, 2));
            served.closed().await;
        }
        // One that is over leaves its place, and one that nobody waits for is closed.
        let fourth = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).last().send(&fourth.peer);
        kit.run_until_idle();
        fourth.running.cancel();
        let mut unused = Served::accept(&service).await;
        unused.closed().await;
        assert_eq!(kit.metric("grpc_connections"), Some(0.0));
        assert_eq!(service.connects(), 3);
    });
}

#[test]
fn a_tunnels_pool_settings_go_before_the_plugins() {
    let kit = kit_with(&json!({ "connections_max": 4, "idle_timeout": "300s" }));
    let mut service = TestService::default();
    service.settings = ServiceSettings {
        pool_connections: Some(1),
        pool_idle_timeout: Some(Duration::from_secs(1)),
        ..ServiceSettings::default()
    };
    kit.block_on(async {
        let mut builder = h2::server::Builder::new();
        builder.max_concurrent_streams(1);
        let delivery = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).last().send(&delivery.peer);
        let mut served = Served::accept_with(&service, &builder).await;
        let (_request, mut respond) = served.request().await;
        let second = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 1)).last().send(&second.peer);
        let outcome = served.drive(second.running.outcome()).await;
        assert_eq!(outcome, Outcome::Ended(failure::OVERLOADED));
        answer(&mut respond, message(1, 2));
        served.drive(delivery.peer.message()).await;
        let before = kit.metric("grpc_connections");
        assert_eq!(before, Some(1.0));
        // The clock jumps to the look that finds it unused, long before the plugin's 300 s.
        served.closed().await;
        assert_eq!(service.connects(), 1);
    });
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
    kit.block_on(async {
        let delivery = kit.deliver(&meta, &service);
        let call = GrpcRequest::call(&message(0, 1)).last();
        call.header("x-forwarded-for", "198.51.100.1").send(&delivery.peer);
        let mut served = Served::accept(&service).await;
        let (request, mut respond) = served.request().await;
        assert_eq!(request.headers()["x-forwarded-for"], "198.51.100.1, 192.0.2.9");
        answer(&mut respond, message(1, 2));
        served.drive(delivery.peer.message()).await;
    });
}
