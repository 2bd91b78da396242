//! Certificates that are replaced while clients of all kinds are at work: nobody meets an error, and who
//! connects next sees the new one.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use sidelane_e2e::authority::Authority;
use sidelane_e2e::load::Load;
use sidelane_e2e::peer::Peer;
use sidelane_e2e::process::{Route, Setup};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::get;
use sidelane_e2e::tls::{Connector, chain};
use sidelane_e2e::tools::Python;
use sidelane_e2e::wait;
use sidelane_e2e::websocket::{Frame, Socket};

use crate::tls_entry::{listener, reload, start};

const HOST: &str = "api.localhost";

/// Certificates that follow one another.
const REPLACED: usize = 8;

/// A thread whose WebSocket says things and hears them back.
struct Talk {
    stop: Arc<AtomicBool>,
    messages: Arc<AtomicU64>,
    /// Panics at the first error.
    thread: JoinHandle<()>,
}

impl Talk {
    /// `of_each`: messages of one connection.
    fn start(connector: Connector, web: SocketAddr, of_each: u64) -> Self {
        let (stop, messages) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, said) = (Arc::clone(&stop), Arc::clone(&messages));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                let mut socket = Socket::open_over(connector.connect(web, HOST), "/ws", "");
                for _ in 0..of_each {
                    socket.says_back("hello");
                    said.fetch_add(1, Ordering::SeqCst);
                    if stopped.load(Ordering::SeqCst) {
                        break;
                    }
                }
            }
        });
        Self { stop, messages, thread }
    }

    fn goes_on(&self) {
        let from = self.messages.load(Ordering::SeqCst);
        wait::until("messages under load", || {
            let now = self.messages.load(Ordering::SeqCst);
            (now > from + 10 || self.thread.is_finished()).then_some(())
        });
    }

    fn end(self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().expect("no error");
        self.messages.load(Ordering::SeqCst)
    }
}

#[test]
fn certificates_are_replaced_under_load_without_an_error() {
    let Some(python) = Python::find("certificates_are_replaced_under_load_without_an_error") else {
        return;
    };
    let authority = Authority::new("ca");
    let mut files = authority.sign(&[HOST]);
    let service = Service::start(|connection| {
        while let Some(request) = connection.request()? {
            if request.all("upgrade").next().is_some() {
                connection.upgrade(&request, "")?;
                loop {
                    let frame = connection.frame()?;
                    connection.write(Frame { mask: None, ..frame }.bytes())?;
                }
            }
            connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        }
        Ok(())
    });
    let (_grpc, grpc) = Peer::service("grpcio", python.script("grpc_server.py"));
    let mut setup = Setup::of(service.address()).websocket("{}").grpc("{}").tunnel("rpc", grpc);
    setup.routes.push(Route::new("api", "rpc").under("/e2e.Peer").named("rpc"));
    let sidelane = start(&setup, &[&listener(&[&files], "")], "");
    let web = sidelane.web();
    let connector = || Connector::new(&authority.ca());

    let target = Arc::new(Mutex::new(web));
    let load = |keeps: bool| Load::secure(Arc::clone(&target), get("/"), keeps, connector(), HOST);
    let loads = [load(true), load(false)];
    let talks = [u64::MAX, 5].map(|of_each| Talk::start(connector(), web, of_each));
    let mut command = python.script("grpc_client.py");
    command.env("SIDELANE_E2E_CA", authority.ca());
    let mut rpcs = Peer::client("grpcio", command, "load", web);
    assert_eq!(rpcs.line()["calls"], true);

    let shown = || {
        let client = connector().connect(web, HOST);
        client.tls().peer_certificates().expect("a certificate").to_vec()
    };
    for turn in 0..REPLACED {
        let old = chain(&files.cert);
        files = authority.sign(&[HOST]);
        let new = chain(&files.cert);
        assert_ne!(old, new);
        if turn == 0 {
            // By itself: the program looks at its files.
            wait::until("the new certificate", || (shown() == new).then_some(()));
        } else {
            reload(&sidelane);
            assert_eq!(shown(), new, "the next handshake");
        }
        loads.iter().for_each(|load| load.goes_on(10));
        talks.iter().for_each(Talk::goes_on);
    }
    for load in loads {
        assert!(load.end().expect("no error") > 0);
    }
    for talk in talks {
        assert!(talk.end() > 0);
    }
    let seen = rpcs.finish();
    assert_eq!(seen["errors"], serde_json::json!([]), "{seen}");
    assert!(seen["calls"].as_u64() > Some(0), "{seen}");
    assert_eq!(
        sidelane.metric("sidelane_exchanges_total", &["role=\"relay\"", "code=\"no-sidecar\""]),
        None
    );
}
