//! Withdrawal, the phase before the end: nothing new comes, and nobody notices.

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver, Sender};

use sidelane_e2e::client::{Client, request};
use sidelane_e2e::process::{Setup, Sidelane, program};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::{Stage, get};
use sidelane_e2e::tools::Curl;
use sidelane_e2e::wait;
use sidelane_e2e::websocket::{Frame, Socket};

/// A service that answers with its name; `/held` begins, and ends when the sender says so.
fn service(name: &'static str) -> (Service, Sender<()>) {
    let (go, gone) = mpsc::channel();
    let gone: Mutex<Receiver<()>> = Mutex::new(gone);
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
                connection.write(format!("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n{name}"))?;
            }
        }
        Ok(())
    });
    (service, go)
}

/// Runs `sidelane drain` on a process.
fn drain(sidelane: &Sidelane, arguments: &[&str]) -> Child {
    Command::new(program())
        .current_dir(sidelane.directory())
        .args(["drain", "--admin", &sidelane.admin().to_string()])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts")
}

/// Waits for the command's end, and checks its exit code and what it says.
#[track_caller]
fn ends(command: Child, code: i32, part: &str) {
    let Output { status, stdout, stderr } = command.wait_with_output().expect("it ends");
    let all = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert_eq!(status.code(), Some(code), "{all}");
    assert!(all.contains(part), "no {part:?} in {all}");
}

