//! Each message kind against prost, both ways.

use proptest::prelude::*;
use prost::Message as _;

use super::*;

#[derive(Clone, PartialEq, prost::Message)]
struct Header {
    #[prost(bytes = "vec", tag = "1")]
    name: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GrpcRequest {
    #[prost(string, tag = "1")]
    grpc_stream_id: String,
    #[prost(string, tag = "2")]
    service: String,
    #[prost(string, tag = "3")]
    method: String,
    #[prost(bytes = "vec", tag = "4")]
    body: Vec<u8>,
    #[prost(bool, tag = "5")]
    is_first_chunk: bool,
    #[prost(bool, tag = "6")]
    is_last_chunk: bool,
    #[prost(uint32, tag = "7")]
    sequence_number: u32,
    #[prost(bool, tag = "8")]
    is_partial: bool,
    #[prost(string, tag = "9")]
    authority: String,
    #[prost(string, tag = "10")]
    path: String,
    #[prost(message, repeated, tag = "11")]
    metadata: Vec<Header>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GrpcResponse {
    #[prost(string, tag = "1")]
    grpc_stream_id: String,
    #[prost(int32, tag = "2")]
    status_code: i32,
    #[prost(bytes = "vec", tag = "3")]
    body: Vec<u8>,
    #[prost(bool, tag = "4")]
    is_first_chunk: bool,
    #[prost(bool, tag = "5")]
    is_last_chunk: bool,
    #[prost(uint32, tag = "6")]
    sequence_number: u32,
    #[prost(bool, tag = "8")]
    is_partial: bool,
    #[prost(message, repeated, tag = "11")]
    metadata: Vec<Header>,
    #[prost(message, repeated, tag = "12")]
    trailers: Vec<Header>,
    #[prost(uint32, tag = "13")]
    http_status: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GrpcBatch {
    #[prost(uint32, tag = "1")]
    sequence_number: u32,
    #[prost(uint32, tag = "2")]
    count: u32,
    #[prost(bytes = "vec", tag = "15")]
    messages: Vec<u8>,
}

fn payload_of(message: &Message) -> Vec<u8> {
    [&message.head[..], &message.body[..]].concat()
}

fn pairs(headers: &[Header]) -> impl Iterator<Item = Field<'_>> + Clone {
    headers.iter().map(|header| (&header.name[..], &header.value[..]))
}

fn size(headers: &[Header]) -> FieldsSize {
    let mut size = FieldsSize::default();
    headers.iter().for_each(|header| size.add(header.name.len(), header.value.len()));
    size
}

fn read_back(headers: Headers<'_>) -> Vec<Header> {
    headers.iter().map(|(name, value)| Header { name: name.into(), value: value.into() }).collect()
}

fn headers() -> impl Strategy<Value = Vec<Header>> {
    let bytes = || proptest::collection::vec(any::<u8>(), 0..200);
    let header = (bytes(), bytes()).prop_map(|(name, value)| Header { name, value });
    proptest::collection::vec(header, 0..5)
}

fn body() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..2 * INLINE_BYTES_MAX)
}

fn piece(body: &[u8], sequence: u32, [first, last, partial]: [bool; 3]) -> Piece {
    Piece { body: Buf::copy_from_slice(body), sequence, messages: 1, first, last, partial }
}

