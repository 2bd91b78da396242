//! The payloads, as prost writes and reads them.

use prost::Message;
use sidelane_testkit::{Peer, PeerMessage};

pub(crate) const REQUEST: u32 = 17;
pub(crate) const RESPONSE: u32 = 18;
pub(crate) const BODY: u32 = 19;
pub(crate) const TRAILERS: u32 = 20;

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Header {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) name: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct HttpRequest {
    #[prost(string, tag = "1")]
    pub(crate) method: String,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) target: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) authority: Vec<u8>,
    #[prost(uint32, tag = "4")]
    pub(crate) version: u32,
    #[prost(message, repeated, tag = "5")]
    pub(crate) headers: Vec<Header>,
    #[prost(uint64, tag = "6")]
    pub(crate) content_length: u64,
    #[prost(bool, tag = "7")]
    pub(crate) expect_continue: bool,
    #[prost(bytes = "vec", tag = "15")]
    pub(crate) body: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct HttpResponse {
    #[prost(uint32, tag = "1")]
    pub(crate) status: u32,
    #[prost(message, repeated, tag = "5")]
    pub(crate) headers: Vec<Header>,
    #[prost(uint64, tag = "6")]
    pub(crate) content_length: u64,
    #[prost(bytes = "vec", tag = "15")]
    pub(crate) body: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct HttpBody {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) data: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct HttpTrailers {
    #[prost(message, repeated, tag = "5")]
    pub(crate) headers: Vec<Header>,
}

impl HttpRequest {
    /// A request without a body.
    pub(crate) fn new(method: &str, target: &str) -> Self {
        Self {
            method: method.to_owned(),
            target: target.as_bytes().to_vec(),
            authority: b"test.localhost:9080".to_vec(),
            content_length: 1,
            ..Self::default()
        }
    }

    pub(crate) fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.headers.push(header(name, value));
        self
    }

    /// Gives it a body, of which `first` comes at once; `None`: of unknown length.
    pub(crate) fn body(mut self, length: Option<u64>, first: &[u8]) -> Self {
        self.content_length = length.map_or(0, |length| length + 1);
        self.body = first.to_vec();
        self
    }

    pub(crate) fn expecting_continue(mut self) -> Self {
        self.expect_continue = true;
        self
    }

    pub(crate) fn send(&self, peer: &Peer, end: bool) {
        peer.send(REQUEST, self.encode_to_vec(), end);
    }
}

pub(crate) fn header(name: &str, value: impl AsRef<[u8]>) -> Header {
    Header { name: name.as_bytes().to_vec(), value: value.as_ref().to_vec() }
}

pub(crate) fn response(status: u32, headers: &[(&str, &str)], body: &[u8]) -> HttpResponse {
    HttpResponse {
        status,
        headers: headers.iter().map(|(name, value)| header(name, value)).collect(),
        content_length: 0,
        body: body.to_vec(),
    }
}

pub(crate) fn send_data(peer: &Peer, data: &[u8], end: bool) {
    peer.send(BODY, HttpBody { data: data.to_vec() }.encode_to_vec(), end);
}

pub(crate) fn read_request(message: &PeerMessage) -> HttpRequest {
    assert_eq!(message.field, REQUEST);
    HttpRequest::decode(&message.payload[..]).expect("an encoded payload")
}

pub(crate) fn read_response(message: &PeerMessage) -> HttpResponse {
    assert_eq!(message.field, RESPONSE);
    let response = HttpResponse::decode(&message.payload[..]).expect("an encoded payload");
    HttpResponse { status: if response.status == 0 { 200 } else { response.status }, ..response }
}

pub(crate) fn read_data(message: &PeerMessage) -> Vec<u8> {
    assert_eq!(message.field, BODY);
    HttpBody::decode(&message.payload[..]).expect("an encoded payload").data
}

pub(crate) fn read_trailers(message: &PeerMessage) -> Vec<(String, String)> {
    assert_eq!(message.field, TRAILERS);
    texts(&HttpTrailers::decode(&message.payload[..]).expect("an encoded payload").headers)
}

/// Fields as text.
pub(crate) fn texts(headers: &[Header]) -> Vec<(String, String)> {
    headers
        .iter()
        .map(|header| {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            (text(&header.name), text(&header.value))
        })
        .collect()
}

/// Fields as text, to compare with.
pub(crate) fn pairs(fields: &[(&str, &str)]) -> Vec<(String, String)> {
    fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}
