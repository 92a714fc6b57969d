//! The choice: a table of records, and histories that are cut off anywhere, with the mistake planted that the rule is for.

use super::*;
use crate::protocol::ConfigurationVersion;

fn id(number: u8) -> InstanceId {
    InstanceId::from_bytes([number; 16])
}

fn stamp(generation: u64, version: u64) -> Stamp {
    Stamp { generation: Generation(generation), version: ConfigurationVersion(version) }
}

/// Members (the first is primary), and candidates that left with a version.
fn configuration(at: Stamp, members: &[u8], candidates: &[(u8, u64)]) -> Configuration {
    let since = |(copy, version): &(u8, u64)| (id(*copy), Lacks::Since(stamp(at.generation.0, *version)));
    Configuration {
        stamp: at,
        term: at,
        primary: members.first().map(|copy| id(*copy)),
        secondaries: members.iter().skip(1).map(|copy| id(*copy)).collect(),
        candidates: candidates.iter().map(since).collect(),
        lost: Stamp::default(),
    }
}

fn found(configuration: Option<Configuration>) -> Found {
    Found {
        node: NodeName("node".into()),
        pool: "default".into(),
        configuration,
        intact: true,
        removing: false,
        peers: BTreeMap::new(),
        attached: false,
        serves: false,
    }
}

fn copies(of: &[(u8, Option<&Configuration>)]) -> Copies {
    of.iter().map(|(copy, configuration)| (id(*copy), found(configuration.cloned()))).collect()
}

fn missing(newest: Option<&Configuration>, copies: &[u8]) -> Choice {
    Choice::Missing { newest: newest.cloned(), missing: copies.iter().map(|copy| id(*copy)).collect() }
}

#[test]
fn the_newest_record_decides_when_all_that_it_names_were_read() {
    let both = configuration(stamp(1, 2), &[1, 2], &[]);
    let alone = configuration(stamp(1, 3), &[1], &[(2, 3)]);
    let three = configuration(stamp(1, 9), &[1, 2, 3], &[]);
    let raised = configuration(stamp(2, 3), &[2, 1], &[]);
    for (of, expected) in [
        (vec![(1, Some(&both)), (2, Some(&both))], Choice::Complete(both.clone())),
        (vec![(1, Some(&alone)), (2, Some(&both))], Choice::Complete(alone.clone())),
        (vec![(1, Some(&alone))], missing(Some(&alone), &[2])),
        // The one that was dropped knows nothing of it.
        (vec![(2, Some(&both))], missing(Some(&both), &[1])),
        (vec![(1, Some(&three)), (2, Some(&both))], missing(Some(&three), &[3])),
        // A generation is above every version of the one before.
        (vec![(1, Some(&three)), (2, Some(&raised))], Choice::Complete(raised.clone())),
        // It is there and has never acted, so it knows no newer one.
        (vec![(1, Some(&both)), (2, None)], Choice::Complete(both.clone())),
        (vec![(1, None), (2, None)], Choice::Unused),
    ] {
        assert_eq!(choose(&copies(&of)), expected, "{of:?}");
    }
}

#[test]
fn a_copy_without_a_record_waits_for_those_that_it_was_made_with() {
    let mut of = copies(&[(1, None)]);
    of.values_mut().for_each(|copy| copy.peers = BTreeMap::from([(id(2), NodeName("other".into()))]));
    assert_eq!(choose(&of), missing(None, &[2]));
}

#[test]
fn two_histories_are_nobodys_to_choose_from() {
    let (one, other) = (configuration(stamp(1, 4), &[1], &[(2, 4)]), configuration(stamp(1, 4), &[2], &[(1, 4)]));
    assert_eq!(choose(&copies(&[(1, Some(&one)), (2, Some(&other))])), Choice::Split(stamp(1, 4)));
}

#[test]
fn what_was_being_removed_is_not_put_back() {
    let both = configuration(stamp(1, 2), &[1, 2], &[]);
    let moved = configuration(stamp(1, 5), &[1], &[(2, 3)]);
    let with_second_going = |of: &Configuration| {
        let mut copies = copies(&[(1, Some(of)), (2, Some(of))]);
        copies.get_mut(&id(2)).expect("there").removing = true;
        copies
    };
    assert_eq!(choose(&with_second_going(&both)), Choice::Going, "a member goes with its volume");
    assert_eq!(choose(&with_second_going(&moved)), Choice::Complete(moved.clone()), "a candidate may go alone");
    let mut last = with_second_going(&both);
    last.remove(&id(1));
    assert_eq!(choose(&last), Choice::Going);
}

#[test]
fn a_candidate_that_went_on_under_an_old_catalogue_lacks_everything() {
    let alone = configuration(stamp(1, 7), &[1], &[(2, 6)]);
    let strayed = configuration(stamp(1, 6), &[2], &[(1, 6)]);
    let told = configuration(stamp(1, 6), &[1], &[(2, 6)]);
    for (own, lacks) in [(&strayed, Lacks::Everything), (&told, Lacks::Since(stamp(1, 6)))] {
        let Choice::Complete(chosen) = choose(&copies(&[(1, Some(&alone)), (2, Some(own))])) else {
            panic!("all were read")
        };
        assert_eq!(chosen.candidates[&id(2)], lacks);
    }
}

#[test]
fn what_is_written_is_above_everything_and_names_the_same() {
    let base = configuration(stamp(1, 7), &[1, 2], &[(3, 6)]);
    let next = raised(&base, Generation(4));
    assert_eq!((next.stamp, next.term, next.primary), (stamp(4, 8), stamp(4, 8), Some(id(1))));
    assert_eq!((&next.secondaries, &next.candidates), (&base.secondaries, &base.candidates));
    let alone = forced(&base, id(2), Generation(4));
    assert_eq!((alone.stamp, alone.members().collect::<Vec<_>>()), (stamp(4, 8), vec![id(2)]));
    assert_eq!(alone.candidates, BTreeMap::from([(id(1), Lacks::Everything), (id(3), Lacks::Everything)]));
}

