//! The data path's threads: one current-thread runtime each, so that an exchange is accepted,
//! carried and answered without crossing a thread.
//!
//! Knows nothing of what runs on them.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::sync::{mpsc, oneshot};

use crate::plugin;

/// How many tasks a thread polls before it looks at its sockets and timers again. Low, so that a
/// burst of ready tasks delays neither (docs/tunnel-protocol.md, "Order of sending").
const EVENT_INTERVAL: u32 = 16;

/// Tasks handed to a thread that it has not started yet. Only connections and lanes come this way;
/// past it a hand-over is refused and its socket closed.
const HANDOVER_MAX: usize = 4096;

type Start = Pin<Box<dyn Future<Output = ()> + Send>>;

/// One data-path thread.
#[derive(Clone)]
pub struct Shard {
    /// Which one, from 0, over all roles of the process.
    pub index: usize,
    starts: mpsc::Sender<Start>,
}

impl Shard {
    /// Runs `task` on this thread. Returns false, the task dropped, where the thread is gone or too
    /// many wait for it.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> bool {
        self.starts.try_send(Box::pin(task)).is_ok()
    }
}

/// The threads of one role.
pub struct Shards {
    /// In index order.
    pub all: Arc<[Shard]>,
    threads: Vec<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Shards {
    /// Starts `count` threads named `name-0` and on, with indices from `first` of `total`.
    ///
    /// # Errors
    /// The system's, where a thread or a runtime cannot be made.
    pub fn start(name: &str, count: usize, first: usize, total: usize) -> io::Result<Self> {
        let mut all = Vec::with_capacity(count);
        let mut threads = Vec::with_capacity(count);
        let shards = u32::try_from(total).map_err(io::Error::other)?;
        for n in 0..count {
            let index = first + n;
            let shard = u32::try_from(index).map_err(io::Error::other)?;
            let (starts, mut inbox) = mpsc::channel::<Start>(HANDOVER_MAX);
            let (stop, stopped) = oneshot::channel::<()>();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .event_interval(EVENT_INTERVAL)
                .build()?;
            let thread =
                std::thread::Builder::new().name(format!("{name}-{n}")).spawn(move || {
                    runtime.block_on(async move {
                        // Inside the runtime, so that plugins' timers find it.
                        plugin::enter_shard(shard, shards);
                        let accept = async {
                            while let Some(task) = inbox.recv().await {
                                tokio::spawn(task);
                            }
                        };
                        tokio::select! {
                            () = accept => {}
                            _ = stopped => {}
                        }
                    });
                })?;
            all.push(Shard { index, starts });
            threads.push((stop, thread));
        }
        Ok(Self { all: all.into(), threads })
    }

    /// Stops the threads; what still runs on them is dropped.
    pub fn stop(self) {
        let mut joins = Vec::with_capacity(self.threads.len());
        for (stop, thread) in self.threads {
            // An error means that the thread is gone already.
            let _ = stop.send(());
            joins.push(thread);
        }
        for thread in joins {
            if thread.join().is_err() {
                tracing::error!("a data-path thread panicked");
            }
        }
    }
}
