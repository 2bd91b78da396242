//! An HTTP proxy of the tests' own, which knows CONNECT and nothing else.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// A host that this proxy knows, and nobody else: this machine.
pub const HOST: &str = "relay.test";

/// Longest head that is read.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// A proxy. It serves until the process ends.
#[derive(Debug)]
pub struct ConnectProxy {
    address: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
}

impl ConnectProxy {
    /// Starts one that lets everybody through, or who presents `user:password` as Basic has it.
    #[must_use]
    pub fn start(credentials: Option<&str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let address = listener.local_addr().expect("its address");
        let heads = Arc::new(Mutex::new(Vec::new()));
        let wanted = credentials.map(|text| format!("basic {}", STANDARD.encode(text)));
        let seen = Arc::clone(&heads);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (seen, wanted) = (Arc::clone(&seen), wanted.clone());
                // An error means that one of the ends has gone.
                thread::spawn(move || serve(stream, wanted.as_deref(), &seen));
            }
        });
        Self { address, heads }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The heads that it was sent.
    #[must_use]
    pub fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn serve(mut client: TcpStream, wanted: Option<&str>, seen: &Mutex<Vec<String>>) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") && head.len() < HEAD_BYTES_MAX {
        let mut byte = [0];
        client.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    seen.lock().unwrap_or_else(PoisonError::into_inner).push(head.clone());
    let presented = head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("proxy-authorization")
            .then(|| value.replacen("Basic", "basic", 1))
    });
    let mut words = head.split(' ');
    let target = words.next().filter(|method| *method == "CONNECT").and_then(|_| words.next());
    let Some(target) = target else {
        return client.write_all(b"HTTP/1.1 405 Method Not Allowed\r\ncontent-length: 0\r\n\r\n");
    };
    if wanted.is_some() && presented.as_deref() != wanted {
        return client.write_all(
            b"HTTP/1.1 407 Proxy Authentication Required\r\nproxy-authenticate: Basic realm=\"test\"\r\n\
              content-length: 0\r\n\r\n",
        );
    }
    let target = target.replacen(HOST, "127.0.0.1", 1);
    let Ok(mut relay) = TcpStream::connect(target) else {
        return client.write_all(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n");
    };
    client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")?;
    let (mut from, mut to) = (client.try_clone()?, relay.try_clone()?);
    let up = thread::spawn(move || {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    let _ = io::copy(&mut relay, &mut client);
    let _ = client.shutdown(Shutdown::Write);
    up.join().expect("no panic");
    Ok(())
}