#[test]
fn a_device_says_who_is_in_use() {
    let both = configuration(stamp(1, 2), &[1, 2], &[(3, 2)]);
    let used = |attached: &[u8], serving: &[u8]| {
        let mut copies = copies(&[(1, Some(&both)), (2, Some(&both)), (3, Some(&both))]);
        attached.iter().for_each(|copy| copies.get_mut(&id(*copy)).expect("there").attached = true);
        serving.iter().for_each(|copy| copies.get_mut(&id(*copy)).expect("there").serves = true);
        in_use(&copies, &both)
    };
    assert_eq!(used(&[], &[1]), None);
    assert_eq!(used(&[1, 2], &[2]), Some(id(1)), "its requests may wait for the catalogue");
    assert_eq!((used(&[2], &[2]), used(&[2], &[])), (Some(id(2)), None));
    assert_eq!(used(&[3], &[3]), None, "no member");
}

/// A volume's life: configurations, what is durable where, and which writes each copy has.
struct History {
    committed: Vec<Configuration>,
    /// By copy: the configuration that is durable there.
    durable: BTreeMap<u8, Configuration>,
    /// By copy: how many of the acknowledged writes it has.
    has: BTreeMap<u8, u64>,
    acknowledged: u64,
    random: u64,
}

const ALL: [u8; 4] = [1, 2, 3, 4];

impl History {
    fn new(seed: u64) -> Self {
        let first = configuration(stamp(0, 1), &[1, 2], &[]);
        let durable = [1, 2].map(|copy| (copy, first.clone())).into();
        let has = ALL.map(|copy| (copy, 0)).into();
        Self { committed: vec![first], durable, has, acknowledged: 0, random: seed * 2 + 1 }
    }

    fn below(&mut self, bound: usize) -> usize {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) as usize % bound
    }

    fn now(&self) -> &Configuration {
        self.committed.last().expect("the first")
    }

    fn follows(&self, copy: u8) -> bool {
        self.durable.get(&copy) == Some(self.now())
    }

    fn members(&self) -> Vec<u8> {
        ALL.into_iter().filter(|copy| self.now().is_member(id(*copy))).collect()
    }

    fn step(&mut self) {
        let copy = ALL[self.below(ALL.len())];
        let (named, now) = (self.now().copies().any(|named| named == id(copy)), self.now().clone());
        let members = self.members();
        match self.below(4) {
            // The primary tells it, or the catalogue.
            0 if named => _ = self.durable.insert(copy, now),
            1 if members.iter().all(|member| self.follows(*member)) => {
                self.acknowledged += 1;
                members.iter().for_each(|member| *self.has.get_mut(member).expect("all") = self.acknowledged);
            }
            2 if members.contains(&copy) && self.follows(copy) => self.propose(copy),
            _ => {}
        }
    }

    /// By a member that follows: it takes over, drops, adds or admits.
    fn propose(&mut self, proposer: u8) {
        let mut next = self.now().clone();
        next.stamp.version = next.stamp.version.next();
        next.secondaries.extend(next.primary.replace(id(proposer)));
        next.secondaries.remove(&id(proposer));
        let other = ALL[self.below(ALL.len())];
        if next.secondaries.remove(&id(other)) {
            next.candidates.insert(id(other), Lacks::Since(next.stamp));
        } else if let Some(lacks) = next.candidates.remove(&id(other)) {
            if self.follows(other) {
                next.secondaries.insert(id(other));
                *self.has.get_mut(&other).expect("all") = self.has[&proposer];
            } else {
                next.candidates.insert(id(other), lacks);
            }
        } else if other != proposer {
            next.candidates.insert(id(other), Lacks::Everything);
        }
        self.committed.push(next);
    }

    /// What is read when some nodes do not answer.
    fn read(&mut self) -> Copies {
        let durable = self.durable.clone();
        let answers: Vec<_> = durable.into_iter().filter(|_| self.below(4) > 0).collect();
        answers.into_iter().map(|(copy, configuration)| (id(copy), found(Some(configuration)))).collect()
    }

    /// Members of what was chosen that lack an acknowledged write.
    fn lost(&self, choice: &Choice) -> usize {
        let Choice::Complete(chosen) = choice else { return 0 };
        let lacks = |copy: &&u8| chosen.is_member(id(**copy)) && self.has[*copy] < self.acknowledged;
        ALL.iter().filter(lacks).count()
    }
}

#[test]
fn no_history_that_is_cut_off_loses_a_write_unless_unread_copies_are_passed_over() {
    let (mut chosen, mut refused, mut caught) = (0, 0, 0);
    for seed in 0..20_000 {
        let mut history = History::new(seed);
        let steps = history.below(60);
        (0..steps).for_each(|_| history.step());
        let read = history.read();
        if read.is_empty() {
            continue;
        }
        let choice = choose(&read);
        assert_eq!(history.lost(&choice), 0, "seed {seed}: {choice:?}");
        match choice {
            Choice::Complete(_) => chosen += 1,
            _ => refused += 1,
        }
        // The planted mistake: the newest of those that answered.
        caught += usize::from(history.lost(&decide(&read, |_| BTreeSet::new())) > 0);
    }
    println!("{chosen} chosen, {refused} refused, {caught} times the planted mistake lost a write");
    assert!(chosen > 1000 && refused > 1000 && caught > 100, "{chosen} {refused} {caught}");
}
