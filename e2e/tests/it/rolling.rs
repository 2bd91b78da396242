//! A rolling restart as an operator does it, under load of clients that take no failure.

use std::net::{SocketAddr, TcpStream};
use std::process::Command;

use sidelane_e2e::balancer::{Backend, Balancer};
use sidelane_e2e::client::request;
use sidelane_e2e::peer::Peer;
use sidelane_e2e::process::{Route, Setup, Sidelane, program};
use sidelane_e2e::service::Service;
use sidelane_e2e::tools::{Node, Python};
use sidelane_e2e::wait;

/// What the clients of `rolling_client.py` speak.
const CASES: [&str; 4] = ["http1", "websocket", "unary", "stream"];

/// Requests between one restart and the next.
const SHARE: f64 = 30.0;

/// Answers `ok` to requests, and WebSockets by what they send.
fn service() -> Service {
    Service::start(|connection| {
        connection.stop_recording();
        while let Some(request) = connection.request()? {
            if request.target == b"/ws" {
                connection.upgrade(&request, "")?;
                return connection.echo();
            }
            connection.body(&request)?;
            connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        }
        Ok(())
    })
}

/// Two relays behind a balancer, two sidecars of the same tunnels, each with a service of its own.
struct Fleet {
    balancer: Balancer,
    relays: Vec<Sidelane>,
    sidecars: Vec<Sidelane>,
    relay_files: Vec<String>,
    sidecar_files: Vec<String>,
    services: Vec<Service>,
}

impl Fleet {
    fn start(rpc: SocketAddr) -> Self {
        let balancer = Balancer::start();
        let services = vec![service(), service()];
        let setup = |service: &Service| {
            let mut setup = Setup::of(service.address()).websocket("{}").grpc("{}");
            setup.tunnels = vec![("web".into(), service.address()), ("rpc".into(), rpc)];
            setup.routes = vec![Route::new("web", "web"), Route::new("rpc", "rpc")];
            setup.drain = "2s";
            setup
        };
        let (mut relays, mut relay_files) = (Vec::new(), Vec::new());
        for name in ["relay 1", "relay 2"] {
            let file = setup(&services[0]).relay() + "withdraw_timeout: 500ms\n";
            let relay = Sidelane::spawn(name, &file);
            // It comes back where it was.
            let (web, tunnel) = (relay.web(), relay.tunnel());
            let any = "address: \"127.0.0.1:0\"";
            let file = file.replacen(any, &format!("address: \"{web}\""), 1).replacen(
                any,
                &format!("address: \"{tunnel}\""),
                1,
            );
            balancer.put(Backend { web, health: relay.health() });
            relay_files.push(file);
            relays.push(relay);
        }
        let both = format!("relays: [\"{}\", \"{}\"]", relays[0].tunnel(), relays[1].tunnel());
        let one = format!("relays: [\"{}\"]", relays[0].tunnel());
        let file = |service| setup(service).sidecar(relays[0].tunnel()).replace(&one, &both);
        let sidecar_files: Vec<_> = services.iter().map(file).collect();
        let sidecars = sidecar_files.iter().zip(["sidecar 1", "sidecar 2"]);
        let sidecars = sidecars.map(|(file, name)| Sidelane::start(name, file)).collect();
        let fleet = Self { balancer, relays, sidecars, relay_files, sidecar_files, services };
        fleet.until_whole();
        fleet
    }

    /// Waits until every sidecar serves at every relay, and the balancer sends clients to all.
    fn until_whole(&self) {
        for relay in &self.relays {
            wait::until("both sidecars at a relay", || {
                let sessions = relay.admin_page("/tunnels")["sessions"].as_array()?.clone();
                let serving = sessions.iter().filter(|session| {
                    session["announcement"].is_u64()
                        && session["unavailable"]
                            .as_object()
                            .is_none_or(|tunnels| tunnels.is_empty())
                });
                (serving.count() == self.sidecars.len()).then_some(())
            });
            wait::until("the balancer to send clients", || {
                self.balancer.sends_to(relay.web()).then_some(())
            });
        }
    }

    /// Waits until some more has passed.
    fn goes_on(&self) {
        let passed = || {
            let of = |relay: &Sidelane| {
                let http = relay.metric("sidelane_exchanges_total", &["protocol_type=\"HTTP\""]);
                http.unwrap_or_default()
            };
            self.relays.iter().map(of).sum::<f64>()
        };
        let before = passed();
        wait::until("the load to go on", || (passed() >= before + SHARE).then_some(()));
    }

