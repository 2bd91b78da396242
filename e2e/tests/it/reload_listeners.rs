//! Edits of listeners, limits, and what only a restart changes.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, mpsc};

use sidelane_e2e::client::{Client, request};
use sidelane_e2e::load::Load;
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::get;
use sidelane_e2e::wait;
use sidelane_e2e::websocket::Socket;

const WEB: &str = "{ name: web, address: \"127.0.0.1:0\" }";

/// The file with other listeners.
fn with(setup: &Setup, listeners: &[&str]) -> String {
    setup.both().replace(WEB, &listeners.join("\n    - "))
}

fn status(address: SocketAddr) -> u16 {
    request(address, "GET", get("/")).head.status
}

/// Takes an edit, and says that it was taken.
fn edit(sidelane: &Sidelane, yaml: &str) -> String {
    sidelane.rewrite(yaml);
    let (status, answer) = sidelane.reload();
    assert_eq!(status, 200, "{answer}");
    answer["status"].as_str().expect("a text").to_owned()
}

#[test]
fn listener_moves_under_load_and_no_request_fails() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    // The other listener is not touched; `web` moves back and forth.
    let other = "{ name: other, address: \"127.0.0.3:0\" }";
    let sidelane = Sidelane::start("sidelane", &with(&setup, &[WEB, other]));
    let web = Arc::new(Mutex::new(sidelane.web()));
    let still = Arc::new(Mutex::new(sidelane.listener("other")));
    let loads = [
        Load::keeping(Arc::clone(&web), get("/")),
        Load::keeping(Arc::clone(&still), get("/")),
        Load::connecting(still, get("/")),
    ];
    for n in 0..4 {
        loads.iter().for_each(|load| load.goes_on(20));
        let before = *web.lock().unwrap();
        let ip = if n % 2 == 0 { "127.0.0.2" } else { "127.0.0.1" };
        let moved = format!("{{ name: web, address: \"{ip}:0\" }}");
        let text = edit(&sidelane, &with(&setup, &[&moved, other]));
        assert!(text.contains("listeners: 0 added, 0 removed, 1 changed"), "{text}");
        let after = wait::until("the new address", || {
            sidelane.listener_now("web").filter(|now| *now != before)
        });
        assert_eq!(status(after), 200, "the new address is open");
        *web.lock().unwrap() = after;
        wait::until("the old address closes", || {
            std::net::TcpStream::connect(before).is_err().then_some(())
        });
        assert_eq!(sidelane.listener_now("other"), Some(sidelane.listener("other")));
    }
    for load in loads {
        load.end().expect("no request fails");
    }
}

#[test]
fn removed_listener_drains_and_the_others_are_not_touched() {
    let (removed, until_removed) = mpsc::channel::<()>();
    let until_removed = Mutex::new(until_removed);
    let service = Service::start(move |connection| {
        while let Some(request) = connection.request()? {
            if request.target == b"/held" {
                connection.write("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n12")?;
                let removed = until_removed.lock().expect("no panic");
                removed.recv_timeout(wait::DEADLINE).map_err(io::Error::other)?;
                connection.write("34")?;
            } else {
                connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
            }
        }
        Ok(())
    });
    let setup = Setup::of(service.address());
    let sidelane = Sidelane::both(&setup);
    let mut web = Client::connect(sidelane.web());
    web.send(get("/"));
    assert_eq!(web.answer("GET").head.status, 200);

    let extra = "{ name: extra, address: \"127.0.0.1:0\" }";
    let text = edit(&sidelane, &with(&setup, &[WEB, extra]));
    assert!(text.contains("listeners: 1 added, 0 removed, 0 changed"), "{text}");
    let address = wait::until("the added listener", || sidelane.listener_now("extra"));
    let mut idle = Client::connect(address);
    idle.send(get("/"));
    assert_eq!(idle.answer("GET").head.status, 200);
    let mut held = Client::connect(address);
    held.send(get("/held"));
    let head = held.head();

    let text = edit(&sidelane, &setup.both());
    assert!(text.contains("listeners: 0 added, 1 removed, 0 changed"), "{text}");
    assert_eq!(idle.rest(), b"", "an idle connection is closed");
    wait::until("the listener closes", || {
        std::net::TcpStream::connect(address).is_err().then_some(())
    });
    removed.send(()).unwrap();
    assert_eq!(held.try_body("GET", head).expect("the answer ends whole").body, b"1234");
    assert_eq!(held.rest(), b"", "and its connection with it");
    // The same connection of the other listener goes on.
    web.send(get("/"));
    assert_eq!(web.answer("GET").head.status, 200);
}

