//! The hand-written codec against prost, both ways.

use std::path::PathBuf;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use prost::Message;

use super::decode::check;
use crate::envelope::{self, COPY_OUT_BYTES_MAX, DecodeError, Envelope, Fault, field};
use crate::proto::tunnel_message::Payload;
use crate::proto::{self, TunnelMessage};
use crate::{COPY_BYTES_MAX, RequestId};

/// Messages as prost has them, ids being ids.
fn messages() -> impl Strategy<Value = TunnelMessage> {
    let id =
        prop_oneof![Just(String::new()), any::<u64>().prop_map(|id| RequestId(id).to_string())];
    let number = prop_oneof![0..4, any::<i32>()];
    let open = prop::option::of(opens());
    let payload = prop::option::of(payloads());
    (id, number, any::<u32>(), open, payload).prop_map(
        |(request_id, protocol_type, flags, open, payload)| TunnelMessage {
            request_id,
            protocol_type,
            flags,
            open,
            payload,
        },
    )
}

fn opens() -> impl Strategy<Value = proto::Open> {
    (".{0,20}", any::<u64>(), prop::option::of(any::<[u8; 32]>())).prop_map(
        |(tunnel, timeout_ns, digest)| proto::Open {
            tunnel,
            timeout_ns,
            tls: digest.map(|digest| proto::TlsFacts {
                client_certificate_sha256: Bytes::copy_from_slice(&digest),
                ..proto::TlsFacts::default()
            }),
            ..proto::Open::default()
        },
    )
}

fn bodies() -> impl Strategy<Value = Bytes> {
    // Around the sizes at which the codec does something else.
    let around = |size: usize| prop::collection::vec(any::<u8>(), size - 40..size + 40);
    prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..200),
        1 => around(COPY_OUT_BYTES_MAX),
        1 => around(COPY_BYTES_MAX),
        1 => around(16 * 1024),
    ]
    .prop_map(Bytes::from)
}

fn payloads() -> impl Strategy<Value = Payload> {
    let header = |(name, value)| proto::Header { name, value };
    let headers = prop::collection::vec((bodies(), bodies()).prop_map(header), 0..3);
    prop_oneof![
        bodies().prop_map(Payload::Custom),
        bodies().prop_map(|data| Payload::HttpBody(proto::HttpBody { data })),
        (headers, bodies()).prop_map(|(headers, body)| {
            Payload::HttpRequest(proto::HttpRequest {
                headers,
                body,
                ..proto::HttpRequest::default()
            })
        }),
        (any::<bool>(), any::<u32>(), bodies()).prop_map(|(fin, opcode, payload)| {
            Payload::WsFrame(proto::WebSocketFrame {
                fin,
                opcode,
                payload,
                ..proto::WebSocketFrame::default()
            })
        }),
        (any::<u32>(), bodies()).prop_map(|(sequence_number, body)| {
            Payload::GrpcResponse(proto::GrpcResponse {
                sequence_number,
                body,
                ..proto::GrpcResponse::default()
            })
        }),
        any::<u64>().prop_map(|limit| Payload::Window(proto::Window { limit })),
        any::<u64>().prop_map(|token| Payload::Ping(proto::Ping { token })),
        Just(Payload::Dispatched(proto::Dispatched {})),
    ]
}

/// A message's fields, each encoded by itself, with fields of a later version among them.
fn fields(message: &TunnelMessage, extra: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let empty = TunnelMessage::default;
    let mut fields = vec![
        TunnelMessage { request_id: message.request_id.clone(), ..empty() }.encode_to_vec(),
        TunnelMessage { protocol_type: message.protocol_type, ..empty() }.encode_to_vec(),
        TunnelMessage { flags: message.flags, ..empty() }.encode_to_vec(),
        TunnelMessage { open: message.open.clone(), ..empty() }.encode_to_vec(),
        TunnelMessage { payload: message.payload.clone(), ..empty() }.encode_to_vec(),
    ];
    fields.extend_from_slice(extra);
    fields
}

/// Encoded unknown fields of each wire type, a group too.
fn unknown() -> impl Strategy<Value = Vec<u8>> {
    prop::sample::select(vec![
        vec![0x08, 0x96, 0x01],
        vec![0x19, 1, 2, 3, 4, 5, 6, 7, 8],
        vec![0x3a, 3, 1, 2, 3],
        vec![0x45, 1, 2, 3, 4],
        vec![0x43, 0x08, 1, 0x4b, 0x10, 2, 0x4c, 0x44],
        vec![0xe2, 3, 1, 0],
    ])
}

fn read(bytes: &[u8]) -> Result<Option<Envelope>, DecodeError> {
    envelope::read(&mut BytesMut::from(bytes), 1 << 20)
}

