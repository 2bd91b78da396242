//! What an operator reads: metrics, health, admin pages, and what the docs say of them.

use std::collections::BTreeSet;

use sidelane_e2e::client::request;
use sidelane_e2e::stage::Stage;

const OPERATIONS: &str = include_str!("../../../docs/operations.md");

#[test]
fn metrics_move_with_the_traffic() {
    let stage = Stage::ok();
    for _ in 0..10 {
        assert_eq!(stage.get("/").head.status, 200);
    }
    let sidelane = &stage.sidelane;
    sidelane.until_metric("sidelane_exchanges_total", &["route=\"api\""], |count| count >= 10.0);
    let page = sidelane.metrics();
    for name in [
        "sidelane_exchanges_total",
        "sidelane_exchange_duration_seconds_count",
        "sidelane_exchange_duration_seconds_sum",
        "sidelane_exchanges_in_flight",
        "sidelane_messages_total",
        "sidelane_message_bytes_total",
        "sidelane_sessions",
        "sidelane_lanes",
        "sidelane_config_last_reload_successful",
        "sidelane_config_last_reload_success_timestamp_seconds",
        "sidelane_plugin_generations",
        "sidelane_connections",
    ] {
        let found = page.lines().any(|line| line.starts_with(name));
        assert!(found, "{name} is not in:\n{page}");
    }
    let live = sidelane.get(sidelane.health(), "/live");
    assert_eq!(live.head.status, 200);
    for page in ["/routes", "/tunnels", "/plugins"] {
        let text = sidelane.admin_page(page).to_string();
        let word = if page == "/plugins" { "http" } else { "api" };
        assert!(text.contains(word), "{page}: {text}");
    }
}

#[test]
fn every_metric_is_documented() {
    let stage = Stage::ok();
    assert_eq!(stage.get("/").head.status, 200);
    let page = stage.sidelane.metrics();
    let names: BTreeSet<_> = page
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert!(names.len() > 10, "{page}");
    for name in names {
        let prefixes = ["sidelane_plugin_http_", "sidelane_plugin_http2_", "process_"];
        let documented = OPERATIONS.contains(&format!("`{name}"))
            || prefixes.iter().any(|prefix| name.starts_with(prefix));
        assert!(documented, "{name} is not in docs/operations.md");
    }
    assert!(page.trim_end().ends_with("# EOF"), "the page is cut");
}

#[test]
fn health_and_admin_are_apart() {
    let stage = Stage::ok();
    let sidelane = &stage.sidelane;
    assert_eq!(sidelane.get(sidelane.health(), "/ready").head.status, 200);
    for path in ["/config", "/routes", "/-/reload"] {
        assert_eq!(sidelane.get(sidelane.health(), path).head.status, 404, "{path}");
    }
    let post = |path: &str| {
        format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        )
    };
    for path in ["/live", "/ready", "/metrics"] {
        let status = request(sidelane.health(), "POST", post(path)).head.status;
        assert_eq!(status, 405, "{path}");
    }
    let status = sidelane.get(sidelane.admin(), "/-/reload").head.status;
    assert!(matches!(status, 404 | 405), "a GET changes nothing: {status}");
    let index = sidelane.get(sidelane.admin(), "/");
    assert_eq!(index.head.status, 200);
    assert!(String::from_utf8_lossy(&index.body).contains("/routes"));
}