fn post(sidelane: &Sidelane, page: &str) -> serde_json::Value {
    let answer = request(
        sidelane.admin(),
        "POST",
        format!(
            "POST {page} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        ),
    );
    assert_eq!(answer.head.status, 200, "{answer:?}");
    serde_json::from_slice(&answer.body).expect("JSON")
}

/// The service that answers.
fn ask(web: SocketAddr) -> String {
    let answer = request(web, "GET", get("/"));
    assert_eq!(answer.head.status, 200, "{answer:?}");
    String::from_utf8(answer.body).expect("a name")
}

#[track_caller]
fn is_not_ready(sidelane: &Sidelane, reason: &str) {
    let answer = sidelane.get(sidelane.health(), "/ready");
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(answer.head.status == 503 && text.contains(reason), "{text}");
}

#[test]
fn withdrawn_sidecar_gets_nothing_new_and_keeps_what_runs() {
    let (first, go) = service("a");
    let (second, _) = service("b");
    let setup = Setup::of(first.address());
    let relay = Sidelane::spawn("relay", &setup.relay());
    let mut old = Sidelane::start("old", &setup.sidecar(relay.tunnel()));
    wait::until("the announcement", || {
        (request(relay.web(), "GET", get("/")).head.status == 200).then_some(())
    });
    let mut held = Client::connect(relay.web());
    held.send(get("/held"));
    let head = held.head();
    let new = Sidelane::start("new", &Setup::of(second.address()).sidecar(relay.tunnel()));
    wait::until("both to serve", || (ask(relay.web()) == "b").then_some(()));

    let command = drain(&old, &["--withdraw", "--wait", "60s"]);
    wait::until("the acknowledgement", || {
        let page = post(&old, "/-/drain");
        assert_eq!(page["phase"], "withdrawn");
        (page["acknowledged"] == true).then_some(())
    });
    for _ in 0..50 {
        assert_eq!(ask(relay.web()), "b");
    }
    is_not_ready(&old, "draining: withdrawn");
    assert_eq!(old.metric("sidelane_draining", &[]), Some(1.0));
    assert_eq!(old.metric("sidelane_lanes", &[]), Some(2.0), "they stay");
    // A reload takes nothing back.
    let more = Setup::of(first.address()).tunnel("more", first.address());
    old.rewrite(&more.sidecar(relay.tunnel()));
    assert_eq!(old.reload().0, 200);
    for _ in 0..10 {
        assert_eq!(ask(relay.web()), "b");
    }
    assert_eq!(post(&old, "/-/drain")["exchanges"], 1);
    go.send(()).expect("the service waits");
    assert_eq!(held.try_body("GET", head).expect("it ends whole").body, b"begun end");
    ends(command, 0, "1 of 1 relays send nothing new");
    old.signal("TERM");
    assert_eq!(old.ended().code(), Some(0));
    assert_eq!(ask(relay.web()), "b");
    drop(new);
}

#[test]
fn what_runs_for_longer_than_the_wait_is_not_cut_by_it() {
    let (service, go) = service("a");
    let setup = Setup::of(service.address());
    let relay = Sidelane::spawn("relay", &setup.relay());
    let sidecar = Sidelane::start("sidecar", &setup.sidecar(relay.tunnel()));
    wait::until("the announcement", || {
        (request(relay.web(), "GET", get("/")).head.status == 200).then_some(())
    });
    let mut held = Client::connect(relay.web());
    held.send(get("/held"));
    let head = held.head();
    ends(drain(&sidecar, &["--withdraw", "--wait", "0s"]), 5, "1 exchange runs");
    wait::until("nothing new to come here", || {
        (request(relay.web(), "GET", get("/")).head.status == 503).then_some(())
    });
    let line = String::from_utf8_lossy(&request(relay.web(), "GET", get("/")).body).into_owned();
    assert!(line.contains("withdrawn"), "{line}");
    go.send(()).expect("the service waits");
    assert_eq!(held.try_body("GET", head).expect("it ends whole").body, b"begun end");
    ends(drain(&sidecar, &["--withdraw"]), 0, "nothing runs");
}

#[test]
fn a_sidecar_that_connects_once_it_is_withdrawn_serves_nothing() {
    let (service, _) = service("a");
    let setup = Setup::of(service.address());
    let relay = Sidelane::spawn("relay", &setup.relay_with_routes());
    let (web, tunnel) = (relay.web(), relay.tunnel());
    let sidecar = Sidelane::start("sidecar", &setup.sidecar(tunnel));
    wait::until("the sidecar to serve", || {
        (request(web, "GET", get("/")).head.status == 200).then_some(())
    });
    ends(drain(&sidecar, &["--withdraw"]), 0, "nothing runs");
    relay.kill();
    let yaml = setup
        .relay_with_routes()
        .replace("name: web, address: \"127.0.0.1:0\"", &format!("name: web, address: \"{web}\""))
        .replace(
            "tunnel: { address: \"127.0.0.1:0\"",
            &format!("tunnel: {{ address: \"{tunnel}\""),
        );
    let relay = Sidelane::spawn("relay", &yaml);
    relay.until_metric("sidelane_announcements_total", &["accepted"], |count| count >= 1.0);
    assert_eq!(request(web, "GET", get("/")).head.status, 503);
}

#[test]
fn withdrawn_relay_sends_clients_elsewhere_and_serves_them_until_then() {
    let mut stage = Stage::ok();
    let mut kept = stage.connect();
    kept.send(get("/"));
    assert!(!kept.answer("GET").head.list("connection").contains("close"));
    let page = post(&stage.sidelane, "/-/drain");
    assert_eq!((&page["acknowledged"], &page["relays"]), (&true.into(), &serde_json::Value::Null));
    is_not_ready(&stage.sidelane, "draining: withdrawn");
    // A moment is given to a connection that is as young as this one.
    wait::until("the answer that says so", || {
        let mut fresh = stage.connect();
        fresh.send(get("/"));
        let answer = fresh.answer("GET");
        assert_eq!(answer.head.status, 200);
        let closes = answer.head.list("connection").contains("close");
        (closes && fresh.rest().is_empty()).then_some(())
    });
    wait::until("the kept connection to be told", || {
        if kept.try_send(get("/").as_ref()).is_err() {
            return Some(());
        }
        let answer = kept.answer("GET");
        assert_eq!(answer.head.status, 200);
        answer.head.list("connection").contains("close").then_some(())
    });
    assert!(kept.rest().is_empty());
    ends(drain(&stage.sidelane, &["--withdraw"]), 0, "withdrawn; nothing runs");
    ends(drain(&stage.sidelane, &["--wait", "30s"]), 0, "ended");
    assert_eq!(stage.sidelane.ended().code(), Some(0));
    let nobody = Command::new(program())
        .args(["drain", "--admin", &stage.sidelane.admin().to_string()])
        .output()
        .expect("it runs");
    assert_eq!(nobody.status.code(), Some(3));
}

#[test]
fn sigterm_gives_balancers_their_time_and_interrupt_does_not() {
    for (signal, waits) in [("TERM", true), ("INT", false)] {
        let service = Service::ok();
        let text = Setup::of(service.address()).both() + "withdraw_timeout: 1h\n";
        let mut sidelane = Sidelane::start("sidelane", &text);
        sidelane.signal(signal);
        if waits {
            wait::until("/ready to say no", || {
                (sidelane.get(sidelane.health(), "/ready").head.status == 503).then_some(())
            });
            for _ in 0..10 {
                let answer = request(sidelane.web(), "GET", get("/"));
                assert_eq!(answer.head.status, 200);
                assert_eq!(answer.head.list("connection"), "close");
            }
            sidelane.signal(signal);
        }
        assert_eq!(sidelane.ended().code(), Some(0), "{signal}");
    }
}

/// A deadline is no end: what is cut looks cut, in each protocol's words.
#[test]
fn an_answer_that_is_cut_at_the_deadline_looks_cut() {
    let test = "an_answer_that_is_cut_at_the_deadline_looks_cut";
    let Some(curl) = Curl::find(test) else { return };
    // curl: 18 a body that is not whole, 92 a stream of HTTP/2 that was reset.
    for (how, version, codes) in [
        ("content-length: 9\r\n\r\nbegun", "--http1.1", [18, 18]),
        ("transfer-encoding: chunked\r\n\r\n5\r\nbegun\r\n", "--http1.1", [18, 18]),
        ("content-length: 9\r\n\r\nbegun", "--http2-prior-knowledge", [92, 18]),
        ("transfer-encoding: chunked\r\n\r\n5\r\nbegun\r\n", "--http2-prior-knowledge", [92, 92]),
    ] {
        let service = Service::start(move |connection| {
            connection.request()?;
            connection.write(format!("HTTP/1.1 200 OK\r\n{how}"))?;
            connection.closed()
        });
        let mut setup = Setup::of(service.address());
        setup.drain = "1s";
        let relay = Sidelane::spawn("relay", &setup.relay());
        let mut sidecar = Sidelane::start("sidecar", &setup.sidecar(relay.tunnel()));
        relay.until_metric("sidelane_announcements_total", &["accepted"], |count| count >= 1.0);
        let mut client = curl
            .command(relay.web())
            .args(["--no-buffer", version, "http://api.localhost/"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("curl starts");
        let mut begun = [0; 5];
        let out = client.stdout.as_mut().expect("a pipe");
        std::io::Read::read_exact(out, &mut begun).expect("it begins");
        sidecar.signal("TERM");
        let code = client.wait().expect("curl ends").code().expect("a code");
        assert!(codes.contains(&code), "{how:?} {version}: {code}");
        assert_eq!(sidecar.ended().code(), Some(0));
    }
}

/// The relay's end: a WebSocket's client and service hear 1001 of it.
#[test]
fn relay_that_ends_says_goodbye_on_both_sides() {
    let (closes, closed) = mpsc::channel();
    let closes = Mutex::new(closes);
    let service = Service::start(move |connection| {
        let Some(request) = connection.request()? else { return Ok(()) };
        connection.upgrade(&request, "")?;
        loop {
            let frame = connection.frame()?;
            let close = frame.close_code();
            connection.write(Frame::new(frame.opcode, frame.payload).bytes())?;
            if let Some((code, _)) = close {
                // An error means that the test has failed.
                let _ = closes.lock().expect("no panic").send(code);
                return connection.closed();
            }
        }
    });
    let mut setup = Setup::of(service.address()).websocket("{}");
    setup.drain = "2s";
    let mut relay = Sidelane::spawn("relay", &setup.relay());
    let _sidecar = Sidelane::start("sidecar", &setup.sidecar(relay.tunnel()));
    relay.until_metric("sidelane_announcements_total", &["accepted"], |count| count >= 1.0);
    let mut socket = Socket::open(relay.web());
    socket.says_back("hello");
    relay.signal("TERM");
    assert_eq!(socket.closes("the relay ends").0, 1001);
    assert_eq!(closed.recv_timeout(wait::DEADLINE), Ok(1001));
    assert_eq!(relay.ended().code(), Some(0));
}

#[test]
fn nobody_new_is_accepted_once_the_end_has_begun() {
    let mut stage = Stage::ok();
    let web = stage.sidelane.web();
    stage.sidelane.signal("TERM");
    assert_eq!(stage.sidelane.ended().code(), Some(0));
    let refused = TcpStream::connect(web).and_then(|mut stream| stream.write_all(&get("/")));
    refused.expect_err("nobody listens");
}
