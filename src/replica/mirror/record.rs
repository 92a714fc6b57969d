//! What is kept beside a copy, so that it can answer its peers while the catalogue is out of reach, and so that a removal
//! that has begun ends.
//!
//! Invariants: JSON inside a checksummed record ([`Record`](crate::replica::records::Record)); unknown fields are ignored.

use crate::catalog::NodeName;
use crate::replica::peer::Party;
use crate::volume::{InstanceId, VolumeSize};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// Where another copy is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PeerRecord {
    pub node: NodeName,
    /// As it was known last; `None`: the node was never seen.
    pub address: Option<SocketAddr>,
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct CopyRecord {
    pub peers: BTreeMap<InstanceId, PeerRecord>,
    /// Its removal was decided and is not undone.
    #[serde(default)]
    pub removing: bool,
    /// The largest size that the volume was known to have: an old catalogue that is restored must not take the end away from
    /// whoever uses it.
    #[serde(default)]
    pub size: Option<VolumeSize>,
}

/// Where the other copies are, by the text of the record beside one.
pub fn nodes_of(record: &str) -> BTreeMap<InstanceId, NodeName> {
    let peers = CopyRecord::decode(record).map(|record| record.peers).unwrap_or_default();
    peers.into_iter().map(|(copy, peer)| (copy, peer.node)).collect()
}

/// Whether the copy's removal was decided, by the text of the record beside it.
pub fn is_going(record: &str) -> bool {
    CopyRecord::decode(record).is_ok_and(|record| record.removing)
}

/// Where copies are reached.
pub(super) type Parties = BTreeMap<InstanceId, (Party, SocketAddr)>;

impl CopyRecord {
    pub fn encode(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    pub fn decode(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// The peers that can be called. Two copies on one node have no conversation.
    pub fn parties(&self, here: &NodeName) -> Parties {
        let mut parties = Parties::new();
        for (copy, peer) in &self.peers {
            let Some(address) = peer.address.filter(|_| peer.node != *here) else { continue };
            match peer.node.0.parse() {
                Ok(node) => _ = parties.insert(*copy, (Party { node, copy: *copy }, address)),
                Err(error) => tracing::error!(%copy, %error, "a copy cannot be reached: its node has no usable name"),
            }
        }
        parties
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_back_and_names_who_can_be_called() {
        let copies = [1, 2, 3, 4].map(|byte| InstanceId::from_bytes([byte; 16]));
        let address = SocketAddr::from(([192, 0, 2, 7], 7001));
        let peer = |node: &str, address| PeerRecord { node: NodeName(node.into()), address };
        let peers =
            [peer("n1", Some(address)), peer("n2", Some(address)), peer("n3", None), peer("N 4", Some(address))];
        let record = CopyRecord { peers: copies.into_iter().zip(peers).collect(), removing: true, size: None };
        assert_eq!(CopyRecord::decode(&record.encode()).expect("readable"), record);
        let parties = record.parties(&NodeName("n1".into()));
        assert_eq!(parties.keys().copied().collect::<Vec<_>>(), [copies[1]]);
        assert!(!CopyRecord::decode("{\"peers\":{}}").expect("readable").removing);
        assert!(CopyRecord::decode("damaged").is_err());
    }
}
