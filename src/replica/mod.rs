//! The replica: local pools, copies of volumes, their block devices and the engine that carries their I/O.
//!
//! # Invariants
//! * It has a mount namespace of its own: sharing one with mounts of its own devices deadlocks at exit.
//! * Everything that must outlive it is in the holder or on disk before anybody is told of it.

pub mod announce;
pub mod cluster;
pub mod device;
pub mod digest;
pub mod engine;
pub mod executor;
pub mod extents;
mod fatal;
pub mod filler;
pub mod holder;
pub mod io;
pub mod manager;
pub mod mirror;
pub mod operations;
pub mod peer;
pub mod pool;
pub mod records;
pub mod run;
pub mod service;
pub mod transfer;
pub mod verify;

pub use run::{ReplicaConfig, RunError, run};
