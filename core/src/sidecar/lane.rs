//! A lane at the sidecar's end: driven on one connection after the other, and dialled anew when one is
//! lost or falls silent.
//!
//! Knows one lane; which lanes a session has is decided elsewhere.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::BytesMut;
use sidelane_abi::failure;
use sidelane_tunnel::proto::{self, RefuseReason};
use thiserror::Error;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::hold::NewLane;
use super::{Peer, Session, Sidecar, Texts};
use crate::error::chain;
use crate::plugin::lend::Reset;
use crate::random;
use crate::tunnel::backoff::{ReturnBackoff, jitter};
use crate::tunnel::dial::{self, DialError, Timeouts};
use crate::tunnel::told::{Told, tell};
use crate::tunnel::transport::{Movable as _, Transport};
use crate::tunnel::{LaneEnd, Link, drive};

/// How an exchange ends with its lane.
const LOST: Reset = Reset::new(failure::TUNNEL_LOST);

/// Other relays that may be reached in place of the session's, one after the other.
pub(super) const WRONG_RELAYS_MAX: u32 = 8;

/// The same other relay, reached so often in a row, has taken the place of the session's.
const SAME_RELAY_MAX: u32 = 3;

/// Dials that reached another relay are repeated within this.
const WRONG_RELAY_WAIT: Duration = Duration::from_millis(50);

/// For a connection by which a lane comes back: a fresh one is sooner through than one whose first
/// packets were lost in the outage.
const CONNECT_MAX: Duration = Duration::from_secs(2);

/// For TLS, and for the relay's answer, then.
const ANSWER_MAX: Duration = Duration::from_secs(3);

/// Between two connections that are dialled beside one that is silent.
const BESIDE_PAUSE: Duration = Duration::from_secs(2);

/// Why a lane does not come back.
#[derive(Debug, Error)]
enum GivenUp {
    #[error("the lane is closed")]
    Closed,
    #[error("no connection within {grace:?}, for which the relay waits; the last dial: {last}")]
    Grace { grace: Duration, last: String },
    #[error("the relay does not go on with it: {0}")]
    Refused(String),
    #[error("what one end lacks the other does not keep: {0}")]
    Gap(String),
}

/// One lane.
pub(super) struct Lane {
    sidecar: Arc<Sidecar>,
    peer: Arc<Peer>,
    session: Arc<Session>,
    link: Arc<Link>,
    texts: Texts,
    attempt: u64,
    backoff: ReturnBackoff,
    /// How far the lane had come at the last loss.
    progress: u64,
    /// When a connection may be dialled beside one that is silent.
    beside_at: Instant,
    losses: Told,
    silences: Told,
}

impl Lane {
    pub(super) fn new(
        sidecar: &Arc<Sidecar>,
        peer: &Arc<Peer>,
        session: &Arc<Session>,
        link: &Arc<Link>,
    ) -> Self {
        Self {
            sidecar: Arc::clone(sidecar),
            peer: Arc::clone(peer),
            session: Arc::clone(session),
            link: Arc::clone(link),
            texts: Texts::default(),
            attempt: 0,
            backoff: ReturnBackoff::default(),
            progress: 0,
            beside_at: Instant::now(),
            losses: Told::default(),
            silences: Told::default(),
        }
    }

    /// Drives it for as long as it lives, on the thread that owns it. Returns how its last connection ended.
    pub(super) async fn run(mut self, lane: NewLane) -> LaneEnd {
        let NewLane { mut transport, input, .. } = lane;
        if let Err(error) = transport.attach() {
            self.link.abandon(LOST);
            return LaneEnd::Io(error);
        }
        let (relay, number) = (self.peer.name.clone(), self.link.number);
        let carrier = transport.kind().label();
        tracing::info!(relay, lane = number, carrier, "lane up");
        let (mut end, mut beside) = self.drive(transport, input).await;
        while self.link.is_detached() {
            let lost_at = Instant::now();
            self.sidecar.metrics.lanes.connection_lost("sidecar");
            let (exchanges, reason) = (self.link.load(), chain(&end));
            let told = self.losses.note(lost_at);
            tell!(
                told.is_some(),
                relay,
                lane = number,
                exchanges,
                losses = told.filter(|&losses| losses > 1),
                reason,
                "lane lost its connection; its exchanges wait while it is dialled"
            );
            match self.come_back(lost_at, beside.take(), told.is_some()).await {
                Ok((transport, input)) => (end, beside) = self.drive(transport, input).await,
                Err(error) => {
                    self.link.abandon(LOST);
                    let waited_ms = millis(lost_at.elapsed());
                    if !matches!(error, GivenUp::Closed) {
                        tracing::warn!(relay, lane = number, exchanges, waited_ms, %error, "lane given up");
                    }
                    break;
                }
            }
        }
        if self.link.lost() > 0 {
            self.sidecar.metrics.lanes.exchanges_lost("sidecar", self.link.lost());
        }
        end
    }

