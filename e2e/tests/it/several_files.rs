//! A directory of files: parts that come, break, are mended and go while traffic flows.

use std::fs;

use sidelane_e2e::client::request;
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::wait;

/// Waits until requests to the host are answered with this status.
fn until(sidelane: &Sidelane, host: &str, status: u16) {
    wait::until("the route's state", || {
        let head = format!("GET / HTTP/1.1\r\nHost: {host}.localhost\r\n\r\n");
        (request(sidelane.web(), "GET", head).head.status == status).then_some(())
    });
}

/// Waits until the last reload failed with such a text.
fn until_refused(sidelane: &Sidelane, part: &str) {
    wait::until("the reload's error", || {
        let page = sidelane.admin_page("/config");
        page["last_reload_error"].as_str().is_some_and(|error| error.contains(part)).then_some(())
    });
}

#[test]
fn a_part_comes_breaks_is_mended_and_goes_while_the_others_stay() {
    let service = Service::answering("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned());
    let setup = Setup::of(service.address());
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("sidecar.yaml"), setup.both()).unwrap();
    let sidelane = Sidelane::spawn_in("sidelane", directory, ".");
    sidelane.until_ready();
    let extra = sidelane.file().with_file_name("web.yaml");
    until(&sidelane, "api", 200);
    until(&sidelane, "extra", 404);

    let route = "routes: [{ subdomain: extra, tunnel: ";
    fs::write(&extra, format!("{route}api }}]\n")).unwrap();
    until(&sidelane, "extra", 200);

    fs::write(&extra, format!("{route}nowhere }}]\n")).unwrap();
    until_refused(&sidelane, "web.yaml:1:38: routes[1].tunnel: unknown tunnel \"nowhere\"");
    // What both files name is told with both places.
    fs::write(&extra, "routes: [{ name: api, subdomain: other, tunnel: api }]\n").unwrap();
    until_refused(&sidelane, "web.yaml:1:18: routes[1].name: route \"api\" is declared already");
    until(&sidelane, "extra", 200);
    until(&sidelane, "api", 200);

    fs::write(&extra, format!("{route}api, redirect: {{ scheme: https }} }}]\n")).unwrap();
    until_refused(&sidelane, "has tunnel and redirect at once");
    fs::write(&extra, format!("{route}api, timeouts: {{ total: 5s }} }}]\n")).unwrap();
    wait::until("the mended part", || {
        sidelane.admin_page("/config")["last_reload_error"].is_null().then_some(())
    });
    until(&sidelane, "extra", 200);

    fs::remove_file(&extra).unwrap();
    until(&sidelane, "extra", 404);
    until(&sidelane, "api", 200);
}
