//! Who may write what over the network: a controller everything, a node what its replica alone knows.
//!
//! Invariants: whoever has a certificate of the cluster may read everything; what a node may write follows from the name in
//! its certificate and from the object as it is in the catalogue, never from what the caller says of itself.

use super::{GroupSnapshot, Node, NodeName, Object, Snapshot, Volume, VolumeConfiguration};
use crate::tls::{Identity, Role};
use crate::volume::InstanceId;

/// A change of one object: what it is, and what it shall be. Neither is `None` twice.
pub(super) struct Write<'a, T> {
    pub before: Option<&'a T>,
    pub after: Option<&'a T>,
}

/// Objects that are reachable over the network.
pub(super) trait Guarded: Object {
    /// Whether a node's replica may change it so.
    fn node_may(node: &NodeName, write: &Write<'_, Self>) -> bool;
}

/// Whether the holder of this certificate may change an object so.
pub(super) fn may<T: Guarded>(who: &Identity, write: &Write<'_, T>) -> bool {
    match who.role {
        Role::Controller => true,
        Role::Node => T::node_may(&NodeName(who.name.to_string()), write),
    }
}

impl Guarded for Node {
    /// Its own. A controller says that it is removed, and it says that it is back.
    fn node_may(node: &NodeName, write: &Write<'_, Self>) -> bool {
        write.after.is_some_and(|after| after.name == *node)
    }
}

impl Guarded for VolumeConfiguration {
    /// The version that follows. Whether the copy may propose it is the protocol's to say.
    fn node_may(_: &NodeName, write: &Write<'_, Self>) -> bool {
        let (Some(before), Some(after)) = (write.before, write.after) else { return false };
        let (old, new) = (before.stamp(), after.stamp());
        new.generation == old.generation && new.version == old.version.next()
    }
}

impl Guarded for Volume {
    /// Which copies are there, and what they are: its own, and those that nobody wants any more. Where it uses the volume
    /// without a copy: which copy shall be primary, because nobody else knows that it does not reach the one that was wished.
    fn node_may(node: &NodeName, write: &Write<'_, Self>) -> bool {
        let (Some(before), Some(after)) = (write.before, write.after) else { return false };
        let mut expected = before.clone();
        expected.status.copies.clone_from(&after.status.copies);
        expected.status.reports.clone_from(&after.status.reports);
        if let (Some(mirror), Some(wished)) = (expected.spec.mirror.as_mut(), after.spec.mirror.as_ref())
            && mirror.client.as_ref().is_some_and(|client| client.node == *node)
            && wished.primary.is_some_and(|copy| mirror.copies.contains_key(&copy))
        {
            mirror.primary = wished.primary;
        }
        let owner = |copy| {
            let mirror = before.spec.mirror.as_ref();
            mirror.and_then(|mirror| mirror.copies.get(copy)).map(|spec| &spec.node)
        };
        let mut added = after.status.copies.difference(&before.status.copies);
        let mut removed = before.status.copies.difference(&after.status.copies);
        let reports = (&before.status.reports, &after.status.reports);
        let changed = |copy: &&InstanceId| reports.0.get(copy) != reports.1.get(copy);
        let mut told = reports.0.keys().chain(reports.1.keys()).filter(changed);
        expected == *after
            && told.all(|copy| owner(copy).map_or(!reports.1.contains_key(copy), |owner| owner == node))
            && added.all(|copy| owner(copy) == Some(node))
            && removed.all(|copy| owner(copy).is_none_or(|owner| owner == node))
    }
}

impl Guarded for Snapshot {
    fn node_may(_: &NodeName, _: &Write<'_, Self>) -> bool {
        false
    }
}

impl Guarded for GroupSnapshot {
    fn node_may(_: &NodeName, _: &Write<'_, Self>) -> bool {
        false
    }
}
