//! The gRPC plugin on a fake host: the test plays client, peer and service.
#![allow(clippy::unwrap_used, reason = "what tests share fails as tests do")]

mod library;
mod path;
mod policy;
mod relay;
mod service;
mod sidecar;
mod split;
mod splitting;
mod wire;

use sidelane_grpc::Grpc;
use sidelane_testkit::{Kit, TestMeta, TestRequest};

fn kit() -> Kit {
    kit_with(&serde_json::json!({}))
}

fn kit_with(config: &serde_json::Value) -> Kit {
    Kit::new::<Grpc>(config).expect("a valid configuration")
}

fn meta() -> TestMeta {
    TestMeta { scheme: "http".to_owned(), ..TestMeta::default() }
}

/// A call of `/t.Echo/Call`, whose body is still to come.
fn call() -> TestRequest {
    TestRequest::new("POST", "/t.Echo/Call")
        .version(20)
        .with_body(None)
        .header("content-type", "application/grpc+proto")
        .header("te", "trailers")
}

/// A message of `size` bytes that differ from those of other seeds, behind its prefix.
fn message(seed: usize, size: usize) -> Vec<u8> {
    let len = u32::try_from(size).expect("a message");
    let bytes = (0..size).map(|i| u8::try_from((seed * 31 + i * 7) % 251).expect("a byte"));
    [0].into_iter().chain(len.to_be_bytes()).chain(bytes).collect()
}
