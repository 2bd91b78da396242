//! Builds the libraries that tests load.

use std::fs::{DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The directory of the libraries: ours alone, in the target directory.
pub(super) fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let tests = std::env::current_exe().unwrap();
        let path = tests.parent().unwrap().join("plugin-libraries");
        // Another run of the same build may be using it: files in it are replaced by renaming.
        let _ = DirBuilder::new().mode(0o700).create(&path);
        std::fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
        path
    })
}

fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
}

/// Compiles `tests/fixtures/plugin.c` with the definitions; `name` is the file's.
pub(super) fn c_plugin(name: &str, definitions: &[&str]) -> PathBuf {
    c_library(name, &["-shared", "-fPIC"], definitions)
}

/// As [`c_plugin`], with the compiler's mode given.
pub(super) fn c_library(name: &str, mode: &[&str], definitions: &[&str]) -> PathBuf {
    let path = directory().join(name);
    let partial = directory().join(format!("{name}.{}", std::process::id()));
    run(Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror"])
        .args(mode)
        .arg("-I")
        .arg(source("../sdk/include"))
        .args(definitions.iter().map(|definition| format!("-D{definition}")))
        .arg("-o")
        .arg(&partial)
        .arg(source("tests/fixtures/plugin.c")));
    std::fs::rename(&partial, &path).unwrap();
    path
}

/// Writes a file beside the libraries.
pub(super) fn file(name: &str, content: &[u8]) -> PathBuf {
    let path = directory().join(name);
    let partial = directory().join(format!("{name}.{}", std::process::id()));
    std::fs::write(&partial, content).unwrap();
    std::fs::set_permissions(&partial, Permissions::from_mode(0o600)).unwrap();
    std::fs::rename(&partial, &path).unwrap();
    path
}

/// The byte-born probe.
pub(super) fn probe_bytes() -> &'static Path {
    &probes().0
}

/// The HTTP-born probe.
pub(super) fn probe_http() -> &'static Path {
    &probes().1
}

/// Builds the probes into the directory and profile of this test run: a plain `cargo test` does not
/// build the libraries of another package.
fn probes() -> &'static (PathBuf, PathBuf) {
    static PROBES: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();
    PROBES.get_or_init(|| {
        let tests = std::env::current_exe().unwrap();
        // <target>/<profile>/deps/<this>
        let built = tests.ancestors().nth(2).unwrap();
        let profile = built.file_name().unwrap().to_str().unwrap();
        run(Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--package", "sidelane-probe", "--lib", "--examples"])
            .args(["--profile", if profile == "debug" { "dev" } else { profile }])
            .arg("--target-dir")
            .arg(built.parent().unwrap())
            .arg("--manifest-path")
            .arg(source("../Cargo.toml")));
        let bytes = std::fs::read(built.join("libprobe_bytes.so")).unwrap();
        let http = std::fs::read(built.join("examples/libprobe_http.so")).unwrap();
        (file("probe_bytes.so", &bytes), file("probe_http.so", &http))
    })
}
