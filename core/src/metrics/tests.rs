use super::*;

/// Checks that the text has each line.
#[track_caller]
fn check(metrics: &Metrics, lines: &[&str]) {
    let mut text = String::new();
    metrics.encode(&mut text);
    for line in lines {
        assert!(text.lines().any(|l| l == *line), "no line {line}\n{text}");
    }
}

fn metrics() -> Arc<Metrics> {
    Arc::new(Metrics::new())
}

#[test]
fn an_exchange_is_counted_once_with_its_code() {
    let (metrics, http) = (metrics(), Arc::from("HTTP"));
    let record = metrics.exchange("relay", &http);
    let labels = "role=\"relay\",protocol_type=\"HTTP\"";
    check(&metrics, &[&format!("sidelane_exchanges_in_flight{{{labels}}} 1")]);
    record.routed(&"demo".into(), &"d".into());
    record.end(failure::NONE);
    record.end(failure::INTERNAL);
    drop(record);
    drop(metrics.exchange("relay", &http));
    // The plugin told the client that no route takes it, and ended well.
    let record = metrics.exchange("relay", &http);
    record.unopened(failure::NO_ROUTE);
    record.end(failure::NONE);
    let total = |route, tunnel, code| {
        format!(
            "sidelane_exchanges_total{{role=\"relay\",route=\"{route}\",tunnel=\"{tunnel}\",\
             protocol_type=\"HTTP\",code=\"{code}\"}} 1"
        )
    };
    check(
        &metrics,
        &[
            &format!("sidelane_exchanges_in_flight{{{labels}}} 0"),
            &total("demo", "d", "none"),
            &total("", "", "cancelled"),
            &total("", "", "no-route"),
            &format!("sidelane_exchange_duration_seconds_count{{{labels}}} 3"),
            &format!("sidelane_exchange_duration_seconds_bucket{{le=\"+Inf\",{labels}}} 3"),
        ],
    );
}

#[test]
fn responses_are_counted_by_route_and_kind_of_status() {
    let (metrics, http) = (metrics(), Arc::from("HTTP"));
    for status in [200, 204, 404, 401] {
        let record = metrics.exchange("relay", &http);
        record.routed(&"demo".into(), &"d".into());
        record.answered(http::StatusCode::from_u16(status).unwrap());
        record.answered(http::StatusCode::BAD_GATEWAY);
        record.end(failure::NONE);
    }
    let record = metrics.exchange("relay", &http);
    record.routed(&"demo".into(), &"d".into());
    record.end(failure::CANCELLED);
    check(
        &metrics,
        &[
            "sidelane_http_responses_total{route=\"demo\",status=\"2xx\"} 2",
            "sidelane_http_responses_total{route=\"demo\",status=\"4xx\"} 2",
            "sidelane_http_response_head_seconds_count{route=\"demo\"} 4",
        ],
    );
}

#[test]
fn followers_are_told_of_each_end_and_nobody_else_pays() {
    let (metrics, http) = (metrics(), Arc::from("HTTP"));
    let flow = || Flows::new("relay").of(&metrics, &http);
    let record = metrics.exchange("relay", &http);
    let shared = flow();
    assert!(!record.is_followed());
    assert!(Arc::ptr_eq(&record.tallied(Arc::clone(&shared)), &shared));
    let mut ends = metrics.follow();
    // It began before anybody followed.
    record.end(failure::NONE);
    assert!(ends.try_recv().is_err());
    let record = metrics.exchange("relay", &http);
    record.asked("GET", b"/a");
    record.routed(&"r".into(), &"t".into());
    record.answered(http::StatusCode::OK);
    let flow = record.tallied(flow());
    flow.sent(3);
    flow.received(5);
    record.end(failure::TUNNEL_LOST);
    record.end(failure::NONE);
    let ended = ends.try_recv().unwrap();
    assert_eq!(ended.request, Some(("GET".to_owned(), "/a".to_owned())));
    assert_eq!((&*ended.route, ended.code, ended.status), ("r", "tunnel-lost", Some(200)));
    assert_eq!((ended.bytes_sent, ended.bytes_received), (3, 5));
    assert!(ends.try_recv().is_err(), "once");
    // The families count the same.
    check(
        &metrics,
        &["sidelane_message_bytes_total{role=\"relay\",protocol_type=\"HTTP\",\
           direction=\"received\"} 5"],
    );
}

