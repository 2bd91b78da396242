//! A route's limits, each end for what it reads.

use std::time::Duration;

use serde_json::json;
use sidelane_plugin::failure;
use sidelane_testkit::Outcome;

use crate::frames::{BINARY, CLOSE, PING, TEXT, code, masked, plain, unmask};
use crate::{Path, kit, written};

const SIZE: &str = r#"{"max_message_size": "1KiB"}"#;
const RATE: &str = r#"{"messages_per_second": 10}"#;

#[test]
fn options_are_checked() {
    let kit = kit();
    kit.validate_route(&json!({"max_message_size": "1MiB", "messages_per_second": 100})).unwrap();
    kit.validate_route(&json!(null)).unwrap();
    let error = kit.validate_route(&json!({"max_message_size": "1 meg"})).unwrap_err();
    assert_eq!(error.path.as_deref(), Some("max_message_size"));
    let error = kit.validate_route(&json!({"max_mesage_size": "1MiB"})).unwrap_err();
    assert_eq!(error.path.as_deref(), Some("max_mesage_size"));
    assert!(error.message.contains("max_message_size"), "{}", error.message);
}

#[test]
fn a_message_of_the_largest_size_passes() {
    let kit = kit();
    let mut path = Path::open(&kit, SIZE, "");
    kit.block_on(async {
        let whole = masked(BINARY, &[1; 1024]);
        let parts = [masked(0x02, &[1; 1000]), masked(PING, b""), masked(0x80, &[1; 24])].concat();
        for bytes in [whole, parts] {
            path.client.write(&bytes).await;
            path.settle(&kit).await;
            assert_eq!(written(&mut path.service), bytes);
        }
        path.accepted.running.cancel();
        path.delivered.running.cancel();
    });
}

#[test]
fn a_larger_message_ends_the_connection_with_1009() {
    let fragments = || [masked(0x02, &[1; 1000]), masked(0x80, &[1; 25])].concat();
    for (bytes, passed) in [
        (masked(BINARY, &[1; 1025]), 0),
        (masked(BINARY, &[1; 40_000])[..20].to_vec(), 0),
        (fragments(), 1008),
    ] {
        let kit = kit();
        let mut path = Path::open(&kit, SIZE, "");
        kit.block_on(async {
            path.client.write(&bytes).await;
            path.settle(&kit).await;
            assert_eq!(written(&mut path.client), plain(CLOSE, &code(1009)));
            let got = written(&mut path.service);
            assert_eq!(unmask(&got[passed..]), (CLOSE, code(1001).to_vec()));
            path.client.shutdown().await;
            path.settle(&kit).await;
            let ended = path.accepted.running.outcome().await;
            assert_eq!(ended, Outcome::Ended(failure::TOO_LARGE));
            path.service.closed().await;
        });
    }
}

#[test]
fn a_services_larger_message_ends_the_connection() {
    let kit = kit();
    let mut path = Path::open(&kit, SIZE, "");
    kit.block_on(async {
        path.service.write(&plain(TEXT, &[b'x'; 1025])).await;
        path.settle(&kit).await;
        assert_eq!(unmask(&written(&mut path.service)), (CLOSE, code(1009).to_vec()));
        assert_eq!(written(&mut path.client), plain(CLOSE, &code(1011)));
        path.accepted.running.cancel();
        path.delivered.running.cancel();
    });
}

#[test]
fn more_messages_than_the_rate_end_the_connection_with_1008() {
    let kit = kit();
    let mut path = Path::open(&kit, RATE, "");
    kit.block_on(async {
        let text = masked(TEXT, b"x");
        // A second's worth at once, control frames beside it, and then at the rate.
        path.client.write(&text.repeat(10)).await;
        path.client.write(&masked(PING, b"").repeat(50)).await;
        path.settle(&kit).await;
        for _ in 0..30 {
            kit.advance(Duration::from_millis(100));
            path.client.write(&text).await;
            path.settle(&kit).await;
        }
        assert_eq!(written(&mut path.client), b"");
        let got = written(&mut path.service);
        assert_eq!(got.len(), 40 * text.len() + 50 * 6);
        kit.advance(Duration::from_millis(100));
        path.client.write(&text.repeat(2)).await;
        path.settle(&kit).await;
        assert_eq!(written(&mut path.client), plain(CLOSE, &code(1008)));
        let got = written(&mut path.service);
        assert_eq!(got[..text.len()], text, "what was within the rate has passed");
        assert_eq!(unmask(&got[text.len()..]), (CLOSE, code(1001).to_vec()));
        path.client.write(&masked(CLOSE, &code(1008))).await;
        path.settle(&kit).await;
        path.client.closed().await;
        let ended = path.accepted.running.outcome().await;
        assert_eq!(ended, Outcome::Ended(failure::RATE_LIMITED));
        path.service.closed().await;
    });
}
