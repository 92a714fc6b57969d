//! The bounds that are explored, and the planted mistakes that must be caught within some of them.

use super::world::{Action, World};
use super::{Bounds, Cluster, Granularity, Invariant, QUIET, SOMETIMES};
use crate::protocol::tests::Planted;
use stateright::{Checker, HasDiscoveries, Model};
use std::collections::BTreeSet;
use std::time::Instant;

/// What a search has found.
pub(super) struct Found {
    /// The invariant that the shortest counterexample breaks.
    pub broken: Option<Invariant>,
    pub reached: BTreeSet<&'static str>,
}

/// Explores everything within the bounds, or up to `limit` states, and prints how much that was.
pub(super) fn explore(name: &str, bounds: Bounds, planted: Option<Planted>, limit: usize) -> Found {
    let start = Instant::now();
    let mut broken: Option<(Invariant, Vec<Action>)> = None;
    loop {
        let checker = Cluster { bounds, planted }.checker().target_state_count(limit);
        let mut checker = checker.finish_when(HasDiscoveries::AnyFailures);
        // The checker tells of some counterexample: the shortest is the one after which there is no shorter one.
        if let Some((_, actions)) = &broken {
            checker = checker.target_max_depth(actions.len() + 1);
        }
        let checker = checker.spawn_bfs().join();
        let (states, unique, depth) = (checker.state_count(), checker.unique_state_count(), checker.max_depth());
        let found = checker.discoveries();
        let invariant = |name: &str| Invariant::ALL.iter().copied().find(|invariant| invariant.name() == name);
        let reached = found.keys().copied().filter(|name| invariant(name).is_none()).collect();
        let shorter = found.into_iter().filter_map(|(name, path)| Some((invariant(name)?, path.into_actions())));
        if let Some(shorter) = shorter.min_by_key(|(invariant, actions)| (actions.len(), *invariant)) {
            broken = Some(shorter);
            continue;
        }
        let exhaustive = states < limit;
        let whole = if exhaustive { "exhaustive" } else { "NOT exhaustive" };
        println!("{name}: {states} states, {unique} unique, depth {depth}, {whole}, {:.1?}", start.elapsed());
        if let Some((invariant, actions)) = &broken {
            println!("   {} is broken by", invariant.name());
            actions.iter().for_each(|action| println!("      {action:?}"));
        }
        return Found { broken: broken.map(|(invariant, _)| invariant), reached };
    }
}

#[test]
fn no_invariant_is_broken_within_these_bounds() {
    let write = Bounds { writes: 1, suspicions: 1, reconfigurations: 2, ..QUIET };
    let crashes = Bounds {
        writes: 3,
        kills: 1,
        power_cuts: 1,
        wishes: 1,
        expiries: 1,
        reconfigurations: 3,
        suspicions: 1,
        ..QUIET
    };
    let runs = [
        (
            "writes, flush, every disk operation",
            Bounds { writes: 2, flushes: 1, disk: Granularity::Every, ..QUIET },
            100_000,
        ),
        ("a member dropped and admitted", Bounds { disk: Granularity::Data, ..write }, 200_000),
        ("a candidate admitted, answers lost", Bounds { copies: 1, candidate: true, ambiguous: 1, ..write }, 200_000),
        ("reads under the lease", Bounds { writes: 1, reads: 2, expiries: 1, ..QUIET }, 200_000),
        ("takeover", Bounds { writes: 2, expiries: 1, wishes: 1, ..write }, 200_000),
        ("engine killed", Bounds { kills: 1, flushes: 1, ..write }, 200_000),
        ("power lost", Bounds { power_cuts: 1, flushes: 1, ..write }, 200_000),
        ("three writes, two crashes, three reconfigurations", crashes, 200_000),
        ("three copies", Bounds { copies: 3, power_cuts: 1, ..write }, 200_000),
    ];
    let more = std::env::var("TANDEM_MODEL_STATES").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    let mut reached = BTreeSet::new();
    for (name, bounds, limit) in runs {
        let found = explore(name, bounds, None, limit.max(more));
        assert_eq!(found.broken, None, "{name}");
        reached.extend(found.reached);
    }
    let missing: Vec<_> = SOMETIMES.iter().map(|(name, _)| *name).filter(|name| !reached.contains(name)).collect();
    assert!(missing.is_empty(), "never reached: {missing:?}");
}

/// More of everything than can be exhausted: for random walks.
pub(super) const RICH: Bounds = Bounds {
    blocks: 2,
    writes: 6,
    flushes: 3,
    reads: 4,
    kills: 2,
    power_cuts: 1,
    reconfigurations: 12,
    wishes: 3,
    suspicions: 3,
    reconnects: 12,
    repetitions: 6,
    ambiguous: 2,
    expiries: 3,
    disk: Granularity::Every,
    ..QUIET
};

/// Takes random walks through the same world, and returns the first invariant that breaks, with the walk's actions.
pub(super) fn walk(
    bounds: Bounds,
    planted: Option<Planted>,
    seeds: std::ops::Range<u64>,
) -> Option<(u64, Invariant, Vec<Action>)> {
    for seed in seeds {
        let mut random = (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut world = World::new(bounds, planted);
        let mut taken = vec![];
        for _ in 0..150 {
            let mut actions = vec![];
            world.actions(&mut actions);
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            // Faults are rarer than work, or nothing would ever get far.
            let fault = |a: &Action| {
                !matches!(
                    a,
                    Action::Disk(..)
                        | Action::Deliver(_)
                        | Action::Commit(_, false)
                        | Action::Write(..)
                        | Action::Flush(_)
                        | Action::Read(..)
                )
            };
            if random % 8 != 0 {
                actions.retain(|a| !fault(a));
            }
            if actions.is_empty() {
                world.actions(&mut actions);
            }
            if actions.is_empty() {
                break;
            }
            let action = actions.swap_remove((random >> 20) as usize % actions.len());
            world.act(&action);
            taken.push(action);
            if let Some(invariant) = world.oracle.broken {
                return Some((seed, invariant, taken));
            }
        }
    }
    None
}

#[test]
fn no_random_walk_breaks_an_invariant() {
    let candidate = Bounds { candidate: true, ..RICH };
    let clusters = [RICH, candidate, Bounds { copies: 3, ..RICH }, Bounds { copies: 3, ..candidate }];
    let seeds = std::env::var("TANDEM_MODEL_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(1500);
    for bounds in clusters {
        let found = walk(bounds, None, 0..seeds);
        assert!(found.is_none(), "{found:?}");
    }
    println!("{} walks of at most 150 events, no invariant broken", seeds * clusters.len() as u64);
}