#[test]
fn a_routes_policies_are_counted_by_its_name() {
    let metrics = metrics();
    let route = metrics.route(&"demo".into());
    route.begun();
    route.refused("rate");
    route.redirected();
    route.timed_out("idle");
    route.compressed(100, 10);
    route.uncompressed();
    metrics.set_announcements_waiting(2);
    check(
        &metrics,
        &[
            "sidelane_route_exchanges_in_flight{route=\"demo\"} 1",
            "sidelane_policy_refused_total{route=\"demo\",policy=\"rate\"} 1",
            "sidelane_redirects_total{route=\"demo\"} 1",
            "sidelane_policy_timeouts_total{route=\"demo\",timeout=\"idle\"} 1",
            "sidelane_compression_bytes_total{route=\"demo\",size=\"plain\"} 100",
            "sidelane_compression_bytes_total{route=\"demo\",size=\"gzip\"} 10",
            "sidelane_compression_skipped_total{route=\"demo\"} 1",
            "sidelane_announcements_waiting 2",
        ],
    );
    route.ended();
    check(&metrics, &["sidelane_route_exchanges_in_flight{route=\"demo\"} 0"]);
}

#[test]
fn a_slow_follower_is_told_how_many_it_missed() {
    use tokio::sync::broadcast::error::TryRecvError;
    let (metrics, http) = (metrics(), Arc::from("HTTP"));
    let mut ends = metrics.follow();
    (0..=ended::WAITING_MAX).for_each(|_| drop(metrics.exchange("relay", &http)));
    assert_eq!(ends.try_recv().unwrap_err(), TryRecvError::Lagged(1));
    assert!(ends.try_recv().is_ok());
}

#[test]
fn messages_are_counted_with_their_bytes() {
    let (metrics, flows) = (metrics(), Flows::new("sidecar"));
    flows.of(&metrics, &"HTTP".into()).sent(100);
    flows.of(&metrics, &"HTTP".into()).received(7);
    let labels = |direction| {
        format!("{{role=\"sidecar\",protocol_type=\"HTTP\",direction=\"{direction}\"}}")
    };
    check(
        &metrics,
        &[
            &format!("sidelane_messages_total{} 1", labels("sent")),
            &format!("sidelane_message_bytes_total{} 100", labels("sent")),
            &format!("sidelane_message_bytes_total{} 7", labels("received")),
        ],
    );
}

#[test]
fn names_are_bounded() {
    let (metrics, http) = (metrics(), Arc::from("HTTP"));
    let end = |route: &str| {
        let record = metrics.exchange("relay", &http);
        record.routed(&route.into(), &"r0".into());
        record.end(failure::NONE);
    };
    (0..=NAMES_MAX).for_each(|index| end(&format!("r{index}")));
    end("r0");
    end("x");
    let mut text = String::new();
    metrics.encode(&mut text);
    assert!(text.contains("route=\"r9999\"") && text.contains("route=\"other\""));
    assert!(!text.contains("route=\"x\"") && !text.contains("route=\"r10000\""));
}

#[test]
fn the_processs_own_metrics_bear_their_usual_names() {
    let mut text = String::new();
    metrics().encode(&mut text);
    for name in ["process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"] {
        assert!(text.lines().any(|line| line.starts_with(name)), "no {name}\n{text}");
    }
    assert_eq!(text.matches("# EOF").count(), 1);
}
