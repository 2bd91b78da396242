//! How connections end: what each side is told, and that nothing is left.

use std::time::Duration;

use sidelane_plugin::{Reset, failure};
use sidelane_testkit::{Kit, Outcome};

use crate::frames::{CLOSE, PING, PONG, TEXT, code, masked, plain, unmask};
use crate::wire::{FRAME, WebSocketFrame, read_frames, send_frame};
use crate::{Path, kit, kit_with, written};

const WELL: Outcome = Outcome::Ended(failure::NONE);
const ECONNRESET: i32 = 104;

fn closes(kit: &Kit, by: &str, code: &str) -> Option<f64> {
    assert_eq!(kit.metric("websocket_closes_total"), Some(1.0));
    assert_eq!(kit.metric("websocket_connections"), Some(0.0));
    kit.metric_with("websocket_closes_total", &[("by", by), ("code", code)])
}

/// Whether the service's next frame is a masked close frame with `expected`.
fn closed_with(bytes: &[u8], expected: u16) {
    assert_eq!(unmask(bytes), (CLOSE, code(expected).to_vec()));
}

#[test]
fn violations_close_the_side_that_sent_them_with_1002() {
    // After a frame that is well formed and arrives.
    let cases: [&[u8]; 10] = [
        &[0x89, 0xfe, 0, 126],
        &[0x09, 0x80],
        &[0x81, 0x02, b'h', b'i'],
        &[0x83, 0x80],
        &[0x8b, 0x80],
        &[0xc1, 0x80],
        &[0x82, 0xff, 0x80],
        &[0x82, 0xfe, 0, 1],
        &[0x80, 0x80],
        &[0x01, 0x80, 0, 0, 0, 0, 0x81, 0x80],
    ];
    for bytes in cases {
        let kit = kit();
        let mut path = Path::open(&kit, "", "");
        kit.block_on(async {
            path.client.write(&[&masked(TEXT, b"first"), bytes].concat()).await;
            path.settle(&kit).await;
            let told = written(&mut path.client);
            assert_eq!(told, plain(CLOSE, &code(1002)), "{bytes:02x?}");
            let got = written(&mut path.service);
            let first = masked(TEXT, b"first");
            assert_eq!(got[..first.len()], first);
            let begun = if bytes[0] == 0x01 { 6 } else { 0 };
            closed_with(&got[first.len() + begun..], 1001);
            // Whatever else it sends is thrown away until it hangs up.
            path.client.write(&[0xff; 1000]).await;
            path.settle(&kit).await;
            assert!(path.accepted.running.ended().is_none());
            path.client.shutdown().await;
            path.settle(&kit).await;
            path.client.closed().await;
            path.service.closed().await;
            let ended = path.accepted.running.outcome().await;
            assert_eq!(ended, Outcome::Ended(failure::BAD_REQUEST));
        });
        assert_eq!(closes(&kit, "sidelane", "1002"), Some(1.0));
    }
}

#[test]
fn a_services_violation_is_told_to_it_masked_and_to_the_client_as_1011() {
    for bytes in [&masked(TEXT, b"hi")[..], &[0xc1, 0], &[0x0a, 0], &[0x82, 0x7e, 0, 125]] {
        let kit = kit();
        let mut path = Path::open(&kit, "", "");
        kit.block_on(async {
            path.service.write(&[&plain(TEXT, b"first"), bytes].concat()).await;
            path.settle(&kit).await;
            closed_with(&written(&mut path.service), 1002);
            let expected = [plain(TEXT, b"first"), plain(CLOSE, &code(1011))].concat();
            assert_eq!(written(&mut path.client), expected);
            path.client.write(&masked(CLOSE, &code(1011))).await;
            path.service.shutdown().await;
            path.settle(&kit).await;
            path.client.shutdown().await;
            path.settle(&kit).await;
            path.client.closed().await;
            path.service.closed().await;
            let ended = path.delivered.running.outcome().await;
            assert_eq!(ended, Outcome::Ended(failure::SERVICE_INVALID));
        });
    }
}

#[test]
fn a_close_frame_is_not_overtaken_by_the_end_of_the_connection() {
    let kit = kit();
    let mut path = Path::open(&kit, "", "");
    kit.block_on(async {
        path.service.write(&masked(TEXT, b"a violation")).await;
        path.settle(&kit).await;
        // The service hangs up, so that the sidecar's end is over at once.
        path.service.shutdown().await;
        path.settle(&kit).await;
        assert!(path.delivered.running.ended().is_some());
        assert!(path.accepted.running.ended().is_none());
        path.client.write(&masked(TEXT, b"sent before the close frame was read")).await;
        path.settle(&kit).await;
        assert_eq!(written(&mut path.client), plain(CLOSE, &code(1011)));
        path.client.write(&masked(CLOSE, &code(1011))).await;
        path.settle(&kit).await;
        path.client.closed().await;
    });
}