proptest! {
    #[test]
    fn what_prost_writes_is_read_with_the_same_meaning(message in messages()) {
        let frame = message.encode_length_delimited_to_vec();
        let envelope = read(&frame).unwrap().unwrap();
        let mut rewritten = Vec::new();
        envelope::write(&mut rewritten, &envelope);
        prop_assert_eq!(TunnelMessage::decode_length_delimited(&*rewritten).unwrap(), message);
    }

    #[test]
    fn what_we_write_prost_reads_with_the_same_meaning(
        id in prop::option::of(any::<u64>()),
        protocol_type in any::<u32>(),
        flags in any::<u32>(),
        open in prop::option::of(opens()),
        data in bodies(),
    ) {
        let envelope = Envelope {
            request_id: id.map(RequestId),
            protocol_type,
            flags,
            open: open.as_ref().map(|open| Bytes::from(open.encode_to_vec())),
            field: field::CUSTOM,
            payload: data.clone(),
        };
        let mut frame = Vec::new();
        envelope::write(&mut frame, &envelope);
        let expected = TunnelMessage {
            request_id: id.map(|id| RequestId(id).to_string()).unwrap_or_default(),
            protocol_type: protocol_type.cast_signed(),
            flags,
            open,
            payload: Some(Payload::Custom(data)),
        };
        prop_assert_eq!(TunnelMessage::decode_length_delimited(&*frame).unwrap(), expected);
        prop_assert_eq!(read(&frame).unwrap().unwrap(), envelope);
    }

    #[test]
    fn fields_may_come_in_any_order_and_repeat(
        fields in (
            messages(),
            messages(),
            prop::collection::vec(unknown(), 0..4),
            any::<bool>(),
        )
            .prop_map(|(message, other, extra, repeat)| {
                let mut all = fields(&message, &extra);
                if repeat {
                    all.extend(fields(&other, &[]));
                }
                all
            })
            .prop_shuffle(),
    ) {
        let bytes = fields.concat();
        prop_assert!(TunnelMessage::decode(&*bytes).is_ok());
        check(&bytes);
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        check(&bytes);
    }

    #[test]
    fn a_damaged_message_is_read_or_refused(
        message in messages(),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<bool>(),
    ) {
        let mut bytes = message.encode_to_vec();
        bytes.push(0);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if cut {
            bytes.truncate(at);
        }
        check(&bytes);
    }
}

#[test]
fn a_message_in_pieces_is_read_when_it_is_whole() {
    let envelope = Envelope {
        request_id: Some(RequestId(12345)),
        flags: 3,
        field: field::CUSTOM,
        payload: Bytes::from(vec![9; 300]),
        ..Envelope::default()
    };
    let mut frame = Vec::new();
    envelope::write(&mut frame, &envelope);
    for cut in 0..frame.len() {
        let mut buffer = BytesMut::from(&frame[..cut]);
        assert_eq!(envelope::read(&mut buffer, 1024), Ok(None));
        assert_eq!(buffer.len(), cut, "the buffer is left as it was");
        buffer.extend_from_slice(&frame[cut..]);
        buffer.extend_from_slice(b"rest");
        assert_eq!(envelope::read(&mut buffer, 1024), Ok(Some(envelope.clone())));
        assert_eq!(&*buffer, b"rest");
    }
}

#[test]
fn small_payloads_do_not_pin_the_read_buffer_and_large_ones_are_not_copied() {
    for (len, copied) in [(COPY_OUT_BYTES_MAX - 1, true), (COPY_OUT_BYTES_MAX, false)] {
        let mut frame = Vec::new();
        let payload = Bytes::from(vec![1; len]);
        let envelope = Envelope { field: field::CUSTOM, payload, ..Envelope::default() };
        envelope::write(&mut frame, &envelope);
        let mut buffer = BytesMut::from(&*frame);
        let range = buffer.as_ptr_range();
        let read = envelope::read(&mut buffer, 1 << 20).unwrap().unwrap();
        assert_eq!(!range.contains(&read.payload.as_ptr()), copied);
    }
}

