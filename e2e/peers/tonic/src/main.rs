//! A gRPC client and a service by tonic, without generated code: messages are bytes, methods of
//! `e2e.Peer` do what `e2e/clients/grpc_server.py` says of them.
//!
//! Usage: `sidelane-e2e-tonic serve`, which prints `{"port": …}` and, once its input ends, which calls
//! were cancelled; or `sidelane-e2e-tonic CASE HOST PORT`, which prints what it saw as one JSON object,
//! as `e2e/clients/grpc_client.py` does, and asserts nothing itself. `to-grpc HOST PORT` and `to-tcp HOST
//! PORT` carry a lane's bytes over gRPC to and from a relay (`bridge`).
#![allow(clippy::print_stdout, reason = "the test that starts it reads its output")]

mod bridge;
mod client;
mod codec;
mod server;

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};
use tonic::metadata::{KeyAndValueRef, MetadataMap};

/// An end for what hangs.
const LIFE: Duration = Duration::from_secs(110);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let seen = match arguments.as_slice() {
        ["to-grpc", host, port] => {
            let relay = format!("{host}:{port}");
            tokio::time::timeout(LIFE, bridge::to_grpc(&relay)).await??
        }
        ["to-tcp", host, port] => {
            let relay = format!("{host}:{port}");
            tokio::time::timeout(LIFE, bridge::to_tcp(&relay)).await??
        }
        ["serve"] => tokio::time::timeout(LIFE, server::serve()).await??,
        [case, host, port] => {
            tokio::time::timeout(LIFE, client::run(case, &format!("{host}:{port}"))).await??
        }
        _ => bail!(
            "usage: sidelane-e2e-tonic serve | to-grpc HOST PORT | to-tcp HOST PORT | CASE HOST PORT"
        ),
    };
    println!("{seen}");
    // Calls that a case left in mid-air end with the process.
    std::process::exit(0);
}

/// Values by name, in order; binary ones in hexadecimal digits.
fn shown(metadata: &MetadataMap) -> Result<Value> {
    let mut seen = Map::new();
    for entry in metadata.iter() {
        let (name, value) = match entry {
            KeyAndValueRef::Ascii(name, value) => {
                (name.as_str(), value.to_str().context("a value that is no text")?.to_owned())
            }
            KeyAndValueRef::Binary(name, value) => {
                (name.as_str(), hexadecimal(&value.to_bytes().context("not base64")?))
            }
        };
        let values = seen.entry(name).or_insert_with(|| Value::Array(Vec::new()));
        values.as_array_mut().context("an array")?.push(Value::String(value));
    }
    Ok(Value::Object(seen))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