#[test]
fn address_that_is_taken_refuses_the_reload_with_its_place() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let sidelane = Sidelane::both(&setup);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let busy = format!("{{ name: busy, address: \"{}\" }}", taken.local_addr().unwrap());
    let fresh = "{ name: fresh, address: \"127.0.0.1:0\" }";
    let mut other = setup.clone();
    other.routes.clear();
    for (yaml, place) in [
        (with(&other, &[WEB, fresh, &busy]), "relay.listeners[2].address: cannot listen on"),
        (
            other.both().replace(
                "health: { address: \"127.0.0.1:0\"",
                &format!("health: {{ address: \"{}\"", taken.local_addr().unwrap()),
            ),
            "health.address: cannot listen on",
        ),
    ] {
        assert!(yaml.contains(&taken.local_addr().unwrap().to_string()), "{yaml}");
        sidelane.rewrite(&yaml);
        let (code, answer) = sidelane.reload();
        let error = answer["error"].as_str().unwrap_or_default();
        assert_eq!(code, 422, "{answer}");
        assert!(error.starts_with("sidecar.yaml:") && error.contains(place), "{error}");
        assert_eq!(status(sidelane.web()), 200, "everything is as it was");
        assert_eq!(sidelane.listener_now("fresh"), None);
        assert_eq!(sidelane.metric("sidelane_config_last_reload_successful", &[]), Some(0.0));
    }
    edit(&sidelane, &setup.both());
}

#[test]
fn settings_of_an_address_change_for_new_connections() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let sidelane = Sidelane::both(&setup);
    let mut old = Client::connect(sidelane.web());
    old.send(get("/"));
    assert_eq!(old.answer("GET").head.status, 200);
    edit(
        &sidelane,
        &with(&setup, &["{ name: web, address: \"127.0.0.1:0\", proxy_protocol: true }"])
            .replace("relay:\n", "relay:\n  trusted_proxies: [127.0.0.1]\n"),
    );
    assert_eq!(sidelane.listener_now("web"), Some(sidelane.web()));
    let proxied = [b"PROXY TCP4 192.0.2.1 127.0.0.1 4711 80\r\n".as_slice(), &get("/")].concat();
    assert_eq!(request(sidelane.web(), "GET", proxied).head.status, 200);
    old.send(get("/"));
    assert_eq!(old.answer("GET").head.status, 200, "what was open goes on");
}

#[test]
fn limits_and_timeouts_take_effect_at_once() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let sidelane = Sidelane::both(&setup);
    let mut open: Vec<Client> = (0..3).map(|_| Client::connect(sidelane.web())).collect();
    for client in &mut open {
        client.send(get("/"));
        assert_eq!(client.answer("GET").head.status, 200);
    }
    let limited =
        |line: &str| setup.both().replace("  base_domains:", &format!("{line}\n  base_domains:"));
    let text = edit(&sidelane, &limited("  limits: { connections: 2 }"));
    assert!(text.contains("changed: relay.limits"), "{text}");
    // More are open than may be: they go on, and nobody new comes.
    for client in &mut open {
        client.send(get("/"));
        assert_eq!(client.answer("GET").head.status, 200);
    }
    assert_eq!(Client::connect(sidelane.web()).rest(), b"");
    open.truncate(1);
    wait::until("room", || {
        let mut client = Client::connect(sidelane.web());
        (client.try_send(&get("/")).is_ok() && client.try_answer("GET").is_ok()).then_some(())
    });
    let text = edit(&sidelane, &limited("  limits: { request_head: 8KiB }"));
    assert!(text.contains("changed: relay.limits"), "{text}");
    let long =
        format!("GET / HTTP/1.1\r\nHost: api.localhost\r\nX-Long: {}\r\n\r\n", "x".repeat(20_000));
    assert_eq!(request(sidelane.web(), "GET", &long).head.status, 431);
    edit(&sidelane, &limited("  timeouts: { idle: 1s }"));
    assert_eq!(request(sidelane.web(), "GET", &long).head.status, 200);
    let mut idle = Client::connect(sidelane.web());
    idle.send(get("/"));
    assert_eq!(idle.answer("GET").head.status, 200);
    assert_eq!(idle.rest(), b"", "closed after a second of rest");
}

