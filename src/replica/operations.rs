//! One operation at a time per volume, snapshot or tree; the next one waits a little, then is told to come back.
//!
//! Invariants: an operation that only waits for others gives its objects up to whoever wants them instead; one that does something
//! ends first.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// How long a second operation on the same object waits for the first. Below the 15 s after which sidecars give up.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct Inner {
    busy: Mutex<BTreeSet<[u8; 16]>>,
    freed: Notify,
    /// What somebody waits for who may have it at once: as often as it is waited for.
    wanted: Mutex<Vec<[u8; 16]>>,
    asked: Notify,
}

/// The objects that have an operation under way.
#[derive(Clone, Debug, Default)]
pub struct Operations(Arc<Inner>);

/// An operation on the same object is still under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an operation on it is still under way; call again")]
pub struct Busy;

/// The object is ours until this is dropped.
#[derive(Debug)]
pub struct OperationGuard {
    operations: Operations,
    keys: Vec<[u8; 16]>,
}

impl Operations {
    /// Waits until none of `keys` is busy and takes them all at once (so no two callers wait for each other).
    pub async fn begin(&self, mut keys: Vec<[u8; 16]>) -> Result<OperationGuard, Busy> {
        keys.sort_unstable();
        keys.dedup();
        let take = async {
            loop {
                // Registered before the check, or a release in between would be missed.
                let freed = self.0.freed.notified();
                if self.try_take(&keys) {
                    return;
                }
                freed.await;
            }
        };
        tokio::time::timeout(PATIENCE, take).await.map_err(|_| Busy)?;
        Ok(OperationGuard { operations: self.clone(), keys })
    }

    /// As [`Self::begin`]; whoever has one of `keys` and only waits gives it up: see [`OperationGuard::wanted`].
    pub async fn begin_instead(&self, keys: Vec<[u8; 16]>) -> Result<OperationGuard, Busy> {
        let _wish = Wish::new(self.clone(), keys.clone());
        self.begin(keys).await
    }

    fn wishes(&self) -> MutexGuard<'_, Vec<[u8; 16]>> {
        self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nothing is busy, but no longer than a second operation would wait for a first one.
    pub async fn idle(&self) {
        let all_done = async {
            loop {
                let freed = self.0.freed.notified();
                if self.0.busy.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
                    return;
                }
                freed.await;
            }
        };
        if tokio::time::timeout(PATIENCE, all_done).await.is_err() {
            tracing::warn!("operations are still under way");
        }
    }

    fn try_take(&self, keys: &[[u8; 16]]) -> bool {
        let mut busy = self.0.busy.lock().unwrap_or_else(PoisonError::into_inner);
        if keys.iter().any(|k| busy.contains(k)) {
            return false;
        }
        busy.extend(keys);
        true
    }
}

/// Somebody waits for these, as long as this is there.
struct Wish {
    operations: Operations,
    keys: Vec<[u8; 16]>,
}

impl Wish {
    fn new(operations: Operations, keys: Vec<[u8; 16]>) -> Self {
        operations.wishes().extend(&keys);
        operations.0.asked.notify_waiters();
        Self { operations, keys }
    }
}

impl Drop for Wish {
    fn drop(&mut self) {
        let mut wanted = self.operations.wishes();
        for key in &self.keys {
            if let Some(at) = wanted.iter().position(|wish| wish == key) {
                wanted.swap_remove(at);
            }
        }
    }
}

impl OperationGuard {
    /// Ends when somebody waits for one of these objects who may have it instead.
    pub async fn wanted(&self) {
        loop {
            // Registered before the check, or a wish in between would be missed.
            let asked = self.operations.0.asked.notified();
            if self.operations.wishes().iter().any(|wish| self.keys.contains(wish)) {
                return;
            }
            asked.await;
        }
    }
}

impl Drop for OperationGuard {
    fn drop(&mut self) {
        let mut busy = self.operations.0.busy.lock().unwrap_or_else(PoisonError::into_inner);
        for key in &self.keys {
            busy.remove(key);
        }
        drop(busy);
        self.operations.0.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_second_operation_waits_for_the_first() {
        let operations = Operations::default();
        let first = operations.begin(vec![[1; 16], [2; 16]]).await.expect("free");
        let second = tokio::spawn({
            let operations = operations.clone();
            async move { operations.begin(vec![[2; 16], [3; 16]]).await.map(drop) }
        });
        operations.begin(vec![[4; 16]]).await.map(drop).expect("another object is free");
        assert!(!second.is_finished());
        drop(first);
        second.await.expect("task").expect("freed");
    }

    #[tokio::test]
    async fn one_that_only_waits_gives_way_to_one_that_takes_its_place() {
        let operations = Operations::default();
        let waits = async {
            let guard = operations.begin(vec![[1; 16]]).await.expect("free");
            guard.wanted().await;
            drop(guard);
        };
        let others = async {
            operations.begin_instead(vec![[2; 16]]).await.map(drop).expect("another object is free");
            operations.begin_instead(vec![[1; 16]]).await.map(drop).expect("given up")
        };
        tokio::join!(waits, others);
        // Nobody waits for it any more.
        let guard = operations.begin(vec![[1; 16]]).await.expect("free");
        let wanted = tokio::time::timeout(Duration::from_millis(50), guard.wanted()).await;
        assert!(wanted.is_err(), "a wish that was fulfilled is over");
        let second = operations.begin(vec![[1; 16]]);
        assert!(tokio::time::timeout(Duration::from_millis(50), second).await.is_err(), "one that can wait does");
    }
}
