//! Exchanges on connections of their own: a plugin hands a stream over, the two ends agree on a
//! connection, and from there on bytes pass as they are.
//!
//! The relay takes a connection that the sidecar has dialled before ([`Pool`]), and says on the exchange
//! whether there is one; the sidecar gives the connection that names the exchange to whoever waits for it
//! ([`Claims`]). Without one the exchange goes on in messages: it never fails for that.

mod carry;
mod claims;
mod pool;

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use sidelane_abi::failure;
use sidelane_tunnel::dedicate::{dedication, encode_dedicate, read_dedicate, read_dedication};
use sidelane_tunnel::proto::DedicationStage;
use sidelane_tunnel::{HandshakeError, Key, RequestId};
use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{sleep, timeout};

use self::carry::{Carry, Side};
pub use self::claims::{Claims, Given};
pub use self::pool::{Full, Pool, Room, Seat};
use super::Link;
use super::transport::{Movable as _, Transport};
use crate::metrics::Flow;
use crate::plugin::lend::{Dedicated, Received, Reset, Stream};

/// Most connections of one session that wait for an exchange, whatever its sidecar dials.
pub const WAITING_PER_SESSION_MAX: usize = 64;

/// Most connections that wait at one relay: bounds the descriptors that sidecars can take.
pub const WAITING_MAX: usize = 4_096;

/// For the few bytes that say which exchange a connection is for: more than a socket that lives ever takes.
const DEDICATE_TIME: Duration = Duration::from_secs(5);

/// From the relay's word that a connection is on its way to the connection.
const ARRIVAL_TIME: Duration = Duration::from_secs(10);

/// How often a connection that says nothing is asked whether it lives, and how often in vain: middleboxes
/// forget what is silent for minutes. Nothing of it is seen by either end.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_RETRIES: u32 = 4;

/// How the exchanges of a lane get connections of their own.
pub enum Dedication {
    /// At the relay.
    Relay(Arc<Pool>),
    /// At the sidecar.
    Sidecar(Arc<Claims>),
}

/// Sets what a socket needs while it waits: to notice by itself that the other end is gone.
///
/// # Errors
/// The system's.
pub fn keep_alive(transport: &Transport) -> io::Result<()> {
    let Some(stream) = transport.tcp() else { return Ok(()) };
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_RETRIES);
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_keepalive(&keepalive)?;
    // A client that does not read for a while is no lost peer: what is unread holds the sender back, and a
    // lane's timeout would end it.
    socket.set_tcp_user_timeout(None)
}

/// Moves an exchange to a connection of its own, if there is one, until it ends.
pub(super) async fn dedicate(
    link: Arc<Link>,
    key: Key,
    flow: Arc<Flow>,
    local: Box<dyn Stream>,
    ahead: Bytes,
) -> Dedicated {
    let found = match (link.dedication(), link.with(|lane| lane.request_id(key))) {
        (_, None) => Err(Reset::new(failure::CANCELLED)),
        (None, Some(_)) => Ok(None),
        (Some(Dedication::Relay(pool)), Some(id)) => give(&link, key, id, pool).await,
        (Some(Dedication::Sidecar(claims)), Some(id)) => await_word(&link, key, id, claims).await,
    };
    let (transport, rest, side, up) = match found {
        Ok(Some(found)) => found,
        Ok(None) => return Dedicated::Framed(local),
        Err(reset) => return Dedicated::Ended { reset, sent: 0, received: 0 },
    };
    let conn: Box<dyn Stream> = Box::new(transport);
    let mut carry = Carry::new(link, key, flow, side, (local, ahead), (conn, rest));
    let reset = poll_fn(|cx| carry.poll(cx)).await;
    drop(up);
    let (sent, received) = carry.bytes();
    Dedicated::Ended { reset, sent, received }
}

/// A connection, what was read of it, whose end this is, and what counts it.
type Found = (Transport, Bytes, Side, crate::metrics::Up);

