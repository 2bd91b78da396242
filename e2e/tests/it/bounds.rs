//! Bounds and timeouts of the file, held against the program: a key that is read and not used is a
//! defect that no unit test sees.

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use sidelane_e2e::client::{Client, request};
use sidelane_e2e::process::{Route, Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::get;
use sidelane_e2e::wait;

/// Well below the defaults of what these tests shorten, well above what they shorten it to.
const SOON: Duration = Duration::from_secs(5);

fn in_relay(yaml: &str, section: &str) -> String {
    yaml.replacen("relay:\n", &format!("relay:\n  {section}\n"), 1)
}

#[test]
fn exchange_waits_for_a_session_that_is_on_its_way() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let yaml = in_relay(&setup.relay_with_routes(), "timeouts: { open_wait: 1m }");
    let relay = Sidelane::spawn("relay", &yaml);
    let web = relay.web();
    let asked = std::thread::spawn(move || request(web, "GET", get("/")));
    relay.until_metric("sidelane_exchanges_in_flight", &["role=\"relay\""], |n| n == 1.0);
    let _sidecar = Sidelane::spawn("sidecar", &setup.sidecar(relay.tunnel()));
    let answer = asked.join().expect("no panic");
    assert_eq!(answer.head.status, 200, "{answer:?}");
}

#[test]
fn exchange_does_not_wait_where_the_file_says_so() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let yaml = in_relay(&setup.relay_with_routes(), "timeouts: { open_wait: 0s }");
    let relay = Sidelane::spawn("relay", &yaml);
    let answer = request(relay.web(), "GET", get("/"));
    assert_eq!(answer.head.first("x-sidelane-error"), Some("no-sidecar"), "{answer:?}");
}

/// Connects to the tunnel's port, says nothing, and returns what came until the end.
fn silent(relay: &Sidelane) -> impl FnOnce() -> Vec<u8> {
    let mut stream = TcpStream::connect(relay.tunnel()).expect("the tunnel's port is open");
    stream.set_read_timeout(Some(SOON)).expect("a timeout can be set");
    move || {
        let mut came = Vec::new();
        stream.read_to_end(&mut came).expect("closed in time");
        came
    }
}

#[test]
fn silent_dialler_is_closed_after_the_files_timeout() {
    let setup = Setup::of(Service::ok().address());
    let yaml = in_relay(&setup.relay(), "timeouts: { handshake: 50ms }");
    let relay = Sidelane::spawn("relay", &yaml);
    assert_eq!(silent(&relay)(), b"");
    wait::until("the log to name the limit", || {
        relay.log().contains("no whole hello within 50ms").then_some(())
    });
}

#[test]
fn diallers_above_the_files_rate_are_told_to_come_back() {
    let setup = Setup::of(Service::ok().address());
    let section =
        "limits: { handshakes_per_second_per_address: 1 }\n  timeouts: { handshake: 50ms }";
    let relay = Sidelane::spawn("relay", &in_relay(&setup.relay(), section));
    // A second may end between two of them, but not between all.
    let diallers = [silent(&relay), silent(&relay), silent(&relay)];
    let told = diallers.map(|dialler| String::from_utf8_lossy(&dialler()).into_owned());
    assert!(told.iter().any(|text| text.contains("too many sidecars")), "{told:?}");
}

#[test]
fn relay_that_never_answers_is_dialled_again_after_the_files_timeout() {
    let mute = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let setup = Setup::of(Service::ok().address());
    let yaml = setup.sidecar(mute.local_addr().expect("bound")).replacen(
        "sidecar:\n",
        "sidecar:\n  timeouts: { handshake: 50ms }\n",
        1,
    );
    let _sidecar = Sidelane::spawn("sidecar", &yaml);
    let begun = Instant::now();
    let _held = [mute.accept().expect("a dial"), mute.accept().expect("a second dial")];
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
}

