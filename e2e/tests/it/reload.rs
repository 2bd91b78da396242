//! Edits of the file while traffic flows.

use std::time::Duration;

use sidelane_e2e::client::{Client, request};
use sidelane_e2e::process::{Route, Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::get;
use sidelane_e2e::wait;

/// How soon an edit must show: the watcher's quiet time, a parse and a swap.
const EDIT_DEADLINE: Duration = Duration::from_secs(3);
/// A transfer that outlives every wait below: the service ends it when it is told to.
const PART: &[u8] = &[b'.'; 64 * 1024];

fn body(answer: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{answer}", answer.len())
}

fn host(host: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: {host}.localhost\r\n\r\n")
}

#[test]
fn route_edited_during_a_download_answers_and_the_download_ends_whole() {
    const PARTS: usize = 400;
    let (edited, until_edited) = std::sync::mpsc::channel::<()>();
    let until_edited = std::sync::Mutex::new(until_edited);
    let old = Service::start(move |connection| {
        while let Some(request) = connection.request()? {
            if request.target != b"/download" {
                connection.write(body("old"))?;
                continue;
            }
            connection.write(format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n",
                PARTS * PART.len()
            ))?;
            for part in 0..PARTS {
                if part == PARTS / 2 {
                    // The second half is sent only once the edit has taken effect.
                    let edited = until_edited.lock().expect("no panic");
                    edited.recv_timeout(wait::DEADLINE).map_err(std::io::Error::other)?;
                }
                connection.write(PART)?;
            }
        }
        Ok(())
    });
    let new = Service::answering(body("new"));
    let setup = Setup::of(old.address()).tunnel("new", new.address());
    let sidelane = Sidelane::both(&setup);

    let mut download = Client::connect(sidelane.web());
    download.send(get("/download"));
    let head = download.head();
    assert_eq!(head.status, 200);
    let reader = std::thread::spawn(move || download.try_body("GET", head));

    // `api` moves to the other tunnel, and a route is added.
    let mut edit = setup.clone();
    edit.routes = vec![Route::new("api", "new"), Route::new("added", "new")];
    sidelane.rewrite(&edit.both());
    wait::within(EDIT_DEADLINE, "the edited routes", || {
        let moved = request(sidelane.web(), "GET", get("/")).body == b"new";
        let added = request(sidelane.web(), "GET", host("added")).body == b"new";
        (moved && added).then_some(())
    });
    edited.send(()).unwrap();
    let answer = reader.join().unwrap().expect("the download ends whole");
    assert_eq!(answer.body.len(), PARTS * PART.len());
}

#[test]
fn removed_route_is_404_and_its_exchange_goes_on() {
    let (removed, until_removed) = std::sync::mpsc::channel::<()>();
    let until_removed = std::sync::Mutex::new(until_removed);
    let service = Service::start(move |connection| {
        while let Some(request) = connection.request()? {
            if request.target == b"/held" {
                connection.write("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n12")?;
                let removed = until_removed.lock().expect("no panic");
                removed.recv_timeout(wait::DEADLINE).map_err(std::io::Error::other)?;
                connection.write("34")?;
            } else {
                connection.write(body("ok"))?;
            }
        }
        Ok(())
    });
    let setup = Setup::of(service.address()).route(Route::new("other", "api"));
    let sidelane = Sidelane::both(&setup);
    let mut held = Client::connect(sidelane.web());
    held.send(get("/held"));
    let head = held.head();
    let mut edit = setup.clone();
    edit.routes.remove(0);
    sidelane.rewrite(&edit.both());
    wait::within(EDIT_DEADLINE, "404", || {
        (request(sidelane.web(), "GET", get("/")).head.status == 404).then_some(())
    });
    assert_eq!(request(sidelane.web(), "GET", host("other")).head.status, 200);
    removed.send(()).unwrap();
    assert_eq!(held.try_body("GET", head).unwrap().body, b"1234");
}

