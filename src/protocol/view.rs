//! What the engine and people may know of a copy beside the outputs.
//!
//! Invariants: reads only; nothing in here changes what a core does.

use super::configuration::{Configuration, Stamp};
use super::copying::Sync;
use super::hot::Extent;
use super::interface::{Primary, Role, Wish};
use super::message::SerialNumber;
use super::replica::{Health, Replica};
use crate::volume::InstanceId;

/// Another copy, as a primary sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// It has every acknowledged write.
    UpToDate,
    /// It gets all writes, and what it lacks is being copied to it.
    SyncTarget,
    /// It lacks writes.
    Outdated,
}

/// How far the last resync or reconcile of a primary is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Progress {
    /// Blocks that were sent or fetched.
    pub copied: u64,
    /// Blocks that were compared and were equal there already.
    pub equal: u64,
    /// Blocks that are under way.
    pub under_way: u64,
}

impl Replica {
    /// How far the last resync or reconcile is.
    pub fn progress(&self) -> Progress {
        Progress { under_way: self.blocks_under_way(), ..self.progress }
    }

    /// Whether the bytes of a frame are still needed: what it asks for waits for its turn.
    pub fn wants(&self, from: InstanceId, stamp: Stamp, serial: SerialNumber) -> bool {
        let configuration = &self.record.configuration;
        let is_primary = configuration.primary == Some(from) && configuration.stamp == stamp;
        is_primary && self.applies.iter().any(|apply| apply.waiting() == Some(serial))
    }

    /// The newest committed configuration that it knows: durable here, or on its way there.
    pub fn newest(&self) -> &Configuration {
        self.adoption.as_ref().map_or(&self.record.configuration, |adoption| adoption.configuration())
    }

    /// The other copies, if this one is primary.
    pub fn standings(&self) -> impl Iterator<Item = (InstanceId, Standing)> + '_ {
        self.peers.iter().map(|peer| {
            let standing = match peer.sync {
                _ if peer.member => Standing::UpToDate,
                Sync::Idle => Standing::Outdated,
                Sync::Joining(_) | Sync::Copying | Sync::Equal => Standing::SyncTarget,
            };
            (peer.copy, standing)
        })
    }

    /// Extents where the copies may differ after a crash.
    pub fn hot_extents(&self) -> Vec<Extent> {
        self.hot.extents()
    }

    /// Its disk failed something that it cannot do without; it serves no more before it is opened again.
    pub fn has_failed(&self) -> bool {
        self.health == Health::Failed
    }

    /// Whether the newest configuration says, and the one before did not, that what this copy, its primary, may have lost no
    /// copy has.
    pub fn has_lost_its_own(&self) -> bool {
        let newest = self.newest();
        let says = newest.says_what_is_lost() && newest.lost > self.record.configuration.lost;
        let has_all = self.record.intact && self.record.configuration.is_member(self.me);
        newest.primary == Some(self.me) && says && !has_all
    }

    /// What the spec wants, as it was told last.
    pub fn wish(&self) -> Option<&Wish> {
        self.wish.as_ref()
    }

    /// The term that it is primary in.
    pub fn term(&self) -> Option<Stamp> {
        self.is_primary().then_some(self.record.configuration.term)
    }

    /// Whether requests are executed here now.
    pub fn serves(&self) -> bool {
        self.role == Role::Primary(Primary::Serving) && self.health != Health::Failed
    }

    /// Whether they can be answered: every secondary was heard within a lease.
    pub fn answers(&self) -> bool {
        self.serves() && self.has_lease()
    }
}
