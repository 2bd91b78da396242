//! `drain`: takes a running process out of service, and waits until nothing runs there any more.
//!
//! Asks for it once, and looks from then on: one that is started in its place meanwhile is not drained.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use http::Method;
use serde_json::Value as Json;

use super::ask::{self, AskError};
use super::{EXIT_LEFT, Failed, print};
use crate::config::value;

/// Between two looks at what is left. Nobody waits long for the last exchange, and a look costs next to
/// nothing.
const LOOK: Duration = Duration::from_millis(100);

/// How far the process is.
const PAGE: &str = "/-/drain";

/// Said where a supervisor was faster than the next look.
const REPLACED: &str = "ended; another process was started in its place\n";

/// Which process is drained, and how far.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Only have others send nothing new: the process stays, and so do its lanes and what runs.
    #[arg(long)]
    withdraw: bool,
    /// How long what runs may take before the command gives up; nothing is cut by it.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = time)]
    wait: Duration,
    /// Admin address of the process; without it that of sidecar.yaml, or 127.0.0.1:9083.
    #[arg(long, value_name = "ADDRESS")]
    admin: Option<String>,
    /// File whose `admin` section says the address.
    #[arg(long, value_name = "FILE", conflicts_with = "admin")]
    file: Option<PathBuf>,
}

