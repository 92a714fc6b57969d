//! The Controller, GroupController and SnapshotMetadata services against a replica in memory: what is answered, what is
//! refused with which code, and that every call converges wherever the process dies.
//! Runs beside others.

#[path = "csi_controller/bring.rs"]
mod bring;
#[path = "csi_controller/changes.rs"]
mod changes;
#[path = "csi_controller/compare.rs"]
mod compare;
#[path = "csi_controller/copies.rs"]
mod copies;
#[path = "csi_controller/crashes.rs"]
mod crashes;
#[path = "csi_controller/departed.rs"]
mod departed;
#[path = "csi_controller/fake.rs"]
mod fake;
#[path = "csi_controller/groups.rs"]
mod groups;
#[path = "csi_controller/half_made.rs"]
mod half_made;
#[path = "csi_controller/metadata.rs"]
mod metadata;
#[path = "csi_controller/mirror_snapshots.rs"]
mod mirror_snapshots;
#[path = "csi_controller/mirrors.rs"]
mod mirrors;
#[path = "csi_controller/nodes.rs"]
mod nodes;
#[path = "csi_controller/publish.rs"]
mod publish;
#[path = "csi_controller/rebuild.rs"]
mod rebuild;
#[path = "csi_controller/recover.rs"]
mod recover;
#[path = "csi_controller/recovery.rs"]
mod recovery;
#[path = "csi_controller/secrets.rs"]
mod secrets;
#[path = "csi_controller/server.rs"]
mod server;
#[path = "csi_controller/site.rs"]
mod site;
#[path = "csi_controller/snapshots.rs"]
mod snapshots;
#[path = "csi_controller/volumes.rs"]
mod volumes;
