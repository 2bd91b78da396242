//! `libsidelane_grpc.so` itself, as a host loads it.

use std::path::{Path, PathBuf};
use std::process::Command;

use sidelane_testkit::{Kit, TestService, contract};

use crate::service::{Served, answer, body};
use crate::wire::{GrpcRequest, read_response};
use crate::{message, meta};

/// Builds the library into this test's target directory, where most of it stands already.
fn library() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("target/tmp has a parent");
    let output = Command::new(env!("CARGO"))
        .args(["build", "--package", "sidelane-grpc-plugin", "--message-format=json"])
        .args(["--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/export/Cargo.toml")])
        .arg("--target-dir")
        .arg(target)
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let artifact = String::from_utf8(output.stdout)
        .expect("cargo writes UTF-8")
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .find(|message| {
            message["target"]["name"] == "sidelane_grpc" && message["target"]["kind"][0] == "cdylib"
        })
        .expect("cargo names the library it made");
    PathBuf::from(artifact["filenames"][0].as_str().expect("a path"))
}

#[test]
fn the_library_keeps_the_plugin_contract_and_serves() {
    let path = library();
    assert_eq!(path.file_name().unwrap(), "libsidelane_grpc.so");
    if let Err(broken) = contract::run(&path) {
        panic!("{} breaks the contract:\n  {}", path.display(), broken.join("\n  "));
    }

    let (kit, service) =
        (Kit::load(&path, &serde_json::Value::Null).unwrap(), TestService::default());
    kit.block_on(async {
        let delivery = kit.deliver(&meta(), &service);
        GrpcRequest::call(&message(0, 3)).last().send(&delivery.peer);
        let mut served = Served::accept(&service).await;
        let (mut request, mut respond) = served.request().await;
        assert_eq!(served.drive(body(request.body_mut())).await, message(0, 3));
        answer(&mut respond, message(1, 4));
        let response = served.drive(delivery.peer.message()).await;
        assert_eq!(read_response(&response).body, message(1, 4));
        served.drive(delivery.running.outcome()).await;
    });
}
