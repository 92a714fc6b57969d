//! Configurations: proposed, lost, and committed without an answer.

use super::network::Relay;
use super::rig::{Lab, Served, anywhere, embedded};
use crate::catalog::{Catalog, VolumeConfiguration};
use crate::protocol::{Configuration, Generation, Outcome};
use crate::tls::Role;
use crate::volume::{InstanceId, VolumeId};
use std::collections::BTreeSet;

fn first(primary: InstanceId, secondary: InstanceId) -> Configuration {
    Configuration::first(Generation(0), primary, BTreeSet::from([secondary]))
}

/// The version after it, with this primary.
fn after(before: &Configuration, primary: InstanceId) -> Configuration {
    let mut next = before.clone();
    next.stamp.version = next.stamp.version.next();
    next.term = next.stamp;
    next.secondaries.extend(next.primary.replace(primary));
    next.secondaries.remove(&primary);
    next
}

#[tokio::test]
async fn of_two_proposals_one_is_committed_and_the_other_learns_it() {
    let (_directory, file) = embedded();
    let catalog = Catalog::Embedded(file);
    let (volume, one, two) = (VolumeId::random(), InstanceId::random(), InstanceId::random());
    assert_eq!(catalog.configuration(volume).await.expect("reads"), None);
    let start = first(one, two);
    catalog.create(VolumeConfiguration::new(volume, &start)).await.expect("created");
    let (mine, theirs) = (after(&start, one), after(&start, two));
    let (a, b) =
        tokio::join!(catalog.propose(volume, start.stamp, &mine), catalog.propose(volume, start.stamp, &theirs));
    let now = catalog.configuration(volume).await.expect("reads").expect("is there");
    let lost = Outcome::Lost(Box::new(now.clone()));
    let expected = if now == mine { (Outcome::Committed, lost) } else { (lost, Outcome::Committed) };
    assert_eq!((a, b), expected);
    // Repeated, because no answer had come: it is what it is.
    assert_eq!(catalog.propose(volume, start.stamp, &now).await, Outcome::Committed);
    // A copy that is ahead of the catalogue changes nothing.
    let ahead = after(&after(&now, one), two);
    assert_eq!(catalog.propose(volume, after(&now, one).stamp, &ahead).await, Outcome::Ambiguous);
    assert_eq!(catalog.configuration(volume).await.expect("reads"), Some(now));
}

#[tokio::test]
async fn a_proposal_without_an_answer_is_never_guessed() {
    let (_directory, embedded) = embedded();
    let (lab, file) = (Lab::new(), Catalog::Embedded(embedded.clone()));
    let served = Served::start(&lab, embedded.clone(), anywhere()).await;
    let relay = Relay::start(served.address).await;
    let node = lab.client(relay.address, Role::Node, "n1");
    let (volume, one, two) = (VolumeId::random(), InstanceId::random(), InstanceId::random());
    let start = first(one, two);
    let stored = file.create(VolumeConfiguration::new(volume, &start)).await.expect("created");
    let next = after(&start, one);
    relay.cut_after_a_change(embedded, stored);
    // The write was executed, its answer is lost, and reading it back works again: nothing is left open.
    assert_eq!(node.propose(volume, start.stamp, &next).await, Outcome::Committed);
    assert_eq!(file.configuration(volume).await.expect("reads"), Some(next.clone()));
    relay.cut(true);
    assert_eq!(node.propose(volume, next.stamp, &after(&next, two)).await, Outcome::Ambiguous);
    relay.cut(false);
    let now = node.configuration(volume).await.expect("reads").expect("is there");
    assert!(now == next || now == after(&next, two), "one of both, as it may be executed or not");
    served.stop().await;
}
