//! The Container Storage Interface: all services of it on one Unix socket.

pub mod capability;
pub mod control;
pub mod controller;
pub mod errors;
pub mod group;
pub mod handler;
pub mod identity;
pub mod node;
pub mod nodes;
pub mod operations;
pub mod parameters;
pub mod recovery;
pub mod server;
pub mod snapshot_metadata;
pub mod status;

pub use node::TOPOLOGY_KEY;
pub use server::{ControllerConfig, CsiConfig, ServeError, serve, serve_controller, serve_node};
