//! What a watcher hears of the catalogue, wherever that is.
//!
//! Invariants: after [`Seen::FellBehind`] everything is to be listed, and until then no change was left out; a watcher that
//! lists first when it begins misses nothing.

use super::Change;
use tokio::sync::{broadcast, mpsc};
use tokio::task::AbortHandle;

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Something happened to an object; what it is now is to be read.
    Changed(Change),
    /// Changes were left out: the watcher was too slow, or the catalogue was out of reach. List again.
    FellBehind,
}

/// Changes from its beginning on, of all kinds.
pub struct Watch(Source);

enum Source {
    Local(broadcast::Receiver<Change>),
    Remote(mpsc::Receiver<Seen>, Task),
}

/// A task that ends with its owner.
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Watch {
    pub(super) fn local(changes: broadcast::Receiver<Change>) -> Self {
        Self(Source::Local(changes))
    }

    pub(super) fn remote(seen: mpsc::Receiver<Seen>, task: AbortHandle) -> Self {
        Self(Source::Remote(seen, Task(task)))
    }

    /// The next event; `None` when the catalogue was closed. May be cancelled.
    pub async fn next(&mut self) -> Option<Seen> {
        match &mut self.0 {
            Source::Local(changes) => match changes.recv().await {
                Ok(change) => Some(Seen::Changed(change)),
                Err(broadcast::error::RecvError::Lagged(_)) => Some(Seen::FellBehind),
                Err(broadcast::error::RecvError::Closed) => None,
            },
            Source::Remote(seen, Task(_)) => seen.recv().await,
        }
    }
}
