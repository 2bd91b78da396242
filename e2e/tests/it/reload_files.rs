//! How files are replaced: by a kubelet, by editors, by copying, and where it cannot be seen.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use sidelane_e2e::client::request;
use sidelane_e2e::process::{Route, Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::wait;

/// How soon an edit must show by events: well below the 10 s at which contents are compared.
const EDIT_DEADLINE: Duration = Duration::from_secs(5);

/// The file with one route, of this subdomain.
fn yaml(setup: &Setup, subdomain: &str) -> String {
    let mut setup = setup.clone();
    setup.routes = vec![Route::new(subdomain, "api")];
    setup.both()
}

fn answers(sidelane: &Sidelane, subdomain: &str) -> bool {
    let text = format!("GET / HTTP/1.1\r\nHost: {subdomain}.localhost\r\n\r\n");
    request(sidelane.web(), "GET", text).head.status == 200
}

#[track_caller]
fn shows(sidelane: &Sidelane, subdomain: &str) {
    wait::within(EDIT_DEADLINE, subdomain, || answers(sidelane, subdomain).then_some(()));
}

/// Writes a version as a kubelet does: a directory of its own with all files, and `..data` turned to
/// it by a rename; then the directory before is removed.
fn publish(directory: &Path, version: &str, yaml: &str) {
    let before = fs::read_link(directory.join("..data")).ok();
    let fresh = format!("..2026_01_01_00_00_00.{version}");
    let published = fs::create_dir(directory.join(&fresh))
        .and_then(|()| fs::write(directory.join(&fresh).join("sidecar.yaml"), yaml))
        .and_then(|()| symlink(&fresh, directory.join("..data_tmp")))
        .and_then(|()| fs::rename(directory.join("..data_tmp"), directory.join("..data")))
        .and_then(|()| before.map_or(Ok(()), |before| fs::remove_dir_all(directory.join(before))));
    published.expect("the directory is ours");
}

#[test]
fn kubelet_replaces_the_volume_twice_in_a_row() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let directory = tempfile::tempdir().unwrap();
    let volume = directory.path().join("config");
    fs::create_dir(&volume).unwrap();
    publish(&volume, "1", &yaml(&setup, "one"));
    symlink("..data/sidecar.yaml", volume.join("sidecar.yaml")).unwrap();
    let sidelane = Sidelane::spawn_in("sidelane", directory, "config/sidecar.yaml");
    sidelane.until_ready();
    assert!(answers(&sidelane, "one"));
    for (version, subdomain) in [("2", "two"), ("3", "three")] {
        publish(&volume, version, &yaml(&setup, subdomain));
        shows(&sidelane, subdomain);
    }
    assert!(!answers(&sidelane, "one") && !answers(&sidelane, "two"));
    // Faster than anybody reads: the last counts.
    for (version, subdomain) in [("4", "four"), ("5", "five"), ("6", "six")] {
        publish(&volume, version, &yaml(&setup, subdomain));
    }
    shows(&sidelane, "six");
    assert_eq!(
        sidelane.metric("sidelane_config_reloads_total", &["result=\"failure\""]),
        Some(0.0)
    );
}

#[test]
fn editors_and_copies_are_seen_whatever_way_they_write() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let sidelane = Sidelane::start("sidelane", &yaml(&setup, "begin"));
    let file = sidelane.file();
    let beside = |name: &str| sidelane.directory().join(name);
    let done = |program: &mut Command| assert!(program.status().unwrap().success());

    // vim with `backup` or over a link: the file is renamed away, and a new one is written.
    for subdomain in ["vim", "vim-again"] {
        fs::rename(&file, beside("sidecar.yaml~")).unwrap();
        fs::write(&file, yaml(&setup, subdomain)).unwrap();
        fs::remove_file(beside("sidecar.yaml~")).unwrap();
        shows(&sidelane, subdomain);
    }
    // sed: a new file is renamed over it.
    done(Command::new("sed").args(["-i", "s/vim-again/sed/g"]).arg(&file));
    shows(&sidelane, "sed");
    // cp: the same file is truncated and written.
    fs::write(beside("fresh"), yaml(&setup, "cp")).unwrap();
    done(Command::new("cp").arg(beside("fresh")).arg(&file));
    shows(&sidelane, "cp");
    // In place, in parts with the first one not whole.
    let text = yaml(&setup, "parts");
    let (first, rest) = text.split_at(text.len() / 2);
    fs::write(&file, first).unwrap();
    let mut open = fs::OpenOptions::new().append(true).open(&file).unwrap();
    std::io::Write::write_all(&mut open, rest.as_bytes()).unwrap();
    shows(&sidelane, "parts");
    // Gone for a while: what runs goes on.
    fs::rename(&file, beside("away")).unwrap();
    sidelane.until_metric("sidelane_config_last_reload_successful", &[], |good| good == 0.0);
    assert!(answers(&sidelane, "parts"));
    fs::write(beside("away"), yaml(&setup, "back")).unwrap();
    fs::rename(beside("away"), &file).unwrap();
    shows(&sidelane, "back");
}

