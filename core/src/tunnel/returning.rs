//! Where a lane that waits for its next connection gets it: one place, and the newest dial has it.
//!
//! Knows attempts and who may take a place; what a lane does with a connection is its task's business.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::BytesMut;

use super::transport::Transport;

/// A connection by which a lane comes back, its socket on no runtime yet.
pub struct Return {
    /// The connection, detached.
    pub transport: Transport,
    /// What came behind the dialler's `resume`.
    pub input: BytesMut,
    /// Grows with each dial of the lane.
    pub attempt: u64,
    /// Counted messages that the dialler has.
    pub received: u64,
    /// Its place among the handshakes under way, held until the dialler is answered.
    pub place: Box<dyn Send>,
}

impl std::fmt::Debug for Return {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Return").field("attempt", &self.attempt).finish_non_exhaustive()
    }
}

/// Why a connection is not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotTaken {
    /// One with this attempt, or a newer one, came before.
    Stale,
    /// The lane has ended.
    Over,
}

/// The place. One connection at most waits in it.
#[derive(Debug, Default)]
pub(super) struct Returns {
    slot: Mutex<Slot>,
}

#[derive(Debug, Default)]
struct Slot {
    waits: Option<Box<Return>>,
    /// The newest attempt that was let in; 0: none.
    newest: u64,
    is_over: bool,
}

impl Returns {
    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a connection in the place, from which an older one is closed. `then` is called under the lock.
    pub(super) fn offer(
        &self,
        next: Return,
        then: impl FnOnce(),
    ) -> Result<(), (Box<Return>, NotTaken)> {
        let next = Box::new(next);
        let mut slot = self.lock();
        if slot.is_over {
            return Err((next, NotTaken::Over));
        }
        if next.attempt <= slot.newest {
            return Err((next, NotTaken::Stale));
        }
        slot.newest = next.attempt;
        let older = slot.waits.replace(next);
        then();
        drop(slot);
        // It may close a socket: not under the lock.
        drop(older);
        Ok(())
    }

    /// Takes what waits. `then` is called under the lock.
    pub(super) fn take(&self, then: impl FnOnce()) -> Option<Box<Return>> {
        let mut slot = self.lock();
        let taken = slot.waits.take();
        then();
        taken
    }

    /// Takes no other from here on; returns what waits.
    pub(super) fn end(&self) -> Option<Box<Return>> {
        let mut slot = self.lock();
        slot.is_over = true;
        slot.waits.take()
    }
}