/// A rollout with an edit: the newer sidecar announces while the older still holds the route.
#[test]
fn refused_announcement_comes_into_force_when_its_rival_is_gone() {
    let service = Service::ok();
    let older = Setup::of(service.address());
    let newer = Setup {
        tunnels: vec![("other".to_owned(), service.address())],
        routes: vec![Route::new("api", "other")],
        ..older.clone()
    };
    let relay = Sidelane::spawn("relay", &older.relay());
    let first = Sidelane::start("first", &older.sidecar(relay.tunnel()));
    let ask = || request(relay.web(), "GET", get("/"));
    wait::until("the older to serve", || (ask().head.status == 200).then_some(()));
    let second = Sidelane::spawn("second", &newer.sidecar(relay.tunnel()));
    wait::until("the newer to be refused", || {
        let page = second.admin_page("/tunnels");
        let refused = page["relays"][0]["announcement_refused"].as_array()?;
        (!refused.is_empty()).then_some(())
    });
    assert_eq!(second.admin_page("/tunnels")["relays"][0]["announcement_waits"], true);
    // A rollout that waits for the newer to be ready would never end the older.
    assert_eq!(second.get(second.health(), "/ready").head.status, 200);
    assert_eq!(second.metric("sidelane_announcement_refused", &[]), Some(1.0));
    assert!(second.log().contains("announcement waits"));
    first.kill();
    wait::until("the newer to serve", || (ask().head.status == 200).then_some(()));
    wait::until("the newer to know", || {
        let page = second.admin_page("/tunnels");
        page["relays"][0]["announcement_accepted"].as_u64()
    });
    second.until_ready();
    assert_eq!(second.metric("sidelane_announcement_refused", &[]), Some(0.0));
}

/// A relay takes 1,000 tunnels of one sidecar.
#[test]
fn sidecar_whose_announcement_is_refused_is_not_ready() {
    let service = Service::ok();
    let mut setup = Setup::of(service.address());
    for number in 0..1000 {
        setup = setup.tunnel(&format!("t{number}"), service.address());
    }
    let relay = Sidelane::spawn("relay", &setup.relay());
    let sidecar = Sidelane::spawn("sidecar", &setup.sidecar(relay.tunnel()));
    sidecar.until_metric("sidelane_announcement_refused", &[], |refused| refused == 1.0);
    let unready = sidecar.get(sidecar.health(), "/ready");
    assert_eq!(unready.head.status, 503);
    let reasons = String::from_utf8_lossy(&unready.body).into_owned();
    assert!(reasons.contains("every relay refuses what this sidecar announces"), "{reasons}");
    assert!(reasons.contains("1001 tunnels"), "{reasons}");
    assert!(sidecar.log().contains("the relay serves nothing of this sidecar"));
}

/// Clients that do not read fill what may be queued; new ones are turned away until they are gone.
#[test]
fn opens_are_refused_above_the_files_bound_on_queued_bytes() {
    let service = Service::start(|connection| {
        connection.stop_recording();
        while let Some(request) = connection.request()? {
            if request.target == b"/endless" {
                connection.write("HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n")?;
                loop {
                    connection.write([b'.'; 16 * 1024])?;
                }
            }
            connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        }
        Ok(())
    });
    let yaml = in_relay(&Setup::of(service.address()).both(), "limits: { queued: 1MiB }");
    let sidelane = Sidelane::start("sidelane", &yaml);
    let ask = || request(sidelane.web(), "GET", get("/"));
    // The bound may be reached before the last of them.
    let readers: Vec<_> = (0..16)
        .map_while(|_| {
            let mut client = Client::connect(sidelane.web());
            client.send(get("/endless"));
            (client.head().status == 200).then_some(client)
        })
        .collect();
    assert!(!readers.is_empty(), "the first one finds room");
    let refused = wait::until("the bound", || {
        let answer = ask();
        (answer.head.status == 503).then_some(answer)
    });
    assert_eq!(refused.head.first("x-sidelane-error"), Some("overloaded"));
    drop(readers);
    wait::until("room again", || (ask().head.status == 200).then_some(()));
}