proptest! {
    #[test]
    fn requests_are_what_prost_says(
        strings in any::<[bool; 4]>(),
        sequence_number: u32,
        flags: [bool; 3],
        metadata in headers(),
        body in body(),
    ) {
        let text = |set: bool, text: &str| if set { text.to_owned() } else { String::new() };
        let [is_first_chunk, is_last_chunk, is_partial] = flags;
        let expected = GrpcRequest {
            grpc_stream_id: String::new(),
            service: text(strings[0], "a.B"),
            method: text(strings[1], "C"),
            path: text(strings[2], "/x"),
            authority: text(strings[3], "h:1"),
            body, is_first_chunk, is_last_chunk, sequence_number, is_partial, metadata,
        };
        let head = RequestHead {
            service: &expected.service,
            method: &expected.method,
            path: &expected.path,
            authority: &expected.authority,
        };
        let (fields, size) = (pairs(&expected.metadata), size(&expected.metadata));
        let piece = piece(&expected.body, sequence_number, flags);
        let message = first_request(head, fields, size, piece);
        prop_assert_eq!(message.field, FIELD_REQUEST);
        prop_assert_eq!(message.end, is_last_chunk);
        prop_assert_eq!(GrpcRequest::decode(&payload_of(&message)[..]).unwrap(), expected.clone());

        let payload = expected.encode_to_vec();
        let read = decode_request(&payload).unwrap();
        prop_assert_eq!(read.service, &expected.service);
        prop_assert_eq!(read.method, &expected.method);
        prop_assert_eq!(read.path, &expected.path);
        prop_assert_eq!(read.authority, &expected.authority);
        prop_assert_eq!(&payload[read.body], &expected.body);
        prop_assert_eq!([read.first, read.last, read.partial], flags);
        prop_assert_eq!(read.sequence, sequence_number);
        prop_assert_eq!(read_back(read.metadata), expected.metadata);
    }

    #[test]
    fn responses_are_what_prost_says(
        http_status in 201u32..=999,
        sequence_number: u32,
        flags: [bool; 3],
        status_code in 0..=20i32,
        metadata in headers(),
        trailers in headers(),
        body in body(),
    ) {
        let [is_first_chunk, is_last_chunk, is_partial] = flags;
        let expected = GrpcResponse {
            grpc_stream_id: String::new(),
            status_code, body, is_first_chunk, is_last_chunk, sequence_number, is_partial,
            metadata, trailers, http_status,
        };
        let sent = Trailers {
            fields: pairs(&expected.trailers),
            size: size(&expected.trailers),
            status: status_code.cast_unsigned(),
        };
        let message = first_response(
            u16::try_from(http_status).unwrap(),
            pairs(&expected.metadata),
            size(&expected.metadata),
            Some(sent),
            piece(&expected.body, sequence_number, flags),
        );
        prop_assert_eq!(message.field, FIELD_RESPONSE);
        prop_assert_eq!(message.end, is_last_chunk);
        prop_assert_eq!(GrpcResponse::decode(&payload_of(&message)[..]).unwrap(), expected.clone());

        let payload = expected.encode_to_vec();
        let read = decode_response(&payload).unwrap();
        prop_assert_eq!(read.http_status, http_status);
        prop_assert_eq!(&payload[read.body], &expected.body);
        prop_assert_eq!([read.first, read.last, read.partial], flags);
        prop_assert_eq!(read.sequence, sequence_number);
        prop_assert_eq!(read_back(read.metadata), expected.metadata);
        prop_assert_eq!(read_back(read.trailers), expected.trailers);
    }

    #[test]
    fn batches_are_what_prost_says(
        sequence_number: u32,
        count in 2u32..,
        messages in body(),
        is_request: bool,
    ) {
        let piece = Piece {
            messages: count,
            ..piece(&messages, sequence_number, [false; 3])
        };
        let message = if is_request {
            request(piece)
        } else {
            response(None::<Trailers<std::iter::Empty<Field<'_>>>>, piece)
        };
        let field = if is_request { FIELD_REQUEST_BATCH } else { FIELD_RESPONSE_BATCH };
        prop_assert_eq!((message.field, message.end), (field, false));
        let expected = GrpcBatch { sequence_number, count, messages };
        prop_assert_eq!(GrpcBatch::decode(&payload_of(&message)[..]).unwrap(), expected.clone());

        let payload = expected.encode_to_vec();
        let read = decode_batch(&payload).unwrap();
        prop_assert_eq!((read.sequence, read.count), (sequence_number, count));
        prop_assert_eq!(&payload[read.messages], &expected.messages);
    }

    #[test]
    fn any_bytes_are_read_or_refused(payload in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = (decode_request(&payload), decode_response(&payload), decode_batch(&payload));
    }
}

#[test]
fn what_is_not_said_is_absent() {
    let message = request(piece(b"", 0, [false; 3]));
    assert!(payload_of(&message).is_empty());
    let read = decode_response(&[]).unwrap();
    assert_eq!((read.http_status, read.sequence, read.body), (200, 0, 0..0));
}