    /// Drives it on one connection. Where that falls silent another is dialled beside it, and takes its
    /// place if it is silent still.
    async fn drive(
        &mut self,
        transport: Transport,
        input: BytesMut,
    ) -> (LaneEnd, Option<Transport>) {
        let _up = self.sidecar.metrics.lane_up("sidecar");
        let _carried = self.sidecar.metrics.carrier_up("sidecar", transport.kind());
        self.link.runs_on(transport.kind());
        let mut texts = std::mem::take(&mut self.texts);
        let mut silences = std::mem::take(&mut self.silences);
        let Self { sidecar, peer, session, link, .. } = &*self;
        let mut beside_at = self.beside_at;
        let on_event =
            |link: &Arc<Link>, event| sidecar.handle_event(peer, session, link, event, &mut texts);
        let driven = drive(Arc::clone(link), transport, input, LOST, on_event)
            .paced_by(Transport::limit_unsent);
        let (end, beside) = {
            let mut driven = pin!(driven);
            loop {
                if let Some(end) = until(driven.as_mut(), link, true).await {
                    break (end, None);
                }
                let told = silences.note(Instant::now());
                tell!(
                    told.is_some(),
                    relay = peer.name,
                    lane = link.number,
                    times = told.filter(|&times| times > 1),
                    "the relay is silent on this lane; another connection is dialled beside it"
                );
                let dial = async {
                    sleep_until(beside_at).await;
                    self.connect().await
                };
                let connected = tokio::select! {
                    biased;
                    end = until(driven.as_mut(), link, false) => Err(end),
                    connected = dial => Ok(connected),
                };
                beside_at = Instant::now() + BESIDE_PAUSE;
                match connected {
                    Err(Some(end)) => break (end, None),
                    Err(None) => {}
                    Ok(Ok(transport)) => {
                        link.replace();
                        break (driven.await, Some(transport));
                    }
                    Ok(Err(error)) => {
                        tracing::debug!(
                            relay = peer.name,
                            error = chain(&error),
                            "no connection beside a silent one"
                        );
                    }
                }
            }
        };
        self.texts = texts;
        self.silences = silences;
        self.beside_at = beside_at;
        (end, beside)
    }

    /// Dials the lane until it is back, or its time is up. `beside`: a connection that is there already.
    /// `is_told`: its loss was told at info, and its return is.
    async fn come_back(
        &mut self,
        lost_at: Instant,
        mut beside: Option<Transport>,
        is_told: bool,
    ) -> Result<(Transport, BytesMut), GivenUp> {
        let grace = self.session.grace;
        let deadline = lost_at + grace;
        let progress = self.link.progress();
        if std::mem::replace(&mut self.progress, progress) != progress {
            self.backoff.reset();
        }
        let mut wait = match beside {
            Some(_) => Duration::ZERO,
            None => self.backoff.next(random::number()),
        };
        let mut wrong_relays = 0;
        // Nobody listened there for a moment: whoever does now is another process, and no relay beside it.
        let mut has_ended = false;
        let mut met = Met::default();
        let mut last = "none was done".to_owned();
        loop {
            self.attempt += 1;
            let (target, is_advertised) = self.session.target(&self.peer);
            let next = async {
                sleep(wait).await;
                let dialled_at = Instant::now();
                (dialled_at, self.dial(target, beside.take()).await)
            };
            let (dialled_at, dialled) = tokio::select! {
                biased;
                () = self.link.ended() => return Err(GivenUp::Closed),
                dialled = timeout_at(deadline, next) => {
                    dialled.map_err(|_elapsed| GivenUp::Grace { grace, last: last.clone() })?
                }
            };
            let error = match dialled {
                Ok((transport, resumed, input)) => {
                    self.resume(resumed.received, lost_at, dialled_at)?;
                    self.tell_return(&transport, lost_at, is_told);
                    return Ok((transport, input));
                }
                Err(error) => error,
            };
            last = chain(&error);
            tracing::debug!(
                relay = self.peer.name,
                lane = self.link.number,
                error = last,
                "lane not back"
            );
            let asked = error.retry_after().unwrap_or_default();
            wait = self.backoff.next_after(asked, random::number());
            has_ended |= error.is_connection_refused();
            let by = error.refused_by();
            let is_another = !by.is_empty() && *by != *self.session.relay_instance;
            has_ended |= is_another && met.again(by) >= SAME_RELAY_MAX;
            if has_ended && is_another {
                // It is too busy to say more, and need not.
                self.peer.is_busy_for(asked);
                self.session_is_gone();
                return Err(GivenUp::Refused(last));
            }
            match error.refusal() {
                None => self.session.not_reached(is_advertised),
                Some(RefuseReason::WrongRelay)
                    if !is_advertised && !has_ended && wrong_relays < WRONG_RELAYS_MAX =>
                {
                    // One name, or one virtual address, leads to several.
                    wrong_relays += 1;
                    wait = jitter(WRONG_RELAY_WAIT, random::number());
                }
                Some(RefuseReason::UnknownSession) => {
                    self.session_is_gone();
                    return Err(GivenUp::Refused(last));
                }
                Some(RefuseReason::WrongRelay) => {
                    if has_ended {
                        self.session_is_gone();
                    }
                    return Err(GivenUp::Refused(last));
                }
                Some(RefuseReason::UnknownLane | RefuseReason::Gap | RefuseReason::Stale) => {
                    return Err(GivenUp::Refused(last));
                }
                Some(_) => {}
            }
        }
    }

