//! What `expose` prints while it runs: the address, what becomes of the relay, a line for each exchange.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::pin::pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::oneshot;

use crate::cli::Paint;
use crate::cli::text::{bytes, printable};
use crate::credentials::NOT_TUNNEL;
use crate::metrics::Ended;
use crate::process::Followed;
use crate::sidecar::RelayAnswer;

/// Longest path of a line; what is longer wraps on most terminals.
const TARGET_CHARS_MAX: usize = 80;

/// How a relay goes on where it tells that another session holds a route. This process ends instead.
const WAITS: &str = ", and this document waits";

/// What is missing where the tunnel may not be claimed.
const NEEDS_TUNNELS: &str =
    "the principal's entry under relay.credentials needs tunnels: [\"expose-*\"]";

/// For a relay's first answer before it is said that there is none.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is known from the start.
pub(super) struct View {
    /// The service.
    pub(super) service: String,
    pub(super) subdomain: String,
    /// The relay runs in this process.
    pub(super) is_embedded: bool,
    /// The user chose the subdomain.
    pub(super) is_named: bool,
    pub(super) paint: Paint,
}

/// How things stand with the relay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// It has not answered yet.
    #[default]
    Waiting,
    /// It has accepted the address.
    Accepted,
    /// It had, and is gone.
    Lost,
}

/// What is to be done after a relay's answer.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    Print(String),
    Fail(String),
}

/// Prints until `finish` is done or dropped. Never waits for a slow reader but here.
pub(super) async fn follow(view: View, followed: Followed, mut finish: oneshot::Receiver<()>) {
    let Followed { sidecar, mut exchanges, stop } = followed;
    let Some(sidecar) = sidecar else { return };
    let mut answers = sidecar.follow_answers();
    let mut stage = Stage::default();
    let mut patience = pin!(tokio::time::sleep(PATIENCE));
    let mut is_told = false;
    let role = if view.is_embedded { "relay" } else { "sidecar" };
    loop {
        // A relay that goes with the process is not missed.
        let is_stopping = sidecar.is_stopping();
        let answer = combined(sidecar.relay_answers()).filter(|_| !is_stopping);
        match answer.map_or(Step::Nothing, |answer| view.step(&mut stage, &answer)) {
            Step::Nothing => {}
            Step::Print(text) => print(&text),
            Step::Fail(reason) => {
                // An error means that it ends already.
                let _ = stop.send(reason).await;
                return;
            }
        }
        tokio::select! {
            ended = exchanges.recv() => match ended {
                Ok(ended) if ended.role == role => print(&view.line(&ended)),
                Ok(_) => {}
                Err(RecvError::Lagged(missed)) => print(&missed_line(missed)),
                Err(RecvError::Closed) => return,
            },
            Ok(()) = answers.changed() => {}
            () = &mut patience, if stage == Stage::Waiting && !is_told => {
                is_told = true;
                print("still waiting for the relay's answer\n");
            }
            _ = &mut finish => break,
        }
    }
    // What ended during the drain.
    loop {
        match exchanges.try_recv() {
            Ok(ended) if ended.role == role => print(&view.line(&ended)),
            Ok(_) => {}
            Err(TryRecvError::Lagged(missed)) => print(&missed_line(missed)),
            Err(_) => return,
        }
    }
}

/// Returns the answer that counts of those of a relay's addresses: one that accepts, else one that
/// refuses, else one that may still come.
fn combined(answers: Vec<RelayAnswer>) -> Option<RelayAnswer> {
    answers.into_iter().max_by_key(|answer| {
        let is_connected = answer.is_connected;
        (
            is_connected && answer.accepted.is_some(),
            is_connected && !answer.refused.is_empty(),
            is_connected,
            answer.last_error.is_none(),
        )
    })
}

fn missed_line(missed: u64) -> String {
    format!("({missed} more ended faster than lines are read)\n")
}

/// Whoever closed standard output has seen enough; the service goes on.
fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

impl View {
    /// Takes a relay's answer.
    fn step(&self, stage: &mut Stage, answer: &RelayAnswer) -> Step {
        if !answer.refused.is_empty() && answer.is_connected {
            return Step::Fail(self.refused(&answer.relay, &answer.refused));
        }
        let is_accepted = answer.is_connected && answer.accepted.is_some();
        match (*stage, is_accepted) {
            (Stage::Waiting | Stage::Lost, true) => {
                // The relay would tell it where it were in force.
                if answer.addresses.is_empty() {
                    return Step::Fail(self.refused(&answer.relay, &self.overruled(answer)));
                }
                let again = if *stage == Stage::Lost { "again: " } else { "" };
                let is_first = *stage == Stage::Waiting;
                *stage = Stage::Accepted;
                Step::Print(format!("{again}{}", self.address(answer, is_first)))
            }
            (Stage::Waiting, false) => match &answer.last_error {
                Some(error) => Step::Fail(format!("no session with the relay: {error}")),
                None => Step::Nothing,
            },
            (Stage::Accepted, false) if !answer.is_connected => {
                *stage = Stage::Lost;
                Step::Print(format!("the relay {} is gone; dialling again\n", answer.relay))
            }
            _ => Step::Nothing,
        }
    }

