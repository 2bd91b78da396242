//! A sidecar that was written from docs/tunnel-protocol.md and the schema alone, in another language.

use sidelane_e2e::client::request;
use sidelane_e2e::nobody::Nobody;
use sidelane_e2e::peer::Peer;
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::stage::get;
use sidelane_e2e::tools::Python;

/// Of the body, which is many times what passes between two cuts.
const BODY_BYTES: usize = 3_000_000;
/// What is written to each connection; no multiple of a message.
const CUT_BYTES: &str = "100000";
const CUTS: u64 = 5;

/// What `peer.py` answers.
fn body() -> Vec<u8> {
    (0..).flat_map(|line| format!("{line:08}\n").into_bytes()).take(BODY_BYTES).collect()
}

#[test]
fn sidecar_by_the_page_serves_and_comes_back() {
    let Some(python) = Python::find("sidecar_by_the_page_serves_and_comes_back") else { return };
    let relay = Sidelane::spawn("relay", &Setup::of(Nobody::new().address()).relay());
    let mut command = python.script("peer.py");
    command.arg(relay.tunnel().to_string()).args(["api", "--life", "120"]);
    command.args(["--cut", CUT_BYTES, "--cuts", &CUTS.to_string()]);
    let mut peer = Peer::start("peer.py".to_owned(), command);
    let url = format!("http://api.localhost:{}/", relay.web().port());
    assert_eq!(peer.line()["ready"][0], url);

    let answer = request(relay.web(), "GET", get(&format!("/bytes/{BODY_BYTES}")));
    assert_eq!(answer.head.status, 200);
    assert!(
        answer.body == body(),
        "{} bytes came, and not those that were sent",
        answer.body.len()
    );
    for number in 1..=CUTS {
        assert_eq!(peer.line()["cut"], number);
        let resumed = peer.line();
        assert_eq!(resumed["resumed"], number);
        assert!(resumed["again"].as_u64() >= Some(1), "the message that was cut: {resumed}");
    }
    assert_eq!(relay.metric("sidelane_lane_resumes_total", &[]), Some(CUTS as f64));
    assert_eq!(request(relay.web(), "GET", get("/else")).head.status, 404);

    let seen = peer.finish();
    assert_eq!(seen["acknowledged"], seen["sent"], "{seen}");
    relay.until_metric("sidelane_sessions", &[], |sessions| sessions == 0.0);
    assert_eq!(relay.metric("sidelane_lanes_lost_total", &[]), Some(0.0));
}
