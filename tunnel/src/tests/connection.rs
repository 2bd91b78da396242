//! Connections between the two ends of a pair: the first one stands, each further one begins with the
//! handshake of a resume. Several may be open at once, as where an end has not noticed a loss.

use bytes::{Bytes, BytesMut};

use super::pair::{End, Pair};
use super::pipe::Pipe;
use crate::{Acceptor, Dialler, First, LaneError, Reply, proto};

const SESSION: &[u8] = b"session";
const SECRET: &[u8] = b"secret";

/// What an end does with a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// Waits for the other's first message.
    Handshake,
    /// The lane is on it.
    Open,
    Gone,
}

pub(super) struct Connection {
    pub(super) attempt: u64,
    pub(super) to_relay: Pipe,
    pub(super) to_sidecar: Pipe,
    pub(super) relay: Phase,
    pub(super) sidecar: Phase,
    /// Of the handshake, at each end.
    relay_input: BytesMut,
    sidecar_input: BytesMut,
    pub(super) is_cut: bool,
}

impl Connection {
    pub(super) fn new(attempt: u64, phase: Phase, now: std::time::Instant) -> Self {
        Self {
            attempt,
            to_relay: Pipe::new(now),
            to_sidecar: Pipe::new(now),
            relay: phase,
            sidecar: phase,
            relay_input: BytesMut::new(),
            sidecar_input: BytesMut::new(),
            is_cut: false,
        }
    }

    pub(super) fn cut(&mut self, keep_to_relay: usize, keep_to_sidecar: usize) {
        self.is_cut = true;
        self.to_relay.truncate(keep_to_relay);
        self.to_sidecar.truncate(keep_to_sidecar);
    }
}

impl End {
    /// The carrier is gone, and what was read and taken with it.
    fn detach(&mut self) {
        self.lane.detach();
        self.out.clear();
        self.input.clear();
    }
}

impl Pair {
    /// Cuts the newest connection. Of what is on its way so many bytes arrive still; an end notices when
    /// nothing more comes.
    pub(super) fn cut_at(&mut self, keep_to_relay: usize, keep_to_sidecar: usize) {
        if let Some(connection) = self.connections.last_mut() {
            connection.cut(keep_to_relay, keep_to_sidecar);
        }
    }

    /// Returns how many bytes are on their way on the newest connection, to the relay and to the sidecar.
    pub(super) fn flying(&self) -> (usize, usize) {
        let newest = self.connections.last();
        newest.map_or((0, 0), |newest| (newest.to_relay.held(), newest.to_sidecar.held()))
    }

    /// The sidecar leaves its connection, where it has one, and dials.
    pub(super) fn dial(&mut self) {
        for connection in &mut self.connections {
            connection.sidecar = Phase::Gone;
        }
        self.sidecar.detach();
        self.attempt += 1;
        self.dial_as(self.attempt);
    }

    /// A dial of long ago arrives.
    pub(super) fn dial_stale(&mut self) {
        self.dial_as(self.attempt.min(self.newest));
        self.connections.last_mut().expect("just dialled").sidecar = Phase::Gone;
        // It is not the connection that the sidecar waits on.
        self.connections.rotate_right(1);
    }

    fn dial_as(&mut self, attempt: u64) {
        let mut connection = Connection::new(attempt, Phase::Handshake, self.now);
        let resume = proto::Resume {
            session: Bytes::from_static(SESSION),
            secret: Bytes::from_static(SECRET),
            lane: 0,
            attempt,
            received: self.sidecar.lane.received(),
            relay_instance: Bytes::new(),
        };
        let bytes = Dialler::new().resume(&resume).expect("a fit resume");
        connection.to_relay.push(&bytes, self.now, self.road);
        self.connections.push(connection);
    }

    /// Returns whether both ends are on the newest connection.
    pub(super) fn is_joined(&self) -> bool {
        self.connections.last().is_some_and(|newest| {
            !newest.is_cut && newest.relay == Phase::Open && newest.sidecar == Phase::Open
        })
    }

    /// Moves what can move on one connection; false: nothing could.
    pub(super) fn step_connection(&mut self, at: usize) -> Result<bool, LaneError> {
        let Self { relay, sidecar, connections, now, road, .. } = self;
        let connection = &mut connections[at];
        let mut moved = false;
        if !connection.is_cut {
            if connection.relay == Phase::Open {
                moved |= connection.to_sidecar.fill(relay, *now, *road);
            }
            if connection.sidecar == Phase::Open {
                moved |= connection.to_relay.fill(sidecar, *now, *road);
            }
        }
        while let Some((bytes, is_cut)) =
            self.connections[at].to_sidecar.take(self.now, &mut self.at_sidecar)
        {
            moved = true;
            self.sidecar_takes(at, &bytes)?;
            if is_cut {
                self.connections[at].cut(0, 0);
            }
        }
        while let Some((bytes, is_cut)) =
            self.connections[at].to_relay.take(self.now, &mut self.at_relay)
        {
            moved = true;
            self.relay_takes(at, &bytes)?;
            if is_cut {
                self.connections[at].cut(0, 0);
            }
        }
        Ok(moved | self.notice_loss(at))
    }