    /// Ends the session's other lanes that are dialled: they need not ask, too.
    fn session_is_gone(&self) {
        for link in self.peer.with(|state| state.lanes.clone()) {
            if !link.is_attached() {
                link.close();
            }
        }
    }

    /// The relay goes on with the lane, of which it has so many counted messages.
    fn resume(&self, received: u64, lost_at: Instant, dialled_at: Instant) -> Result<(), GivenUp> {
        self.link.resume(received).map_err(|error| GivenUp::Gap(error.to_string()))?;
        let (messages, bytes) = self.link.to_replay();
        let lanes = &self.sidecar.metrics.lanes;
        lanes.resumed("sidecar", lost_at.elapsed(), messages, bytes);
        lanes.dialled(dialled_at.elapsed());
        Ok(())
    }

    fn tell_return(&self, transport: &Transport, lost_at: Instant, is_told: bool) {
        let (messages, bytes) = self.link.to_replay();
        tell!(
            is_told,
            relay = self.peer.name,
            lane = self.link.number,
            attempt = self.attempt,
            carrier = transport.kind().label(),
            after_ms = millis(lost_at.elapsed()),
            replayed_messages = messages,
            replayed_bytes = bytes,
            "lane is back"
        );
    }

    async fn dial(
        &self,
        target: &str,
        beside: Option<Transport>,
    ) -> Result<(Transport, proto::Resumed, BytesMut), DialError> {
        let mut transport = match beside {
            Some(transport) => transport,
            None => self.connect_to(target).await?,
        };
        let resume = proto::Resume {
            session: self.session.id.clone(),
            secret: self.session.secret.clone(),
            lane: self.link.number,
            attempt: self.attempt,
            // Nothing more comes on the connection before.
            received: self.link.received(),
            relay_instance: self.session.relay_instance.clone(),
        };
        let limit = self.timeouts().answer;
        let (resumed, input) =
            dial::resume(&self.peer.name, &mut transport, &resume, limit).await?;
        Ok((transport, resumed, input))
    }

    async fn connect(&self) -> Result<Transport, DialError> {
        let (target, is_advertised) = self.session.target(&self.peer);
        let connected = self.connect_to(target).await;
        if connected.is_err() {
            self.session.not_reached(is_advertised);
        }
        connected
    }

    /// Connects to the relay as it is to be dialled now, as far as TLS.
    async fn connect_to(&self, target: &str) -> Result<Transport, DialError> {
        let carrier = self.sidecar.access.load().carrier(&self.peer.relay);
        // The session's secret is presented.
        dial::open(&self.peer.name, target, &carrier, false, self.timeouts()).await
    }

    fn timeouts(&self) -> Timeouts {
        let timeouts = self.sidecar.settings.timeouts;
        Timeouts {
            connect: timeouts.connect.min(CONNECT_MAX),
            answer: timeouts.answer.min(ANSWER_MAX),
        }
    }
}

/// Drives a connection until it ends, or until its peer is silent, or not silent any more (`None`).
async fn until(
    mut driven: Pin<&mut impl Future<Output = LaneEnd>>,
    link: &Link,
    is_suspect: bool,
) -> Option<LaneEnd> {
    poll_fn(|cx| match driven.as_mut().poll(cx) {
        Poll::Ready(end) => Poll::Ready(Some(end)),
        Poll::Pending if link.is_suspect() == is_suspect => Poll::Ready(None),
        Poll::Pending => Poll::Pending,
    })
    .await
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Which other relay was reached last, and how often in a row.
#[derive(Default)]
struct Met {
    instance: Vec<u8>,
    times: u32,
}

impl Met {
    fn again(&mut self, instance: &[u8]) -> u32 {
        if *self.instance != *instance {
            self.instance = instance.to_vec();
            self.times = 0;
        }
        self.times += 1;
        self.times
    }
}

#[cfg(test)]
mod tests;
