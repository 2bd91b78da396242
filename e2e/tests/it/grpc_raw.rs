//! What no gRPC library shows: codes of resets, half messages, answers that are not gRPC's.

use serde_json::{Value, json};
use sidelane_e2e::client::request;
use sidelane_e2e::peer::Peer;
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::tools::Python;

/// The service, the program before it, and what a client saw.
struct Seen {
    service: Peer,
    sidelane: Sidelane,
    client: Value,
}

impl Seen {
    fn case(test: &str, case: &str) -> Option<Self> {
        let python = Python::find(test)?;
        let (service, address) = Peer::service("h2", python.script("grpc_h2_server.py"));
        let sidelane = Sidelane::both(&Setup::of(address).grpc("{}"));
        let client = python.script("grpc_h2.py");
        let client = Peer::client("grpc_h2.py", client, case, sidelane.web()).finish();
        Some(Self { service, sidelane, client })
    }

    /// Returns what the service saw, once all is over.
    fn service(self) -> Value {
        self.sidelane.until_metric("sidelane_exchanges_in_flight", &[], |count| count == 0.0);
        self.service.finish()
    }
}

#[test]
fn reset_without_an_answer_is_the_status_of_its_code() {
    let test = "reset_without_an_answer_is_the_status_of_its_code";
    let Some(seen) = Seen::case(test, "resets") else { return };
    // "Errors" of gRPC's PROTOCOL-HTTP2; codes that it does not name are UNKNOWN.
    let statuses = [13, 13, 13, 13, 13, 2, 13, 14, 1, 13, 13, 8, 7, 2];
    for (code, status) in statuses.iter().enumerate() {
        let answer = &seen.client[code.to_string()];
        assert_eq!(answer["grpc"], *status, "{code}: {answer}");
        assert_eq!(answer["http"], 200, "{code}: {answer}");
        assert_eq!(answer["reset"], Value::Null, "{code}: {answer}");
        let message = answer["message"].as_str().unwrap_or_default();
        assert!(message.contains("service"), "{code}: {answer}");
    }
}

#[test]
fn reset_in_mid_answer_passes_as_sent() {
    let Some(seen) = Seen::case("reset_in_mid_answer_passes_as_sent", "resets-later") else {
        return;
    };
    for code in 0..14 {
        let answer = &seen.client[code.to_string()];
        // What was on its way may be overtaken by a reset, the head too.
        assert!(answer["reset"] == code || answer["grpc"].is_number(), "{code}: {answer}");
    }
}

#[test]
fn reset_of_the_client_reaches_the_service_as_sent() {
    let test = "reset_of_the_client_reaches_the_service_as_sent";
    let Some(seen) = Seen::case(test, "cancel-codes") else { return };
    assert_eq!(seen.client["grpc"], 0, "the connection goes on: {}", seen.client);
    let service = seen.service();
    let mut resets: Vec<_> = service["resets"].as_array().unwrap().clone();
    resets.sort_by_key(|reset| reset[1].as_u64());
    let sent: Vec<_> = (0..14).map(|code| json!([format!("/raw.Echo/{code}"), code])).collect();
    assert_eq!(resets, sent);
}

#[test]
fn answers_pass_as_they_are_or_say_what_is_wrong() {
    let test = "answers_pass_as_they_are_or_say_what_is_wrong";
    let Some(seen) = Seen::case(test, "answers") else { return };
    let has = |answer: &Value, part: &str, name: &str, value: &str| {
        let all = answer[part].as_array().expect("a list");
        assert!(all.contains(&json!([name, value])), "{name}: {value}: {answer}");
    };
    let only = &seen.client["TrailersOnly"];
    for (name, value) in [("grpc-status", "7"), ("grpc-message", "k%C3%A4se"), ("x-only", "1")] {
        has(only, "headers", name, value);
    }
    assert_eq!((&only["trailers"], &only["body"]), (&json!([]), &json!("")), "{only}");

    // An error may overtake what was on its way, the head too.
    let half = &seen.client["Half"];
    let told = ["headers", "trailers"].iter().any(|part| {
        half[*part].as_array().expect("a list").contains(&json!(["grpc-status", "13"]))
    });
    assert!(told || half["reset"].is_number(), "half a message is no success: {half}");
    let page = &seen.client["Html"];
    assert_eq!((&page["status"], &page["body"]), (&502.into(), &"<p>bad gateway".into()), "{page}");
    has(page, "headers", "content-type", "text/html");
    for retried in ["Refused", "Goaway"] {
        has(&seen.client[retried], "trailers", "grpc-status", "0");
    }
    let service = seen.service();
    let paths = service["heads"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|head| head.as_array().unwrap().contains(&json!([":path", "/raw.Refused/x"])));
    assert_eq!(paths.count(), 2, "an RPC that was refused unprocessed is sent once more");
}

