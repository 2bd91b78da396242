//! What the program refuses to start with, and what it says then.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use sidelane_e2e::process::{Setup, library, program};

fn setup() -> Setup {
    Setup::of(([127, 0, 0, 1], 9).into())
}

/// Runs a command of the program on a file of this text, to its end.
fn run(command: &str, yaml: &str) -> Output {
    let directory = tempfile::tempdir().expect("a temporary directory");
    fs::write(directory.path().join("sidecar.yaml"), yaml).expect("the directory is ours");
    Command::new(program())
        .current_dir(directory.path())
        .args([command, "sidecar.yaml"])
        .output()
        .expect("the program starts")
}

fn text(output: &Output) -> String {
    let bytes = [output.stdout.as_slice(), &output.stderr].concat();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Copies the HTTP plugin's library, changed.
fn changed_library(directory: &Path, change: impl FnOnce(&mut Vec<u8>)) -> std::path::PathBuf {
    let mut bytes = fs::read(library()).expect("the library is built");
    change(&mut bytes);
    let path = directory.join("changed.so");
    fs::write(&path, bytes).expect("the directory is ours");
    path
}

#[test]
fn check_accepts_a_good_file() {
    let output = run("check", &setup().both());
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn check_names_the_place_of_each_fault() {
    let yaml = setup().both().replace("subdomain: api", "subdomian: api");
    let line = yaml.lines().position(|line| line.contains("subdomian")).unwrap() + 1;
    for command in ["check", "run"] {
        let output = run(command, &yaml);
        assert!(!output.status.success());
        let text = text(&output);
        assert!(text.contains(&format!("sidecar.yaml:{line}:")), "{command}: {text}");
        assert!(text.contains("subdomain"), "{command}: a suggestion in {text}");
    }
}

#[test]
fn missing_file_is_named() {
    let output =
        Command::new(program()).args(["run", "/nonexistent/sidecar.yaml"]).output().unwrap();
    assert!(!output.status.success());
    assert!(text(&output).contains("/nonexistent/sidecar.yaml"), "{}", text(&output));
}

#[test]
fn tunnel_beyond_loopback_needs_a_token() {
    let yaml = setup()
        .both()
        .replace("tunnel: { address: \"127.0.0.1:0\"", "tunnel: { address: \"0.0.0.0:0\"");
    let output = run("check", &yaml);
    assert!(!output.status.success());
    assert!(text(&output).contains("token"), "{}", text(&output));
}

#[test]
fn library_that_is_none_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let text_file = directory.path().join("text.so");
    fs::write(&text_file, "not a library\n").unwrap();
    let truncated = changed_library(directory.path(), |bytes| bytes.truncate(bytes.len() / 2));
    for (name, path, says) in [
        ("missing", directory.path().join("nothing.so"), "nothing.so"),
        ("text", text_file, "text.so"),
        ("truncated", truncated, "changed.so"),
    ] {
        let mut setup = setup();
        setup.library = path;
        for command in ["check", "run"] {
            let output = run(command, &setup.both());
            assert!(!output.status.success(), "{name} {command}: {}", text(&output));
            assert!(text(&output).contains(says), "{name} {command}: {}", text(&output));
        }
    }
}

#[test]
fn library_of_another_abi_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = changed_library(directory.path(), |bytes| {
        let magic = b"sidelane-plugin\0";
        // Behind magic and size, both little-endian u32: the ABI's major version. The host-side
        // constant may stand in the library, too; the stamp is the one with a plausible size.
        let mut changed = 0;
        for at in 0..bytes.len().saturating_sub(magic.len() + 8) {
            let size = u32::from_le_bytes([
                bytes[at + 16],
                bytes[at + 17],
                bytes[at + 18],
                bytes[at + 19],
            ]);
            if bytes[at..].starts_with(magic) && (200..=400).contains(&size) {
                bytes[at + 20] = 77;
                changed += 1;
            }
        }
        assert_eq!(changed, 1, "the stamp stands once in the library");
    });
    let mut setup = setup();
    setup.library = path;
    let output = run("check", &setup.both());
    assert!(!output.status.success());
    assert!(text(&output).contains("77"), "{}", text(&output));
}

#[test]
fn plugin_refuses_its_own_block_with_a_place() {
    let mut setup = setup();
    setup.http_config = "{ idle_timout: 5s }".to_owned();
    let output = run("check", &setup.both());
    assert!(!output.status.success());
    let text = text(&output);
    assert!(text.contains("idle_timout"), "{text}");
    assert!(text.contains("sidecar.yaml:"), "{text}");
}

#[test]
fn version_and_help_are_told() {
    let output = Command::new(program()).arg("--version").output().unwrap();
    assert!(text(&output).starts_with("sidelane "), "{}", text(&output));
    let output = Command::new(program()).arg("--help").output().unwrap();
    for word in ["run", "check"] {
        assert!(text(&output).contains(word), "{}", text(&output));
    }
}

#[test]
fn all_that_is_wrong_is_told_at_once() {
    let mut setup = setup();
    setup.http_config = "{ idle_timout: 5s }".to_owned();
    let yaml = setup
        .both()
        .replace("relay:", "relay:\n  threads: many")
        .replace("level: debug", "level: \"${NOT_SET_ANYWHERE}\"");
    for command in ["check", "run"] {
        let text = text(&run(command, &yaml));
        let place = |what: &str| {
            text.find(what).unwrap_or_else(|| panic!("{command}: {what} is told: {text}"))
        };
        // The file's own faults, what a plugin refuses, and what the environment lacks.
        let places = [
            place("relay.threads: \"many\" is not accepted"),
            place("idle_timout"),
            place("NOT_SET_ANYWHERE is not set"),
        ];
        assert_eq!(text.matches("sidecar.yaml:").count(), places.len(), "{command}: {text}");
    }
}

#[test]
fn a_directory_of_plugins_that_is_missing_is_told_once() {
    let yaml = "version: 1\nrelay: {}\nplugins:\n  directory: nowhere\n  libraries:\n    - { name: a, \
                library: a.so }\n    - { name: b, library: b.so }\n";
    let text = text(&run("check", yaml));
    assert!(text.contains("sidecar.yaml:4:14: plugins.directory: no such directory: /"), "{text}");
    assert_eq!(text.matches("no such").count(), 1, "{text}");
}

#[test]
fn check_takes_a_directory_of_files() {
    let directory = tempfile::tempdir().unwrap();
    let both = setup().both();
    let (base, routes) = both.split_once("routes:").expect("the setup has routes");
    let check = |routes: &str| {
        fs::write(directory.path().join("10-base.yaml"), base).unwrap();
        fs::write(directory.path().join("20-routes.yaml"), routes).unwrap();
        Command::new(program()).arg("check").arg(directory.path()).output().unwrap()
    };
    let output = check(&format!("routes:{routes}"));
    assert!(output.status.success(), "{}", text(&output));
    let output = check("routes: [{ subdomain: a, tunnel: nowhere }]\n");
    assert!(!output.status.success());
    assert!(text(&output).contains("20-routes.yaml:1:34: routes[0].tunnel"), "{}", text(&output));
}
