//! The demo's page in a browser: HTTP, events and a WebSocket of one page, through the tunnel.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use sidelane_e2e::browser::Page;
use sidelane_e2e::process::{Setup, Sidelane, build_directory};
use sidelane_e2e::tools::Chromium;

/// The service that `cargo demo` shows. Killed when dropped.
pub(crate) struct Demo {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Demo {
    pub(crate) fn start() -> Self {
        let mut child = Command::new(build_directory().join("sidelane-demo-service"))
            .arg("127.0.0.1:0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the demo service starts");
        let output = child.stdout.take().expect("it is piped");
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line).expect("it says where it listens");
        let address = line.trim_end().trim_end_matches('/').rsplit('/').next();
        let address = address.and_then(|text| text.parse().ok()).expect("an address");
        Self { child, address }
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the page lists: kind and text of each message.
const MESSAGES: &str = "[...document.querySelectorAll('#messages li')].map((li) => `${li.className} ${li.textContent}`)";

fn until_state(page: &mut Page, state: &str) {
    page.until("document.getElementById('state')?.textContent", |found| found == state);
}

pub(crate) fn until_messages(page: &mut Page, messages: &[&str]) {
    page.until(MESSAGES, |found| found == &Value::from(messages));
}

#[test]
fn the_demo_page_talks_over_its_websocket() {
    let Some(chromium) = Chromium::find("the_demo_page_talks_over_its_websocket") else { return };
    let demo = Demo::start();
    let sidelane = Sidelane::both(&Setup::of(demo.address).websocket("{}"));
    let url = format!("http://api.localhost:{}/?echo=hello", sidelane.web().port());
    let window = chromium.open(&url);
    let mut page = window.page();

    until_messages(&mut page, &["sent hello", "received hello"]);
    until_state(&mut page, "connected");
    // The page and its events come by HTTP, beside the WebSocket.
    page.until("document.getElementById('events')?.textContent", |events| {
        events.as_str().is_some_and(|text| text.starts_with("event "))
    });

    let _ = page.evaluate("document.getElementById('text').value = 'grüße <b>'");
    let _ = page.evaluate("document.getElementById('send').click()");
    let typed = ["sent hello", "received hello", "sent grüße <b>", "received grüße <b>"];
    until_messages(&mut page, &typed);

    let _ = page.evaluate("document.getElementById('toggle').click()");
    until_state(&mut page, "closed");
    let closed = [&typed[..], &["closed closed: 1000 "]].concat();
    until_messages(&mut page, &closed);

    let _ = page.evaluate("document.getElementById('toggle').click()");
    until_messages(&mut page, &[&closed[..], &["sent hello", "received hello"]].concat());
    until_state(&mut page, "connected");
}