    fn refused(&self, relay: &str, reasons: &[String]) -> String {
        let (tunnels, others): (Vec<&String>, Vec<&String>) =
            reasons.iter().partition(|reason| reason.contains(NOT_TUNNEL));
        let mut hints = Vec::new();
        if !tunnels.is_empty() {
            hints.push(NEEDS_TUNNELS);
        }
        // No subdomain helps where the tunnel may not be claimed.
        if !others.is_empty() || tunnels.is_empty() {
            hints.push(if self.is_named {
                "try another --subdomain"
            } else {
                "try --subdomain, or run it again"
            });
        }
        let told = |reason: &String| {
            printable(reason.split_once(WAITS).map_or(&**reason, |(reason, _)| reason))
        };
        let reasons: Vec<String> = reasons.iter().map(told).collect();
        format!(
            "the relay {relay} does not give the address {}: {} ({})",
            self.subdomain,
            reasons.join("; "),
            hints.join("; ")
        )
    }

    /// Why an accepted route is not in force.
    fn overruled(&self, answer: &RelayAnswer) -> Vec<String> {
        if answer.notes.is_empty() {
            vec!["another route of the relay takes it".to_owned()]
        } else {
            answer.notes.clone()
        }
    }

    fn address(&self, answer: &RelayAnswer, is_first: bool) -> String {
        let mut text = String::new();
        for address in &answer.addresses {
            let address = self.paint.paint("1", &printable(address));
            // Writing to a string does not fail.
            let _ = writeln!(text, "{address} -> {}", self.service);
        }
        if is_first {
            if !self.is_embedded {
                text.push_str(
                    "Lines say what this end knows; method, path and status are the relay's.\n",
                );
            }
            text.push_str("Ctrl-C ends it.\n");
        }
        text
    }

    /// Returns an exchange's line: time (UTC), type, request, status, duration, bytes of the answer, and
    /// why it failed.
    fn line(&self, ended: &Ended) -> String {
        let mut line =
            format!("{} {:<9} ", clock(SystemTime::now()), printable(&ended.protocol_type));
        if let Some((method, target)) = &ended.request {
            let target = match target.char_indices().nth(TARGET_CHARS_MAX) {
                Some((end, _)) => format!("{}…", &target[..end]),
                None => target.clone(),
            };
            let _ = write!(line, "{} {} ", printable(method), printable(&target));
        }
        if let Some(status) = ended.status {
            let color = match status {
                0..400 => "32",
                400..500 => "33",
                _ => "31",
            };
            let _ = write!(line, "{} ", self.paint.paint(color, &status.to_string()));
        }
        let answered = if self.is_embedded { ended.bytes_received } else { ended.bytes_sent };
        let _ = write!(line, "{} {}", milliseconds(ended.duration), bytes(answered));
        if ended.code != "none" {
            let _ = write!(line, " {}", self.paint.paint("31", ended.code));
        }
        line.push('\n');
        line
    }
}

