//! The HTTP plugin on a fake host: the test plays client, peer and service.

mod alpn;
mod h2;
mod library;
mod path;
mod policy;
mod relay;
mod sidecar;
mod wire;

use sidelane_http::Http;
use sidelane_testkit::{Kit, TestMeta, TestStream};

fn kit() -> Kit {
    kit_with(&serde_json::json!({}))
}

fn kit_with(config: &serde_json::Value) -> Kit {
    Kit::new::<Http>(config).expect("a valid configuration")
}

fn meta() -> TestMeta {
    TestMeta { scheme: "http".to_owned(), ..TestMeta::default() }
}

/// Reads a head, to the empty line.
async fn read_head(stream: &mut TestStream) -> String {
    String::from_utf8_lossy(&stream.read_until(b"\r\n\r\n").await).into_owned()
}

/// The values of a field in a head, in order.
fn values<'a>(head: &'a str, name: &str) -> Vec<&'a str> {
    head.lines()
        .filter_map(|line| line.split_once(": "))
        .filter(|(candidate, _)| *candidate == name)
        .map(|(_, value)| value)
        .collect()
}
