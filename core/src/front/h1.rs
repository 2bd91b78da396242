//! HTTP/1.1 and 1.0, by hyper.
//!
//! Drives one connection: timeouts, the client's end, shutdown, the hand-over after an upgrade.
//! hyper parses and frames; docs/adr/0002-http-front.md says what it cannot do and what holds then.

use std::error::Error as _;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::task::{self, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use sidelane_abi::failure;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, Sleep};

use self::service::Requests;
use super::answer::Refusal;
use super::wire::{Signals, Wire};
use super::{ConnectionError, Context, Dispatch, FrontConfig};
use crate::plugin::lend;

mod body;
mod interim;
mod service;

/// How long a connection is read to its end after we have closed our side with input outstanding.
/// Closing at once would make the kernel reset it, and the client could lose the answer.
pub(super) const LINGER: Duration = Duration::from_secs(2);

/// Most bytes thrown away meanwhile.
pub(super) const LINGER_BYTES_MAX: usize = 1024 * 1024;

/// Serves an HTTP/1 connection until it ends.
pub(super) async fn serve<S, D>(
    stream: S,
    ahead: Bytes,
    context: Context<D>,
    mut shutdown: Pin<&mut (impl Future<Output = ()> + Send)>,
) -> Result<(), ConnectionError>
where
    S: lend::Stream,
    D: Dispatch,
{
    let signals = Arc::new(Signals::new());
    signals.read.store(!ahead.is_empty(), Relaxed);
    signals.ends_soon.store(context.info.ends_soon.load(Relaxed), Relaxed);
    let wire = Wire::new(stream, ahead, Arc::clone(&signals));
    let mut clock = Clock::new(&context.config);
    let config = Arc::clone(&context.config);
    let info = Arc::clone(&context.info);
    let requests = Requests::new(context, Arc::clone(&signals));
    let mut connection = builder(&config).serve_connection(TokioIo::new(wire), requests);

    let mut closing = false;
    let end = poll_fn(|cx| {
        if let Poll::Ready(done) = connection.poll_without_shutdown(cx) {
            return Poll::Ready(End::Done(done));
        }
        // After the first poll, so that a request that has come is still answered.
        if !closing && shutdown.as_mut().poll(cx).is_ready() {
            closing = true;
            Pin::new(&mut connection).graceful_shutdown();
            if let Poll::Ready(done) = connection.poll_without_shutdown(cx) {
                return Poll::Ready(End::Done(done));
            }
        }
        if info.ends_soon.load(Relaxed) {
            signals.ends_soon.store(true, Relaxed);
        }
        if signals.ended.load(Relaxed) && signals.live.load(Relaxed) > 0 {
            // hyper notices only where it waits for nothing but the response.
            return Poll::Ready(End::Gone);
        }
        clock.poll(&signals, cx).map(End::Late)
    })
    .await;

    let parts = connection.into_parts();
    let upgrade = signals.upgrade.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(exchange) = upgrade {
        if matches!(end, End::Done(Ok(()))) {
            exchange.upgraded(Box::new(parts.io.into_inner().with_ahead(parts.read_buf)));
            return Ok(());
        }
        exchange.upgrade_failed();
    }
    let wire = parts.io.into_inner();
    match end {
        End::Done(Ok(())) => {
            close(wire, signals.unread.load(Relaxed)).await;
            Ok(())
        }
        End::Done(Err(error)) if error.is_parse() => {
            close(wire, true).await;
            Err(ConnectionError::Http1(error))
        }
        End::Done(Err(error)) => Err(classify(error)),
        End::Gone => Err(ConnectionError::ClientGone),
        // What the client has not taken is lost, and must not look whole.
        End::Late(Late::Idle) if !signals.flushed.load(Relaxed) => Err(ConnectionError::Stalled),
        End::Late(Late::Idle) => {
            close(wire, false).await;
            Ok(())
        }
        End::Late(Late::Head) => {
            // Only where nothing of an earlier response is still on its way.
            if !signals.wrote.load(Relaxed) || signals.flushed.load(Relaxed) {
                say_too_slow(wire).await;
            }
            Err(ConnectionError::HeadTimeout)
        }
    }
}

/// Returns who broke the connection, where it was not the request's syntax.
fn classify(error: hyper::Error) -> ConnectionError {
    if error.is_user() || error.is_body_write_aborted() {
        return ConnectionError::Aborted;
    }
    let cause = error.source().and_then(|source| source.downcast_ref::<io::Error>());
    match cause.map(io::Error::kind) {
        _ if error.is_incomplete_message() => ConnectionError::ClientGone,
        Some(
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted,
        ) => ConnectionError::ClientGone,
        Some(kind) => ConnectionError::Io(io::Error::new(kind, error)),
        None => ConnectionError::Http1(error),
    }
}

/// How a connection came to its end.
enum End {
    Done(hyper::Result<()>),
    /// The client went away during an exchange.
    Gone,
    Late(Late),
}

