//! Tandem: storage for Kubernetes. A CSI driver that makes block volumes out of local disks and outlives its own software.
//!
//! # Layers
//! ```text
//!    main.rs, cli/, standalone.rs                   wiring
//!    csi/   catalog/   replica/   metrics.rs        edges: they wait, fail and retry
//!                 protocol/   store/                pure: step(now, input) -> outputs
//!                 volume.rs                         vocabulary: ids, ranges, sizes
//! ```
//! # Glossary
//! * **volume**, **snapshot**, **stage**, **publish**: as in CSI.
//! * **pool**: a directory (or a disk that Tandem formatted) that holds copies.
//! * **copy**: one layer tree in one pool: a volume, its snapshots and the clones made from them.
//! * **layer**, **seal**, **merge**: a map from logical to physical blocks; end the newest one; fold one into its only child.
//! * **base**: the layer that a copy of a mirrored volume had as its newest when it left; it lacks what lies above.
//! * **slot**: shared memory that keeps one device request while the engine may die.
//! * **holder**: the process that keeps descriptors so that everything else may die.
//! * **primary**, **configuration**: PacificA's; **promote**, **UpToDate**, **Outdated**: DRBD's (they come with the mirror).

pub mod catalog;
pub mod cli;
pub mod crash;
pub mod csi;
pub mod logging;
pub mod memory;
pub mod metrics;
pub mod mount;
pub mod placement;
pub mod protocol;
pub mod replica;
pub mod rpc;
pub mod standalone;
pub mod store;
pub mod tls;
pub mod uds;
pub mod volume;
