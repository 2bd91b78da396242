//! Bodies as they flow: event by event, under backpressure, and broken off from either side.

use std::io::{self, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use sidelane_e2e::client::{Client, values};
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::{Connection, Service};
use sidelane_e2e::stage::{Stage, get};
use sidelane_e2e::tools::{Curl, Python};
use sidelane_e2e::wait;

/// One write of a large body.
static CHUNK: [u8; 64 * 1024] = [b'.'; 64 * 1024];
/// A body that no buffer holds by chance.
const HUGE_BYTES: u64 = 512 * 1024 * 1024;
/// How much memory a body may cost while its reader sleeps: the exchange's window (4 MiB at most)
/// at both ends of the tunnel, socket buffers' copies, and room for the allocator.
const MEMORY_GROWTH_MAX: u64 = 48 * 1024 * 1024;
/// How much may be on its way while a reader sleeps: the windows above, and the kernel's socket
/// buffers at four places.
const IN_FLIGHT_MAX: u64 = 64 * 1024 * 1024;

#[test]
fn events_arrive_one_by_one() {
    let (seen, next) = mpsc::channel::<()>();
    let next = Mutex::new(next);
    let stage = Stage::script(move |connection| {
        connection.exchange()?;
        connection.write("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")?;
        for number in 0..20 {
            let event = format!("data: {number}\n\n");
            connection.write(format!("{:x}\r\n{event}\r\n", event.len()))?;
            // The next event is not made before the client has this one: nothing may hold it back.
            next.lock()
                .expect("no panic")
                .recv_timeout(wait::DEADLINE)
                .map_err(io::Error::other)?;
        }
        connection.write("0\r\n\r\n")
    });
    let mut client = stage.connect();
    client.send(get("/"));
    let head = client.head();
    assert_eq!(head.first("content-type"), Some("text/event-stream"));
    for number in 0..20 {
        let event = client.chunk().unwrap().expect("an event");
        assert_eq!(String::from_utf8_lossy(&event), format!("data: {number}\n\n"));
        seen.send(()).unwrap();
    }
    assert_eq!(client.chunk().unwrap(), None);
}

#[test]
fn head_arrives_before_the_body_is_made() {
    let (seen, next) = mpsc::channel::<()>();
    let next = Mutex::new(next);
    let stage = Stage::script(move |connection| {
        connection.exchange()?;
        connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")?;
        next.lock().expect("no panic").recv_timeout(wait::DEADLINE).map_err(io::Error::other)?;
        connection.write("ok")
    });
    let mut client = stage.connect();
    client.send(get("/"));
    let head = client.head();
    seen.send(()).unwrap();
    assert_eq!(client.try_body("GET", head).unwrap().body, b"ok");
}

#[test]
fn upload_reaches_the_service_piece_by_piece() {
    // The service answers each byte before the client sends the next: both directions flow at once.
    let stage = Stage::script(|connection| {
        connection.request()?;
        connection.write("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")?;
        for _ in 0..10 {
            // 1 CRLF x CRLF
            let chunk = connection.exactly(6)?;
            connection.write(chunk)?;
        }
        connection.write("0\r\n\r\n")?;
        connection.exactly(5).map(drop)
    });
    let mut client = stage.connect();
    client.send("POST / HTTP/1.1\r\nHost: api.localhost\r\nTransfer-Encoding: chunked\r\n\r\n");
    assert_eq!(client.head().status, 200, "an answer may begin before the request has ended");
    for number in 0..10_u8 {
        client.send([b"1\r\n".as_slice(), &[b'0' + number], b"\r\n"].concat());
        assert_eq!(client.chunk().unwrap().unwrap(), [b'0' + number]);
    }
    client.send("0\r\n\r\n");
    assert_eq!(client.chunk().unwrap(), None);
}

#[test]
fn answer_before_the_upload_ends_passes() {
    let stage = Stage::script(|connection| {
        connection.request()?;
        connection
            .write("HTTP/1.1 413 Too Large\r\nconnection: close\r\ncontent-length: 3\r\n\r\nbig")?;
        connection.closed()
    });
    let mut client = stage.connect();
    client.send("POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 1000000\r\n\r\nbegun");
    let answer = client.answer("POST");
    assert_eq!((answer.head.status, answer.body.as_slice()), (413, b"big".as_slice()));
}

#[test]
fn http2_uploads_and_many_streams_pass() {
    let Some(python) = Python::find("http2_uploads_and_many_streams_pass") else { return };
    let stage = Stage::script(|connection| {
        connection.stop_recording();
        while let Some(request) = connection.exchange()? {
            let body = request.body.bytes;
            connection
                .write(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len()))?;
            connection.write(body)?;
        }
        Ok(())
    });
    let seen = python.run("h2-upload", stage.sidelane.web());
    assert_eq!(seen["same"], true, "{seen}");
    assert_eq!(seen["body"], 8 * 1024 * 1024);
    let seen = python.run("h2-many", stage.sidelane.web());
    let statuses = seen["statuses"].as_array().unwrap();
    assert_eq!(statuses.len(), 100);
    assert!(statuses.iter().all(|status| status == 200), "{seen}");
}

