//! Copies that keep their connection and renew the lease, and answer nothing: a disk that hangs is as bad as a dead node.
//!
//! Invariant: what is remembered of a copy is the one operation that it owes longest, and since when.

use crate::protocol::{Now, SerialNumber};
use crate::volume::InstanceId;
use std::collections::BTreeMap;
use std::time::Duration;

/// How long a copy may owe one operation: far longer than a disk that works ever takes, and shorter than the half minute after
/// which kernels and databases begin to complain about theirs.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Laggards(BTreeMap<InstanceId, (SerialNumber, Now)>);

impl Laggards {
    /// What each copy owes longest now. Returns those that have owed the same for too long; their time begins anew.
    pub fn look(&mut self, now: Now, owed: impl Iterator<Item = (InstanceId, SerialNumber)>) -> Vec<InstanceId> {
        let before = std::mem::take(&mut self.0);
        let mut found = Vec::new();
        for (copy, serial) in owed {
            let since = before.get(&copy).filter(|(known, _)| *known == serial).map_or(now, |(_, since)| *since);
            if now.0.saturating_sub(since.0) < PATIENCE {
                self.0.insert(copy, (serial, since));
            } else {
                found.push(copy);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_found_when_it_owes_one_operation_for_too_long() {
        let (slow, dead) = (InstanceId::random(), InstanceId::random());
        let mut laggards = Laggards::default();
        for second in 0..10 {
            let owed = [(slow, SerialNumber(second)), (dead, SerialNumber(7))];
            assert_eq!(laggards.look(Now(Duration::from_secs(second)), owed.into_iter()), []);
        }
        let owed = || [(slow, SerialNumber(10)), (dead, SerialNumber(7))].into_iter();
        assert_eq!(laggards.look(Now(PATIENCE), owed()), [dead]);
        assert_eq!(laggards.look(Now(PATIENCE * 2), owed()), [slow], "the other one's time began anew");
    }
}
