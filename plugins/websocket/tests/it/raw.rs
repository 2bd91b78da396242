//! `mode: raw`: the bytes go to a connection of their own, or go on as frames.

use serde_json::json;
use sidelane_plugin::failure;
use sidelane_testkit::{Outcome, TestService};

use crate::frames::{TEXT, masked};
use crate::{Path, kit, meta, read_head, settle, switching, upgrade, written};

const RAW: &str = r#"{"mode": "raw"}"#;

#[test]
fn options_are_checked() {
    let kit = kit();
    for mode in ["framed", "raw"] {
        kit.validate_route(&json!({ "mode": mode })).unwrap();
    }
    let error = kit.validate_route(&json!({"mode": "bytes"})).unwrap_err();
    assert_eq!(error.path.as_deref(), Some("mode"));
    assert!(error.message.contains("accepted: framed, raw"), "{}", error.message);
    let limited = json!({"mode": "raw", "messages_per_second": 1});
    let error = kit.validate_route(&limited).unwrap_err();
    assert_eq!(error.path.as_deref(), Some("messages_per_second"));
    assert!(error.message.contains("no effect with mode: raw"), "{}", error.message);
}

#[test]
fn bytes_pass_as_they_are_at_both_ends() {
    let kit = kit();
    let mut request = upgrade("/chat");
    RAW.clone_into(&mut request.meta.options);
    let of_sidecar = sidelane_testkit::TestMeta { options: RAW.to_owned(), ..meta() };
    let test_service = TestService::default();
    let accepted = kit.accept_http(&request);
    let mut client = accepted.response.upgraded();
    let delivered = kit.deliver(&of_sidecar, &test_service);
    let (mut at_relay, mut at_sidecar) = (accepted.peer.dedicated(), delivered.peer.dedicated());
    kit.block_on(async {
        settle(&kit, &accepted, &delivered).await;
        let mut service = test_service.accept().await;
        let head = read_head(&mut service).await;
        // Bytes that no frame begins with, some of them right behind the head.
        let mut answer = switching(&head, "");
        answer.extend_from_slice(b"\xff\xff ahead");
        service.write(&answer).await;
        settle(&kit, &accepted, &delivered).await;
        assert_eq!(accepted.response.head().await.expect("a head").status, 101);
        kit.run_until_idle();
        assert_eq!(written(&mut at_sidecar), b"\xff\xff ahead");
        client.write(b"\xff\x00 not a frame").await;
        at_relay.write(b"as it came").await;
        kit.run_until_idle();
        assert_eq!(written(&mut at_relay), b"\xff\x00 not a frame");
        assert_eq!(written(&mut client), b"as it came");
        assert_eq!((accepted.peer.waiting(), delivered.peer.waiting()), (0, 0));
        for stream in [&mut client, &mut service, &mut at_relay, &mut at_sidecar] {
            stream.shutdown().await;
        }
        let ended = Outcome::Ended(failure::NONE);
        assert_eq!(accepted.running.outcome().await, ended);
        assert_eq!(delivered.running.outcome().await, ended);
    });
}

#[test]
fn without_a_connection_it_goes_on_as_frames() {
    let kit = kit();
    let mut path = Path::open(&kit, RAW, "");
    kit.block_on(async {
        let frame = masked(TEXT, b"hello");
        path.client.write(&frame).await;
        path.settle(&kit).await;
        assert_eq!(written(&mut path.service), frame);
        path.accepted.running.cancel();
        path.delivered.running.cancel();
    });
}
