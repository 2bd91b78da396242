//! SIGTERM: what runs ends, nothing new begins, and the program is gone within its deadline.

use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use sidelane_e2e::client::request;
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::{Stage, get};
use sidelane_e2e::wait;

#[test]
fn exchange_ends_whole_after_sigterm() {
    let (go, gone) = mpsc::channel::<()>();
    let gone = Mutex::new(gone);
    let mut stage = Stage::script(move |connection| {
        connection.request()?;
        connection.write("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nbegun")?;
        gone.lock()
            .expect("no panic")
            .recv_timeout(wait::DEADLINE)
            .map_err(std::io::Error::other)?;
        connection.write(" end")?;
        connection.closed()
    });
    let mut client = stage.connect();
    client.send(get("/"));
    let head = client.head();
    assert_eq!(client.exactly(5).unwrap(), b"begun");
    let web = stage.sidelane.web();
    stage.sidelane.signal("TERM");
    wait::until("the listener to close", || TcpStream::connect(web).is_err().then_some(()));
    go.send(()).unwrap();
    assert_eq!(head.first("content-length"), Some("9"));
    assert_eq!(client.exactly(4).unwrap(), b" end");
    assert!(client.rest().is_empty());
    assert_eq!(stage.sidelane.ended().code(), Some(0));
}

#[test]
fn idle_program_ends_at_once() {
    let mut stage = Stage::ok();
    assert_eq!(stage.get("/").head.status, 200);
    // An idle kept-alive connection is no exchange.
    let mut idle = stage.connect();
    idle.send(get("/"));
    assert_eq!(idle.answer("GET").head.status, 200);
    let started = Instant::now();
    stage.sidelane.signal("TERM");
    assert_eq!(stage.sidelane.ended().code(), Some(0));
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(idle.rest().is_empty());
}

#[test]
fn interrupt_ends_as_sigterm_does() {
    let mut stage = Stage::ok();
    stage.sidelane.signal("INT");
    assert_eq!(stage.sidelane.ended().code(), Some(0));
}

#[test]
fn exchange_without_an_end_is_cut_at_the_deadline() {
    let service = Service::start(|connection| {
        connection.request()?;
        connection.write("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nbegun")?;
        connection.closed()
    });
    let mut setup = Setup::of(service.address());
    setup.drain = "1s";
    let mut sidelane = Sidelane::both(&setup);
    let mut client = sidelane_e2e::client::Client::connect(sidelane.web());
    client.send(get("/"));
    let head = client.head();
    sidelane.signal("TERM");
    client.try_body("GET", head).expect_err("a cut answer does not look complete");
    let code = sidelane.ended().code();
    assert_eq!(code, Some(0));
}

#[test]
fn sidecar_that_ends_finishes_what_it_carries() {
    let (go, gone) = mpsc::channel::<()>();
    let gone = Mutex::new(gone);
    let service = Service::start(move |connection| {
        while let Some(request) = connection.request()? {
            if request.target == b"/held" {
                connection.write("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nbegun")?;
                gone.lock()
                    .expect("no panic")
                    .recv_timeout(wait::DEADLINE)
                    .map_err(std::io::Error::other)?;
                connection.write(" end")?;
            } else {
                connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
            }
        }
        Ok(())
    });
    let setup = Setup::of(service.address());
    let relay = Sidelane::spawn("relay", &setup.relay());
    let mut sidecar = Sidelane::start("sidecar", &setup.sidecar(relay.tunnel()));
    wait::until("the announcement", || {
        (request(relay.web(), "GET", get("/")).head.status == 200).then_some(())
    });
    let mut client = sidelane_e2e::client::Client::connect(relay.web());
    client.send(get("/held"));
    let head = client.head();
    sidecar.signal("TERM");
    wait::until("new requests to go elsewhere", || {
        (request(relay.web(), "GET", get("/")).head.status == 503).then_some(())
    });
    go.send(()).unwrap();
    assert_eq!(client.try_body("GET", head).unwrap().body, b"begun end");
    assert_eq!(sidecar.ended().code(), Some(0));
}

/// Relay and sidecar in one process: what the relay has accepted is still delivered.
#[test]
fn no_request_is_refused_because_of_the_shutdown_itself() {
    let service = Service::ok();
    let mut sidelane = Sidelane::both(&Setup::of(service.address()));
    let web = sidelane.web();
    let (begun, has_begun) = mpsc::channel::<()>();
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let begun = begun.clone();
            std::thread::spawn(move || {
                let mut client = sidelane_e2e::client::Client::connect(web);
                loop {
                    // The end of the connection is how a client learns of the shutdown.
                    if client.try_send(get("/").as_ref()).is_err() {
                        return;
                    }
                    let Ok(answer) = client.try_answer("GET") else { return };
                    assert_eq!(answer.head.status, 200, "{answer:?}");
                    // An error means that enough have begun.
                    let _ = begun.send(());
                }
            })
        })
        .collect();
    for _ in 0..500 {
        has_begun.recv().expect("clients are served");
    }
    sidelane.signal("TERM");
    assert_eq!(sidelane.ended().code(), Some(0));
    for client in clients {
        client.join().expect("every answer was 200");
    }
}
