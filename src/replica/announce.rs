//! A node says in the catalogue that it is there, and where.
//!
//! Invariants: until the controller is reached it is tried again, and nothing else waits for that; an object that is not as
//! it should be, because the catalogue was lost or is an old one, is put right as soon as the controller is there again. A node
//! that was removed says that it is back; what it has given up meanwhile stays written until it has done so.

use crate::catalog::{Catalog, CreateError, Node, Seen, Stored, UpdateError, Watch};
use std::time::Duration;

/// Before the first attempts after a failure,
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// and before later ones: a controller that is back is found soon.
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// How often a node that is announced looks whether it still is.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// Announces the node, says so once by `ready`, and keeps it announced. Never returns.
pub async fn keep_announced(catalog: &Catalog, node: &Node, ready: impl FnOnce()) {
    let mut watch = catalog.watch();
    let (mut ready, mut pause, mut failing) = (Some(ready), FIRST_PAUSE, false);
    loop {
        match announce(catalog, node).await {
            Ok(()) => {
                if let Some(ready) = ready.take() {
                    ready();
                }
                if failing {
                    tracing::info!("the controller is reached again");
                }
                (pause, failing) = (FIRST_PAUSE, false);
                until_worth_a_look(&mut watch).await;
            }
            Err(error) => {
                if !failing {
                    tracing::warn!(%error, "this node cannot announce itself, and tries again until it can");
                }
                failing = true;
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LAST_PAUSE);
            }
        }
    }
}

/// The catalogue may have been another one meanwhile, or it is time.
async fn until_worth_a_look(watch: &mut Watch) {
    let looked = async {
        loop {
            match watch.next().await {
                Some(Seen::Changed(_)) => {}
                Some(Seen::FellBehind) => return,
                // The catalogue of a process that is ending.
                None => std::future::pending().await,
            }
        }
    };
    let _ = tokio::time::timeout(LOOK_EVERY, looked).await;
}

/// Why it is not announced now: a sentence of the catalogue.
#[derive(Debug, thiserror::Error)]
enum Unannounced {
    #[error(transparent)]
    Read(#[from] crate::catalog::CatalogError),
    #[error(transparent)]
    Create(#[from] CreateError),
    #[error(transparent)]
    Update(#[from] UpdateError),
}

async fn announce(catalog: &Catalog, node: &Node) -> Result<(), Unannounced> {
    match catalog.get::<Node>(&node.name.0).await? {
        Some(stored) => {
            let object = Node { given_up: stored.object.given_up.clone(), ..node.clone() };
            if stored.object != object {
                catalog.update(Stored { object, ..stored }).await?;
            }
        }
        None => drop(catalog.create(node.clone()).await?),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::NodeName;
    use crate::volume::VolumeId;

    #[tokio::test]
    async fn a_node_that_moves_or_was_forgotten_is_announced_again() {
        let dir = tempfile::Builder::new().prefix("tandem-announce").tempdir().expect("a directory");
        let catalog = Catalog::open(&dir.path().join("catalog.redb")).expect("a catalogue");
        let at = |port: u16| {
            let [mirror, control] = [port, port + 1].map(|port| ([127, 0, 0, 1], port).into());
            Node::new(NodeName("node-1".into()), mirror, control, true)
        };
        for node in [at(1), at(1), at(7)] {
            announce(&catalog, &node).await.expect("announced");
            let stored = catalog.get::<Node>("node-1").await.expect("readable").expect("there");
            assert_eq!(stored.object, node);
        }
        let mut stored = catalog.get::<Node>("node-1").await.expect("readable").expect("there");
        stored.object.removed = true;
        stored.object.given_up.volumes.insert(VolumeId::random());
        let given_up = stored.object.given_up.clone();
        catalog.update(stored).await.expect("removed");
        announce(&catalog, &at(7)).await.expect("announced");
        let stored = catalog.get::<Node>("node-1").await.expect("readable").expect("there");
        assert_eq!((stored.object.removed, &stored.object.given_up), (false, &given_up), "it is back");
        catalog.delete(&stored).await.expect("forgotten");
        announce(&catalog, &at(7)).await.expect("announced");
        assert!(catalog.get::<Node>("node-1").await.expect("readable").is_some());
    }
}
