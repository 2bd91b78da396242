//! The payloads, as prost writes and reads them.

use prost::Message;
use sidelane_testkit::{Peer, PeerMessage};

pub(crate) const REQUEST: u32 = 9;
pub(crate) const RESPONSE: u32 = 10;
pub(crate) const FRAME: u32 = 11;
pub(crate) const BATCH: u32 = 12;
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
pub(crate) struct WebSocketRequest {
    #[prost(string, tag = "1")]
    pub(crate) url: String,
    #[prost(string, tag = "2")]
    pub(crate) host: String,
    #[prost(message, repeated, tag = "3")]
    pub(crate) headers: Vec<Header>,
    #[prost(string, tag = "4")]
    pub(crate) subprotocol: String,
    #[prost(uint32, tag = "5")]
    pub(crate) version: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct WebSocketResponse {
    #[prost(int32, tag = "1")]
    pub(crate) status_code: i32,
    #[prost(message, repeated, tag = "2")]
    pub(crate) headers: Vec<Header>,
    #[prost(string, tag = "3")]
    pub(crate) subprotocol: String,
    #[prost(bool, tag = "4")]
    pub(crate) accepted: bool,
    #[prost(uint64, tag = "5")]
    pub(crate) content_length: u64,
    #[prost(bytes = "vec", tag = "15")]
    pub(crate) body: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct WebSocketFrame {
    #[prost(bool, tag = "2")]
    pub(crate) fin: bool,
    #[prost(uint32, tag = "3")]
    pub(crate) opcode: u32,
    #[prost(bool, tag = "4")]
    pub(crate) masked: bool,
    #[prost(bytes = "vec", tag = "5")]
    pub(crate) payload: Vec<u8>,
    #[prost(int32, tag = "6")]
    pub(crate) frame_direction: i32,
    #[prost(uint32, tag = "7")]
    pub(crate) reserved: u32,
    #[prost(fixed32, tag = "8")]
    pub(crate) masking_key: u32,
    #[prost(uint64, tag = "9")]
    pub(crate) length: u64,
    #[prost(uint64, tag = "10")]
    pub(crate) offset: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct WebSocketBatch {
    #[prost(message, repeated, tag = "1")]
    pub(crate) frames: Vec<WebSocketFrame>,
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

pub(crate) fn header(name: &str, value: &str) -> Header {
    Header { name: name.as_bytes().to_vec(), value: value.as_bytes().to_vec() }
}

impl WebSocketRequest {
    pub(crate) fn new(url: &str) -> Self {
        Self { url: url.to_owned(), host: "test.localhost:9080".to_owned(), ..Self::default() }
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push(header(name, value));
        self
    }

    pub(crate) fn send(&self, peer: &Peer) {
        peer.send(REQUEST, self.encode_to_vec(), false);
    }
}

/// An acceptance.
pub(crate) fn accepted(headers: &[(&str, &str)], subprotocol: &str) -> WebSocketResponse {
    WebSocketResponse {
        status_code: 101,
        headers: headers.iter().map(|(name, value)| header(name, value)).collect(),
        subprotocol: subprotocol.to_owned(),
        accepted: true,
        ..WebSocketResponse::default()
    }
}

pub(crate) fn send_response(peer: &Peer, response: &WebSocketResponse, end: bool) {
    peer.send(RESPONSE, response.encode_to_vec(), end);
}

pub(crate) fn send_frame(peer: &Peer, frame: &WebSocketFrame) {
    peer.send(FRAME, frame.encode_to_vec(), false);
}

pub(crate) fn read_request(message: &PeerMessage) -> WebSocketRequest {
    assert_eq!(message.field, REQUEST);
    WebSocketRequest::decode(&message.payload[..]).expect("an encoded payload")
}

pub(crate) fn read_response(message: &PeerMessage) -> WebSocketResponse {
    assert_eq!(message.field, RESPONSE);
    WebSocketResponse::decode(&message.payload[..]).expect("an encoded payload")
}

/// The frames of a frame's or a batch's message.
pub(crate) fn read_frames(message: &PeerMessage) -> Vec<WebSocketFrame> {
    match message.field {
        FRAME => vec![WebSocketFrame::decode(&message.payload[..]).expect("an encoded payload")],
        BATCH => WebSocketBatch::decode(&message.payload[..]).expect("an encoded payload").frames,
        other => panic!("field {other} has no frames"),
    }
}

/// Fields as text.
pub(crate) fn texts(headers: &[Header]) -> Vec<(String, String)> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    headers.iter().map(|header| (text(&header.name), text(&header.value))).collect()
}

/// Fields as text, to compare with.
pub(crate) fn pairs(fields: &[(&str, &str)]) -> Vec<(String, String)> {
    fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}
