//! The handshake between a dialler and an acceptor.

use bytes::{Bytes, BytesMut};

use crate::credit::WINDOW_MIN;
use crate::{
    Acceptor, Dialler, First, HELD_MAX, HELLO_BYTES_MAX, HandshakeError, MESSAGE_BYTES_MIN,
    ProtocolTable, Reply, VERSION, proto,
};

fn hello() -> proto::Hello {
    proto::Hello {
        version: VERSION,
        instance: Bytes::from_static(&[1; 16]),
        name: "web-0".to_owned(),
        credential: Bytes::from_static(b"token"),
        protocols: ProtocolTable::bind(["HTTP", "LINE"]).unwrap().to_wire(),
        window: WINDOW_MIN,
        message_bytes_max: MESSAGE_BYTES_MIN,
        ..proto::Hello::default()
    }
}

fn welcome() -> proto::Welcome {
    proto::Welcome {
        version: VERSION,
        session: Bytes::from_static(&[2; 16]),
        secret: Bytes::from_static(&[3; 32]),
        relay_instance: Bytes::from_static(&[4; 16]),
        epoch: 1,
        protocols: ProtocolTable::bind(["HTTP"]).unwrap().to_wire(),
        window: WINDOW_MIN,
        message_bytes_max: MESSAGE_BYTES_MIN,
        lanes_max: 16,
        ..proto::Welcome::default()
    }
}

#[test]
fn hello_and_welcome_arrive_in_pieces_and_leave_what_follows() {
    let bytes = Dialler::new().hello(&hello()).unwrap();
    let mut buffer = BytesMut::new();
    for &byte in &bytes[..bytes.len() - 1] {
        buffer.extend_from_slice(&[byte]);
        assert_eq!(Acceptor::new().handle_input(&mut buffer), Ok(None));
    }
    buffer.extend_from_slice(&bytes[bytes.len() - 1..]);
    buffer.extend_from_slice(b"next");
    assert_eq!(Acceptor::new().handle_input(&mut buffer), Ok(Some(First::Hello(hello()))));
    assert_eq!(&*buffer, b"next");

    let mut buffer = BytesMut::from(&*Acceptor::new().encode_welcome(&welcome()).unwrap());
    buffer.extend_from_slice(b"next");
    assert_eq!(Dialler::new().handle_input(&mut buffer), Ok(Some(Reply::Welcome(welcome()))));
    assert_eq!(&*buffer, b"next");
}

fn resume() -> proto::Resume {
    proto::Resume {
        session: Bytes::from_static(&[2; 16]),
        secret: Bytes::from_static(&[3; 32]),
        lane: 1,
        attempt: 7,
        received: 1 << 40,
        relay_instance: Bytes::from_static(&[4; 16]),
    }
}

#[test]
fn resume_and_resumed_arrive_in_pieces_and_leave_what_follows() {
    let bytes = Dialler::new().resume(&resume()).unwrap();
    let mut buffer = BytesMut::new();
    for &byte in &bytes[..bytes.len() - 1] {
        buffer.extend_from_slice(&[byte]);
        assert_eq!(Acceptor::new().handle_input(&mut buffer), Ok(None));
    }
    buffer.extend_from_slice(&bytes[bytes.len() - 1..]);
    buffer.extend_from_slice(b"next");
    assert_eq!(Acceptor::new().handle_input(&mut buffer), Ok(Some(First::Resume(resume()))));
    assert_eq!(&*buffer, b"next");

    let resumed = proto::Resumed { received: u64::MAX, attempt: 7 };
    let mut buffer = BytesMut::from(&*Acceptor::new().encode_resumed(&resumed));
    buffer.extend_from_slice(b"next");
    assert_eq!(Dialler::new().handle_input(&mut buffer), Ok(Some(Reply::Resumed(resumed))));
    assert_eq!(&*buffer, b"next");
}

#[test]
fn a_resume_with_a_field_out_of_range_is_malformed_and_says_which() {
    let long = Bytes::from(vec![1; 65]);
    let cases = [
        ("session", proto::Resume { session: Bytes::new(), ..resume() }),
        ("session", proto::Resume { session: long.clone(), ..resume() }),
        ("secret", proto::Resume { secret: Bytes::new(), ..resume() }),
        ("secret", proto::Resume { secret: long.clone(), ..resume() }),
        ("relay_instance", proto::Resume { relay_instance: long, ..resume() }),
    ];
    for (field, resume) in cases {
        let error = Dialler::new().resume(&resume).unwrap_err();
        assert!(error.to_string().starts_with(field), "{field}: {error}");
        let message = proto::TunnelMessage {
            payload: Some(proto::tunnel_message::Payload::Resume(resume)),
            ..proto::TunnelMessage::default()
        };
        let frame = prost::Message::encode_length_delimited_to_vec(&message);
        let taken = Acceptor::new().handle_input(&mut BytesMut::from(&*frame));
        assert_eq!(taken, Err(error.clone()));
        assert_eq!(error.refusal().reason(), proto::RefuseReason::Malformed);
    }
}

#[test]
fn a_refusal_reaches_the_dialler() {
    let refuse = proto::Refuse {
        reason: proto::RefuseReason::Credential.into(),
        detail: "unknown credential".to_owned(),
        retry_after_ms: 1000,
        ..proto::Refuse::default()
    };
    let mut buffer = BytesMut::from(&*Acceptor::new().encode_refuse(&refuse));
    assert_eq!(Dialler::new().handle_input(&mut buffer), Ok(Some(Reply::Refuse(refuse))));
}

