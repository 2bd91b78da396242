//! One test per rule of a lane.

use std::task::Poll;

use sidelane_abi::failure;

use super::pair::{Pair, data, last};
use crate::{Received, Reset};

const DONE: Poll<Result<(), Reset>> = Poll::Ready(Ok(()));

#[test]
fn an_exchange_goes_both_ways_and_leaves_nothing() {
    let mut pair = Pair::new();
    let (relay, sidecar) = pair.opened();
    assert_eq!(pair.sidecar.send(sidecar, data(b"answer")), DONE);
    pair.sidecar.lane.finish(sidecar);
    assert_eq!(pair.relay.send(relay, last(b"rest")), DONE);
    pair.run();
    assert_eq!(pair.relay.recv(relay), Poll::Ready(Received::Message(last(b"answer"))));
    assert_eq!(pair.relay.recv(relay), Poll::Ready(Received::Finished));
    assert_eq!(pair.sidecar.recv(sidecar), Poll::Ready(Received::Message(last(b"rest"))));
    assert_eq!(pair.sidecar.recv(sidecar), Poll::Ready(Received::Finished));
    assert_eq!(pair.relay.closed(relay), Poll::Ready(Reset::new(failure::NONE)));
    assert_eq!(pair.sidecar.closed(sidecar), Poll::Ready(Reset::new(failure::NONE)));
    pair.relay.drop_handles(relay);
    pair.sidecar.drop_handles(sidecar);
    pair.assert_empty();
}