fn builder(config: &FrontConfig) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .max_buf_size(config.buffer_bytes_max)
        .max_header_size(config.head_bytes_max as usize)
        .max_headers(config.headers_max)
        // Ours counts rest and head apart, and costs no timer per request.
        .header_read_timeout(None)
        .pipeline_flush(false)
        .half_close(false)
        .writev(true);
    builder
}

/// Ends our side; where input is outstanding, reads on for a while so that the answer arrives.
async fn close<S: AsyncRead + AsyncWrite + Unpin>(mut wire: Wire<S>, linger: bool) {
    let closing = async {
        wire.shutdown().await?;
        let mut space = vec![0; if linger { 16 * 1024 } else { 0 }];
        let mut thrown_away = 0;
        while linger && thrown_away < LINGER_BYTES_MAX {
            match wire.read(&mut space).await? {
                0 => break,
                read => thrown_away += read,
            }
        }
        Ok::<(), io::Error>(())
    };
    if let Ok(Err(error)) = tokio::time::timeout(LINGER, closing).await {
        tracing::trace!(%error, "client's connection failed while it was closed");
    }
}

async fn say_too_slow<S: AsyncRead + AsyncWrite + Unpin>(mut wire: Wire<S>) {
    let line = Refusal::of_code(failure::CLIENT_TIMEOUT).line();
    let answer = format!(
        "HTTP/1.1 408 Request Timeout\r\nconnection: close\r\n\
         content-type: text/plain; charset=utf-8\r\nx-sidelane-error: client-timeout\r\n\
         content-length: {}\r\n\r\n",
        line.len()
    );
    let answer = [answer.as_bytes(), &line].concat();
    // A client that does not take it in time is not worth waiting for.
    let answered = tokio::time::timeout(LINGER, wire.write_all(&answer)).await;
    if matches!(answered, Ok(Ok(()))) {
        close(wire, true).await;
    }
}

/// Which time has run out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Late {
    /// Nothing came between requests.
    Idle,
    /// A head did not come whole.
    Head,
}

/// What a connection is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Head,
    Busy,
    Idle,
}

/// Watches a connection's rest and its heads with one timer, which is set again only when it fires.
struct Clock {
    head_timeout: Duration,
    idle_timeout: Duration,
    phase: Phase,
    /// Of the present phase; none counts while busy.
    deadline: Instant,
    /// `Signals::requests` when last at rest.
    requests: u32,
    sleep: Pin<Box<Sleep>>,
}

impl Clock {
    fn new(config: &FrontConfig) -> Self {
        let deadline = Instant::now() + config.request_head_timeout;
        Self {
            head_timeout: config.request_head_timeout,
            idle_timeout: config.idle_timeout,
            // The first request must come as fast as a head.
            phase: Phase::Head,
            deadline,
            requests: 0,
            sleep: Box::pin(tokio::time::sleep_until(deadline)),
        }
    }

    /// Takes note of where the connection is; ready once it has been there too long.
    fn poll(&mut self, signals: &Signals, cx: &mut task::Context<'_>) -> Poll<Late> {
        self.observe(signals);
        while self.sleep.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            if self.phase == Phase::Busy {
                self.deadline = now + self.idle_timeout;
            } else if self.deadline <= now
                && self.phase == Phase::Idle
                && signals.wrote.swap(false, Relaxed)
            {
                // A slow client still takes the last response.
                self.deadline = now + self.idle_timeout;
            } else if self.deadline <= now {
                return Poll::Ready(match self.phase {
                    Phase::Head => Late::Head,
                    _ => Late::Idle,
                });
            }
            self.sleep.as_mut().reset(self.deadline);
        }
        Poll::Pending
    }

    fn observe(&mut self, signals: &Signals) {
        let requests = signals.requests.load(Relaxed);
        // A response that is over, and waits for its client alone, keeps nobody busy.
        if signals.live.load(Relaxed) > 0 && signals.calls.load(Relaxed) > 0 {
            self.phase = Phase::Busy;
        } else if self.requests != requests || self.phase == Phase::Busy {
            self.requests = requests;
            // What was read belonged to the exchange.
            signals.read.store(false, Relaxed);
            signals.wrote.store(false, Relaxed);
            self.enter(Phase::Idle, self.idle_timeout);
        } else if self.phase == Phase::Idle
            && signals.read.load(Relaxed)
            // hyper looks at what a client has sent ahead once the last response has left.
            && signals.flushed.load(Relaxed)
        {
            self.enter(Phase::Head, self.head_timeout);
        }
    }

    fn enter(&mut self, phase: Phase, timeout: Duration) {
        self.phase = phase;
        self.deadline = Instant::now() + timeout;
        // Later deadlines are found when the timer fires.
        if self.deadline < self.sleep.deadline() {
            self.sleep.as_mut().reset(self.deadline);
        }
    }
}
