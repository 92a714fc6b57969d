//! The places between two effects of a call where a kill would leave something half done.
//!
//! Invariant: nothing is tidied up on the way out of an interrupted call, as nothing is when a process is killed; so a test
//! that interrupts every call at every step, then repeats it, has tried every kill.

use crate::crash::crash_point;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

/// Counts the effects of calls; the default never interrupts.
#[derive(Clone, Debug, Default)]
pub struct Steps(Option<Arc<AtomicI64>>);

/// The call ended between two of its effects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("interrupted between two steps; repeat the call")]
pub struct Interrupted;

impl Steps {
    /// Interrupts after `effects` effects (0: before anything), and at every one that follows.
    pub fn interrupt_after(effects: u32) -> Self {
        Self(Some(Arc::new(AtomicI64::new(i64::from(effects)))))
    }

    /// To be called after each effect on the system.
    pub(super) fn done(&self) -> Result<(), Interrupted> {
        crash_point("csi.node");
        match &self.0 {
            None => Ok(()),
            Some(left) if left.fetch_sub(1, Ordering::SeqCst) > 1 => Ok(()),
            Some(_) => Err(Interrupted),
        }
    }
}