#[test]
fn reserved_bits_pass_where_an_extension_was_negotiated() {
    let kit = kit();
    let mut path = Path::open(&kit, "", "permessage-deflate");
    kit.block_on(async {
        path.client.write(&masked(0xc1, b"x")).await;
        path.service.write(&plain(0xf1, b"y")).await;
        path.settle(&kit).await;
        assert_eq!(written(&mut path.service), masked(0xc1, b"x"));
        assert_eq!(written(&mut path.client), plain(0xf1, b"y"));
        path.accepted.running.cancel();
        path.delivered.running.cancel();
    });
}

#[test]
fn nothing_follows_a_close_frame() {
    let kit = kit();
    let mut path = Path::open(&kit, "", "");
    kit.block_on(async {
        let close = masked(CLOSE, &[&code(1000)[..], b"bye"].concat());
        path.client.write(&[&close[..], &masked(TEXT, b"no"), &[0xff; 9]].concat()).await;
        path.settle(&kit).await;
        assert_eq!(written(&mut path.service), close);
        // The other direction goes on until it is closed.
        path.service.write(&plain(TEXT, b"still")).await;
        path.settle(&kit).await;
        assert_eq!(written(&mut path.client), plain(TEXT, b"still"));
        path.service.write(&plain(CLOSE, &[])).await;
        path.settle(&kit).await;
        assert_eq!(written(&mut path.client), plain(CLOSE, &[]));
        // Neither hangs up: the time is bounded.
        kit.advance(Duration::from_secs(4));
        assert!(path.accepted.running.ended().is_none());
        kit.advance(Duration::from_secs(1));
        path.settle(&kit).await;
        assert_eq!(path.accepted.running.outcome().await, WELL);
        assert_eq!(path.delivered.running.outcome().await, WELL);
        path.client.closed().await;
        path.service.closed().await;
    });
    assert_eq!(closes(&kit, "client", "1000"), Some(1.0));
}

#[test]
fn a_client_that_breaks_off_ends_the_services_connection() {
    for inside in [false, true] {
        let kit = kit();
        let mut path = Path::open(&kit, "", "");
        kit.block_on(async {
            if inside {
                // Within a frame the end of the stream is a break.
                path.client.write(&masked(TEXT, b"hello")[..8]).await;
                path.client.shutdown().await;
            } else {
                path.client.fail(ECONNRESET);
            }
            path.settle(&kit).await;
            path.service.closed().await;
            assert_eq!(path.service.read_to_end().await, b"", "no close frame is invented");
            let gone = Outcome::Ended(failure::CLIENT_GONE);
            assert_eq!(path.accepted.running.outcome().await, gone);
            assert_eq!(path.delivered.running.outcome().await, gone);
        });
        assert_eq!(closes(&kit, "client", "1006"), Some(1.0));
    }
}

#[test]
fn a_service_that_breaks_off_ends_the_clients_connection() {
    for reset in [false, true] {
        let kit = kit();
        let mut path = Path::open(&kit, "", "");
        kit.block_on(async {
            path.service.write(&plain(TEXT, b"last words")).await;
            path.settle(&kit).await;
            if reset {
                path.service.fail(ECONNRESET);
            } else {
                let (_, gone) = (path.settle(&kit).await, &mut path.service);
                gone.shutdown().await;
            }
            path.settle(&kit).await;
            assert_eq!(path.client.read_to_end().await, plain(TEXT, b"last words"));
            path.client.shutdown().await;
            path.settle(&kit).await;
            let code = if reset { failure::SERVICE_RESET } else { failure::NONE };
            assert_eq!(path.accepted.running.outcome().await, Outcome::Ended(code));
            path.client.closed().await;
        });
        assert_eq!(closes(&kit, "service", "1006"), Some(1.0));
    }
}

