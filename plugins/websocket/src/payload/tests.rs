use proptest::prelude::*;
use prost::Message;

use super::*;

/// The messages of `tunnel.proto` as prost derives them.
mod proto {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Header {
        #[prost(bytes = "vec", tag = "1")]
        pub(super) name: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        pub(super) value: Vec<u8>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct WebSocketRequest {
        #[prost(string, tag = "1")]
        pub(super) url: String,
        #[prost(string, tag = "2")]
        pub(super) host: String,
        #[prost(message, repeated, tag = "3")]
        pub(super) headers: Vec<Header>,
        #[prost(string, tag = "4")]
        pub(super) subprotocol: String,
        #[prost(uint32, tag = "5")]
        pub(super) version: u32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct WebSocketResponse {
        #[prost(int32, tag = "1")]
        pub(super) status_code: i32,
        #[prost(message, repeated, tag = "2")]
        pub(super) headers: Vec<Header>,
        #[prost(string, tag = "3")]
        pub(super) subprotocol: String,
        #[prost(bool, tag = "4")]
        pub(super) accepted: bool,
        #[prost(uint64, tag = "5")]
        pub(super) content_length: u64,
        #[prost(bytes = "vec", tag = "15")]
        pub(super) body: Vec<u8>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct WebSocketFrame {
        #[prost(string, tag = "1")]
        pub(super) connection_id: String,
        #[prost(bool, tag = "2")]
        pub(super) fin: bool,
        #[prost(uint32, tag = "3")]
        pub(super) opcode: u32,
        #[prost(bool, tag = "4")]
        pub(super) masked: bool,
        #[prost(bytes = "vec", tag = "5")]
        pub(super) payload: Vec<u8>,
        #[prost(int32, tag = "6")]
        pub(super) frame_direction: i32,
        #[prost(uint32, tag = "7")]
        pub(super) reserved: u32,
        #[prost(fixed32, tag = "8")]
        pub(super) masking_key: u32,
        #[prost(uint64, tag = "9")]
        pub(super) length: u64,
        #[prost(uint64, tag = "10")]
        pub(super) offset: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct WebSocketBatch {
        #[prost(message, repeated, tag = "1")]
        pub(super) frames: Vec<WebSocketFrame>,
    }
}

fn fields() -> impl Strategy<Value = Vec<(Vec<u8>, Vec<u8>)>> {
    let field = ("[a-z-]{1,20}", prop::collection::vec(any::<u8>(), 0..200));
    prop::collection::vec(field.prop_map(|(name, value)| (name.into_bytes(), value)), 0..12)
}

fn borrowed(fields: &[(Vec<u8>, Vec<u8>)]) -> impl Iterator<Item = Field<'_>> {
    fields.iter().map(|(name, value)| (&name[..], &value[..]))
}

fn size(fields: &[(Vec<u8>, Vec<u8>)]) -> FieldsSize {
    let mut size = FieldsSize::default();
    fields.iter().for_each(|(name, value)| size.add(name.len(), value.len()));
    size
}

fn entries(fields: &[(Vec<u8>, Vec<u8>)]) -> Vec<proto::Header> {
    let entry = |(name, value): &(Vec<u8>, Vec<u8>)| proto::Header {
        name: name.clone(),
        value: value.clone(),
    };
    fields.iter().map(entry).collect()
}

fn owned(headers: Headers<'_>) -> Vec<(Vec<u8>, Vec<u8>)> {
    headers.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect()
}

prop_compose! {
    fn headers_of_frames()(
        fin in any::<bool>(),
        reserved in 0..8u8,
        opcode in prop::sample::select(vec![0u8, 1, 2, 8, 9, 10]),
        key in any::<Option<[u8; 4]>>(),
        len in prop_oneof![0..200u64, 32_768..70_000u64, (1u64 << 40)..(1u64 << 62)],
    ) -> Header {
        Header { fin, reserved, opcode, key, len }
    }
}

fn as_proto(header: &Header, from_client: bool, payload: &[u8]) -> proto::WebSocketFrame {
    proto::WebSocketFrame {
        connection_id: String::new(),
        fin: header.fin,
        opcode: header.opcode.into(),
        masked: header.key.is_some(),
        payload: payload.to_vec(),
        frame_direction: (!from_client).into(),
        reserved: header.reserved.into(),
        masking_key: header.key.map_or(0, u32::from_le_bytes),
        length: if header.len > payload.len() as u64 { header.len } else { 0 },
        offset: 0,
    }
}

proptest! {
    #[test]
    fn requests_are_prosts(
        url in "/[a-z?=&]{0,50}",
        host in "[a-z.:0-9]{0,30}",
        fields in fields(),
        subprotocol in "[a-z, ]{0,30}",
        version in prop::sample::select(vec![11u32, 20]),
    ) {
        let encoded = encode_request(
            url.as_bytes(), host.as_bytes(), borrowed(&fields), size(&fields),
            subprotocol.as_bytes(), version,
        );
        let decoded = proto::WebSocketRequest::decode(&encoded[..]).unwrap();
        let expected = proto::WebSocketRequest {
            url, host, headers: entries(&fields), subprotocol,
            version: if version == 11 { 0 } else { version },
        };
        prop_assert_eq!(&decoded, &expected);
        let bytes = expected.encode_to_vec();
        let read = decode_request(&bytes).unwrap();
        prop_assert_eq!(read.url, expected.url.as_bytes());
        prop_assert_eq!(read.host, expected.host.as_bytes());
        prop_assert_eq!(owned(read.headers), fields);
        prop_assert_eq!(read.subprotocol, expected.subprotocol.as_bytes());
        prop_assert_eq!(read.version, version);
    }

    #[test]
    fn responses_are_prosts(
        status in 101..600u16,
        fields in fields(),
        subprotocol in "[a-z]{0,10}",
        accepted in any::<bool>(),
        content_length in prop::option::of(0..u64::MAX - 1),
        body in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let encoded = encode_response(
            status, borrowed(&fields), size(&fields), subprotocol.as_bytes(), accepted,
            content_length,
        );
        let mut expected = proto::WebSocketResponse {
            status_code: status.into(), headers: entries(&fields), subprotocol, accepted,
            content_length: content_length.map_or(0, |length| length + 1), body: Vec::new(),
        };
        prop_assert_eq!(&proto::WebSocketResponse::decode(&encoded[..]).unwrap(), &expected);
        expected.body.clone_from(&body);
        let bytes = expected.encode_to_vec();
        let read = decode_response(&bytes).unwrap();
        prop_assert_eq!(read.status, u32::from(status));
        prop_assert_eq!(owned(read.headers), fields);
        prop_assert_eq!(read.subprotocol, expected.subprotocol.as_bytes());
        prop_assert_eq!(read.accepted, accepted);
        prop_assert_eq!(read.content_length, content_length);
        prop_assert_eq!(&bytes[read.body], &body[..]);
    }

    #[test]
    fn frames_are_prosts(
        header in headers_of_frames(),
        from_client in any::<bool>(),
        payload in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let header = Header { len: header.len.max(payload.len() as u64), ..header };
        let encoded = join(&frame_prefix(&header, from_client, payload.len()), &payload);
        let expected = as_proto(&header, from_client, &payload);
        prop_assert_eq!(&proto::WebSocketFrame::decode(&encoded[..]).unwrap(), &expected);
        let bytes = expected.encode_to_vec();
        let read = decode_frame(&bytes).unwrap();
        prop_assert_eq!(read.header, header);
        prop_assert_eq!(read.offset, 0);
        prop_assert_eq!(&bytes[read.payload], &payload[..]);
    }

    #[test]
    fn pieces_are_prosts(
        offset in 1..u64::MAX,
        from_client in any::<bool>(),
        payload in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let encoded = join(&piece_prefix(offset, from_client, payload.len()), &payload);
        let expected = proto::WebSocketFrame {
            payload: payload.clone(), frame_direction: (!from_client).into(), offset,
            ..Default::default()
        };
        prop_assert_eq!(&proto::WebSocketFrame::decode(&encoded[..]).unwrap(), &expected);
        let bytes = expected.encode_to_vec();
        let read = decode_frame(&bytes).unwrap();
        prop_assert_eq!(read.offset, offset);
        prop_assert_eq!(&bytes[read.payload], &payload[..]);
    }

    #[test]
    fn batches_are_prosts(
        frames in prop::collection::vec(
            (headers_of_frames(), prop::collection::vec(any::<u8>(), 0..300)), 2..8),
    ) {
        let mut out = Vec::new();
        let mut batch = Batch::new(&mut out);
        let mut expected = proto::WebSocketBatch::default();
        for (header, payload) in &frames {
            let header = Header { len: payload.len() as u64, ..*header };
            batch.push(&frame_prefix(&header, true, payload.len()), payload);
            expected.frames.push(as_proto(&header, true, payload));
        }
        let (field, encoded) = batch.take();
        prop_assert_eq!(field, FIELD_BATCH);
        prop_assert_eq!(&proto::WebSocketBatch::decode(&encoded[..]).unwrap(), &expected);
        let bytes = expected.encode_to_vec();
        let mut reader = Reader::new(&bytes);
        for (_, payload) in &frames {
            let range = next_of_batch(&mut reader).unwrap().unwrap();
            let read = decode_frame(&bytes[range.clone()]).unwrap();
            prop_assert_eq!(&bytes[range][read.payload], &payload[..]);
        }
        prop_assert_eq!(next_of_batch(&mut reader), Ok(None));
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode_request(&bytes);
        let _ = decode_response(&bytes);
        if let Ok(frame) = decode_frame(&bytes) {
            prop_assert!(frame.payload.end <= bytes.len());
        }
        let mut reader = Reader::new(&bytes);
        while let Ok(Some(range)) = next_of_batch(&mut reader) {
            prop_assert!(range.end <= bytes.len());
        }
    }
}

#[test]
fn a_frame_alone_is_no_batch() {
    let mut out = Vec::new();
    let mut batch = Batch::new(&mut out);
    let header = Header { fin: true, reserved: 0, opcode: 1, key: None, len: 2 };
    batch.push(&frame_prefix(&header, false, 2), b"hi");
    let (field, encoded) = batch.take();
    assert_eq!(field, FIELD_FRAME);
    let expected = as_proto(&header, false, b"hi");
    assert_eq!(proto::WebSocketFrame::decode(&encoded[..]).unwrap(), expected);
    assert!(batch.is_empty());
}

#[test]
fn the_largest_messages_are_within_the_limit() {
    let header = Header { fin: true, reserved: 7, opcode: 2, key: Some([255; 4]), len: u64::MAX };
    let first = frame_prefix(&header, false, PIECE_BYTES_MAX);
    let later = piece_prefix(u64::MAX, false, PIECE_BYTES_MAX);
    for prefix in [first, later] {
        assert!(prefix.as_slice().len() + PIECE_BYTES_MAX <= sidelane_plugin::MESSAGE_BYTES_MAX);
    }
}