#[test]
fn file_that_a_value_names_may_come_after_the_edit_that_names_it() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let sidelane = Sidelane::start("sidelane", &yaml(&setup, "begin"));
    // A secret that is mounted later than the configuration.
    sidelane.rewrite(&yaml(&setup, "\"${file:name}\""));
    sidelane.until_metric("sidelane_config_last_reload_successful", &[], |good| good == 0.0);
    assert!(answers(&sidelane, "begin"));
    fs::write(sidelane.directory().join("name"), "later\n").unwrap();
    shows(&sidelane, "later");
}

#[test]
fn pipe_in_place_of_a_file_that_a_value_names_stops_no_reload() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let sidelane = Sidelane::start("sidelane", &yaml(&setup, "begin"));
    let pipe = sidelane.directory().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    sidelane.rewrite(&yaml(&setup, "\"${file:pipe}\""));
    let (status, answer) = sidelane.reload();
    assert_eq!(status, 422, "{answer}");
    assert!(answer["error"].as_str().unwrap().contains("pipe: not a regular file"), "{answer}");
    sidelane.rewrite(&yaml(&setup, "mended"));
    shows(&sidelane, "mended");
}

#[test]
fn all_who_ask_for_a_reload_at_once_are_answered_by_what_the_file_says() {
    const ASKING: usize = 48;
    const EACH: usize = 10;
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let sidelane = Sidelane::start("sidelane", &yaml(&setup, "begin"));
    std::thread::scope(|scope| {
        for _ in 0..ASKING {
            scope.spawn(|| {
                for _ in 0..EACH {
                    assert_eq!(sidelane.reload().0, 200);
                }
            });
        }
    });
    // Whoever asks after an edit hears of that edit, not of a look before it.
    for index in 0..20 {
        let name = format!("edit-{index}");
        sidelane.rewrite(&yaml(&setup, &name));
        assert_eq!(sidelane.reload().0, 200);
        assert!(answers(&sidelane, &name), "{name}");
    }
}

#[test]
fn file_that_is_a_mount_of_its_own_is_warned_about() {
    let service = Service::ok();
    let directory = tempfile::tempdir().unwrap();
    let (file, mounted) = (directory.path().join("source"), directory.path().join("sidecar.yaml"));
    fs::write(&file, Setup::of(service.address()).both()).unwrap();
    fs::write(&mounted, "").unwrap();
    // In a mount namespace of its own, so that nothing is left behind.
    let script = format!(
        "mount --bind source sidecar.yaml && exec {} run sidecar.yaml",
        sidelane_e2e::process::program().display()
    );
    let unshare = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script]).current_dir(directory.path());
        command
    };
    let may = unshare("mount --bind source sidecar.yaml").output();
    if !may.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED file_that_is_a_mount_of_its_own_is_warned_about: no mount namespaces");
        return;
    }
    let log = directory.path().join("log");
    let mut child =
        unshare(&script).stderr(fs::File::create(&log).unwrap()).spawn().expect("unshare starts");
    let said = || fs::read_to_string(&log).unwrap_or_default();
    wait::until("the warning", || said().contains("the file is a subPath mount").then_some(()));
    child.kill().unwrap();
    child.wait().unwrap();
}