#[test]
fn a_half_closed_connection_stays_half_closed() {
    let kit = kit();
    let mut path = Path::open(&kit, "", "");
    kit.block_on(async {
        path.client.shutdown().await;
        path.settle(&kit).await;
        assert_eq!(path.service.read_to_end().await, b"");
        kit.advance(Duration::from_secs(3600));
        path.service.write(&plain(TEXT, b"still here")).await;
        path.settle(&kit).await;
        assert_eq!(written(&mut path.client), plain(TEXT, b"still here"));
        path.service.shutdown().await;
        path.settle(&kit).await;
        assert_eq!(path.accepted.running.outcome().await, WELL);
        assert_eq!(path.delivered.running.outcome().await, WELL);
    });
}

#[test]
fn resets_are_told_as_the_readme_says() {
    for (reset, told) in [
        (failure::TUNNEL_LOST, Some(1012)),
        (failure::DRAINING, Some(1001)),
        (failure::SERVICE_INVALID, Some(1011)),
        (failure::TOO_LARGE, Some(1011)),
        (failure::RATE_LIMITED, Some(1011)),
        (failure::PLUGIN_FAILED, Some(1011)),
        (failure::OVERLOADED, Some(1013)),
        (failure::SERVICE_RESET, None),
        (failure::CANCELLED, None),
    ] {
        let kit = kit();
        let mut path = Path::open(&kit, "", "");
        kit.block_on(async {
            path.accepted.peer.reset(Reset::new(reset));
            kit.run_until_idle();
            let expected = told.map_or_else(Vec::new, |told| plain(CLOSE, &code(told)));
            assert_eq!(written(&mut path.client), expected, "{}", failure::name(reset));
            if let Some(told) = told {
                // The client answers, and the relay hangs up first.
                path.client.write(&masked(CLOSE, &code(told))).await;
            }
            path.client.closed().await;
            assert_eq!(path.accepted.running.outcome().await, Outcome::Ended(reset));
            path.delivered.running.cancel();
        });
        let (by, code) = match (reset, told) {
            (failure::SERVICE_RESET, _) => ("service", "1006".to_owned()),
            (_, None) => ("sidelane", "1006".to_owned()),
            (_, Some(told)) => ("sidelane", told.to_string()),
        };
        assert_eq!(closes(&kit, by, &code), Some(1.0));
    }
    for (reset, told) in [
        (failure::DRAINING, Some(1001)),
        (failure::BAD_REQUEST, Some(1001)),
        (failure::CLIENT_TIMEOUT, Some(1001)),
        (failure::TUNNEL_LOST, None),
        (failure::CLIENT_GONE, None),
        (failure::CANCELLED, None),
        (failure::NONE, None),
    ] {
        let kit = kit();
        let mut path = Path::open(&kit, "", "");
        kit.block_on(async {
            path.delivered.peer.reset(Reset::new(reset));
            kit.run_until_idle();
            let got = written(&mut path.service);
            match told {
                Some(told) => closed_with(&got, told),
                None => assert_eq!(got, b""),
            }
            path.service.shutdown().await;
            path.service.closed().await;
            assert_eq!(path.delivered.running.outcome().await, Outcome::Ended(reset));
            path.accepted.running.cancel();
        });
    }
}

#[test]
fn a_close_frame_of_ours_never_lands_inside_another_frame() {
    let kit = kit();
    let mut path = Path::open(&kit, "", "");
    kit.block_on(async {
        let whole = plain(TEXT, &[b'x'; 40_000]);
        path.service.write(&whole[..35_000]).await;
        path.settle(&kit).await;
        path.accepted.peer.reset(Reset::new(failure::TUNNEL_LOST));
        kit.run_until_idle();
        assert_eq!(path.client.read_to_end().await, &whole[..35_000]);
        path.client.closed().await;
        path.delivered.running.cancel();
    });
}

#[test]
fn a_close_frame_of_ours_waits_behind_whole_frames() {
    let kit = kit();
    let mut path = Path::open(&kit, "", "");
    kit.block_on(async {
        path.client.set_room(10);
        path.service.write(&plain(TEXT, &[b'x'; 1000])).await;
        path.settle(&kit).await;
        path.accepted.peer.reset(Reset::new(failure::TUNNEL_LOST));
        kit.run_until_idle();
        let mut got = Vec::new();
        while got.len() < 1004 + 4 {
            got.extend(written(&mut path.client));
            kit.run_until_idle();
        }
        assert_eq!(got, [plain(TEXT, &[b'x'; 1000]), plain(CLOSE, &code(1012))].concat());
        // Without an answer the time is bounded.
        kit.advance(Duration::from_secs(5));
        path.client.closed().await;
        path.delivered.running.cancel();
    });
}