#[test]
fn a_long_detail_is_cut_between_characters() {
    let refuse = proto::Refuse { detail: "é".repeat(1000) + "x", ..proto::Refuse::default() };
    let mut buffer = BytesMut::from(&*Acceptor::new().encode_refuse(&refuse));
    let reply = Dialler::new().handle_input(&mut buffer).unwrap();
    let expected = proto::Refuse { detail: "é".repeat(128), ..proto::Refuse::default() };
    assert_eq!(reply, Some(Reply::Refuse(expected)));
}

#[test]
fn another_version_is_refused_as_such() {
    let mut dialled = proto::Hello { version: 2, ..hello() };
    // `hello` fills in this end's version, so the message is made here.
    let message = proto::TunnelMessage {
        payload: Some(proto::tunnel_message::Payload::Hello(dialled.clone())),
        ..proto::TunnelMessage::default()
    };
    let frame = prost::Message::encode_length_delimited_to_vec(&message);
    let error = Acceptor::new().handle_input(&mut BytesMut::from(&*frame)).unwrap_err();
    assert_eq!(error, HandshakeError::Version { found: 2 });
    let refusal = error.refusal();
    assert_eq!(refusal.reason(), proto::RefuseReason::Version);
    assert_eq!(
        refusal.detail,
        "the peer speaks version 2 of the tunnel's protocol, this end speaks 1"
    );
    dialled.version = 0;
    assert!(Dialler::new().hello(&dialled).is_ok(), "the version is filled in");
}

#[test]
fn a_hello_with_a_field_out_of_range_is_malformed_and_says_which() {
    let long = |len| Bytes::from(vec![1; len]);
    let cases = [
        ("instance", proto::Hello { instance: Bytes::new(), ..hello() }),
        ("instance", proto::Hello { instance: long(65), ..hello() }),
        ("name", proto::Hello { name: "x".repeat(257), ..hello() }),
        ("credential", proto::Hello { credential: long(16 * 1024 + 1), ..hello() }),
        ("session", proto::Hello { session: long(65), secret: long(1), ..hello() }),
        ("secret", proto::Hello { session: long(1), ..hello() }),
        ("secret", proto::Hello { secret: long(1), ..hello() }),
        ("held", proto::Hello { held: vec![long(16); HELD_MAX + 1], ..hello() }),
        ("held", proto::Hello { held: vec![long(65)], ..hello() }),
        ("held", proto::Hello { held: vec![Bytes::new()], ..hello() }),
        ("window", proto::Hello { window: WINDOW_MIN - 1, ..hello() }),
        ("message_bytes_max", proto::Hello { message_bytes_max: 1000, ..hello() }),
        (
            "protocol type",
            proto::Hello {
                protocols: vec![proto::ProtocolName { number: 5, name: "HTTP".to_owned() }],
                ..hello()
            },
        ),
    ];
    for (field, hello) in cases {
        let error = Dialler::new().hello(&hello).unwrap_err();
        assert!(error.to_string().starts_with(field), "{field}: {error}");
        assert_eq!(error.refusal().reason(), proto::RefuseReason::Malformed);
    }
}

#[test]
fn a_welcome_with_a_field_out_of_range_is_refused() {
    let cases = [
        ("session", proto::Welcome { session: Bytes::new(), ..welcome() }),
        ("secret", proto::Welcome { secret: Bytes::new(), ..welcome() }),
        ("relay_instance", proto::Welcome { relay_instance: Bytes::new(), ..welcome() }),
        ("advertise_address", proto::Welcome { advertise_address: "x".repeat(257), ..welcome() }),
        ("peers", proto::Welcome { peers: vec![String::new()], ..welcome() }),
        ("peers", proto::Welcome { peers: vec!["r".to_owned(); 257], ..welcome() }),
        ("window", proto::Welcome { window: 0, ..welcome() }),
        ("welcome", proto::Welcome { peers: vec!["r".repeat(256); 256], ..welcome() }),
    ];
    for (field, welcome) in cases {
        let error = Acceptor::new().encode_welcome(&welcome).unwrap_err();
        assert!(error.to_string().starts_with(field), "{field}: {error}");
    }
}

#[test]
fn what_is_not_our_protocol_is_refused_at_once() {
    let error = Acceptor::new()
        .handle_input(&mut BytesMut::from(&b"GET / HTTP/1.1\r\nhost: relay\r\n\r\n"[..]))
        .map(|hello| assert_eq!(hello, None));
    // "G" announces 71 bytes, which are awaited; the hello's time limit is the caller's.
    assert_eq!(error, Ok(()));
    let too_long = [0xff, 0xff, 0x7f];
    let error = Acceptor::new().handle_input(&mut BytesMut::from(&too_long[..])).unwrap_err();
    assert!(matches!(error, HandshakeError::Decode(_)), "{error:?}");
    assert!(error.to_string().contains(&HELLO_BYTES_MAX.to_string()), "{error}");
    let mut welcome = BytesMut::from(&*Acceptor::new().encode_welcome(&welcome()).unwrap());
    let error = Acceptor::new().handle_input(&mut welcome).unwrap_err();
    assert_eq!(
        error,
        HandshakeError::Unexpected { found: 33, expected: "32 (hello) or 35 (resume)" }
    );
}
