//! Relay, sidecar and service, with a wire between the first two where one is asked for.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use sidelane_e2e::authority::Authority;
use sidelane_e2e::fault::{Shape, Wire};
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::{Connection, Service};

/// One write of a bulk body.
static CHUNK: [u8; 64 * 1024] = [b'.'; 64 * 1024];

/// A wire of 50 ms there and back without loss.
pub(crate) const FAR: Shape = Shape { delay: Duration::from_millis(25), loss: 0.0, seed: 1 };
/// The same that loses a hundredth.
pub(crate) const LOSSY: Shape = Shape { loss: 0.01, ..FAR };

/// What the tunnel is like.
#[derive(Clone, Copy)]
pub(crate) struct Tunnel {
    pub(crate) lanes: usize,
    pub(crate) tls: bool,
    /// Between relay and sidecar; none: they are joined at once.
    pub(crate) wire: Option<Shape>,
}

/// A relay and a sidecar of one thread each.
pub(crate) struct Stage {
    pub(crate) relay: Sidelane,
    pub(crate) sidecar: Sidelane,
    pub(crate) wire: Option<Wire>,
    _authority: Authority,
}

impl Stage {
    pub(crate) fn start(service: SocketAddr, tunnel: Tunnel) -> Self {
        let setup = Setup::of(service).websocket("{}");
        let authority = Authority::new("measure");
        let files = authority.sign(&["127.0.0.1"]);
        let quiet = |yaml: String| yaml.replace("level: debug", "level: warn");
        let mut relay = quiet(setup.relay()).replace("relay:\n", "relay:\n  threads: 1\n");
        if tunnel.tls {
            let pair = format!(
                "{{ cert: \"{}\", key: \"{}\" }}",
                files.cert.display(),
                files.key.display()
            );
            let plain = "tunnel: { address: \"127.0.0.1:0\"";
            relay = relay.replace(plain, &format!("{plain}, tls: {{ certificates: [{pair}] }}"));
        }
        let relay = Sidelane::spawn("relay", &relay);
        let wire = tunnel.wire.map(|shape| Wire::shaped(relay.tunnel(), shape));
        let address = wire.as_ref().map_or_else(|| relay.tunnel(), Wire::address);
        let mut sidecar = quiet(setup.sidecar(address))
            .replace("sidecar:\n", &format!("sidecar:\n  lanes: {}\n", tunnel.lanes));
        if tunnel.tls {
            let ca = format!("{{ ca: \"{}\" }}", authority.ca().display());
            let secure = format!("relays: [{{ address: \"{address}\", tls: {ca} }}]");
            sidecar = sidecar.replace(&format!("relays: [\"{address}\"]"), &secure);
        }
        let sidecar = Sidelane::start("sidecar", &sidecar);
        let accepted = ["result=\"accepted\""];
        relay.until_metric("sidelane_announcements_total", &accepted, |count| count >= 1.0);
        let stage = Self { relay, sidecar, wire, _authority: authority };
        stage.until_lanes(tunnel.lanes);
        stage
    }

    /// Waits until so many lanes are up, as both ends see it.
    pub(crate) fn until_lanes(&self, count: usize) {
        for side in [&self.relay, &self.sidecar] {
            side.until_metric("sidelane_lanes", &[], |lanes| lanes == count as f64);
        }
    }
}

/// Echoes a WebSocket; sends without an end on `/bulk`; answers others by two bytes.
pub(crate) fn serve(connection: &mut Connection) -> io::Result<()> {
    connection.stop_recording();
    while let Some(request) = connection.request()? {
        if request.has("upgrade") {
            connection.upgrade(&request, "")?;
            return connection.echo();
        }
        if request.target == b"/bulk" {
            connection.write("HTTP/1.1 200 OK\r\ncontent-length: 1000000000000000\r\n\r\n")?;
            loop {
                connection.write(CHUNK)?;
            }
        }
        connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
    }
    Ok(())
}

/// A service that does all of it.
pub(crate) fn service() -> Service {
    Service::start(serve)
}
