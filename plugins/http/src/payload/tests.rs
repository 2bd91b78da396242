use proptest::prelude::*;
use prost::Message;

use sidelane_http_born::body::{decode_body, decode_trailers, encode_body, encode_trailers};
use sidelane_http_born::wire::FIELDS_MAX;

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
    pub(super) struct HttpRequest {
        #[prost(string, tag = "1")]
        pub(super) method: String,
        #[prost(bytes = "vec", tag = "2")]
        pub(super) target: Vec<u8>,
        #[prost(bytes = "vec", tag = "3")]
        pub(super) authority: Vec<u8>,
        #[prost(uint32, tag = "4")]
        pub(super) version: u32,
        #[prost(message, repeated, tag = "5")]
        pub(super) headers: Vec<Header>,
        #[prost(uint64, tag = "6")]
        pub(super) content_length: u64,
        #[prost(bool, tag = "7")]
        pub(super) expect_continue: bool,
        #[prost(bytes = "vec", tag = "15")]
        pub(super) body: Vec<u8>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct HttpResponse {
        #[prost(uint32, tag = "1")]
        pub(super) status: u32,
        #[prost(message, repeated, tag = "5")]
        pub(super) headers: Vec<Header>,
        #[prost(uint64, tag = "6")]
        pub(super) content_length: u64,
        #[prost(bytes = "vec", tag = "15")]
        pub(super) body: Vec<u8>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct HttpBody {
        #[prost(bytes = "vec", tag = "1")]
        pub(super) data: Vec<u8>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct HttpTrailers {
        #[prost(message, repeated, tag = "5")]
        pub(super) headers: Vec<Header>,
    }
}

type Fields = Vec<(Vec<u8>, Vec<u8>)>;

fn bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..max)
}

fn fields() -> impl Strategy<Value = Fields> {
    proptest::collection::vec((bytes(40), bytes(300)), 0..20)
}

fn borrowed(fields: &Fields) -> impl Iterator<Item = Field<'_>> {
    fields.iter().map(|(name, value)| (name.as_slice(), value.as_slice()))
}

fn size(fields: &Fields) -> FieldsSize {
    let mut size = FieldsSize::default();
    for (name, value) in fields {
        size.add(name.len(), value.len());
    }
    size
}

fn prost_headers(fields: &Fields) -> Vec<proto::Header> {
    fields
        .iter()
        .map(|(name, value)| proto::Header { name: name.clone(), value: value.clone() })
        .collect()
}

fn owned(headers: Headers<'_>) -> Fields {
    headers.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect()
}

