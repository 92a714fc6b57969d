//! What is known beside a copy of a mirrored volume: what a cluster's catalogue is rebuilt from.
//!
//! Invariant: a configuration that the copy knows is never kept back: what is on its way to stable media is committed, too,
//! and the copy may act under it at any moment.

use super::{Manager, VolumePlace};
use crate::catalog::NodeName;
use crate::protocol::Record;
use crate::replica::mirror::{is_going, nodes_of};
use crate::volume::{InstanceId, VolumeId};
use std::collections::BTreeMap;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordView {
    /// The copy on this node.
    pub copy: InstanceId,
    /// Its removal was decided.
    pub removing: bool,
    /// The other copies, and where they were last.
    pub peers: BTreeMap<InstanceId, NodeName>,
    /// With the newest committed configuration; `None`: it has never acted.
    pub record: Option<Record>,
}

impl Manager {
    /// `None`: the volume has but one copy.
    pub(super) async fn record_view(&self, volume: VolumeId, place: &VolumePlace) -> Option<RecordView> {
        let text = &place.mirror.as_ref()?.record;
        let known = self.engine().mirror_status(volume).await.ok().flatten();
        let record = match known {
            Some(status) => Some(Record { configuration: status.newest, intact: status.intact }),
            None => self.durable_record(volume).await,
        };
        Some(RecordView { copy: place.tree, removing: is_going(text), peers: nodes_of(text), record })
    }
}