#[test]
fn a_fault_says_what_and_where() {
    let cases: [(&[u8], DecodeError); 15] = [
        (&[0xff, 0xff, 0x7f], error(Fault::MessageTooLong { length: 0x1f_ffff, max: 1 << 20 }, 0)),
        (&[0xff; 10], error(Fault::VarintTooLong, 0)),
        (&[2, 0x28, 0x80], error(Fault::Truncated, 1)),
        (
            &[12, 0x28, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            error(Fault::VarintTooLong, 2),
        ),
        (&[2, 0x00, 1], error(Fault::Key { key: 0 }, 0)),
        (&[6, 0x80, 0x80, 0x80, 0x80, 0x10, 1], error(Fault::Key { key: 1 << 32 }, 0)),
        (&[2, 0x0e, 1], error(Fault::NoSuchWireType { field: 1, wire: 6 }, 0)),
        (&[4, 0x28, 1, 0x10, 1], error(Fault::WireType { field: 2, found: 0, expected: 2 }, 2)),
        (&[3, 0x2a, 1, 1], error(Fault::WireType { field: 5, found: 2, expected: 0 }, 0)),
        (&[2, 0xf8, 0x01], error(Fault::WireType { field: 31, found: 0, expected: 2 }, 0)),
        (&[3, 0x12, 1, 0xff], error(Fault::Utf8 { field: 2 }, 1)),
        (&[3, 0x12, 1, b'-'], error(Fault::RequestId, 1)),
        (&[3, 0x12, 5, b'a'], error(Fault::Truncated, 1)),
        (&[1, 0x44], error(Fault::GroupEnd { field: 8 }, 0)),
        (&[2, 0x43, 0x4c], error(Fault::GroupEnd { field: 9 }, 1)),
    ];
    for (bytes, expected) in cases {
        assert_eq!(read(bytes), Err(expected), "{bytes:?}");
    }
    let mut deep = vec![101];
    deep.extend([0x43; 101]);
    assert_eq!(read(&deep), Err(error(Fault::GroupDepth, 0)));
    assert_eq!(
        error(Fault::WireType { field: 2, found: 0, expected: 2 }, 7).to_string(),
        "malformed tunnel message: field 2 has wire type 0, expected 2 at byte 7"
    );
}

const fn error(fault: Fault, at: usize) -> DecodeError {
    DecodeError { fault, at }
}

/// Replays what the fuzz target has found worth keeping. `SIDELANE_BLESS=1` writes the seeds anew.
#[test]
fn the_corpus_is_read_or_refused() {
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/decode");
    if std::env::var_os("SIDELANE_BLESS").is_some() {
        for (name, bytes) in seeds() {
            std::fs::write(corpus.join(name), bytes).expect("the corpus is writable");
        }
    }
    let mut replayed = 0;
    for entry in std::fs::read_dir(&corpus).expect("the corpus is checked in") {
        let path = entry.expect("the corpus is readable").path();
        check(&std::fs::read(&path).expect("the corpus is readable"));
        replayed += 1;
    }
    assert!(replayed >= seeds().len(), "only {replayed} in {}", corpus.display());
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let custom = |len| Some(Payload::Custom(Bytes::from(vec![7; len])));
    let id = RequestId(4711).to_string();
    let data =
        TunnelMessage { request_id: id.clone(), payload: custom(40), ..TunnelMessage::default() };
    let open = TunnelMessage {
        protocol_type: 1,
        flags: 3,
        open: Some(proto::Open { tunnel: "web".to_owned(), ..proto::Open::default() }),
        payload: Some(Payload::HttpRequest(proto::HttpRequest {
            method: "PUT".to_owned(),
            headers: vec![proto::Header {
                name: Bytes::from_static(b"accept"),
                value: Bytes::from_static(b"*/*"),
            }],
            ..proto::HttpRequest::default()
        })),
        ..data.clone()
    };
    let control = |payload| TunnelMessage { payload: Some(payload), ..TunnelMessage::default() };
    let window = TunnelMessage {
        payload: Some(Payload::Window(proto::Window { limit: 1 << 20 })),
        ..data.clone()
    };
    let mut reversed = fields(&open, &[vec![0x43, 0x08, 1, 0x4b, 0x10, 2, 0x4c, 0x44]]);
    reversed.reverse();
    let mut twice = open.encode_to_vec();
    twice.extend(data.encode_to_vec());
    twice.extend(open.encode_to_vec());
    let mut deep = vec![0x43; 120];
    deep.extend([0x44; 120]);
    vec![
        ("empty", Vec::new()),
        ("data", data.encode_to_vec()),
        ("data-large", TunnelMessage { payload: custom(5000), ..data.clone() }.encode_to_vec()),
        ("open", open.encode_to_vec()),
        ("open-reversed", reversed.concat()),
        ("open-twice", twice),
        ("window", window.encode_to_vec()),
        ("ping", control(Payload::Ping(proto::Ping { token: u64::MAX })).encode_to_vec()),
        ("hello", control(Payload::Hello(proto::Hello::default())).encode_to_vec()),
        ("stream", [data.encode_length_delimited_to_vec(), vec![0]].concat()),
        ("unnamed-payload", vec![0xba, 1, 2, 8, 1, 0xaa, 1, 0]),
        ("groups-deep", deep),
        ("group-open", vec![0x43, 8, 1]),
        ("varint-long", vec![0x28, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2]),
        ("length-huge", vec![0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]),
        ("id-not-canonical", vec![0x12, 2, b'0', b'1']),
        ("id-not-utf8", vec![0x12, 1, 0xff]),
        ("wire-type", vec![0x10, 1]),
    ]
}