/// Returns the time of day, UTC.
fn clock(now: SystemTime) -> String {
    let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() % 86_400;
    format!("{:02}:{:02}:{:02}Z", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// Returns `0.4ms`, `12ms`, `3.2s`.
fn milliseconds(duration: Duration) -> String {
    let micros = duration.as_micros();
    match micros {
        0..10_000 => format!("{}.{}ms", micros / 1000, micros / 100 % 10),
        10_000..10_000_000 => format!("{}ms", micros / 1000),
        _ => format!("{}.{}s", micros / 1_000_000, micros / 100_000 % 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(is_embedded: bool) -> View {
        View {
            service: "127.0.0.1:3000".to_owned(),
            subdomain: "calm-otter-42".to_owned(),
            is_embedded,
            is_named: false,
            paint: Paint::default(),
        }
    }

    fn answer() -> RelayAnswer {
        RelayAnswer {
            relay: "r.example.org:9081".to_owned(),
            is_connected: false,
            accepted: None,
            refused: Vec::new(),
            notes: Vec::new(),
            addresses: Vec::new(),
            last_error: None,
        }
    }

    fn accepted() -> RelayAnswer {
        let addresses = vec!["http://calm-otter-42.example.org/".to_owned()];
        RelayAnswer { is_connected: true, accepted: Some(1), addresses, ..answer() }
    }

    #[track_caller]
    fn check(stage: Stage, answer: &RelayAnswer, part: &str, then: Stage) {
        let mut at = stage;
        let step = view(false).step(&mut at, answer);
        assert!(format!("{step:?}").contains(part), "{step:?}");
        assert_eq!(at, then);
    }

    #[test]
    fn the_address_is_printed_once_it_is_accepted() {
        check(Stage::Waiting, &answer(), "Nothing", Stage::Waiting);
        let connected = RelayAnswer { is_connected: true, ..answer() };
        check(Stage::Waiting, &connected, "Nothing", Stage::Waiting);
        check(
            Stage::Waiting,
            &accepted(),
            "Print(\"http://calm-otter-42.example.org/ -> 127.0.0.1:3000\\nLines say",
            Stage::Accepted,
        );
        check(Stage::Accepted, &accepted(), "Nothing", Stage::Accepted);
        check(Stage::Accepted, &answer(), "is gone; dialling again", Stage::Lost);
        let failing = RelayAnswer { last_error: Some("refused".into()), ..answer() };
        check(Stage::Lost, &failing, "Nothing", Stage::Lost);
        check(Stage::Lost, &accepted(), "Print(\"again: http://calm", Stage::Accepted);
    }

    #[test]
    fn whatever_keeps_the_address_away_ends_it() {
        let refused = |reasons: &[&str]| RelayAnswer {
            is_connected: true,
            refused: reasons.iter().map(|reason| (*reason).to_owned()).collect(),
            ..answer()
        };
        let part = "does not give the address calm-otter-42: taken; ?[2J (try --subdomain, or";
        check(Stage::Waiting, &refused(&["taken", "\x1b[2J"]), part, Stage::Waiting);
        check(Stage::Lost, &refused(&["taken"]), "taken", Stage::Lost);
        let tunnel =
            "tunnel expose-x: principal shop may not claim tunnel expose-x; its tunnels: shop";
        let part = "shop (the principal's entry under relay.credentials needs tunnels: [";
        check(Stage::Waiting, &refused(&[tunnel]), part, Stage::Waiting);
        let part = "]; try --subdomain, or run it again)";
        check(Stage::Waiting, &refused(&[tunnel, "taken"]), part, Stage::Waiting);
        let waits = "taken; the older session keeps it, and this document waits until it ends";
        let part = "calm-otter-42: taken; the older session keeps it (try --subdomain";
        check(Stage::Waiting, &refused(&[waits]), part, Stage::Waiting);
        let overruled =
            RelayAnswer { addresses: Vec::new(), notes: vec!["the relay's".into()], ..accepted() };
        check(Stage::Waiting, &overruled, "the relay's", Stage::Waiting);
        let silent = RelayAnswer { notes: Vec::new(), ..overruled };
        check(Stage::Waiting, &silent, "another route of the relay takes it", Stage::Waiting);
        let failing = RelayAnswer { last_error: Some("no token".into()), ..answer() };
        check(Stage::Waiting, &failing, "no session with the relay: no token", Stage::Waiting);
    }

    #[test]
    fn of_a_relays_addresses_the_best_answer_counts() {
        let failing = RelayAnswer { last_error: Some("no".into()), ..answer() };
        let connected = RelayAnswer { is_connected: true, ..answer() };
        let refusing = RelayAnswer { refused: vec!["taken".into()], ..connected.clone() };
        let order = [failing, answer(), connected, refusing, accepted()];
        for count in 1..=order.len() {
            let best = combined(order[..count].iter().rev().cloned().collect()).unwrap();
            assert_eq!(format!("{best:?}"), format!("{:?}", order[count - 1]));
        }
        assert!(combined(Vec::new()).is_none());
    }

    #[test]
    fn a_line_says_what_is_known() {
        let ended = Ended {
            role: "relay",
            protocol_type: "HTTP".into(),
            route: "r".into(),
            code: "none",
            duration: Duration::from_micros(3150),
            request: Some(("GET".to_owned(), format!("/a\x1b{}", "x".repeat(90)))),
            status: Some(200),
            bytes_sent: 10,
            bytes_received: 1230,
        };
        let text =
            |view: View, ended: &Ended| view.line(ended).split_once(' ').unwrap().1.to_owned();
        let line = text(view(true), &ended);
        assert_eq!(line, format!("HTTP      GET /a?{}… 200 3.1ms 1.2KiB\n", "x".repeat(77)));
        let bare = Ended { request: None, status: None, code: "service-unreachable", ..ended };
        assert_eq!(text(view(false), &bare), "HTTP      3.1ms 10B service-unreachable\n");
        let painted = View { paint: Paint { is_on: true }, ..view(true) };
        assert!(text(painted, &bare).contains("\x1b[31mservice-unreachable\x1b[0m"));
    }

    #[test]
    fn times_are_short() {
        assert_eq!(clock(UNIX_EPOCH + Duration::from_secs(86_400 + 3_661)), "01:01:01Z");
        for (micros, expected) in
            [(0, "0.0ms"), (9_999, "9.9ms"), (12_345, "12ms"), (12_345_678, "12.3s")]
        {
            assert_eq!(milliseconds(Duration::from_micros(micros)), expected);
        }
    }
}
