//! Moves the bytes of one direction: as they come where the line is plain, when they are due
//! otherwise.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Control;
use super::line::Line;

/// What one read takes.
const READ_BYTES: usize = 64 * 1024;

/// How a direction ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Its sender has said that nothing follows, and that was passed on.
    Ended,
    /// One of its ends is gone.
    Broken,
}

/// One direction of a connection.
pub(super) struct Flow<'a> {
    pub(super) from: &'a TcpStream,
    pub(super) to: &'a TcpStream,
    pub(super) line: Line,
    pub(super) stalls: fn(&Control) -> bool,
    pub(super) carried: &'a AtomicU64,
}

impl Flow<'_> {
    /// Runs until the direction ends; a fault that ends the connection drops it.
    pub(super) async fn run(mut self, control: &mut watch::Receiver<Control>) -> Outcome {
        match self.pass(control).await {
            Ok(()) => Outcome::Ended,
            Err(_) => Outcome::Broken,
        }
    }

    async fn pass(&mut self, control: &mut watch::Receiver<Control>) -> io::Result<()> {
        let mut space = vec![0; READ_BYTES];
        // Pieces that were read, with the time at which they are due. Bounded by the line's window.
        let mut held: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
        let mut ended = false;
        loop {
            if (self.stalls)(&control.borrow_and_update()) {
                control.changed().await.map_err(io::Error::other)?;
                continue;
            }
            let now = Instant::now();
            if held.front().is_some_and(|(due, _)| *due <= now) {
                tokio::select! {
                    biased;
                    _ = control.changed() => {}
                    writable = self.to.writable() => {
                        writable?;
                        self.write(&mut held, now)?;
                    }
                }
                continue;
            }
            if ended && held.is_empty() {
                return SockRef::from(self.to).shutdown(std::net::Shutdown::Write);
            }
            let room = if ended { 0 } else { self.line.room(now).min(READ_BYTES) };
            let due = held.front().map(|(due, _)| *due);
            let more_room = if room == 0 && !ended { self.line.more_room_at() } else { None };
            let next = due.into_iter().chain(more_room).min();
            tokio::select! {
                biased;
                _ = control.changed() => {}
                () = until(next) => {}
                readable = self.from.readable(), if room > 0 => {
                    readable?;
                    match self.from.try_read(&mut space[..room]) {
                        Ok(0) => ended = true,
                        Ok(length) => self.take(&space[..length], &mut held),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => return Err(error),
                    }
                }
            }
        }
    }

    fn take(&mut self, bytes: &[u8], held: &mut VecDeque<(Instant, Vec<u8>)>) {
        let now = Instant::now();
        if self.line.is_plain() {
            held.push_back((now, bytes.to_vec()));
            return;
        }
        let mut from = 0;
        self.line.send(now, bytes.len(), |due, length| {
            let piece = &bytes[from..from + length];
            from += length;
            match held.back_mut() {
                Some((last, last_piece)) if *last == due => last_piece.extend_from_slice(piece),
                _ => held.push_back((due, piece.to_vec())),
            }
        });
    }

    /// Writes what is due, as far as the socket takes it.
    fn write(&self, held: &mut VecDeque<(Instant, Vec<u8>)>, now: Instant) -> io::Result<()> {
        while let Some((due, piece)) = held.front_mut()
            && *due <= now
        {
            match self.to.try_write(piece) {
                Ok(length) => {
                    self.carried.fetch_add(length as u64, Ordering::SeqCst);
                    if length == piece.len() {
                        held.pop_front();
                    } else {
                        piece.drain(..length);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Says that nothing follows, and throws away what still comes until its sender says so too.
pub(super) async fn close(side: &TcpStream) {
    // It may be gone already.
    let _ = SockRef::from(side).shutdown(std::net::Shutdown::Write);
    let mut space = vec![0; READ_BYTES];
    while side.readable().await.is_ok() {
        match side.try_read(&mut space) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}
