//! What is under way: at most one operation per volume, snapshot, group or name at a time.
//!
//! Invariant: an [`Operation`] ends when it is dropped, and handlers run to their end even if the caller goes away, so
//! "under way" is always true when it is said.

use crate::volume::{GroupSnapshotId, SnapshotId, VolumeId};
use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// What an operation changes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// A volume that may not have an id yet.
    VolumeName(String),
    /// A volume.
    Volume(VolumeId),
    /// The taking away of a volume from a node, which is a part of an operation on it.
    Release(VolumeId),
    /// A snapshot that may not have an id yet.
    SnapshotName(String),
    /// A snapshot.
    Snapshot(SnapshotId),
    /// A group that may not have an id yet.
    GroupName(String),
    /// A group of snapshots.
    Group(GroupSnapshotId),
    /// The whole catalogue, rebuilt from the disks.
    Recovery,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VolumeName(name) => write!(f, "the volume named {name:?}"),
            Self::Volume(id) => write!(f, "volume {id}"),
            Self::Release(id) => write!(f, "the release of volume {id}"),
            Self::SnapshotName(name) => write!(f, "the snapshot named {name:?}"),
            Self::Snapshot(id) => write!(f, "snapshot {id}"),
            Self::GroupName(name) => write!(f, "the group snapshot named {name:?}"),
            Self::Group(id) => write!(f, "group snapshot {id}"),
            Self::Recovery => f.write_str("the recovery of the catalogue"),
        }
    }
}

/// The operations that are under way; clones are the same list.
#[derive(Clone, Debug, Default)]
pub struct Operations(Arc<All>);

#[derive(Debug, Default)]
struct All {
    under_way: Mutex<BTreeSet<Subject>>,
    ended: Condvar,
}

/// One operation; dropping it ends it.
#[derive(Debug)]
#[must_use = "the operation ends when this is dropped"]
pub struct Operation {
    subject: Subject,
    all: Operations,
}

/// Another call works on it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another call for {0} is under way; repeat this one later")]
pub struct UnderWay(pub Subject);

impl Operations {
    /// Starts an operation, unless there is one.
    pub fn start(&self, subject: Subject) -> Result<Operation, UnderWay> {
        self.start_within(subject, Duration::ZERO)
    }

    /// The same; the one that is under way is waited for so long. Never use it on a thread of the runtime.
    pub fn start_within(&self, subject: Subject, limit: Duration) -> Result<Operation, UnderWay> {
        let under_way = self.0.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.0.ended.wait_timeout_while(under_way, limit, |all| all.contains(&subject));
        let (mut under_way, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if !under_way.insert(subject.clone()) {
            return Err(UnderWay(subject));
        }
        Ok(Operation { subject, all: self.clone() })
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        self.all.0.under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.subject);
        self.all.0.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_operation_waits_for_the_end_of_the_first() {
        let (all, id) = (Operations::default(), VolumeId::random());
        let first = all.start(Subject::Volume(id)).expect("the first");
        assert_eq!(all.start(Subject::Volume(id)).err(), Some(UnderWay(Subject::Volume(id))));
        let _other = all.start(Subject::Volume(VolumeId::random())).expect("another volume");
        drop(first);
        let _second = all.start(Subject::Volume(id)).expect("the second");
    }

    #[test]
    fn whoever_waits_has_it_when_the_first_ends_and_is_told_if_it_does_not() {
        let (all, subject) = (Operations::default(), Subject::Volume(VolumeId::random()));
        let first = all.start(subject.clone()).expect("the first");
        let refused = all.start_within(subject.clone(), Duration::from_millis(20)).err();
        assert_eq!(refused, Some(UnderWay(subject.clone())));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| all.start_within(subject.clone(), Duration::from_secs(60)).map(drop));
            drop(first);
            waits.join().expect("no panic").expect("the second");
        });
    }
}
