//! Volumes and snapshots as objects: what CSI asks for becomes an object of the catalogue first, then a call to the
//! replica, then the object's status.
//!
//! ```text
//!   request ── TryFrom ──> domain request ──> catalogue: wanted ──> replica: make it so ──> catalogue: it is so ──> response
//!                │ InvalidArgument
//! ```
//! # Invariants
//! * A process may die between any two arrows; the same call repeated goes on from there, and [`Controller::sweep`]
//!   finishes at start what nobody repeats.
//! * Nothing is promised to a caller before the catalogue has it on disk.
//! * The replica is the one that counts bytes: two creations at once cannot promise the same ones.
//! * A final error leaves nothing behind; where that cannot be made sure the answer is UNAVAILABLE and the call is repeated.

mod bring;
mod change;
mod compare;
mod create;
mod delete;
mod departed;
mod half_made;
mod list;
pub(in crate::csi) mod mirror;
mod operator;
mod place;
mod publish;
mod rebuild;
mod recover;
mod replicas;
pub mod request;
pub(crate) mod response;
pub(in crate::csi) mod seal;
mod service;
mod settle;
pub(crate) mod snapshot;
mod source;
mod sweep;

pub use operator::OperatorService;
pub use recover::{ForceError, Promotion, Report, Row, State, Unopened, recover};
pub use request::SizeRange;
pub use service::ControllerService;

use super::errors::Transient;
use super::nodes::{Node, Nodes};
use super::operations::{Operation, Operations, Subject};
use crate::catalog::{Catalog, CreateError, NodeName, Object, Reach, Stored, UpdateError, Volume};
use crate::crash::crash_point;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// How often a change of a volume is tried again because a node has confirmed something in the same moment: each node of a
/// volume has one or two things to confirm at a time.
const MAX_RACES: usize = 16;

/// The domain behind the Controller, GroupController and SnapshotMetadata services.
pub struct Controller {
    pub(super) catalog: Catalog,
    pub(super) nodes: Nodes,
    pub(super) operations: Operations,
    max_volumes_per_node: u32,
    /// Whether volumes may have copies on several nodes.
    mirrors: bool,
    publishing: publish::Publishing,
}

impl Controller {
    /// A controller for the volumes of `nodes`, of which at most `max_volumes_per_node` are published to one at a time.
    pub fn new(catalog: Catalog, nodes: Nodes, max_volumes_per_node: u32) -> Self {
        let (operations, publishing) = (Operations::default(), publish::Publishing::default());
        Self { catalog, nodes, operations, max_volumes_per_node, mirrors: false, publishing }
    }

    /// The same, whose nodes can keep volumes with copies on several of them.
    #[must_use]
    pub fn with_mirrors(self) -> Self {
        Self { mirrors: true, ..self }
    }

    /// The node that holds a volume with one copy.
    pub(super) async fn home(&self, volume: &Volume) -> Result<Node, Transient> {
        self.nodes.holder(volume.spec.node.as_ref()).await
    }

    /// Where the volume can be used.
    pub(super) fn holders(&self, volume: &Volume) -> Vec<NodeName> {
        match &volume.spec.mirror {
            Some(mirror) => {
                mirror.copies.values().map(|copy| copy.node.clone()).collect::<BTreeSet<_>>().into_iter().collect()
            }
            None => self.nodes.name_of(volume.spec.node.as_ref()).into_iter().collect(),
        }
    }

    /// The nodes that a scheduler may choose for the volume; none are named if all are possible.
    pub(super) fn reachable_from(&self, volume: &Volume) -> Vec<NodeName> {
        if volume.request.reach == Reach::Any { Vec::new() } else { self.holders(volume) }
    }

    pub(super) fn start(&self, subject: Subject) -> Result<Operation, Transient> {
        Ok(self.operations.start(subject)?)
    }

