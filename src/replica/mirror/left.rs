//! Devices that a killed engine left and whose copy on this node cannot be opened: ended when another copy has taken its place.
//!
//! Invariant: only what was read from the catalogue now ends a device, and only if it is not older than the copy, as far as that
//! can be read. A copy that is still primary there, or may become it again without having been brought up to date, has its device.

use super::local::Local;
use super::reconcile::Trouble;
use crate::protocol::Configuration;
use crate::replica::manager::Manager;
use crate::volume::{InstanceId, VolumeId};

impl Local {
    /// Looks whether the volume's device waits here for a copy that is overtaken.
    pub(super) async fn follow_left_device(&self, manager: &Manager, volume: VolumeId) -> Result<(), Trouble> {
        let Some(copy) = manager.left_copy(volume).await? else { return Ok(()) };
        let configuration = self.committed(manager, volume).await?;
        manager.note_others(volume, has_others(&configuration, copy));
        if is_overtaken(&configuration, copy) {
            manager.end_left(volume).await?;
        }
        Ok(())
    }
}

/// Whether another copy than this one has every acknowledged write; a candidate lacks some.
fn has_others(configuration: &Configuration, copy: InstanceId) -> bool {
    configuration.members().any(|member| member != copy)
}

/// Whether another copy has been primary since this one was: only that makes itself primary, or this one no member.
fn is_overtaken(configuration: &Configuration, copy: InstanceId) -> bool {
    configuration.primary.is_some_and(|primary| primary != copy) || !configuration.is_member(copy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Generation, Lacks};

    #[test]
    fn a_copy_is_overtaken_by_another_primary_and_by_nothing_else() {
        let [one, two] = [1, 2].map(|byte| InstanceId::from_bytes([byte; 16]));
        let mut configuration = Configuration::first(Generation(1), one, [two].into());
        assert!(!is_overtaken(&configuration, one) && is_overtaken(&configuration, two));
        configuration.primary = None;
        configuration.secondaries.insert(one);
        assert!(!is_overtaken(&configuration, one), "nobody was primary since it has left");
        configuration.secondaries.remove(&one);
        configuration.candidates.insert(one, Lacks::Everything);
        assert!(is_overtaken(&configuration, one), "a primary has dropped it");
        configuration.candidates.remove(&one);
        assert!(is_overtaken(&configuration, one), "a primary has taken it out");
    }

    #[test]
    fn only_members_are_worth_more_than_a_copy_that_cannot_be_opened() {
        let [one, two] = [1, 2].map(|byte| InstanceId::from_bytes([byte; 16]));
        let mut configuration = Configuration::first(Generation(1), one, [two].into());
        assert!(has_others(&configuration, one));
        configuration.secondaries.remove(&two);
        for lacks in [Lacks::Everything, Lacks::Since(configuration.stamp)] {
            configuration.candidates.insert(two, lacks);
            assert!(!has_others(&configuration, one), "{lacks:?}");
        }
        configuration.primary = Some(two);
        assert!(has_others(&configuration, one));
    }
}
