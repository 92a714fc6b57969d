//! Who has been promised how many bytes of a pool: the one place where a promise is made.
//!
//! # Invariants
//! * What a tree may grow to (`settled`) plus what operations under way have asked for (`pending`) never exceeds the limit
//!   at the moment a promise is made, also under concurrency.
//! * A promise is dropped ([`Promise`] is a guard) or settled into its tree's figure, never both, never neither.

use crate::volume::InstanceId;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct Inner {
    settled: BTreeMap<InstanceId, u64>,
    pending: u64,
}

/// The promises of one pool.
#[derive(Clone, Debug, Default)]
pub struct Promises(Arc<Mutex<Inner>>);

/// The pool cannot promise so much.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} bytes are needed and {available} can be promised")]
pub struct NotEnough {
    /// Bytes asked for.
    pub wanted: u64,
    /// Bytes that could be promised.
    pub available: u64,
}

/// Bytes promised to an operation under way.
#[derive(Debug)]
#[must_use = "dropping it gives the bytes back"]
pub struct Promise {
    promises: Promises,
    bytes: u64,
}

impl Promises {
    /// Promises `bytes` if `limit` allows.
    pub fn promise(&self, bytes: u64, limit: u64) -> Result<Promise, NotEnough> {
        let mut inner = self.lock();
        let available = limit.saturating_sub(inner.total());
        if bytes > available {
            return Err(NotEnough { wanted: bytes, available });
        }
        inner.pending += bytes;
        drop(inner);
        Ok(Promise { promises: self.clone(), bytes })
    }

    /// What the tree may grow to, from now on; 0 forgets it.
    pub fn settle(&self, tree: InstanceId, bytes: u64) {
        self.lock().settle(tree, bytes);
    }

    /// Bytes promised altogether.
    pub fn total(&self) -> u64 {
        self.lock().total()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every critical section here leaves the sums consistent, so a poisoned lock is still usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Promise {
    /// The operation has happened: the tree's new figure takes the promise's place, in one step.
    pub fn settle(self, tree: InstanceId, bytes: u64) {
        let mut inner = self.promises.lock();
        inner.settle(tree, bytes);
        // Dropping `self` takes the pending bytes away; between the two the pool looks fuller, never emptier.
        drop(inner);
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.promises.lock().pending -= self.bytes;
    }
}

impl Inner {
    fn total(&self) -> u64 {
        self.settled.values().sum::<u64>() + self.pending
    }
    fn settle(&mut self, tree: InstanceId, bytes: u64) {
        if bytes == 0 {
            self.settled.remove(&tree);
        } else {
            self.settled.insert(tree, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fifty_parallel_promises_never_exceed_the_limit() {
        let promises = Promises::default();
        let granted: u64 = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..50)
                .map(|_| {
                    let promises = promises.clone();
                    scope.spawn(move || match promises.promise(10, 105) {
                        Ok(promise) => {
                            promise.settle(InstanceId::random(), 10);
                            10
                        }
                        Err(_) => 0,
                    })
                })
                .collect();
            workers.into_iter().map(|w| w.join().expect("worker")).sum()
        });
        assert!(granted <= 105 && promises.total() == granted, "{granted}");
    }

    #[test]
    fn a_dropped_promise_gives_its_bytes_back() {
        let promises = Promises::default();
        let promise = promises.promise(100, 100).expect("fits");
        assert_eq!(promises.promise(1, 100).expect_err("full").available, 0);
        drop(promise);
        assert_eq!(promises.total(), 0);
    }
}
