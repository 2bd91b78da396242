//! A page in a browser, asked and clicked by way of the browser's debugger.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};

use serde_json::{Value, json};

use crate::client;
use crate::tools::Window;
use crate::wait;
use crate::websocket::{Frame, Socket, TEXT};

/// The page that a [`Window`] shows.
#[derive(Debug)]
pub struct Page {
    socket: Socket,
    /// Number of the next command; an answer carries its command's.
    next: u64,
}

impl Window {
    /// Returns the page, once the browser shows one.
    #[must_use]
    pub fn page(&self) -> Page {
        let file = self.profile.path().join("DevToolsActivePort");
        let port = wait::until("the browser's debugger", || {
            fs::read_to_string(&file).ok()?.lines().next()?.parse().ok()
        });
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let path = wait::until("a page in the browser", || {
            let request = "GET /json/list HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
            let answer = client::request(address, "GET", request);
            let targets: Vec<Value> = serde_json::from_slice(&answer.body).ok()?;
            let page = targets.iter().find(|target| target["type"] == "page")?;
            let url = page["webSocketDebuggerUrl"].as_str()?;
            url.find("/devtools/").map(|at| url[at..].to_owned())
        });
        Page { socket: Socket::open_with(address, &path, ""), next: 1 }
    }
}

impl Page {
    /// Returns what an expression of JavaScript yields; null while the page has no such thing yet.
    #[must_use]
    pub fn evaluate(&mut self, expression: &str) -> Value {
        let id = self.next;
        self.next += 1;
        let command = json!({
            "id": id,
            "method": "Runtime.evaluate",
            "params": { "expression": expression, "returnByValue": true },
        });
        self.socket.send(Frame::new(TEXT, command.to_string()));
        loop {
            let frame = self.socket.frame();
            let answer: Value = serde_json::from_slice(&frame.payload).expect("JSON");
            // Events carry no id.
            if answer["id"] == id {
                return answer["result"]["result"]["value"].clone();
            }
        }
    }

    /// Waits until an expression yields a value that fulfils a condition.
    pub fn until(&mut self, expression: &str, condition: impl Fn(&Value) -> bool) {
        let mut last = Value::Null;
        wait::until(expression, || {
            let value = self.evaluate(expression);
            if value != last {
                eprintln!("{expression}: {value}");
                last.clone_from(&value);
            }
            condition(&value).then_some(())
        });
    }
}
