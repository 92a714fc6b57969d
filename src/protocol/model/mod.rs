//! The shipped core under a model checker: small clusters, every order of events within printed bounds.
//!
//! What is free: the order of all messages, their repetition, silence of anybody, when time passes, the moment of each
//! disk operation, crashes (the engine alone, or the node with what was not flushed), whether a compare-and-swap is
//! answered, and when it lands. What is bounded: how often. A message that is never delivered is a lost one.

#![allow(clippy::wildcard_enum_match_arm, clippy::disallowed_methods, reason = "a test with a stop-watch")]

mod canonical;
mod checks;
mod disk;
mod events;
mod mistakes;
mod oracle;
mod runs;
mod world;

use super::tests::Planted;
use stateright::{Model, Property};
use world::{Action, World};

/// Which disk operations take time: anything may happen between their beginning and their end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Granularity {
    Instant,
    /// Writes and flushes.
    Data,
    Every,
}

/// How much may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Bounds {
    /// Members of the first configuration.
    pub copies: u8,
    pub blocks: u8,
    pub writes: u8,
    pub flushes: u8,
    pub reads: u8,
    /// Restarts of the engine with the node's caches kept.
    pub kills: u8,
    /// Restarts of a node without them.
    pub power_cuts: u8,
    /// Configurations after the first one.
    pub reconfigurations: u8,
    /// Changes of `spec.primary`.
    pub wishes: u8,
    pub suspicions: u8,
    pub reconnects: u8,
    pub repetitions: u8,
    /// Compare-and-swaps without an answer.
    pub ambiguous: u8,
    /// How often all leases expire.
    pub expiries: u8,
    pub disk: Granularity,
    /// Between an answer and its reply anything may happen.
    pub slow_replies: bool,
    /// A further node's copy that is a candidate from the beginning.
    pub candidate: bool,
}

/// Nothing but what is said explicitly happens.
pub(super) const QUIET: Bounds = Bounds {
    copies: 2,
    blocks: 1,
    writes: 0,
    flushes: 0,
    reads: 0,
    kills: 0,
    power_cuts: 0,
    reconfigurations: 0,
    wishes: 0,
    suspicions: 0,
    reconnects: 0,
    repetitions: 0,
    ambiguous: 0,
    expiries: 0,
    disk: Granularity::Instant,
    slow_replies: false,
    candidate: false,
};

/// A cluster with its bounds, and perhaps a planted mistake.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cluster {
    pub bounds: Bounds,
    pub planted: Option<Planted>,
}

/// What must always hold, and its name.
macro_rules! invariants {
    ($($invariant:ident = $name:literal),+ $(,)?) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub(super) enum Invariant { $($invariant),+ }

        impl Invariant {
            pub const ALL: &[Self] = &[$(Self::$invariant),+];

            pub fn name(self) -> &'static str {
                match self { $(Self::$invariant => $name),+ }
            }

            fn properties() -> Vec<Property<Cluster>> {
                vec![$(Property::always($name, |_: &Cluster, world: &World| {
                    world.oracle.broken != Some(Self::$invariant)
                })),+]
            }
        }
    };
}

invariants! {
    Durable = "I1 acked writes and flushes are on every member",
    Awaited = "I2 acks are awaited from every committed member",
    OnePrimary = "I3 one primary per version",
    MembersOnly = "I4 only members are promoted",
    KnownDifferences = "I5 copies differ only where it is known",
    Marked = "I6 what is not flushed everywhere is marked",
    OneOrder = "I7 overlapping operations have one order",
    NeverOlder = "I8 a copy never overwrites newer with older",
    OnlyOnce = "I10 an acknowledged request is not executed or answered again",
    Reads = "reads return what was acknowledged, and what was read stays",
}

type Reached = fn(&Cluster, &World) -> bool;

/// What the runs must reach together: nothing holds by doing nothing.
const SOMETIMES: [(&str, Reached); 14] = [
    ("a write is acknowledged", |_, w| w.oracle.acknowledged() > 0),
    ("a flush is acknowledged", |_, w| w.oracle.has_flushed()),
    ("a read is answered", |_, w| w.oracle.has_read),
    ("another copy serves", |_, w| w.serves(1)),
    ("a write is acknowledged by another copy", |_, w| w.serves(1) && w.oracle.acknowledged() > 0),
    ("a member is dropped", |c, w| w.catalogue.candidates.len() > usize::from(c.bounds.candidate)),
    ("a primary is demoted", |_, w| w.catalogue.primary.is_none()),
    ("a candidate is resynced", |_, w| w.has_equal_candidate()),
    ("a candidate is admitted", |c, w| w.has_admitted(c)),
    ("a request is fenced", |_, w| w.oracle.fenced() > 0),
    ("hot extents are reconciled", |_, w| w.is_reconciling()),
    ("a lost copy is repaired before it serves", |_, w| w.is_fetching()),
    ("a read waits for the lease", |_, w| w.misses_lease()),
    ("an ambiguous proposal is resolved", |c, w| w.has_resolved(c)),
];

impl Model for Cluster {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.bounds, self.planted)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        world.actions(actions);
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        if world.oracle.broken.is_some() {
            return None;
        }
        let mut next = world.clone();
        next.act(&action);
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = Invariant::properties();
        properties.extend(SOMETIMES.iter().map(|(name, reached)| Property::sometimes(name, *reached)));
        properties
    }
}