    /// What the controller does by itself holds an operation for a moment only: whoever calls need not hear of it.
    pub(in crate::csi) async fn start_soon(&self, subject: Subject) -> Result<Operation, Transient> {
        /// A few times as long as a change of an object takes on a slow disk.
        const PATIENCE: Duration = Duration::from_secs(2);
        const TRY_EVERY: Duration = Duration::from_millis(20);
        let until = Instant::now() + PATIENCE;
        loop {
            match self.start(subject.clone()) {
                Err(_) if Instant::now() < until => tokio::time::sleep(TRY_EVERY).await,
                started => return started,
            }
        }
    }

    pub(super) async fn get<T: Object>(&self, key: impl ToString) -> Result<Option<Stored<T>>, Transient> {
        Ok(self.catalog.get(&key.to_string()).await?)
    }

    pub(super) async fn find<T: Object>(&self, name: &str) -> Result<Option<Stored<T>>, Transient> {
        Ok(self.catalog.find(name).await?)
    }

    pub(super) async fn all<T: Object>(&self) -> Result<Vec<Stored<T>>, Transient> {
        Ok(self.catalog.list().await?)
    }

    pub(super) async fn create<T: Object>(&self, object: T) -> Result<Stored<T>, Transient> {
        crash_point("csi.create");
        let created = self.catalog.create(object).await.map_err(Transient::from);
        crash_point("csi.created");
        created
    }

    pub(super) async fn update<T: Object>(&self, stored: Stored<T>) -> Result<Stored<T>, Transient> {
        crash_point("csi.update");
        let updated = self.catalog.update(stored).await.map_err(Transient::from);
        crash_point("csi.updated");
        updated
    }

    /// Changes the volume. Its nodes confirm in its status what they have done, at any moment: to lose against them is no
    /// reason to ask the caller again. Needs the volume's operation, so that nobody else changes its spec.
    pub(super) async fn change(
        &self,
        stored: Stored<Volume>,
        change: impl Fn(&mut Volume),
    ) -> Result<Stored<Volume>, Transient> {
        let (id, spec) = (stored.object.id, stored.object.spec.clone());
        let lost = || Transient::Conflict(format!("volume {id}"));
        let mut now = stored;
        for _ in 0..MAX_RACES {
            change(&mut now.object);
            match self.update(now).await {
                Err(Transient::Conflict(_)) => {
                    let read = self.get::<Volume>(id).await?;
                    now = read.filter(|read| read.object.spec == spec).ok_or_else(lost)?;
                }
                done => return done,
            }
        }
        Err(lost())
    }

    pub(super) async fn remove<T: Object>(&self, stored: &Stored<T>) -> Result<(), Transient> {
        crash_point("csi.remove");
        let removed = self.catalog.delete(stored).await.map_err(Transient::from);
        crash_point("csi.removed");
        removed
    }

    /// The object as it was read, now that its operation has been started: what was read before may be old.
    pub(super) async fn same<T: Object>(&self, stored: &Stored<T>) -> Result<(), Transient> {
        let key = stored.object.key();
        match self.get::<T>(&key).await? {
            Some(now) if now.version == stored.version => Ok(()),
            _ => Err(Transient::Conflict(format!("{} {key}", T::KIND))),
        }
    }
}

/// For messages.
fn names<'a>(nodes: impl IntoIterator<Item = &'a NodeName>) -> String {
    let names: Vec<_> = nodes.into_iter().map(|node| node.0.as_str()).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

impl From<CreateError> for Transient {
    fn from(error: CreateError) -> Self {
        match error {
            CreateError::Exists { kind, key } => Self::Conflict(format!("{kind} {key}")),
            CreateError::Ambiguous { kind, key, reason } => Self::NoAnswer { what: format!("{kind} {key}"), reason },
            CreateError::Failed(error) => error.into(),
        }
    }
}

impl From<UpdateError> for Transient {
    fn from(error: UpdateError) -> Self {
        match error {
            UpdateError::Conflict { kind, key } => Self::Conflict(format!("{kind} {key}")),
            UpdateError::Ambiguous { kind, key, reason } => Self::NoAnswer { what: format!("{kind} {key}"), reason },
            UpdateError::Failed(error) => error.into(),
        }
    }
}
