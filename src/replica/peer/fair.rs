//! A mutex for a thread that must not wait long, beside one that locks again and again.
//!
//! Invariant: whoever waits gets the value before the one that has it gets it again: that one then waits for the turn, which the
//! first has kept. What the standard library has gives the value to whoever comes first, and a thread that is awake comes first.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// See the module.
pub(super) struct Fair<T> {
    /// Of whoever is next.
    turn: Mutex<()>,
    value: Mutex<T>,
}

impl<T> Fair<T> {
    pub fn new(value: T) -> Self {
        Self { turn: Mutex::new(()), value: Mutex::new(value) }
    }

    pub fn lock(&self) -> MutexGuard<'_, T> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn who_waits_has_its_turn_before_the_one_that_has_it_now() {
        for _ in 0..100 {
            let fair = Fair::new(false);
            std::thread::scope(|scope| {
                let here = fair.lock();
                scope.spawn(|| *fair.lock() = true);
                let began = Instant::now();
                while fair.turn.try_lock().is_ok() {
                    assert!(began.elapsed() < Duration::from_secs(120), "nobody waits");
                    std::thread::yield_now();
                }
                drop(here);
                assert!(*fair.lock(), "this thread was awake, and came first");
            });
        }
    }
}