#[test]
fn a_stream_that_takes_part_of_a_write_gets_the_rest() {
    let kit = kit();
    let mut path = Path::open(&kit, "", "");
    kit.block_on(async {
        path.client.set_room(10);
        let frame = plain(TEXT, &[b'x'; 1000]);
        path.service.write(&frame).await;
        path.settle(&kit).await;
        let mut got = Vec::new();
        while got.len() < frame.len() {
            let more = written(&mut path.client);
            assert!(!more.is_empty(), "stalled after {} bytes", got.len());
            got.extend(more);
            kit.run_until_idle();
        }
        assert_eq!(got, frame);
        path.accepted.running.cancel();
        path.delivered.running.cancel();
    });
}

#[test]
fn a_drain_says_goodbye_before_it_is_cut() {
    for (config, told) in
        [(serde_json::json!({}), 1001), (serde_json::json!({"drain_code": 1012}), 1012)]
    {
        let kit = kit_with(&config);
        let mut path = Path::open(&kit, "", "");
        kit.block_on(async {
            kit.drain(Duration::from_secs(25));
            kit.advance(Duration::from_millis(19_900));
            path.client.write(&masked(TEXT, b"still here")).await;
            path.settle(&kit).await;
            assert_eq!(written(&mut path.service), masked(TEXT, b"still here"));
            kit.advance(Duration::from_millis(200));
            path.settle(&kit).await;
            assert_eq!(written(&mut path.client), plain(CLOSE, &code(told)));
            closed_with(&written(&mut path.service), told);
            path.client.write(&masked(CLOSE, &code(told))).await;
            path.client.closed().await;
            path.service.shutdown().await;
            path.service.closed().await;
            let ended = path.accepted.running.outcome().await;
            assert_eq!(ended, Outcome::Ended(failure::DRAINING));
        });
        assert_eq!(closes(&kit, "sidelane", &told.to_string()), Some(1.0));
    }
}

#[test]
fn a_short_drain_leaves_half_of_its_time() {
    let kit = kit();
    let mut path = Path::open(&kit, "", "");
    kit.block_on(async {
        kit.drain(Duration::from_secs(2));
        kit.advance(Duration::from_millis(999));
        assert_eq!(written(&mut path.client), b"");
        kit.advance(Duration::from_millis(1));
        assert_eq!(written(&mut path.client), plain(CLOSE, &code(1001)));
        path.accepted.running.cancel();
        path.delivered.running.cancel();
    });
}

#[test]
fn an_idle_connection_ends_where_configured() {
    let kit = kit_with(&serde_json::json!({"idle_timeout": "10s"}));
    let mut path = Path::open(&kit, "", "");
    kit.block_on(async {
        for _ in 0..3 {
            kit.advance(Duration::from_secs(7));
            path.client.write(&masked(TEXT, b"up")).await;
            path.settle(&kit).await;
            kit.advance(Duration::from_secs(7));
            path.service.write(&plain(TEXT, b"down")).await;
            path.settle(&kit).await;
        }
        written(&mut path.client);
        written(&mut path.service);
        kit.advance(Duration::from_secs(10));
        path.settle(&kit).await;
        assert_eq!(written(&mut path.client), plain(CLOSE, &code(1001)));
        closed_with(&written(&mut path.service), 1001);
        path.accepted.running.cancel();
        path.delivered.running.cancel();
    });
}

#[test]
fn our_pings_are_between_client_and_relay() {
    let kit = kit_with(&serde_json::json!({"ping_interval": "10s"}));
    let mut path = Path::open(&kit, "", "");
    kit.block_on(async {
        for _ in 0..3 {
            kit.advance(Duration::from_secs(10));
            let ping = written(&mut path.client);
            assert_eq!((ping[0], ping[1]), (PING, 8));
            path.client.write(&masked(PONG, &ping[2..])).await;
            // Somebody else's pong is passed.
            path.client.write(&masked(PONG, b"another!")).await;
            path.settle(&kit).await;
            assert_eq!(written(&mut path.service), masked(PONG, b"another!"));
        }
        // Silence from one ping to the next is a client that is gone.
        kit.advance(Duration::from_secs(10));
        assert_eq!(written(&mut path.client).len(), 10);
        kit.advance(Duration::from_secs(10));
        path.settle(&kit).await;
        path.client.closed().await;
        path.service.closed().await;
        let gone = Outcome::Ended(failure::CLIENT_GONE);
        assert_eq!(path.accepted.running.outcome().await, gone);
    });
}