/// Writes a body of [`HUGE_BYTES`] and counts what the kernel took.
fn pour(connection: &mut Connection, poured: &AtomicU64) -> io::Result<()> {
    connection.request()?;
    connection.write(format!("HTTP/1.1 200 OK\r\ncontent-length: {HUGE_BYTES}\r\n\r\n"))?;
    while poured.load(Ordering::SeqCst) < HUGE_BYTES {
        connection.write(CHUNK)?;
        poured.fetch_add(CHUNK.len() as u64, Ordering::SeqCst);
    }
    Ok(())
}

/// Waits until a counter has moved, and then stood still for a second.
fn until_still(counter: &AtomicU64) -> u64 {
    let mut last = (0, Instant::now());
    wait::until("a writer that is held back", || {
        let count = counter.load(Ordering::SeqCst);
        if count != last.0 || count == 0 {
            last = (count, Instant::now());
        }
        (last.1.elapsed() > Duration::from_secs(1)).then_some(count)
    })
}

#[test]
fn huge_download_through_a_slow_reader_costs_no_memory() {
    let poured = Arc::new(AtomicU64::new(0));
    let stage = Stage::script({
        let poured = Arc::clone(&poured);
        move |connection| {
            connection.stop_recording();
            pour(connection, &poured)
        }
    });
    let before = stage.sidelane.memory_resident();
    let mut client = stage.connect();
    client.send(get("/"));
    let head = client.head();
    assert_eq!(head.first("content-length"), Some(HUGE_BYTES.to_string().as_str()));

    // The client reads nothing: everything between the two must come to rest.
    let in_flight = until_still(&poured);
    assert!(in_flight < IN_FLIGHT_MAX, "{in_flight} bytes on their way to a reader that sleeps");

    let mut read = 0;
    while read < HUGE_BYTES {
        read += client.exactly(CHUNK.len()).unwrap().len() as u64;
    }
    assert_eq!(poured.load(Ordering::SeqCst), HUGE_BYTES);
    let growth = stage.sidelane.memory_peak().saturating_sub(before);
    assert!(growth < MEMORY_GROWTH_MAX, "{growth} bytes for {HUGE_BYTES}");
}

