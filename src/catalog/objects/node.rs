//! The nodes of a cluster.

use super::NodeName;
use crate::catalog::Object;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// A node, as its replica says at each start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Node {
    /// Also in its certificate.
    pub name: NodeName,
    /// Where the other replicas reach its copies.
    pub mirror: SocketAddr,
    /// Where the controller reaches its replica.
    pub control: SocketAddr,
    /// Whether its connections to other replicas are encrypted.
    pub encrypted: bool,
}

impl Object for Node {
    const KIND: &'static str = "node";
    fn key(&self) -> String {
        self.name.0.clone()
    }
    fn name(&self) -> Option<&str> {
        None
    }
}
