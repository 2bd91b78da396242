//! Several sidecars that serve one tunnel, and several relays that one sidecar serves at.

mod moves;
mod relays;
mod share;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use sidelane_e2e::client::{Answer, request};
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::wait;

/// A service that answers with its name, and holds what is asked of `/hold` until it is let go.
pub(crate) struct Named {
    pub(crate) name: &'static str,
    pub(crate) service: Service,
    is_well: Arc<AtomicBool>,
    held: Arc<Held>,
}

#[derive(Default)]
struct Held {
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Named {
    pub(crate) fn start(name: &'static str) -> Self {
        let is_well = Arc::new(AtomicBool::new(true));
        let held = Arc::new(Held::default());
        let (well, hold) = (Arc::clone(&is_well), Arc::clone(&held));
        let service = Service::start(move |connection| {
            while let Some(request) = connection.exchange()? {
                let status = match request.target.as_slice() {
                    b"/health" if !well.load(Ordering::SeqCst) => "503 Service Unavailable",
                    b"/hold" => {
                        hold.wait();
                        "200 OK"
                    }
                    _ => "200 OK",
                };
                let length = name.len();
                connection.write(format!(
                    "HTTP/1.1 {status}\r\ncontent-length: {length}\r\n\r\n{name}"
                ))?;
            }
            Ok(())
        });
        Self { name, service, is_well, held }
    }

    pub(crate) fn set_well(&self, is_well: bool) {
        self.is_well.store(is_well, Ordering::SeqCst);
    }

    /// How many requests are held.
    pub(crate) fn holds(&self) -> usize {
        self.held.state.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// Lets go of what is held, and holds nothing from here on.
    pub(crate) fn let_go(&self) {
        self.held.state.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.held.changed.notify_all();
    }

    /// How many requests of this method it was sent.
    pub(crate) fn count(&self, method: &str) -> usize {
        self.service.requests().iter().filter(|request| request.method == method).count()
    }
}

impl Held {
    fn wait(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 += 1;
        while !state.1 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Of one service, as `api`.
pub(crate) fn setup(service: SocketAddr) -> Setup {
    Setup { drain: "2s", ..Setup::of(service) }
}

/// A sidecar's file; `tunnel` and `route` are keys beside those that are there (`, weight: 3`).
pub(crate) fn sidecar_yaml(
    service: SocketAddr,
    relay: SocketAddr,
    tunnel: &str,
    route: &str,
) -> String {
    let yaml = setup(service).sidecar(relay);
    let with = |yaml: &str, end: &str, more: &str| {
        assert!(yaml.contains(end), "{yaml}");
        yaml.replace(end, &format!("{}{more} }}", end.trim_end_matches(" }")))
    };
    let yaml = with(&yaml, &format!("service: \"{service}\" }}"), tunnel);
    with(&yaml, "tunnel: api }", route)
}

/// A relay's file with these keys of `relay.tunnel` beside its address.
pub(crate) fn relay_yaml(tunnel: &str) -> String {
    let plain = "tunnel: { address: \"127.0.0.1:0\"";
    let yaml = setup(([127, 0, 0, 1], 1).into()).relay();
    assert!(yaml.contains(plain), "{yaml}");
    yaml.replace(plain, &format!("{plain}{tunnel}"))
}

/// Two sidecars of one name at one relay, each with a service of its own.
pub(crate) struct Two {
    pub(crate) relay: Sidelane,
    pub(crate) one: Sidelane,
    pub(crate) two: Sidelane,
    pub(crate) services: [Named; 2],
}

impl Two {
    /// With keys of both sidecars' tunnels, and of both sidecars' routes.
    pub(crate) fn with(relay: &str, tunnels: [&str; 2], route: &str) -> Self {
        let services = [Named::start("one"), Named::start("two")];
        let relay = Sidelane::spawn("relay", relay);
        let start = |index: usize, name: &'static str| {
            let service = services[index].service.address();
            Sidelane::start(name, &sidecar_yaml(service, relay.tunnel(), tunnels[index], route))
        };
        let (one, two) = (start(0, "sidecar 1"), start(1, "sidecar 2"));
        until_serving(&relay, 2);
        Self { relay, one, two, services }
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        get(self.relay.web(), path, "")
    }

    /// How often each service answers so many requests.
    pub(crate) fn answers(&self, count: usize) -> BTreeMap<String, usize> {
        let mut answers = BTreeMap::new();
        for _ in 0..count {
            let answer = self.get("/");
            assert_eq!(answer.head.status, 200, "{answer:?}");
            *answers.entry(text(&answer)).or_default() += 1;
        }
        answers
    }
}

pub(crate) fn text(answer: &Answer) -> String {
    String::from_utf8_lossy(&answer.body).into_owned()
}

/// A request with further lines of its head.
pub(crate) fn get(relay: SocketAddr, path: &str, fields: &str) -> Answer {
    let head =
        format!("GET {path} HTTP/1.1\r\nhost: api.localhost\r\n{fields}connection: close\r\n\r\n");
    request(relay, "GET", head)
}

/// Waits until so many sidecars serve the tunnel at a relay.
pub(crate) fn until_serving(relay: &Sidelane, count: usize) {
    wait::until("sidecars that serve", || {
        let page = relay.admin_page("/tunnels");
        let serving = page["tunnels"][0]["serving"].as_array()?;
        let open = serving.iter().filter(|one| one["open"] == true).count();
        (open == count).then_some(())
    });
}