    /// Restarts a relay, and waits until the load goes on.
    fn restart_relay(&mut self, index: usize) {
        let relay = &mut self.relays[index];
        let web = relay.web();
        withdraw(relay, "1s");
        wait::until("the balancer to notice", || (!self.balancer.sends_to(web)).then_some(()));
        relay.signal("TERM");
        assert_eq!(relay.ended().code(), Some(0));
        let name = ["relay 1 again", "relay 2 again"][index];
        *relay = Sidelane::spawn(name, &self.relay_files[index]);
        self.balancer.put(Backend { web, health: relay.health() });
        self.until_whole();
        self.goes_on();
    }

    /// Restarts a sidecar, and waits until the load goes on.
    fn restart_sidecar(&mut self, index: usize) {
        let sidecar = &mut self.sidecars[index];
        withdraw(sidecar, "1s");
        sidecar.signal("TERM");
        assert_eq!(sidecar.ended().code(), Some(0));
        let name = ["sidecar 1 again", "sidecar 2 again"][index];
        *sidecar = Sidelane::start(name, &self.sidecar_files[index]);
        self.until_whole();
        self.goes_on();
    }
}

/// As an operator does, or a preStop hook: streams without an end are left to the process's own end.
fn withdraw(sidelane: &Sidelane, wait: &str) {
    let output = Command::new(program())
        .args(["drain", "--withdraw", "--wait", wait, "--admin", &sidelane.admin().to_string()])
        .output()
        .expect("the program starts");
    let code = output.status.code();
    assert!(matches!(code, Some(0 | 5)), "{output:?}");
}

/// Zero failed requests: HTTP/1.1 kept alive, HTTP/2, WebSockets, gRPC unary and streaming.
#[test]
fn rolling_restart_of_relays_and_sidecars_is_not_noticed() {
    let test = "rolling_restart_of_relays_and_sidecars_is_not_noticed";
    let (Some(python), Some(node)) = (Python::find(test), Node::find(test)) else { return };
    let (_peer, rpc) = Peer::service("grpcio", python.script("grpc_server.py"));
    let mut fleet = Fleet::start(rpc);
    let address = fleet.balancer.address();
    let client = |case| Peer::client(case, python.script("rolling_client.py"), case, address);
    let mut clients: Vec<_> = CASES.iter().map(|case| (*case, client(case))).collect();
    let mut http2 = node.script("rolling_h2.mjs");
    http2.arg(address.ip().to_string()).arg(address.port().to_string());
    clients.push(("http2", Peer::start("http2".to_owned(), http2)));
    fleet.goes_on();
    for index in 0..fleet.relays.len() {
        fleet.restart_relay(index);
    }
    for index in 0..fleet.sidecars.len() {
        fleet.restart_sidecar(index);
    }
    let mut report = String::new();
    let mut failed = 0;
    for (case, client) in clients {
        let seen = client.finish();
        report += &format!("{case}: {seen}\n");
        failed += seen["failed"].as_u64().expect("a count");
        assert!(seen["good"].as_u64() > Some(100), "{report}");
        // One that began at the second relay is sent away once.
        assert!(seen["connected"].as_u64() >= Some(2), "it was sent elsewhere: {report}");
    }
    assert_eq!(failed, 0, "{report}");
    println!("{report}");
}

/// A pod that is deleted: the hook, then the application ends, then the sidecar gets its SIGTERM.
#[test]
fn pod_that_goes_is_not_noticed() {
    let Some(python) = Python::find("pod_that_goes_is_not_noticed") else { return };
    let (_peer, rpc) = Peer::service("grpcio", python.script("grpc_server.py"));
    let mut fleet = Fleet::start(rpc);
    let address = fleet.balancer.address();
    let load = Peer::client("http1", python.script("rolling_client.py"), "http1", address);
    fleet.goes_on();
    withdraw(&fleet.sidecars[0], "30s");
    let application = fleet.services.remove(0);
    let at = application.address();
    drop(application);
    wait::until("the application's end", || TcpStream::connect(at).is_err().then_some(()));
    fleet.sidecars[0].signal("TERM");
    assert_eq!(fleet.sidecars[0].ended().code(), Some(0));
    let host = "GET / HTTP/1.1\r\nHost: web.localhost\r\nConnection: close\r\n\r\n";
    for _ in 0..20 {
        assert_eq!(request(address, "GET", host).head.status, 200);
    }
    let seen = load.finish();
    assert_eq!(seen["failed"], 0, "{seen}");
}
