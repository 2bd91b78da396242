//! Where things are in the workspace, and the cargo calls that build them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// What the program needs at run time: itself, and the plugins that it loads.
pub(crate) const PROGRAM_PACKAGES: &[&str] =
    &["sidelane", "sidelane-http-plugin", "sidelane-websocket-plugin", "sidelane-grpc-plugin"];
/// The small service that `cargo demo` shows.
pub(crate) const DEMO_PACKAGE: &str = "sidelane-demo-service";

/// The head-to-head's own load and services.
const LOAD_PACKAGE: &str = "sidelane-bench-load";

/// What measures sessions.
const MEASURE_PACKAGE: &str = "sidelane-e2e";

/// Returns the workspace's root.
pub(crate) fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().expect("xtask stands in the workspace's root").to_path_buf()
}

/// Returns cargo's target directory.
pub(crate) fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(path) => root().join(path),
        None => root().join("target"),
    }
}

/// Returns a call of the cargo that runs this task, in the workspace's root.
pub(crate) fn cargo() -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(program);
    command.current_dir(root());
    command
}

/// Builds the packages in a profile (`dev`, `release`).
pub(crate) fn build(profile: &str, packages: &[&str]) -> Result<()> {
    let mut command = cargo();
    command.args(["build", "--profile", profile]);
    for package in packages {
        command.args(["--package", package]);
    }
    run(&mut command)
}

/// Runs a command to its end; its failure is an error that names it.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let text = format!("{command:?}");
    let status = command.status().with_context(|| format!("cannot start {text}"))?;
    if !status.success() {
        bail!("{text}: {status}");
    }
    Ok(())
}

/// Returns whether a program is on the path.
pub(crate) fn has_program(name: &str) -> bool {
    let Some(path) = std::env::var_os("PATH") else { return false };
    std::env::split_paths(&path).any(|directory| directory.join(name).is_file())
}

/// Reloads of a soak where its caller says no number.
const SOAK_RELOADS: u64 = 1000;

/// Reloads a release build under load, as often as the first argument says.
pub(crate) fn soak(arguments: &[String]) -> Result<()> {
    let reloads = match arguments {
        [] => SOAK_RELOADS,
        [count] => count.parse().with_context(|| format!("{count} is no number of reloads"))?,
        _ => bail!("one argument at most: the number of reloads"),
    };
    build("release", PROGRAM_PACKAGES)?;
    let mut command = cargo();
    command
        .args(["test", "--quiet", "--package", "sidelane-e2e", "--test", "it", "--"])
        .args(["--exact", "--nocapture", "reload_soak::reloads_under_load_lose_and_leak_nothing"])
        .env("SIDELANE_BUILD_DIR", target().join("release"))
        .env("SIDELANE_SOAK_RELOADS", reloads.to_string());
    run(&mut command)
}

/// Measures sessions on a release build.
pub(crate) fn measure(arguments: &[String]) -> Result<()> {
    let mut packages = PROGRAM_PACKAGES.to_vec();
    packages.push(MEASURE_PACKAGE);
    build("release", &packages)?;
    let release = target().join("release");
    let mut command = Command::new(release.join("sidelane-measure"));
    command.current_dir(root()).args(arguments).env("SIDELANE_BUILD_DIR", release);
    run(&mut command)
}

/// Runs the head-to-head of bench/ on a release build.
pub(crate) fn bench(arguments: &[String]) -> Result<()> {
    let mut packages = PROGRAM_PACKAGES.to_vec();
    packages.push(LOAD_PACKAGE);
    build("release", &packages)?;
    let mut command = Command::new("python3");
    command
        .current_dir(root())
        .arg("bench/run.py")
        .arg("--program-directory")
        .arg(target().join("release"))
        .args(arguments);
    run(&mut command)
}
