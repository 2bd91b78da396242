//! Every plugin library of the repository through the contract suite; the examples also through a
//! conversation.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use sidelane_plugin::failure;
use sidelane_testkit::{Kit, Outcome, TestMeta, TestService, contract};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// Builds a plugin's package with the cargo and into the target directory of this test, where most of it
/// stands already: cargo holds no lock while tests run.
fn build(package: &str, library: &str) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("target/tmp has a parent");
    let output = Command::new(env!("CARGO"))
        .args(["build", "--package", package, "--message-format=json", "--manifest-path"])
        .arg(Path::new(ROOT).join("Cargo.toml"))
        .arg("--target-dir")
        .arg(target)
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let libraries: Vec<PathBuf> = String::from_utf8(output.stdout)
        .expect("cargo writes UTF-8")
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == library)
        .filter(|message| message["target"]["crate_types"][0] == "cdylib")
        .filter_map(|message| message["filenames"][0].as_str().map(PathBuf::from))
        .collect();
    libraries.into_iter().next().expect("cargo names the library it made")
}

fn compile(source: &Path, library: &str, flags: &[&str]) -> PathBuf {
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(library);
    let output = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O1", "-g", "-fPIC"])
        .args(["-fvisibility=hidden", "-fno-sanitize=all", "-shared", "-I"])
        .arg(Path::new(ROOT).join("sdk/include"))
        .args(flags)
        .arg("-o")
        .arg(&library)
        .arg(source)
        .output()
        .expect("a C compiler (Rust links with it)");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
}

fn line_c(library: &str, flags: &[&str]) -> PathBuf {
    compile(&Path::new(ROOT).join("examples/plugins/line-c/line.c"), library, flags)
}

fn keeps_the_contract(path: &Path) {
    if let Err(broken) = contract::run(path) {
        panic!("{} breaks the contract:\n  {}", path.display(), broken.join("\n  "));
    }
}

fn check(path: &Path) {
    keeps_the_contract(path);
    converse(path);
}

/// Both ends, bytes both ways, half-close, under backpressure.
fn converse(path: &Path) {
    let load = || Kit::load(path, &json!(null)).expect("accepts an absent block");
    let (relay, sidecar) = (load(), load());
    let large: Vec<u8> = (0..300_000u32).map(|i| i.to_le_bytes()[1]).collect();

    let mut call = relay.accept();
    relay.block_on(async {
        call.client.write(b"hello\n").await;
        assert_eq!(&call.peer.message().await.payload[..], b"hello\n");
        call.client.shutdown().await;
        assert_eq!(call.peer.payload_to_end().await, b"");
        for chunk in large.chunks(30_000) {
            call.peer.send(sidelane_plugin::FIELD_CUSTOM, chunk.to_vec(), false);
        }
        call.peer.finish();
        assert!(call.client.read_to_end().await == large);
        assert_eq!(call.running.outcome().await, Outcome::Ended(failure::NONE));
    });

    let service = TestService::default();
    let call = sidecar.deliver(&TestMeta::default(), &service);
    sidecar.block_on(async {
        let mut stream = service.accept().await;
        assert!(!call.peer.was_dispatched());
        call.peer.send(sidelane_plugin::FIELD_CUSTOM, &b"hello\n"[..], true);
        assert_eq!(stream.read_to_end().await, b"hello\n");
        assert!(call.peer.was_dispatched());
        stream.write(&large[..60_000]).await;
        stream.shutdown().await;
        assert!(call.peer.payload_to_end().await == large[..60_000]);
        assert_eq!(call.running.outcome().await, Outcome::Ended(failure::NONE));
    });
}

#[test]
fn rust_example_keeps_the_contract() {
    check(&build("line-rust", "line_rust"));
}

#[test]
fn rust_example_moves_to_a_connection_of_its_own_where_its_route_says_so() {
    let path = build("line-rust", "line_rust");
    let kit = Kit::load(&path, &json!(null)).expect("accepts an absent block");
    kit.validate_route(&json!({"mode": "raw"})).unwrap();
    assert!(kit.validate_route(&json!({"mode": "row"})).is_err());
    let service = TestService::default();
    let meta = TestMeta { options: r#"{"mode":"raw"}"#.to_owned(), ..TestMeta::default() };
    let call = kit.deliver(&meta, &service);
    let mut other = call.peer.dedicated();
    kit.block_on(async {
        let mut stream = service.accept().await;
        other.write(b"hello").await;
        other.shutdown().await;
        assert_eq!(stream.read_to_end().await, b"hello");
        stream.write(b"goodbye").await;
        stream.shutdown().await;
        assert_eq!(other.read_to_end().await, b"goodbye");
        assert_eq!(call.running.outcome().await, Outcome::Ended(failure::NONE));
        assert_eq!(call.peer.waiting(), 0);
    });
    // Without a connection it is as without the option.
    let call = kit.deliver(&meta, &service);
    kit.block_on(async {
        let mut stream = service.accept().await;
        call.peer.send(sidelane_plugin::FIELD_CUSTOM, &b"hello"[..], true);
        assert_eq!(stream.read_to_end().await, b"hello");
        stream.shutdown().await;
        assert_eq!(call.peer.payload_to_end().await, b"");
        assert_eq!(call.running.outcome().await, Outcome::Ended(failure::NONE));
    });
}

#[test]
fn c_example_keeps_the_contract() {
    check(&line_c("libline_c.so", &[]));
}

#[test]
fn http_plugin_keeps_the_contract() {
    keeps_the_contract(&build("sidelane-http-plugin", "sidelane_http"));
}

#[test]
fn suite_notices_what_a_plugin_breaks() {
    for (flag, expected) in [
        // Never drops the opener.
        ("-Dhas_opener=has_nothing_of_the_kind", "opener: 1 never dropped"),
        ("-DSIDELANE_BORN_BYTES=9u", "born in no known way"),
        ("-DSIDELANE_PANIC_STRATEGY_NONE=2u", "panics abort"),
        ("-DSIDELANE_SNIFF_NO=7u", "sniff returned 7"),
    ] {
        // A define before the header's own would be a redefinition: this one comes behind it.
        let broken = Path::new(env!("CARGO_TARGET_TMPDIR")).join("broken.c");
        let (name, value) = flag.trim_start_matches("-D").split_once('=').unwrap();
        let source =
            std::fs::read_to_string(Path::new(ROOT).join("examples/plugins/line-c/line.c"))
                .unwrap();
        let include = "#include \"sidelane_plugin.h\"\n";
        let source = if name == "has_opener" {
            source.replace("join->opener.vt->drop(join->opener.data);", ";")
        } else {
            source.replace(include, &format!("{include}#undef {name}\n#define {name} {value}\n"))
        };
        std::fs::write(&broken, source).unwrap();
        let library = compile(&broken, &format!("libbroken_{name}.so"), &[]);
        let broken = contract::run(&library).expect_err(flag);
        assert!(broken.iter().any(|line| line.contains(expected)), "{flag}: {broken:?}");
    }
}

#[test]
fn what_is_no_plugin_is_refused() {
    let text = Path::new(env!("CARGO_TARGET_TMPDIR")).join("text.so");
    std::fs::write(&text, "not a library").unwrap();
    let broken = contract::run(&text).expect_err("a text file");
    assert!(broken[0].contains("text.so"), "{broken:?}");
}