    /// An end to which nothing more comes leaves the connection.
    fn notice_loss(&mut self, at: usize) -> bool {
        let connection = &mut self.connections[at];
        let is_cut = connection.is_cut;
        let over = |other, pipe: &Pipe| (is_cut || other == Phase::Gone) && pipe.is_empty();
        let relay_left = over(connection.sidecar, &connection.to_relay);
        let sidecar_left = over(connection.relay, &connection.to_sidecar);
        let mut moved = false;
        if relay_left && connection.relay != Phase::Gone {
            if std::mem::replace(&mut connection.relay, Phase::Gone) == Phase::Open {
                self.relay.detach();
            }
            moved = true;
        }
        let connection = &mut self.connections[at];
        if sidecar_left && connection.sidecar != Phase::Gone {
            if std::mem::replace(&mut connection.sidecar, Phase::Gone) == Phase::Open {
                self.sidecar.detach();
            }
            moved = true;
            if self.redials {
                self.dial();
            }
        }
        moved
    }

    fn relay_takes(&mut self, at: usize, bytes: &[u8]) -> Result<(), LaneError> {
        let connection = &mut self.connections[at];
        match connection.relay {
            Phase::Gone => Ok(()),
            Phase::Open => self.relay.takes(bytes, self.now),
            Phase::Handshake => {
                connection.relay_input.extend_from_slice(bytes);
                let first = Acceptor::new().handle_input(&mut connection.relay_input);
                match first.expect("the dialler is honest") {
                    None => Ok(()),
                    Some(First::Resume(resume)) => self.relay_resumes(at, &resume),
                    Some(First::Hello(_)) => panic!("nobody says hello"),
                }
            }
        }
    }

    fn relay_resumes(&mut self, at: usize, resume: &proto::Resume) -> Result<(), LaneError> {
        assert_eq!((&*resume.session, &*resume.secret), (SESSION, SECRET));
        if resume.attempt <= self.newest {
            let refuse = proto::Refuse {
                reason: proto::RefuseReason::Stale.into(),
                ..proto::Refuse::default()
            };
            let bytes = Acceptor::new().encode_refuse(&refuse);
            let connection = &mut self.connections[at];
            connection.to_sidecar.push(&bytes, self.now, self.road);
            connection.relay = Phase::Gone;
            self.stale += 1;
            return Ok(());
        }
        self.newest = resume.attempt;
        // The fence: from here on nothing is read from the connections before.
        for connection in &mut self.connections {
            if connection.attempt < resume.attempt {
                connection.relay = Phase::Gone;
            }
        }
        self.relay.detach();
        let resumed =
            proto::Resumed { received: self.relay.lane.received(), attempt: resume.attempt };
        self.relay.lane.resume(self.now, resume.received)?;
        let bytes = Acceptor::new().encode_resumed(&resumed);
        let connection = &mut self.connections[at];
        connection.to_sidecar.push(&bytes, self.now, self.road);
        connection.relay = Phase::Open;
        let follows = std::mem::take(&mut connection.relay_input);
        self.relay.takes(&follows, self.now)
    }

    fn sidecar_takes(&mut self, at: usize, bytes: &[u8]) -> Result<(), LaneError> {
        let connection = &mut self.connections[at];
        match connection.sidecar {
            Phase::Gone => Ok(()),
            Phase::Open => self.sidecar.takes(bytes, self.now),
            Phase::Handshake => {
                connection.sidecar_input.extend_from_slice(bytes);
                let reply = Dialler::new().handle_input(&mut connection.sidecar_input);
                match reply.expect("the acceptor is honest") {
                    None => Ok(()),
                    Some(Reply::Resumed(resumed)) => {
                        assert_eq!(resumed.attempt, connection.attempt);
                        connection.sidecar = Phase::Open;
                        let follows = std::mem::take(&mut connection.sidecar_input);
                        self.sidecar.lane.resume(self.now, resumed.received)?;
                        self.sidecar.takes(&follows, self.now)
                    }
                    Some(other) => panic!("the newest attempt is answered by {other:?}"),
                }
            }
        }
    }
}
