//! Holds the checked-in code against the schema, so that nobody needs protoc to build.
//!
//! `SIDELANE_BLESS=1 cargo test -p sidelane-tunnel` rewrites it.

use std::path::Path;

#[test]
fn generated_code_is_that_of_the_schema() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("src/gen/sidelane.tunnel.v1.rs");
    let expected = generate(root);
    if std::env::var_os("SIDELANE_BLESS").is_some() {
        std::fs::write(&path, &expected).expect("tunnel/src/gen is writable");
    }
    let found = std::fs::read_to_string(&path).expect("generated code is checked in");
    assert!(
        found == expected,
        "{} is stale; run SIDELANE_BLESS=1 cargo test -p sidelane-tunnel",
        path.display()
    );
}

fn generate(root: &Path) -> String {
    let files =
        protox::compile(["tunnel.proto"], [root.join("proto")]).expect("the schema compiles");
    let requests = files
        .file
        .into_iter()
        .map(|file| (prost_build::Module::from_protobuf_package_name(file.package()), file))
        .collect();
    let modules = prost_build::Config::new()
        .bytes(["."])
        // `masked.rs` shows them.
        .skip_debug([
            "Hello",
            "Welcome",
            "Resume",
            "Authenticate",
            "AnnouncedRoute",
            "RouteOptions",
        ])
        .generate(requests)
        .expect("code can be generated from a schema that compiles");
    assert_eq!(modules.len(), 1, "the schema has one package");
    modules.into_values().collect()
}