#[test]
fn small_frames_that_wait_share_a_message_and_large_ones_go_in_pieces() {
    let kit = kit();
    let mut path = Path::open(&kit, "", "");
    kit.block_on(async {
        path.client.write(&masked(TEXT, b"a")).await;
        kit.run_until_idle();
        let message = path.accepted.peer.message().await;
        assert_eq!((message.field, read_frames(&message).len()), (FRAME, 1));

        let three = [masked(TEXT, b"a"), masked(PING, b""), masked(TEXT, b"b")].concat();
        path.client.write(&three).await;
        kit.run_until_idle();
        let frames = read_frames(&path.accepted.peer.message().await);
        assert_eq!(frames.len(), 3);
        assert_eq!(frames[1].opcode, 9);
        assert_eq!(path.accepted.peer.waiting(), 0);

        let large = masked(TEXT, &[b'x'; 50_000]);
        path.client.write(&large).await;
        kit.run_until_idle();
        let mut payload: Vec<u8> = Vec::new();
        while path.accepted.peer.waiting() > 0 {
            let frames = read_frames(&path.accepted.peer.message().await);
            let [piece] = &frames[..] else { panic!("a piece by itself") };
            assert!(piece.payload.len() <= 32 * 1024);
            assert_eq!(piece.offset, payload.len() as u64);
            assert_eq!(piece.length, if payload.is_empty() { 50_000 } else { 0 });
            assert_eq!(piece.masked, payload.is_empty());
            payload.extend(&piece.payload);
        }
        assert_eq!(payload, &large[8..]);
        path.accepted.running.cancel();
        path.delivered.running.cancel();
    });
}

#[test]
fn a_peer_that_makes_no_sense_ends_the_connection() {
    let frame = |payload: &[u8]| WebSocketFrame {
        fin: true,
        opcode: 1,
        payload: payload.to_vec(),
        frame_direction: 1,
        ..WebSocketFrame::default()
    };
    for frames in [
        vec![WebSocketFrame { offset: 1, ..frame(b"x") }],
        vec![WebSocketFrame { length: 1, ..frame(b"xx") }],
        vec![WebSocketFrame { length: 9, ..frame(b"xx") }, frame(b"x")],
        vec![
            WebSocketFrame { length: 9, ..frame(b"xx") },
            WebSocketFrame { offset: 3, ..frame(b"") },
        ],
        vec![WebSocketFrame { reserved: 8, ..frame(b"") }],
        vec![WebSocketFrame { opcode: 16, ..frame(b"") }],
    ] {
        let kit = kit();
        let mut path = Path::open(&kit, "", "");
        kit.block_on(async {
            for frame in &frames {
                send_frame(&path.accepted.peer, frame);
            }
            kit.run_until_idle();
            path.client.shutdown().await;
            let ended = path.accepted.running.outcome().await;
            assert_eq!(ended, Outcome::Ended(failure::PLUGIN_FAILED), "{frames:?}");
            path.delivered.running.cancel();
        });
    }
}

#[test]
fn nothing_is_left_of_a_thousand_ends() {
    let kit = kit();
    for round in 0..1000 {
        let mut path = Path::open(&kit, "", "");
        kit.block_on(async {
            path.client.write(&masked(TEXT, b"up")).await;
            path.service.write(&plain(TEXT, b"down")).await;
            match round % 9 {
                0 => path.client.fail(ECONNRESET),
                1 => path.service.fail(ECONNRESET),
                2 => path.accepted.running.cancel(),
                3 => path.delivered.running.cancel(),
                4 => path.client.shutdown().await,
                5 => path.service.write(&plain(CLOSE, &code(1000))).await,
                6 => path.client.write(&[0xff; 20]).await,
                7 => path.accepted.peer.reset(Reset::new(failure::TUNNEL_LOST)),
                _ => path.client.write(&masked(CLOSE, &code(1000))).await,
            }
            path.settle(&kit).await;
            path.client.fail(ECONNRESET);
            path.service.fail(ECONNRESET);
            path.settle(&kit).await;
        });
        kit.advance(Duration::from_secs(6));
        kit.block_on(path.settle(&kit));
        let (accepted, delivered) = (path.accepted.running.ended(), path.delivered.running.ended());
        assert!(accepted.is_some() || round % 9 == 2, "{round}");
        assert!(delivered.is_some() || round % 9 == 3, "{round}");
        path.accepted.running.cancel();
        path.delivered.running.cancel();
    }
    assert_eq!(kit.metric("websocket_connections"), Some(0.0));
    assert_eq!(kit.metric("websocket_connections_opened_total"), Some(1000.0));
    assert_eq!(kit.finish(), Vec::<String>::new());
}