#[test]
fn bad_edit_keeps_the_last_good_file_and_says_so() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let sidelane = Sidelane::both(&setup);
    sidelane.until_metric("sidelane_config_last_reload_successful", &[], |value| value == 1.0);
    for (name, yaml, says) in [
        ("not YAML", "relay: [\n".to_owned(), "sidecar.yaml:"),
        ("unknown key", setup.both().replace("subdomain: api", "subdomian: api"), "subdomian"),
        ("unknown tunnel", setup.both().replace("tunnel: api", "tunnel: apii"), "apii"),
        ("empty", String::new(), "sidecar.yaml"),
    ] {
        sidelane.rewrite(&yaml);
        sidelane.until_metric("sidelane_config_last_reload_successful", &[], |value| value == 0.0);
        assert_eq!(request(sidelane.web(), "GET", get("/")).head.status, 200, "{name}");
        wait::until(name, || sidelane.log().contains(says).then_some(()));

        sidelane.rewrite(&setup.both());
        sidelane.until_metric("sidelane_config_last_reload_successful", &[], |value| value == 1.0);
    }
    assert_eq!(request(sidelane.web(), "GET", get("/")).head.status, 200);
}

#[test]
fn reload_may_be_asked_for() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let sidelane = Sidelane::both(&setup);
    let before = sidelane.metric("sidelane_config_reloads_total", &[]).unwrap_or(0.0);
    let answer = request(
        sidelane.admin(),
        "POST",
        "POST /-/reload HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
    );
    assert!(matches!(answer.head.status, 200 | 202 | 204), "{answer:?}");
    sidelane.until_metric("sidelane_config_reloads_total", &[], |count| count > before);
    let before = sidelane.metric("sidelane_config_reloads_total", &[]).unwrap_or(0.0);
    sidelane.signal("HUP");
    sidelane.until_metric("sidelane_config_reloads_total", &[], |count| count > before);
}

#[test]
fn sidecar_announces_its_edit_to_the_relay() {
    let (old, new) = (Service::answering(body("old")), Service::answering(body("new")));
    let setup = Setup::of(old.address()).tunnel("new", new.address());
    let relay = Sidelane::spawn("relay", &setup.relay());
    let sidecar = Sidelane::start("sidecar", &setup.sidecar(relay.tunnel()));
    wait::until("the first routes", || {
        (request(relay.web(), "GET", get("/")).body == b"old").then_some(())
    });
    let mut edit = setup.clone();
    edit.routes = vec![Route::new("api", "new"), Route::new("added", "old-one")];
    edit.tunnels.push(("old-one".to_owned(), old.address()));
    sidecar.rewrite(&edit.sidecar(relay.tunnel()));
    wait::within(EDIT_DEADLINE, "the edited routes", || {
        let moved = request(relay.web(), "GET", get("/")).body == b"new";
        let added = request(relay.web(), "GET", host("added")).body == b"old";
        (moved && added).then_some(())
    });
}

#[test]
fn edited_base_domain_takes_effect_and_the_answer_names_it() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let sidelane = Sidelane::both(&setup);
    let get = |host: &str| {
        let text = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
        request(sidelane.web(), "GET", text).head.status
    };
    assert_eq!(get("api.localhost"), 200);
    sidelane.rewrite(
        &setup.both().replace("base_domains: [localhost]", "base_domains: [example.test]"),
    );
    wait::within(EDIT_DEADLINE, "the new domain", || {
        (get("api.example.test") == 200 && get("api.localhost") == 404).then_some(())
    });
    wait::until("the summary", || {
        sidelane.log().contains("changed: relay.base_domains").then_some(())
    });
}

#[test]
fn edit_refused_for_a_route_keeps_the_plugins_before() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let sidelane = Sidelane::both(&setup);
    let mut edit = setup.clone();
    edit.http_config = "{ idle_timeout: 1s }".to_owned();
    let yaml =
        edit.both().replace("tunnel: api }", "tunnel: api, options: { HTTP: { nonsense: 1 } } }");
    assert_ne!(yaml, edit.both());
    sidelane.rewrite(&yaml);
    sidelane.until_metric("sidelane_config_last_reload_successful", &[], |value| value == 0.0);
    wait::until("the refusal", || sidelane.log().contains("nonsense").then_some(()));
    // The file as it was is what runs: nothing is left to load.
    sidelane.rewrite(&setup.both());
    sidelane.until_metric("sidelane_config_last_reload_successful", &[], |value| value == 1.0);
    assert!(sidelane.log().contains("nothing has changed"), "{}", sidelane.log());
}
