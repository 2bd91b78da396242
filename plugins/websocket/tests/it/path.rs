//! Both ends, with the test as the tunnel between them.

use proptest::prelude::*;
use sidelane_plugin::failure;
use sidelane_testkit::Outcome;

use crate::frames::{BINARY, CLOSE, PING, TEXT, code, masked, masked_with, plain};
use crate::{Path, kit, write_some, written};

#[test]
fn frames_go_there_and_back() {
    let kit = kit();
    let mut path = Path::open(&kit, "", "");
    kit.block_on(async {
        path.client.write(&masked(TEXT, b"hello")).await;
        path.settle(&kit).await;
        assert_eq!(written(&mut path.service), masked(TEXT, b"hello"));
        path.service.write(&plain(TEXT, b"world")).await;
        path.settle(&kit).await;
        assert_eq!(written(&mut path.client), plain(TEXT, b"world"));

        // The closing handshake is the ends' own: the service hangs up first.
        path.client.write(&masked(CLOSE, &code(4000))).await;
        path.settle(&kit).await;
        assert_eq!(written(&mut path.service), masked(CLOSE, &code(4000)));
        path.service.write(&plain(CLOSE, &code(4000))).await;
        path.settle(&kit).await;
        assert_eq!(written(&mut path.client), plain(CLOSE, &code(4000)));
        assert_eq!((path.client.is_closed(), path.service.is_closed()), (false, false));
        path.service.shutdown().await;
        path.settle(&kit).await;
        assert_eq!(path.client.read_to_end().await, b"");
        path.client.shutdown().await;
        path.settle(&kit).await;
        assert_eq!(path.service.read_to_end().await, b"");
        let well = Outcome::Ended(failure::NONE);
        assert_eq!(path.accepted.running.outcome().await, well);
        assert_eq!(path.delivered.running.outcome().await, well);
    });
    let count = |direction, kind| {
        let labels = [("route", "test"), ("direction", direction), ("type", kind)];
        kit.metric_with("websocket_messages_total", &labels)
    };
    assert_eq!(count("client_to_service", "text"), Some(1.0));
    assert_eq!(count("service_to_client", "text"), Some(1.0));
    assert_eq!(count("client_to_service", "close"), Some(1.0));
    assert_eq!(count("service_to_client", "close"), Some(1.0));
    assert_eq!(kit.metric("websocket_bytes_total"), Some(14.0));
    assert_eq!(kit.metric("websocket_message_size_bytes"), Some(10.0));
    let closes = kit.metric_with("websocket_closes_total", &[("by", "client"), ("code", "4xxx")]);
    assert_eq!(closes, Some(1.0));
    assert_eq!(kit.metric("websocket_closes_total"), Some(1.0));
    assert_eq!(kit.metric("websocket_connections"), Some(0.0));
}

/// A whole message: its fragments' sizes, and control frames between them.
#[derive(Clone, Debug)]
struct Sent {
    binary: bool,
    compressed: bool,
    fragments: Vec<usize>,
    ping: bool,
    key: [u8; 4],
    fill: u8,
}

fn sizes() -> impl Strategy<Value = usize> {
    prop_oneof![
        8 => 0..200usize,
        3 => prop::sample::select(vec![125, 126, 127, 4095, 4096, 4097, 32_767, 32_768, 32_769]),
        2 => 0..5_000usize,
        1 => prop::sample::select(vec![65_535, 65_536, 70_000, 150_000]),
    ]
}

fn messages() -> impl Strategy<Value = Vec<Sent>> {
    let message = (
        any::<bool>(),
        any::<bool>(),
        prop::collection::vec(sizes(), 1..4),
        any::<bool>(),
        any::<[u8; 4]>(),
        any::<u8>(),
    );
    let message = message.prop_map(|(binary, compressed, fragments, ping, key, fill)| Sent {
        binary,
        compressed,
        fragments,
        ping,
        key,
        fill,
    });
    prop::collection::vec(message, 0..12)
}

fn bytes(messages: &[Sent], from_client: bool) -> Vec<u8> {
    let frame = |sent: &Sent, first: u8, payload: &[u8]| {
        if from_client { masked_with(first, sent.key, payload) } else { plain(first, payload) }
    };
    let mut out = Vec::new();
    for sent in messages {
        let last = sent.fragments.len() - 1;
        for (index, size) in sent.fragments.iter().enumerate() {
            let opcode = match (index, sent.binary) {
                (0, true) => BINARY & 0x0f,
                (0, false) => TEXT & 0x0f,
                _ => 0,
            };
            let fin = if index == last { 0x80 } else { 0 };
            let reserved = if index == 0 && sent.compressed { 0x40 } else { 0 };
            let pattern = (0..=250u8).cycle().map(|at| sent.fill.wrapping_add(at));
            let payload: Vec<u8> = pattern.take(*size).collect();
            out.extend(frame(sent, fin | reserved | opcode, &payload));
            if sent.ping {
                out.extend(frame(sent, PING, &[sent.fill; 5]));
            }
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_frames_in_any_chunks_arrive_identical(
        up in messages(),
        down in messages(),
        chunks in prop::collection::vec(prop_oneof![1..20usize, 1..3_000usize, 20_000..70_000usize], 1..30),
        window in prop::sample::select(vec![1usize, 1_000, 40_000, 256 * 1024]),
    ) {
        let kit = kit();
        let mut path = Path::open(&kit, "", "permessage-deflate");
        let (up, down) = (bytes(&up, true), bytes(&down, false));
        let (mut got_up, mut got_down) = (Vec::new(), Vec::new());
        let (mut at_up, mut at_down, mut step) = (0, 0, 0);
        path.accepted.peer.set_window(window);
        path.delivered.peer.set_window(window);
        kit.block_on(async {
            let mut rounds = 0;
            while got_up.len() < up.len() || got_down.len() < down.len() {
                let chunk = chunks[step % chunks.len()].max(up.len().max(down.len()) / 300);
                step += 1;
                let end = up.len().min(at_up + chunk);
                at_up += write_some(&mut path.client, &up[at_up..end]);
                let end = down.len().min(at_down + chunk);
                at_down += write_some(&mut path.service, &down[at_down..end]);
                if step % 3 == 0 {
                    kit.run_until_idle();
                }
                path.settle(&kit).await;
                got_up.extend(written(&mut path.service));
                got_down.extend(written(&mut path.client));
                rounds += 1;
                assert!(rounds < 5_000, "stuck: {} of {}, {} of {}", got_up.len(), up.len(), got_down.len(), down.len());
            }
        });
        prop_assert!(got_up == up, "client to service");
        prop_assert!(got_down == down, "service to client");
        kit.block_on(async {
            path.client.shutdown().await;
            path.settle(&kit).await;
            assert_eq!(path.service.read_to_end().await, b"");
            path.service.shutdown().await;
            path.settle(&kit).await;
            assert_eq!(path.client.read_to_end().await, b"");
            let well = Outcome::Ended(failure::NONE);
            assert_eq!(path.accepted.running.outcome().await, well);
            assert_eq!(path.delivered.running.outcome().await, well);
        });
        prop_assert_eq!(kit.finish(), Vec::<String>::new());
    }
}