proptest! {
    #[test]
    fn prost_reads_what_encode_request_writes(
        method in "[A-Z]{1,10}",
        target in bytes(200),
        authority in bytes(60),
        version in prop_oneof![Just(10u32), Just(11), Just(20)],
        fields in fields(),
        content_length in proptest::option::of(0..u64::MAX),
        expect_continue in any::<bool>(),
        body in bytes(500),
    ) {
        let head = RequestHead {
            method: &method, target: &target, authority: &authority, version, content_length, expect_continue,
        };
        let mut wire = encode_request(head, borrowed(&fields), size(&fields), body.len()).to_vec();
        wire.extend_from_slice(&body);

        let read = proto::HttpRequest::decode(wire.as_slice()).unwrap();
        prop_assert_eq!(if read.method.is_empty() { "GET" } else { &read.method }, &method);
        let slash = b"/".to_vec();
        prop_assert_eq!(if read.target.is_empty() && target == slash { &slash } else { &read.target }, &target);
        prop_assert_eq!(&read.authority, &authority);
        prop_assert_eq!(if read.version == 0 { 11 } else { read.version }, version);
        prop_assert_eq!(read.headers, prost_headers(&fields));
        prop_assert_eq!(read.content_length, content_length.map_or(0, |length| length + 1));
        prop_assert_eq!(read.expect_continue, expect_continue);
        prop_assert_eq!(read.body, body);
    }

    #[test]
    fn decode_request_reads_what_prost_writes(
        method in "[A-Z]{0,10}",
        target in bytes(200),
        authority in bytes(60),
        version in prop_oneof![Just(0u32), Just(10), Just(11), Just(20)],
        fields in fields(),
        content_length in any::<u64>(),
        expect_continue in any::<bool>(),
        body in bytes(500),
    ) {
        let wire = proto::HttpRequest {
            method: method.clone(), target: target.clone(), authority: authority.clone(), version,
            headers: prost_headers(&fields), content_length, expect_continue, body: body.clone(),
        }.encode_to_vec();
        let read = decode_request(&wire).unwrap();
        prop_assert_eq!(read.method, if method.is_empty() { "GET" } else { &method });
        prop_assert_eq!(&wire[read.target.clone()], &target[..]);
        prop_assert_eq!(read.authority, &authority[..]);
        prop_assert_eq!(read.version, if version == 0 { 11 } else { version });
        prop_assert_eq!(owned(read.headers), fields);
        prop_assert_eq!(read.content_length, content_length.checked_sub(1));
        prop_assert_eq!(read.expect_continue, expect_continue);
        prop_assert_eq!(&wire[read.body.clone()], &body[..]);
    }

    #[test]
    fn responses_agree_with_prost_both_ways(
        status in 100u16..1000,
        fields in fields(),
        content_length in proptest::option::of(0..u64::MAX),
        body in bytes(500),
    ) {
        let mut wire = encode_response(status, borrowed(&fields), size(&fields), content_length, body.len()).to_vec();
        wire.extend_from_slice(&body);
        let read = proto::HttpResponse::decode(wire.as_slice()).unwrap();
        prop_assert_eq!(if read.status == 0 { 200 } else { read.status }, u32::from(status));
        prop_assert_eq!(&read.headers, &prost_headers(&fields));
        prop_assert_eq!(read.content_length, content_length.map_or(0, |length| length + 1));
        prop_assert_eq!(&read.body, &body);

        let wire = read.encode_to_vec();
        let read = decode_response(&wire).unwrap();
        prop_assert_eq!(read.status, u32::from(status));
        prop_assert_eq!(owned(read.headers), fields);
        prop_assert_eq!(read.content_length, content_length);
        prop_assert_eq!(&wire[read.body.clone()], &body[..]);
    }

    #[test]
    fn bodies_and_trailers_agree_with_prost(data in bytes(70_000), fields in fields()) {
        let mut wire = encode_body(data.len()).to_vec();
        wire.extend_from_slice(&data);
        let read = proto::HttpBody::decode(wire.as_slice()).unwrap();
        prop_assert_eq!(&read.data, &data);
        prop_assert_eq!(&wire[decode_body(&wire).unwrap()], &data[..]);

        let wire = encode_trailers(borrowed(&fields)).to_vec();
        let read = proto::HttpTrailers::decode(wire.as_slice()).unwrap();
        prop_assert_eq!(&read.headers, &prost_headers(&fields));
        prop_assert_eq!(owned(decode_trailers(&wire).unwrap()), fields);
    }

    #[test]
    fn any_bytes_are_read_or_refused_and_never_panic(wire in bytes(300)) {
        for headers in [
            decode_request(&wire).map(|request| request.headers),
            decode_response(&wire).map(|response| response.headers),
            decode_trailers(&wire),
        ]
        .into_iter()
        .flatten()
        {
            prop_assert_eq!(headers.iter().count(), headers.count);
        }
        let _ = decode_body(&wire);
    }
}

#[test]
fn unknown_fields_are_skipped() {
    let mut wire = BufBuilder::new();
    put_uint(&mut wire, 90, 7);
    put_bytes(&mut wire, 91, b"later");
    wire.extend_from_slice(&[0xe5, 0x05]);
    wire.extend_from_slice(&[1, 2, 3, 4]);
    wire.extend_from_slice(&[0xe9, 0x05]);
    wire.extend_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
    put_header(&mut wire, HEADERS, b"a", b"b");
    let read = decode_request(&wire).unwrap();
    assert_eq!(read.headers.iter().collect::<Vec<_>>(), [(&b"a"[..], &b"b"[..])]);
}

#[test]
fn malformed_payloads_say_what_is_wrong() {
    let cases: [(&[u8], WireError); 5] = [
        (b"\x0a\x05ab", WireError::Truncated),
        (b"\x20", WireError::Truncated),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", WireError::Varint),
        (b"\x08\x01", WireError::WireType(REQUEST_METHOD)),
        (b"\x0a\x01\xff", WireError::Utf8(REQUEST_METHOD)),
    ];
    for (wire, error) in cases {
        assert_eq!(decode_request(wire), Err(error), "{wire:?}");
    }
}

#[test]
fn fields_are_bounded() {
    let fields: Fields = vec![(b"a".to_vec(), Vec::new()); FIELDS_MAX + 1];
    let most = encode_trailers(borrowed(&fields[..FIELDS_MAX].to_vec())).to_vec();
    assert_eq!(decode_trailers(&most).unwrap().count, FIELDS_MAX);
    let more = encode_trailers(borrowed(&fields)).to_vec();
    assert_eq!(decode_trailers(&more), Err(WireError::Fields));
}