#[test]
fn health_and_admin_move() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let sidelane = Sidelane::both(&setup);
    let ports = || {
        let bytes = std::fs::read(sidelane.directory().join("ports.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&bytes).unwrap()
    };
    let address = |name: &str| ports()[name].as_str().unwrap().parse::<SocketAddr>().unwrap();
    // The answer comes by the connection of the old address.
    let moved = setup
        .both()
        .replace("health: { address: \"127.0.0.1:0\"", "health: { address: \"127.0.0.2:0\"")
        .replace("admin: { address: \"127.0.0.1:0\"", "admin: { address: \"127.0.0.2:0\"");
    let text = edit(&sidelane, &moved);
    assert!(text.contains("changed: health, admin"), "{text}");
    for (name, old, page) in
        [("health", sidelane.health(), "/live"), ("admin", sidelane.admin(), "/config")]
    {
        let new = address(name);
        assert!(new.to_string().starts_with("127.0.0.2:"), "{new}");
        assert_eq!(sidelane.get(new, page).head.status, 200);
        wait::until("the old address closes", || {
            std::net::TcpStream::connect(old).is_err().then_some(())
        });
    }
}

#[test]
fn what_needs_a_restart_is_pending_until_it_is_taken_back() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let sidelane = Sidelane::both(&setup);
    let pending = || sidelane.admin_page("/config")["pending_restart"].clone();
    let metric = || sidelane.metric("sidelane_config_restart_pending", &[]);
    assert_eq!((pending(), metric()), (serde_json::json!([]), Some(0.0)));
    let threads = setup.both().replace("  base_domains:", "  threads: 2\n  base_domains:");
    let text = edit(&sidelane, &threads);
    assert!(text.starts_with("nothing changes before a restart; in force: "), "{text}");
    assert!(text.contains("only after a restart: relay.threads"), "{text}");
    // Another edit does not make it forgotten, and what is in force is what runs.
    let mut more = setup.clone();
    more.drain = "9s";
    let both = more
        .both()
        .replace("  base_domains:", "  threads: 2\n  base_domains:")
        .replace("name: e2e\n", "name: other\n");
    let text = edit(&sidelane, &both);
    assert!(text.contains("only after a restart: relay.threads, sidecar.name"), "{text}");
    let text = edit(&sidelane, &both);
    assert!(text.contains("only after a restart: relay.threads, sidecar.name"), "{text}");
    assert_eq!(pending(), serde_json::json!(["relay.threads", "sidecar.name"]));
    assert_eq!(metric(), Some(1.0));
    let config = sidelane.admin_page("/config");
    assert_eq!(config["relay"]["threads"], 0);
    assert_eq!(config["sidecar"]["name"], "e2e");
    assert_eq!(config["drain_timeout"], "9s");
    let text = edit(&sidelane, &more.both());
    assert!(text.starts_with("what waited for a restart is taken back; in force: "), "{text}");
    assert_eq!((pending(), metric()), (serde_json::json!([]), Some(0.0)));
}

#[test]
fn reload_of_what_was_taken_says_what_is_in_force() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let sidelane = Sidelane::both(&setup);
    let (_, answer) = sidelane.reload();
    let text = answer["status"].as_str().unwrap();
    assert!(text.starts_with("nothing has changed since the start of "), "{text}");
    let mut other = setup.clone();
    other.drain = "9s";
    sidelane.rewrite(&other.both());
    // The watcher takes it by itself.
    wait::until("the edit", || sidelane.log().contains("changed: drain_timeout").then_some(()));
    let (_, answer) = sidelane.reload();
    let text = answer["status"].as_str().unwrap();
    assert!(text.starts_with("nothing has changed since the reload of "), "{text}");
    assert!(text.contains("in force: routes 1, tunnels 1, listeners 1"), "{text}");
}

#[test]
fn edit_of_the_log_alone_announces_nothing() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let sidelane = Sidelane::both(&setup);
    sidelane.until_metric("sidelane_announcements_total", &["result=\"accepted\""], |n| n == 1.0);
    let text = edit(&sidelane, &setup.both().replace("level: debug", "level: info"));
    assert!(text.contains("changed: log"), "{text}");
    let page = sidelane.admin_page("/tunnels");
    assert_eq!(page["sessions"][0]["announcement"], 1, "{page}");
    let metric = sidelane.metric("sidelane_announcements_total", &["result=\"accepted\""]);
    assert_eq!(metric, Some(1.0));
}

#[test]
fn websocket_and_download_run_through_reloads_untouched() {
    const PARTS: usize = 200;
    const PART: &[u8] = &[b'.'; 16 * 1024];
    let (edited, until_edited) = mpsc::channel::<()>();
    let until_edited = Mutex::new(until_edited);
    let service = Service::start(move |connection| {
        while let Some(request) = connection.request()? {
            match request.target.as_slice() {
                b"/socket" => {
                    connection.upgrade(&request, "")?;
                    return connection.echo();
                }
                b"/download" => {
                    let length = PARTS * PART.len();
                    connection
                        .write(format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n"))?;
                    for part in 0..PARTS {
                        if part % 20 == 10 {
                            let edited = until_edited.lock().expect("no panic");
                            edited.recv_timeout(wait::DEADLINE).map_err(io::Error::other)?;
                        }
                        connection.write(PART)?;
                    }
                }
                _ => connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?,
            }
        }
        Ok(())
    });
    let mut setup = Setup::of(service.address()).websocket("{}");
    // What runs on a plugin's generation that is replaced has this long.
    setup.drain = "300s";
    let sidelane = Sidelane::both(&setup);
    let mut socket = Socket::open_with(sidelane.web(), "/socket", "");
    let mut download = Client::connect(sidelane.web());
    download.send(get("/download"));
    let head = download.head();
    let reader = std::thread::spawn(move || download.try_body("GET", head));
    for n in 0..10 {
        let mut other = setup.clone();
        if n % 2 == 0 {
            other.http_config = "{ idle_timeout: 5s }".to_owned();
            other.plugins[0].config = "{ ping_interval: 20s }".to_owned();
            other.routes[0].subdomain = "elsewhere".to_owned();
        }
        let moved = format!("{{ name: web, address: \"127.0.0.{}:0\" }}", n % 2 + 1);
        edit(&sidelane, &with(&other, &[&moved]));
        edited.send(()).unwrap();
        socket.says_back(&format!("after edit {n}"));
    }
    let answer = reader.join().unwrap().expect("the download ends whole");
    assert_eq!(answer.body.len(), PARTS * PART.len());
    socket.says_back("still there");
}