#[test]
fn huge_upload_to_a_slow_service_costs_no_memory() {
    let (go, gone) = mpsc::channel::<()>();
    let gone = Mutex::new(gone);
    let stage = Stage::script(move |connection| {
        connection.request()?;
        connection.stop_recording();
        gone.lock().expect("no panic").recv_timeout(wait::DEADLINE).map_err(io::Error::other)?;
        let mut read = 0;
        while read < HUGE_BYTES {
            read += connection.some()?.len() as u64;
        }
        connection.write(format!("HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-read: {read}\r\n\r\n"))
    });
    let before = stage.sidelane.memory_resident();
    let sent = Arc::new(AtomicU64::new(0));
    let mut stream = TcpStream::connect(stage.sidelane.web()).unwrap();
    let mut answers = stream.try_clone().unwrap();
    let writer = std::thread::spawn({
        let sent = Arc::clone(&sent);
        move || {
            let head = format!(
                "POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: {HUGE_BYTES}\r\n\r\n"
            );
            stream.write_all(head.as_bytes()).unwrap();
            while sent.load(Ordering::SeqCst) < HUGE_BYTES {
                stream.write_all(&CHUNK).unwrap();
                sent.fetch_add(CHUNK.len() as u64, Ordering::SeqCst);
            }
            stream
        }
    });
    let in_flight = until_still(&sent);
    assert!(in_flight < IN_FLIGHT_MAX, "{in_flight} bytes on their way to a service that sleeps");
    go.send(()).unwrap();
    drop(writer.join().unwrap());
    let mut answer = [0; 12];
    answers.set_read_timeout(Some(wait::DEADLINE)).unwrap();
    io::Read::read_exact(&mut answers, &mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
    let growth = stage.sidelane.memory_peak().saturating_sub(before);
    assert!(growth < MEMORY_GROWTH_MAX, "{growth} bytes for {HUGE_BYTES}");
}

#[test]
fn slow_reader_holds_nobody_else_back() {
    let stage = Stage::script(|connection| {
        connection.stop_recording();
        while let Some(request) = connection.request()? {
            if request.target == b"/huge" {
                connection
                    .write(format!("HTTP/1.1 200 OK\r\ncontent-length: {HUGE_BYTES}\r\n\r\n"))?;
                loop {
                    connection.write(CHUNK)?;
                }
            }
            connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        }
        Ok(())
    });
    let mut sleepers: Vec<Client> = (0..8).map(|_| stage.connect()).collect();
    for client in &mut sleepers {
        client.send(get("/huge"));
        assert_eq!(client.head().status, 200);
    }
    for _ in 0..100 {
        assert_eq!(stage.get("/small").body, b"ok");
    }
}

#[test]
fn client_that_leaves_in_mid_answer_cancels_the_request() {
    let stage = Stage::script(|connection| {
        connection.stop_recording();
        connection.request()?;
        connection.write("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")?;
        loop {
            connection.write("4\r\nmore\r\n")?;
            std::thread::park_timeout(Duration::from_millis(1));
        }
    });
    let mut client = stage.connect();
    client.send(get("/"));
    assert_eq!(client.head().status, 200);
    assert!(client.chunk().unwrap().is_some());
    drop(client);
    stage.service.until("the service's connection to close", |records| {
        records.first().is_some_and(|record| record.closed)
    });
}

#[test]
fn client_that_leaves_before_the_answer_cancels_the_request() {
    let stage = Stage::script(|connection| {
        connection.request()?;
        // Never answers; returns once the peer has closed.
        connection.closed()
    });
    let mut client = stage.connect();
    client.send(get("/"));
    stage.service.until("the request", |records| {
        records.first().is_some_and(|record| !record.received.is_empty())
    });
    drop(client);
    stage.service.until("the service's connection to close", |records| records[0].closed);
}

#[test]
fn client_that_leaves_in_mid_upload_cancels_the_request() {
    let stage = Stage::script(|connection| {
        connection.request()?;
        connection.closed()
    });
    let mut client = stage.connect();
    client.send("POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 1000\r\n\r\nbegun");
    stage.service.until("the body's begin", |records| {
        records.first().is_some_and(|record| record.received.ends_with(b"begun"))
    });
    drop(client);
    stage.service.until("the service's connection to close", |records| records[0].closed);
}

#[test]
fn http2_stream_reset_cancels_its_request_alone() {
    let Some(python) = Python::find("http2_stream_reset_cancels_its_request_alone") else { return };
    let stage = Stage::script(|connection| {
        connection.stop_recording();
        while let Some(request) = connection.request()? {
            if request.target == b"/endless" {
                connection.write("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")?;
                loop {
                    connection.write("4\r\nmore\r\n")?;
                    std::thread::park_timeout(Duration::from_millis(1));
                }
            }
            connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        }
        Ok(())
    });
    let seen = python.run("h2-cancel", stage.sidelane.web());
    assert_eq!(seen["status"], 200, "{seen}");
    stage.service.until("the endless connection to close", |records| records[0].closed);
}

#[test]
fn service_that_leaves_before_the_answer_is_502() {
    let stage = Stage::script(|connection| {
        connection.exchange()?;
        connection.crash()
    });
    let answer =
        stage.ask("POST", "POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 3\r\n\r\nabc");
    assert_eq!(answer.head.status, 502);
    assert_eq!(answer.head.first("x-sidelane-error"), Some("service-reset"));
}

#[test]
fn service_that_leaves_in_mid_answer_never_looks_complete() {
    for (name, head) in [
        ("fixed", "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nbegun"),
        ("chunked", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nbegun\r\n"),
        ("inside a chunk", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n50\r\nbegun"),
    ] {
        let stage = Stage::script(move |connection| {
            connection.exchange()?;
            connection.write(head)?;
            connection.crash()
        });
        let mut client = stage.connect();
        client.send(get("/"));
        let outcome = client.try_answer("GET");
        match outcome {
            Err(_) => drop(client.rest()),
            // The service was gone before its head had passed.
            Ok(answer) => assert_eq!(answer.head.status, 502, "{name}: {answer:?}"),
        }
    }
}

#[test]
fn curl_notices_a_broken_answer() {
    let Some(curl) = Curl::find("curl_notices_a_broken_answer") else { return };
    let stage = Stage::script(|connection| {
        connection.exchange()?;
        connection.write("HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\nbegun")?;
        connection.crash()
    });
    // 18: partial file; 92: HTTP/2 stream error.
    for (flag, codes) in [("--http1.1", [18, 56]), ("--http2-prior-knowledge", [92, 18])] {
        let output = curl.run(stage.sidelane.web(), [flag, "--fail", "http://api.localhost/"]);
        let code = output.status.code().unwrap_or(-1);
        // 22: the service was gone before its head had passed (502).
        assert!(codes.contains(&code) || code == 22, "{flag}: {code}");
    }
}

#[test]
fn one_connection_carries_many_protocols_of_framing() {
    // Head, chunk and trailer bytes one at a time: nothing may depend on how bytes are cut.
    let stage = Stage::ok();
    let mut client = stage.connect();
    let bytes = b"POST / HTTP/1.1\r\nHost: api.localhost\r\nTransfer-Encoding: chunked\r\nTrailer: t\r\n\r\n3\r\nabc\r\n0\r\nt: 1\r\n\r\n";
    for byte in bytes {
        client.send([*byte]);
    }
    assert_eq!(client.answer("POST").head.status, 200);
    let request = stage.service.only_request();
    assert_eq!(request.body.bytes, b"abc");
    assert_eq!(values(&request.body.trailers, "t").collect::<Vec<_>>(), [b"1"]);
}

#[test]
fn second_service_is_reached_by_its_path() {
    let (first, second) = (
        Service::answering("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n1"),
        Service::answering("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n2"),
    );
    let mut route = sidelane_e2e::process::Route::new("api", "second").under("/v2");
    route.name = "api-v2".to_owned();
    let setup = Setup::of(first.address()).tunnel("second", second.address()).route(route);
    let sidelane = Sidelane::both(&setup);
    for (path, body) in [("/", "1"), ("/v2", "2"), ("/v2/x", "2"), ("/v22", "1"), ("/V2", "1")] {
        let answer = sidelane_e2e::client::request(sidelane.web(), "GET", get(path));
        assert_eq!(String::from_utf8_lossy(&answer.body), body, "{path}");
    }
}