fn time(text: &str) -> Result<Duration, String> {
    value::duration(text)
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failed> {
    let address = ask::address(arguments.admin.as_deref(), arguments.file.as_deref())?;
    let until = Instant::now() + arguments.wait;
    if arguments.withdraw { withdraw(&address, until) } else { end(&address, until) }
}

/// Waits until relays have acknowledged, and then until nothing runs.
fn withdraw(address: &str, until: Instant) -> Result<(), Failed> {
    let mut told = String::new();
    let mut page = ask::call(address, &Method::POST, PAGE)?;
    let asked = page["process"].clone();
    loop {
        if page["process"] != asked {
            return print(REPLACED);
        }
        let state = State::of(&page);
        let line = state.line();
        if line != told {
            print(&format!("{line}\n"))?;
            told = line;
        }
        if state.is_done() {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(Failed { code: EXIT_LEFT, message: state.left() });
        }
        std::thread::park_timeout(LOOK);
        page = ask::get(address, PAGE)?;
    }
}

/// Waits until the process has gone.
fn end(address: &str, until: Instant) -> Result<(), Failed> {
    let page = ask::call(address, &Method::POST, "/-/drain?phase=end")?;
    let asked = page["process"].clone();
    print(&format!("ending: {}\n", State::of(&page).running()))?;
    loop {
        match ask::get(address, PAGE) {
            Ok(page) if page["process"] != asked => return print(REPLACED),
            // It goes in the midst of an answer, too: the next look tells.
            Ok(_) | Err(AskError::NotAdmin(_) | AskError::Timeout(_)) => {}
            Err(AskError::Unreachable { .. }) => return print("ended\n"),
            Err(error) => return Err(error.into()),
        }
        if Instant::now() >= until {
            let message = "the process has not ended yet; at its drain_timeout it does".to_owned();
            return Err(Failed { code: EXIT_LEFT, message });
        }
        std::thread::park_timeout(LOOK);
    }
}

/// What is left, as the page says.
struct State {
    exchanges: u64,
    /// Of clients, at a relay.
    connections: u64,
    /// Relays that have acknowledged, and all; `None`: there is no sidecar, or it serves the relay of its
    /// own process.
    relays: Option<(usize, usize)>,
    /// Relays that have not, each with why not where they said so.
    silent: Vec<String>,
}

impl State {
    fn of(page: &Json) -> Self {
        let relays = page["relays"].as_array();
        let is_silent = |relay: &&Json| relay["acknowledged"] != true;
        let silent = relays.into_iter().flatten().filter(is_silent).map(|relay| {
            let name = relay["relay"].as_str().unwrap_or("?");
            match relay["refused"].as_str() {
                Some(why) => format!("{name} ({why})"),
                None => name.to_owned(),
            }
        });
        let silent: Vec<String> = silent.collect();
        Self {
            exchanges: page["exchanges"].as_u64().unwrap_or_default(),
            connections: page["connections"].as_u64().unwrap_or_default(),
            relays: relays.map(|relays| (relays.len() - silent.len(), relays.len())),
            silent,
        }
    }

    fn is_done(&self) -> bool {
        self.exchanges == 0 && self.connections == 0 && self.silent.is_empty()
    }

    fn line(&self) -> String {
        match self.relays {
            Some((knowing, all)) => {
                format!("withdrawn: {knowing} of {all} relays send nothing new; {}", self.running())
            }
            None => format!("withdrawn; {}", self.running()),
        }
    }

    fn running(&self) -> String {
        let exchanges = match self.exchanges {
            0 => "nothing runs".to_owned(),
            1 => "1 exchange runs".to_owned(),
            many => format!("{many} exchanges run"),
        };
        match self.connections {
            0 => exchanges,
            1 => exchanges + ", 1 client is connected",
            many => format!("{exchanges}, {many} clients are connected"),
        }
    }

    fn left(&self) -> String {
        let silent = match self.silent.as_slice() {
            [] => String::new(),
            silent => format!("; not acknowledged by {}", silent.join(", ")),
        };
        format!("--wait is over: {}{silent}", self.running())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    use serde_json::json;

    use super::*;

    /// Answers each question with the next page, and returns what was asked.
    #[track_caller]
    fn asked(
        pages: &'static [&'static str],
        drain: fn(&str, Instant) -> Result<(), Failed>,
    ) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let mut all = String::new();
            for page in pages {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 1024];
                let read = stream.read(&mut request).unwrap();
                let request = String::from_utf8_lossy(&request[..read]).into_owned();
                all += request.split(" HTTP").next().unwrap();
                all += "; ";
                let length = page.len();
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n");
                stream.write_all((head + page).as_bytes()).unwrap();
            }
            all
        });
        let drained = drain(&address, Instant::now() + Duration::from_secs(60));
        drained.unwrap_or_else(|failed| panic!("{}", failed.message));
        server.join().unwrap()
    }

    #[test]
    fn a_process_that_is_started_in_its_place_is_not_drained() {
        let runs = r#"{ "process": "a", "phase": "withdrawn", "exchanges": 1 }"#;
        let other = r#"{ "process": "b", "phase": "running", "exchanges": 5 }"#;
        let pages: &[&str] = &[runs, runs, other];
        assert_eq!(
            asked(Box::leak(Box::from(pages)), end),
            "POST /-/drain?phase=end; GET /-/drain; GET /-/drain; "
        );
        assert_eq!(
            asked(Box::leak(Box::from(pages)), withdraw),
            "POST /-/drain; GET /-/drain; GET /-/drain; "
        );
    }

    #[track_caller]
    fn check(page: &Json, line: &str, left: &str, is_done: bool) {
        let state = State::of(page);
        assert_eq!(
            (state.line(), state.left(), state.is_done()),
            (line.into(), left.into(), is_done)
        );
    }

    #[test]
    fn what_is_left_is_told() {
        let relay = |name: &str, acknowledged: bool, refused: Json| json!({ "relay": name, "acknowledged": acknowledged, "refused": refused });
        check(
            &json!({ "exchanges": 0, "connections": 0, "relays": null }),
            "withdrawn; nothing runs",
            "--wait is over: nothing runs",
            true,
        );
        check(
            &json!({ "exchanges": 2, "connections": 3, "relays": null }),
            "withdrawn; 2 exchanges run, 3 clients are connected",
            "--wait is over: 2 exchanges run, 3 clients are connected",
            false,
        );
        check(
            &json!({ "exchanges": 1, "relays": [relay("a:1", true, Json::Null)] }),
            "withdrawn: 1 of 1 relays send nothing new; 1 exchange runs",
            "--wait is over: 1 exchange runs",
            false,
        );
        let refused = relay("b:1", false, json!("route x: taken"));
        check(
            &json!({ "exchanges": 0, "relays": [relay("a:1", false, Json::Null), refused] }),
            "withdrawn: 0 of 2 relays send nothing new; nothing runs",
            "--wait is over: nothing runs; not acknowledged by a:1, b:1 (route x: taken)",
            false,
        );
        check(
            &json!({ "relays": [] }),
            "withdrawn: 0 of 0 relays send nothing new; nothing runs",
            "--wait is over: nothing runs",
            true,
        );
    }
}
