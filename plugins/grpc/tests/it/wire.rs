//! The payloads, as prost writes and reads them.

use prost::Message;
use sidelane_testkit::{Peer, PeerMessage};

pub(crate) const REQUEST: u32 = 13;
pub(crate) const RESPONSE: u32 = 14;
pub(crate) const REQUEST_BATCH: u32 = 15;
pub(crate) const RESPONSE_BATCH: u32 = 16;
pub(crate) const HTTP_BODY: u32 = 19;
pub(crate) const HTTP_TRAILERS: u32 = 20;

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Header {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) name: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct GrpcRequest {
    #[prost(string, tag = "2")]
    pub(crate) service: String,
    #[prost(string, tag = "3")]
    pub(crate) method: String,
    #[prost(bytes = "vec", tag = "4")]
    pub(crate) body: Vec<u8>,
    #[prost(bool, tag = "5")]
    pub(crate) first: bool,
    #[prost(bool, tag = "6")]
    pub(crate) last: bool,
    #[prost(uint32, tag = "7")]
    pub(crate) sequence: u32,
    #[prost(bool, tag = "8")]
    pub(crate) partial: bool,
    #[prost(string, tag = "9")]
    pub(crate) authority: String,
    #[prost(string, tag = "10")]
    pub(crate) path: String,
    #[prost(message, repeated, tag = "11")]
    pub(crate) metadata: Vec<Header>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct GrpcResponse {
    #[prost(int32, tag = "2")]
    pub(crate) status_code: i32,
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) body: Vec<u8>,
    #[prost(bool, tag = "4")]
    pub(crate) first: bool,
    #[prost(bool, tag = "5")]
    pub(crate) last: bool,
    #[prost(uint32, tag = "6")]
    pub(crate) sequence: u32,
    #[prost(bool, tag = "8")]
    pub(crate) partial: bool,
    #[prost(message, repeated, tag = "11")]
    pub(crate) metadata: Vec<Header>,
    #[prost(message, repeated, tag = "12")]
    pub(crate) trailers: Vec<Header>,
    #[prost(uint32, tag = "13")]
    pub(crate) http_status: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Batch {
    #[prost(uint32, tag = "1")]
    pub(crate) sequence: u32,
    #[prost(uint32, tag = "2")]
    pub(crate) count: u32,
    #[prost(bytes = "vec", tag = "15")]
    pub(crate) messages: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct HttpBody {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) data: Vec<u8>,
}

impl GrpcRequest {
    /// The first chunk of a call.
    pub(crate) fn call(body: &[u8]) -> Self {
        Self {
            service: "t.Echo".to_owned(),
            method: "Call".to_owned(),
            authority: "test.localhost:9080".to_owned(),
            metadata: headers(&[("content-type", "application/grpc"), ("te", "trailers")]),
            first: true,
            body: body.to_vec(),
            ..Self::default()
        }
    }

    pub(crate) fn chunk(sequence: u32, body: &[u8]) -> Self {
        Self { sequence, body: body.to_vec(), ..Self::default() }
    }

    pub(crate) fn last(mut self) -> Self {
        self.last = true;
        self
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.metadata.extend(headers(&[(name, value)]));
        self
    }

    pub(crate) fn send(&self, peer: &Peer) {
        peer.send(REQUEST, self.encode_to_vec(), self.last);
    }
}

impl GrpcResponse {
    /// The first chunk of an answer.
    pub(crate) fn answer(body: &[u8]) -> Self {
        Self {
            metadata: headers(&[("content-type", "application/grpc")]),
            first: true,
            body: body.to_vec(),
            ..Self::default()
        }
    }

    pub(crate) fn chunk(sequence: u32, body: &[u8]) -> Self {
        Self { sequence, body: body.to_vec(), ..Self::default() }
    }

    pub(crate) fn partial(mut self) -> Self {
        self.partial = true;
        self
    }

    pub(crate) fn last(mut self, trailers: &[(&str, &str)]) -> Self {
        self.last = true;
        self.trailers = headers(trailers);
        self
    }

    pub(crate) fn send(&self, peer: &Peer) {
        peer.send(RESPONSE, self.encode_to_vec(), self.last);
    }
}

pub(crate) fn headers(fields: &[(&str, &str)]) -> Vec<Header> {
    fields
        .iter()
        .map(|(name, value)| Header { name: (*name).into(), value: (*value).into() })
        .collect()
}

pub(crate) fn send_batch(peer: &Peer, field: u32, sequence: u32, count: u32, messages: &[u8]) {
    let batch = Batch { sequence, count, messages: messages.to_vec() };
    peer.send(field, batch.encode_to_vec(), false);
}

pub(crate) fn read_request(message: &PeerMessage) -> GrpcRequest {
    assert_eq!(message.field, REQUEST);
    let request = GrpcRequest::decode(&message.payload[..]).expect("an encoded payload");
    assert_eq!(request.last, message.end);
    request
}

pub(crate) fn read_response(message: &PeerMessage) -> GrpcResponse {
    assert_eq!(message.field, RESPONSE);
    let response = GrpcResponse::decode(&message.payload[..]).expect("an encoded payload");
    assert_eq!(response.last, message.end);
    response
}

pub(crate) fn read_batch(message: &PeerMessage, field: u32) -> Batch {
    assert_eq!((message.field, message.end), (field, false));
    Batch::decode(&message.payload[..]).expect("an encoded payload")
}

/// The values of a field, in order.
pub(crate) fn values(headers: &[Header], name: &str) -> Vec<Vec<u8>> {
    let named = headers.iter().filter(|header| header.name == name.as_bytes());
    named.map(|header| header.value.clone()).collect()
}
