//! One operation at a time per volume, snapshot or tree; the next one waits a little, then is told to come back.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// How long a second operation on the same object waits for the first. Below the 15 s after which sidecars give up.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct Inner {
    busy: Mutex<BTreeSet<[u8; 16]>>,
    freed: Notify,
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
}
