//! Who holds the copies of a new volume: a function of what the nodes have and of where the volume must be reached.
//!
//! Invariants: no two copies on one node; no copy where the pool cannot promise its bytes; what the caller requires is met
//! or the volume is refused with one sentence; the same input gives the same answer. Preferences come before free space.

use crate::catalog::NodeName;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// A place that a caller names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// Every node is there.
    Anywhere,
    /// That node is it.
    Node(NodeName),
    /// Described in words that no node of ours uses.
    Unknown,
}

impl Place {
    /// Whether the node is there.
    pub fn includes(&self, node: &NodeName) -> bool {
        match self {
            Self::Anywhere => true,
            Self::Node(name) => name == node,
            Self::Unknown => false,
        }
    }
}

/// A pool in which a copy could be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Of which node.
    pub node: NodeName,
    /// Its name there.
    pub pool: String,
    /// Bytes that it can still promise.
    pub free: u64,
    /// Bytes of the largest volume that it takes.
    pub largest: u64,
}

/// What is to be placed.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// Name of the pool.
    pub pool: &'a str,
    /// Bytes of each copy.
    pub bytes: u64,
    /// On how many nodes.
    pub copies: usize,
    /// CSI's `requisite`: with fewer copies than places each copy is in one of them, else each of them has a copy.
    pub requisite: &'a [Place],
    /// CSI's `preferred`: the first one that can be had is the best.
    pub preferred: &'a [Place],
}

/// Where a copy shall be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Choice {
    /// On which node.
    pub node: NodeName,
    /// In which pool of it.
    pub pool: String,
}

/// Why there is no such place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No node has a pool of that name: the class is wrong.
    #[error("no node has a pool {pool:?}; there are: {known}; see `tandem pool add`")]
    UnknownPool {
        /// As asked for.
        pool: String,
        /// Comma separated.
        known: String,
    },
    /// The places that the caller requires and the nodes that there are do not meet.
    #[error("the volume must be reachable from {required}, and pool {pool:?} is on {there}")]
    NotThere {
        /// The caller's places.
        required: String,
        /// As asked for.
        pool: String,
        /// Who has it.
        there: String,
    },
    /// More copies than nodes that could hold one.
    #[error("{copies} copies need {copies} nodes with a pool {pool:?}, and it is on {there}")]
    TooFewNodes {
        /// How many were asked for.
        copies: usize,
        /// As asked for.
        pool: String,
        /// Who has it.
        there: String,
    },
    /// The pools are full.
    #[error("no room for {copies} copies of {bytes} bytes in pool {pool:?}: {free}")]
    NoRoom {
        /// How many were asked for.
        copies: usize,
        /// Of each copy.
        bytes: u64,
        /// As asked for.
        pool: String,
        /// What the nodes have left, one after the other.
        free: String,
    },
}

/// Chooses a node and its pool for each copy; the first one is the best for the first primary.
pub fn choose(pools: &[Pool], wanted: &Wanted<'_>) -> Result<Vec<Choice>, Refusal> {
    let named = candidates(pools, wanted)?;
    // Two pools of one name on a node do not exist, but nothing here may rest on that.
    let fitting: BTreeMap<_, _> = named.iter().filter(|p| p.largest >= wanted.bytes).map(|p| (&p.node, *p)).collect();
    let mut chosen: Vec<&Pool> = Vec::new();
    for place in must_have(wanted) {
        let covered = chosen.iter().any(|pool| place.includes(&pool.node));
        if !covered {
            let best = ranked(&fitting, wanted).into_iter().find(|pool| place.includes(&pool.node));
            chosen.push(best.ok_or_else(|| no_room(&named, wanted))?);
        }
    }
    for pool in ranked(&fitting, wanted) {
        if chosen.len() < wanted.copies && !chosen.contains(&pool) {
            chosen.push(pool);
        }
    }
    if chosen.len() < wanted.copies {
        return Err(no_room(&named, wanted));
    }
    chosen.sort_by_key(|pool| rank(pool, wanted));
    Ok(chosen.into_iter().map(|pool| Choice { node: pool.node.clone(), pool: pool.pool.clone() }).collect())
}