/// The relay's end: finds a connection, and says on the exchange how its bytes go.
async fn give(
    link: &Arc<Link>,
    key: Key,
    id: RequestId,
    pool: &Pool,
) -> Result<Option<Found>, Reset> {
    let mut found = pool.take_now().await;
    if found.is_none() {
        // The sidecar may not know of the exchange yet, and dials where one waits.
        say(link, key, DedicationStage::Wanted).await?;
    }
    let wait = sleep(pool.wait());
    tokio::pin!(wait);
    loop {
        let transport = match found.take() {
            Some(transport) => transport,
            None => tokio::select! {
                biased;
                reset = closed(link, key) => return Err(reset),
                taken = pool.take() => match taken {
                    Some(transport) => transport,
                    None => break,
                },
                () = &mut wait => break,
            },
        };
        // One that was lost while it waited is passed over.
        if let Ok(Ok(transport)) = timeout(DEDICATE_TIME, hand_over(transport, id)).await {
            say(link, key, DedicationStage::Connection).await?;
            let up = pool.metrics().dedicated.used("relay");
            return Ok(Some((transport, Bytes::new(), Side::Relay, up)));
        }
    }
    say(link, key, DedicationStage::Framed).await?;
    pool.metrics().dedicated.framed("relay");
    tracing::debug!(request_id = %id, "no dedicated connection; the exchange goes on in messages");
    Ok(None)
}

async fn hand_over(mut transport: Transport, id: RequestId) -> io::Result<Transport> {
    transport.attach()?;
    keep_alive(&transport)?;
    transport.write_all(&encode_dedicate(id)).await?;
    transport.flush().await?;
    Ok(transport)
}

/// The sidecar's end: waits for the relay's word, and for the connection that it speaks of.
async fn await_word(
    link: &Arc<Link>,
    key: Key,
    id: RequestId,
    claims: &Arc<Claims>,
) -> Result<Option<Found>, Reset> {
    link.with(|lane| lane.dispatched(key));
    let mut claim = claims.claim(id);
    let broken = |code: u32| {
        let reset = Reset::new(code);
        link.with(|lane| lane.reset(key, reset));
        Err(reset)
    };
    let late = sleep(ARRIVAL_TIME);
    tokio::pin!(late);
    let mut is_coming = false;
    loop {
        tokio::select! {
            biased;
            given = claim.given() => {
                let Given { mut transport, rest } = given;
                if transport.attach().and_then(|()| keep_alive(&transport)).is_err() {
                    return broken(failure::TUNNEL_LOST);
                }
                let up = claims.metrics().dedicated.used("sidecar");
                return Ok(Some((transport, rest, Side::Sidecar, up)));
            }
            // What comes after the relay's word is the exchange's, and an end may be faster than the
            // connection.
            received = poll_fn(|cx| link.with(|lane| lane.poll_recv(key, cx))), if !is_coming => {
                let stage = match received {
                    Received::Message(message) => read_dedication(&message),
                    Received::Finished => None,
                    Received::Reset(reset) => return Err(reset),
                };
                match stage {
                    Some(DedicationStage::Wanted) => {}
                    Some(DedicationStage::Connection) => {
                        is_coming = true;
                        late.as_mut().reset(tokio::time::Instant::now() + ARRIVAL_TIME);
                    }
                    Some(DedicationStage::Framed) => {
                        claims.metrics().dedicated.framed("sidecar");
                        return Ok(None);
                    }
                    None => return broken(failure::PLUGIN_FAILED),
                }
            }
            reset = closed(link, key), if is_coming => return Err(reset),
            () = &mut late, if is_coming => return broken(failure::TUNNEL_LOST),
        }
    }
}

/// Sends a word on the exchange.
async fn say(link: &Arc<Link>, key: Key, stage: DedicationStage) -> Result<(), Reset> {
    let mut message = Some(dedication(stage));
    poll_fn(|cx| link.with(|lane| lane.poll_send(key, cx, &mut message))).await
}

/// Waits until the exchange is over.
async fn closed(link: &Arc<Link>, key: Key) -> Reset {
    poll_fn(|cx| link.with(|lane| lane.poll_closed(key, cx))).await
}

/// Why a connection that waited at the sidecar will carry nothing.
#[derive(Debug, Error)]
pub enum WaitError {
    /// The relay closed it.
    #[error("the relay closed it")]
    Closed,
    /// The transport failed.
    #[error("the connection failed")]
    Io(#[source] io::Error),
    /// The relay said something else.
    #[error("the relay does not say what it is for")]
    Malformed(#[source] HandshakeError),
}

/// Waits at the sidecar until the relay says which exchange a connection is for. The bytes after that are left
/// in `input`.
///
/// # Errors
/// As [`WaitError`] says.
pub async fn await_dedicate(
    transport: &mut Transport,
    input: &mut BytesMut,
) -> Result<RequestId, WaitError> {
    loop {
        if let Some(id) = read_dedicate(input).map_err(WaitError::Malformed)? {
            return Ok(id);
        }
        if transport.read_buf(input).await.map_err(WaitError::Io)? == 0 {
            return Err(WaitError::Closed);
        }
    }
}

#[cfg(test)]
mod tests;