#[test]
fn requests_that_are_no_rpc_are_told_so() {
    let Some(seen) = Seen::case("requests_that_are_no_rpc_are_told_so", "requests") else { return };
    let all = &seen.client;
    assert_eq!(all["get"]["http"], 405, "{all}");
    for half in ["half", "prefix"] {
        let answer = &all[half];
        assert!(answer["grpc"] == 13 || answer["reset"].is_number(), "{half}: {answer}");
    }
    for whole in ["nothing", "plus", "semicolon"] {
        assert_eq!(all[whole]["grpc"], 0, "{whole}: {all}");
    }
}

#[test]
fn metadata_and_flags_keep_their_bytes() {
    let Some(seen) = Seen::case("metadata_and_flags_keep_their_bytes", "metadata") else { return };
    assert_eq!(seen.client["body"], "\u{1}\0\0\0\u{6}packed", "{}", seen.client);
    let trailers: Vec<_> = seen.client["trailers"].as_array().unwrap().clone();
    for field in [["grpc-status", "0"], ["x-trailing", "1"], ["x-trailing", "2"]] {
        assert!(trailers.contains(&json!(field)), "{field:?}: {trailers:?}");
    }
    let service = seen.service();
    let head = service["heads"][0].as_array().unwrap();
    let values = |name: &str| -> Vec<&str> {
        let fields = head.iter().filter(|field| field[0] == name);
        fields.filter_map(|field| field[1].as_str()).collect()
    };
    assert_eq!(values(":method"), ["POST"]);
    assert_eq!(values(":path"), ["/raw.Echo/metadata"]);
    assert_eq!(values(":authority"), ["api.localhost"]);
    assert_eq!(values("te"), ["trailers"]);
    assert_eq!(values("content-type"), ["application/grpc"]);
    assert_eq!(values("x-repeated"), ["1", "2"]);
    assert_eq!(values("x-data-bin"), ["AAH/"]);
    assert_eq!(values("grpc-timeout"), ["30S"]);
    assert_eq!(values("grpc-encoding"), ["x-own"]);
    assert_eq!(values("x-forwarded-for"), ["127.0.0.1"], "what a client claims is dropped");
}

#[test]
fn message_flows_before_it_is_whole() {
    let Some(seen) = Seen::case("message_flows_before_it_is_whole", "pieces") else { return };
    assert_eq!((&seen.client["same"], &seen.client["grpc"]), (&true.into(), &0.into()));
}

#[test]
fn grpc_web_is_http_and_grpc_over_http1_is_refused() {
    let service = Service::ok();
    let sidelane = Sidelane::both(&Setup::of(service.address()).grpc("{}"));
    for (kind, status) in [
        ("application/grpc-web", 200),
        ("application/grpc-web+proto", 200),
        ("application/grpc-web-text", 200),
        ("application/grpcx", 200),
        ("application/grpc", 505),
        ("application/grpc+proto", 505),
    ] {
        let answer = request(
            sidelane.web(),
            "POST",
            format!(
                "POST /a.B/C HTTP/1.1\r\nHost: api.localhost\r\nContent-Type: {kind}\r\nContent-Length: 5\r\n\r\n\0\0\0\0\0"
            ),
        );
        assert_eq!(answer.head.status, status, "{kind}: {answer:?}");
    }
}