/// Bytes of the largest volume that could be placed like that now; 0: none.
pub fn largest(pools: &[Pool], wanted: &Wanted<'_>) -> u64 {
    let mut sizes: Vec<u64> = pools.iter().filter(|pool| pool.pool == wanted.pool).map(|pool| pool.largest).collect();
    sizes.sort_unstable();
    let fits = |bytes: &u64| choose(pools, &Wanted { bytes: *bytes, ..wanted.clone() }).is_ok();
    sizes.into_iter().rev().filter(|bytes| *bytes > 0).find(fits).unwrap_or(0)
}

/// The pools of the wanted name that the caller's places allow, whatever room they have.
fn candidates<'a>(pools: &'a [Pool], wanted: &Wanted<'_>) -> Result<Vec<&'a Pool>, Refusal> {
    let named: Vec<&Pool> = pools.iter().filter(|pool| pool.pool == wanted.pool).collect();
    let pool = || wanted.pool.to_owned();
    if named.is_empty() {
        let known: BTreeSet<_> = pools.iter().map(|pool| pool.pool.as_str()).collect();
        return Err(Refusal::UnknownPool { pool: pool(), known: listed(known) });
    }
    let there = listed(named.iter().map(|pool| &pool.node).collect::<BTreeSet<_>>());
    let places: BTreeSet<_> = wanted.requisite.iter().collect();
    let unmet = |place: &&Place| !named.iter().any(|pool| place.includes(&pool.node));
    let required = |places: &BTreeSet<&Place>| listed(places.iter().copied());
    if must_have(wanted).iter().any(unmet) || !places.is_empty() && places.iter().all(unmet) {
        return Err(Refusal::NotThere { required: required(&places), pool: pool(), there });
    }
    // Fewer copies than places: none of them may be elsewhere.
    let confined = !places.is_empty() && wanted.copies <= places.len();
    let allowed = |p: &&Pool| !confined || places.iter().any(|place| place.includes(&p.node));
    let allowed: Vec<&Pool> = named.into_iter().filter(allowed).collect();
    let nodes: BTreeSet<_> = allowed.iter().map(|pool| &pool.node).collect();
    if nodes.len() < wanted.copies {
        return Err(Refusal::TooFewNodes { copies: wanted.copies, pool: pool(), there: listed(nodes) });
    }
    Ok(allowed)
}

/// The places of which each must have a copy.
fn must_have<'a>(wanted: &Wanted<'a>) -> BTreeSet<&'a Place> {
    let places: BTreeSet<_> = wanted.requisite.iter().collect();
    if places.len() <= wanted.copies { places } else { BTreeSet::new() }
}

/// The best first.
fn ranked<'a>(fitting: &BTreeMap<&NodeName, &'a Pool>, wanted: &Wanted<'_>) -> Vec<&'a Pool> {
    let mut pools: Vec<&Pool> = fitting.values().copied().collect();
    pools.sort_by_key(|pool| rank(pool, wanted));
    pools
}

/// Smaller is better: the caller's order, then the most room, then the name.
fn rank<'a>(pool: &'a Pool, wanted: &Wanted<'_>) -> (usize, Reverse<u64>, &'a NodeName) {
    let preferred = wanted.preferred.iter().position(|place| place.includes(&pool.node));
    (preferred.unwrap_or(usize::MAX), Reverse(pool.free), &pool.node)
}

fn no_room(named: &[&Pool], wanted: &Wanted<'_>) -> Refusal {
    let left = named.iter().map(|pool| format!("{} takes at most {} bytes", pool.node, pool.largest));
    let free = left.collect::<Vec<_>>().join(", ");
    Refusal::NoRoom { copies: wanted.copies, bytes: wanted.bytes, pool: wanted.pool.to_owned(), free }
}

fn listed<T: fmt::Display>(names: impl IntoIterator<Item = T>) -> String {
    let names: Vec<String> = names.into_iter().map(|name| name.to_string()).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anywhere => f.write_str("any node"),
            Self::Node(name) => name.fmt(f),
            Self::Unknown => f.write_str("a place that is no node of this cluster"),
        }
    }
}

#[cfg(test)]
mod tests;
