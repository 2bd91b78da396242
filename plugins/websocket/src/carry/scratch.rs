//! Buffers that a thread's connections share: each uses them within one poll.

use std::cell::Cell;

use sidelane_plugin::Buf;

/// Read at once. With a batch of 32 KiB a read makes two messages.
pub(super) const READ_BYTES: usize = 64 * 1024;

/// Most bytes that stand before what is read: what an earlier read left.
pub(super) const HELD_BYTES_MAX: usize = READ_BYTES + 33 * 1024;

struct Buffers {
    read: Box<[u8]>,
    out: Vec<u8>,
    payloads: Vec<(usize, Buf)>,
}

thread_local! {
    static BUFFERS: Cell<Option<Box<Buffers>>> = const { Cell::new(None) };
}

/// This thread's buffers, given back when it is dropped.
pub(super) struct Scratch {
    buffers: Option<Box<Buffers>>,
}

impl Scratch {
    pub(super) fn take() -> Self {
        let kept = BUFFERS.try_with(Cell::take).ok().flatten();
        let buffers = kept.unwrap_or_else(|| {
            Box::new(Buffers {
                read: vec![0; HELD_BYTES_MAX + READ_BYTES].into_boxed_slice(),
                out: Vec::new(),
                payloads: Vec::new(),
            })
        });
        Self { buffers: Some(buffers) }
    }

    fn buffers(&mut self) -> &mut Buffers {
        self.buffers.as_mut().expect("present until it is dropped")
    }

    /// Where bytes are read to that nobody wants.
    pub(super) fn room(&mut self) -> &mut [u8] {
        &mut self.buffers().read[..READ_BYTES]
    }

    /// The buffer for reading, and the one for what is made of it.
    pub(super) fn both(&mut self) -> (&mut [u8], &mut Vec<u8>) {
        let buffers = self.buffers();
        (&mut buffers.read, &mut buffers.out)
    }

    /// Empty buffers for what is written: bytes, and payloads with where among them they stand.
    pub(super) fn write(&mut self) -> (&mut Vec<u8>, &mut Vec<(usize, Buf)>) {
        let Buffers { out, payloads, .. } = self.buffers();
        out.clear();
        payloads.clear();
        (out, payloads)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(buffers) = &mut self.buffers {
            buffers.payloads.clear();
        }
        // Gone with its thread where that ends.
        let _ = BUFFERS.try_with(|kept| kept.set(self.buffers.take()));
    }
}
