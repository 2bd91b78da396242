//! `cargo test-all`: prepares what tests need beyond cargo, then runs all of them.
//!
//! A test whose tool is missing prints `SKIPPED <name>: <why>`; with `CI=true` it fails instead.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::workspace;

/// Programs that tests start, with the Debian package that brings each.
const PROGRAMS: &[(&str, &str)] = &[
    ("cc", "gcc"),
    ("c++", "g++"),
    ("chromium", "chromium"),
    ("curl", "curl"),
    ("make", "make"),
    ("nginx", "nginx"),
    ("node", "nodejs"),
    ("npm", "npm"),
    ("pebble", "pebble"),
    ("python3", "python3"),
];

/// What tests need beside programs: a file, and the Debian package that brings it. Where there is no
/// Debian it may be built in.
const FILES: &[(&str, &str)] =
    &[("/usr/lib/nginx/modules/ngx_stream_module.so", "libnginx-mod-stream")];

/// Runs every test of the workspace; `arguments` go to `cargo test`.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    install_missing_programs();
    let python = prepare_python();
    let node = prepare_node();

    // Tests load the plugins that stand beside the program, so both exist before the first starts.
    workspace::run(workspace::cargo().args(["build", "--workspace"]))?;

    let mut command = workspace::cargo();
    command.args(["test", "--workspace"]).args(arguments);
    command.env("SIDELANE_BUILD_DIR", workspace::target().join("debug"));
    match python {
        Ok(python) => {
            command.env("SIDELANE_PYTHON", python);
        }
        Err(error) => eprintln!("SKIPPED preparation of the Python clients: {error:#}"),
    }
    match node {
        Ok(node) => {
            command.env("SIDELANE_NODE", node);
        }
        Err(error) => eprintln!("SKIPPED preparation of the Node.js clients: {error:#}"),
    }
    workspace::run(&mut command)
}

/// Installs what is missing, where that can be done without asking: as root, by apt-get.
fn install_missing_programs() {
    let missing: Vec<_> =
        PROGRAMS.iter().filter(|(program, _)| !workspace::has_program(program)).collect();
    let files: Vec<_> = FILES.iter().filter(|(file, _)| !Path::new(file).exists()).collect();
    if missing.is_empty() && files.is_empty() {
        return;
    }
    let names = missing.iter().map(|(program, _)| *program);
    let names: Vec<_> = names.chain(files.iter().map(|(_, package)| *package)).collect();
    if !workspace::has_program("apt-get") || !is_root() {
        eprintln!("not installed: {}; tests that need them are skipped", names.join(", "));
        return;
    }
    println!("installing {}", names.join(", "));
    let packages = missing.iter().chain(&files).map(|(_, package)| *package);
    let outcome = apt_get(&["update", "-qq"]).and_then(|()| {
        let mut arguments = vec!["install", "-y", "-qq", "--no-install-recommends"];
        arguments.extend(packages);
        apt_get(&arguments)
    });
    if let Err(error) = outcome {
        eprintln!("cannot install {}: {error:#}", names.join(", "));
    }
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    workspace::run(Command::new("apt-get").args(arguments).env("DEBIAN_FRONTEND", "noninteractive"))
}

fn is_root() -> bool {
    let output = Command::new("id").arg("-u").output();
    output.is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

/// Makes a virtual environment under the target directory, with the pinned packages of
/// e2e/clients/requirements.txt; one that stands is used again as long as they are the same.
fn prepare_python() -> Result<PathBuf> {
    let requirements = workspace::root().join("e2e/clients/requirements.txt");
    let wanted = fs::read(&requirements)
        .with_context(|| format!("cannot read {}", requirements.display()))?;
    let venv = workspace::target().join("e2e-venv");
    let python = venv.join("bin/python3");
    let stamp = venv.join("requirements.installed");
    if python.exists() && fs::read(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(python);
    }
    println!("preparing a Python environment in {}", venv.display());
    if let Err(error) = make_venv(&venv, &python) {
        // Debian ships Python without ensurepip.
        if !workspace::has_program("apt-get") || !is_root() {
            return Err(error).context("python3 -m venv failed (on Debian: package python3-venv)");
        }
        apt_get(&["update", "-qq"])?;
        apt_get(&["install", "-y", "-qq", "--no-install-recommends", "python3-venv"])?;
        make_venv(&venv, &python)?;
    }
    workspace::run(
        Command::new(&python)
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
            .arg("--requirement")
            .arg(&requirements),
    )?;
    fs::write(&stamp, &wanted).with_context(|| format!("cannot write {}", stamp.display()))?;
    Ok(python)
}

/// Copies e2e/clients/node to the target directory, and installs the packages of its lockfile there;
/// what is installed is used again as long as the lockfile is the same.
fn prepare_node() -> Result<PathBuf> {
    let source = workspace::root().join("e2e/clients/node");
    let directory = workspace::target().join("e2e-node");
    let stamp = directory.join("installed");
    let lock = fs::read(source.join("package-lock.json"))
        .with_context(|| format!("cannot read {}", source.display()))?;
    let installed = fs::read(&stamp).is_ok_and(|installed| installed == lock);
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    for entry in fs::read_dir(&source)? {
        let path = entry?.path();
        let name = path.file_name().expect("an entry of a directory has a name");
        fs::copy(&path, directory.join(name))
            .with_context(|| format!("cannot copy {}", path.display()))?;
    }
    if installed {
        return Ok(directory);
    }
    println!("preparing Node.js packages in {}", directory.display());
    workspace::run(
        Command::new("npm")
            .args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"])
            .current_dir(&directory),
    )?;
    fs::write(&stamp, &lock).with_context(|| format!("cannot write {}", stamp.display()))?;
    Ok(directory)
}

fn make_venv(venv: &Path, python: &Path) -> Result<()> {
    if venv.exists() {
        fs::remove_dir_all(venv).with_context(|| format!("cannot remove {}", venv.display()))?;
    }
    workspace::run(Command::new("python3").args(["-m", "venv"]).arg(venv))?;
    if !python.exists() {
        bail!("python3 -m venv made no {}", python.display());
    }
    Ok(())
}
