//! Nothing is left of an exchange, however it ended.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

use sidelane_e2e::client::Client;
use sidelane_e2e::stage::{Stage, get};
use sidelane_e2e::wait;

/// Exchanges in all, over all clients.
const EXCHANGES: u64 = 4_000;
/// Clients at once.
const CLIENTS: u64 = 16;

/// Steps of a xorshift: every run takes the same ends in the same order per client.
pub(crate) struct Random(u64);

impl Random {
    /// A sequence of its own for each client.
    pub(crate) fn of(client: u64) -> Self {
        Self((client + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// One exchange with one of many ends. Errors are ends, too: only what is left counts.
fn one(relay: std::net::SocketAddr, random: &mut Random) {
    let mut client = Client::connect(relay);
    match random.below(12) {
        0 => {
            client.send(get("/"));
            drop(client.try_answer("GET"));
        }
        1 => client.send(get("/")),
        2 => client.send("GET / HTTP/1.1\r\nHost: api.loc"),
        3 => client
            .send("POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 100\r\n\r\nbegun"),
        4 => {
            client.send(get("/large"));
            drop(client.try_head());
        }
        5 => {
            client.send(get("/crash"));
            drop(client.try_answer("GET"));
        }
        6 => {
            client.send(get("/half"));
            drop(client.try_answer("GET"));
        }
        7 => {
            client.send(get("/garbage"));
            drop(client.try_answer("GET"));
        }
        8 => {
            client.send("GET / HTTP/1.1\r\nHost: nobody.localhost\r\n\r\n");
            drop(client.try_answer("GET"));
        }
        9 => {
            client.send("PUT / HTTP/1.1\r\nHost: api.localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\nzz\r\n");
            drop(client.try_answer("PUT"));
        }
        10 => {
            client.send("PUT /crash HTTP/1.1\r\nHost: api.localhost\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n");
            drop(client.try_head());
        }
        _ => {
            for _ in 0..random.below(5) {
                client.send(get("/"));
                drop(client.try_answer("GET"));
            }
            client.send(get("/large"));
            drop(client.exactly(1000));
        }
    }
}

#[test]
fn thousands_of_random_ends_leave_nothing() {
    let stage = Stage::script(|connection| {
        connection.stop_recording();
        while let Some(request) = connection.request()? {
            match request.target.as_slice() {
                b"/crash" => return connection.crash(),
                b"/half" => {
                    connection.write("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nbegun")?;
                    return connection.crash();
                }
                b"/garbage" => return connection.write("no http\r\n\r\n"),
                b"/large" => {
                    connection.write("HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")?;
                    connection.write(vec![b'.'; 1_000_000])?;
                }
                _ => {
                    connection.body(&request)?;
                    connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
                }
            }
        }
        Ok(())
    });
    // A first round warms pools and allocators: what it leaves is no residue.
    run(&stage, EXCHANGES / 8, 1);
    until_quiet(&stage);
    let descriptors = open_descriptors(&stage);
    let memory = stage.sidelane.memory_resident();

    run(&stage, EXCHANGES, 2);
    until_quiet(&stage);
    assert_eq!(stage.get("/").head.status, 200, "the program still serves");
    wait::until("descriptors to be given back", || {
        // The pool's idle connections, within their limit, may differ from before.
        (open_descriptors(&stage) <= descriptors + 64).then_some(())
    });
    let growth = stage.sidelane.memory_resident().saturating_sub(memory);
    assert!(growth < 32 * 1024 * 1024, "{growth} bytes for {EXCHANGES} exchanges");
}

fn run(stage: &Stage, exchanges: u64, seed: u64) {
    let left = AtomicU64::new(exchanges);
    let relay = stage.sidelane.web();
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let left = &left;
            scope.spawn(move || {
                let mut random = Random((client + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed);
                while left
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
                    .is_ok()
                {
                    one(relay, &mut random);
                }
            });
        }
    });
}

/// Waits until the program says that nothing is in flight, at either end, nor any client connected.
fn until_quiet(stage: &Stage) {
    for name in ["sidelane_exchanges_in_flight", "sidelane_connections"] {
        stage.sidelane.until_metric(name, &[], |count| count == 0.0);
    }
}

fn open_descriptors(stage: &Stage) -> usize {
    let path = format!("/proc/{}/fd", stage.sidelane.id());
    fs::read_dir(path).expect("the program runs").count()
}
