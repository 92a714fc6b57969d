use super::*;
use proptest::prelude::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Hole,
    Written,
    Owned,
    Retired(Option<Batch>),
    Busy,
}

#[derive(Clone, Debug)]
enum Step {
    Allocate(u32),
    Retire { from: usize, count: u32 },
    Undo { from: usize, count: u32 },
    Batch,
    Durable(usize),
    Zero,
    Zeroed { fails: bool },
    Punch(u32),
    Budget(u64),
}

const LIMIT: u32 = 40_000;

fn step() -> impl Strategy<Value = Step> {
    let count = prop_oneof![8 => 1..9_u32, 2 => 1..300_u32, 1 => 1..20_000_u32];
    prop_oneof![
        10 => count.prop_map(Step::Allocate),
        8 => (any::<usize>(), 1..2000_u32).prop_map(|(from, count)| Step::Retire { from, count }),
        1 => (any::<usize>(), 1..20_u32).prop_map(|(from, count)| Step::Undo { from, count }),
        3 => Just(Step::Batch),
        3 => any::<usize>().prop_map(Step::Durable),
        2 => Just(Step::Zero),
        2 => any::<bool>().prop_map(|fails| Step::Zeroed { fails }),
        2 => (0..2000_u32).prop_map(Step::Punch),
        1 => (0..u64::from(LIMIT)).prop_map(Step::Budget),
    ]
}

struct Model {
    blocks: Vec<State>,
    batches: Vec<Batch>,
    zeroing: Vec<(PhysicalBlock, u32)>,
}

impl Model {
    fn set(&mut self, start: u32, count: u32, allowed: &[State], to: State) {
        for state in &mut self.blocks[start as usize..(start + count) as usize] {
            assert!(allowed.contains(state), "{state:?} becomes {to:?}");
            *state = to;
        }
    }

    fn count(&self, matching: impl Fn(State) -> bool) -> u64 {
        self.blocks.iter().filter(|&&state| matching(state)).count() as u64
    }

    /// Some run of owned blocks.
    fn owned(&self, from: usize, count: u32) -> Option<(u32, u32)> {
        let from = from % self.blocks.len();
        let start = (from..self.blocks.len()).chain(0..from).find(|&at| self.blocks[at] == State::Owned)?;
        let run = self.blocks[start..].iter().take_while(|&&state| state == State::Owned).count();
        Some((start as u32, count.min(run as u32)))
    }

    fn allocate(&mut self, allocator: &mut Allocator, count: u32) {
        let free = self.count(|state| matches!(state, State::Hole | State::Written));
        let mut out = Vec::new();
        match allocator.allocate(count, &mut out) {
            Ok(()) => {
                assert_eq!(out.iter().map(|run| run.1).sum::<u32>(), count);
                for (start, count) in out {
                    self.set(start.0, count, &[State::Hole, State::Written], State::Owned);
                }
            }
            Err(full) => {
                assert_eq!(full, Full { wanted: count, free });
                assert!(free < u64::from(count) && out.is_empty());
            }
        }
    }

    fn step(&mut self, allocator: &mut Allocator, step: Step) {
        match step {
            Step::Allocate(count) => self.allocate(allocator, count),
            Step::Retire { from, count } => {
                if let Some((start, count)) = self.owned(from, count) {
                    allocator.retire(PhysicalBlock(start), count);
                    self.set(start, count, &[State::Owned], State::Retired(None));
                }
            }
            Step::Undo { from, count } => {
                if let Some((start, count)) = self.owned(from, count) {
                    allocator.undo(PhysicalBlock(start), count);
                    self.set(start, count, &[State::Owned], State::Written);
                }
            }
            Step::Batch => {
                let batch = allocator.begin_batch();
                self.batches.push(batch);
                let open = self.blocks.iter_mut().filter(|state| **state == State::Retired(None));
                open.for_each(|state| *state = State::Retired(Some(batch)));
            }
            Step::Durable(_) if self.batches.is_empty() => {}
            Step::Durable(which) => {
                let durable = self.batches[which % self.batches.len()];
                allocator.durable(durable);
                for state in &mut self.blocks {
                    if matches!(state, State::Retired(Some(batch)) if *batch <= durable) {
                        *state = State::Written;
                    }
                }
            }
            Step::Zero => {
                if let Some((start, count)) = allocator.zero_ahead() {
                    self.set(start.0, count, &[State::Hole], State::Busy);
                    self.zeroing.push((start, count));
                }
            }
            Step::Zeroed { fails } => {
                if let Some((start, count)) = self.zeroing.pop() {
                    if fails {
                        allocator.not_zeroed(start, count)
                    } else {
                        allocator.zeroed(start, count)
                    }
                    self.set(start.0, count, &[State::Busy], if fails { State::Hole } else { State::Written });
                }
            }
            Step::Punch(max) => {
                if let Some((start, count)) = allocator.take_punchable(max) {
                    assert!(count <= max && start.0.is_multiple_of(CHUNK) && count.is_multiple_of(CHUNK));
                    self.set(start.0, count, &[State::Written], State::Hole);
                    allocator.punched(start, count);
                }
            }
            Step::Budget(blocks) => allocator.set_budget(blocks),
        }
    }

    fn check(&self, allocator: &Allocator) {
        assert_eq!(allocator.owned_blocks(), self.count(|state| state == State::Owned));
        assert_eq!(allocator.retired_blocks(), self.count(|state| matches!(state, State::Retired(_))));
        assert_eq!(allocator.free_written(), self.count(|state| state == State::Written));
        assert_eq!(allocator.free_holes(), self.count(|state| state == State::Hole));
        assert_eq!(allocator.occupied_blocks(), self.count(|state| state != State::Hole));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn every_block_is_in_exactly_one_state(
        owned in prop::collection::btree_map(0..LIMIT / 32, 1..32_u32, 0..200),
        written in 0..LIMIT,
        steps in prop::collection::vec(step(), 1..250),
    ) {
        let owned: Vec<_> = owned.into_iter().rev().map(|(at, count)| (PhysicalBlock(at * 32), count)).collect();
        let mut model = Model { blocks: vec![State::Hole; LIMIT as usize], batches: vec![], zeroing: vec![] };
        model.set(0, written, &[State::Hole], State::Written);
        for (start, count) in owned.iter().copied() {
            model.set(start.0, count, &[State::Hole, State::Written], State::Owned);
        }
        let mut allocator = Allocator::from_owned(owned.into_iter(), written, LIMIT).expect("nothing overlaps");
        model.check(&allocator);
        for (number, step) in steps.into_iter().enumerate() {
            model.step(&mut allocator, step);
            if number % 16 == 0 {
                model.check(&allocator);
            }
        }
        model.check(&allocator);
    }
}

fn runs(pairs: &[(u32, u32)]) -> impl Iterator<Item = (PhysicalBlock, u32)> {
    pairs.iter().map(|&(start, count)| (PhysicalBlock(start), count))
}

fn allocate(allocator: &mut Allocator, count: u32) -> Vec<(u32, u32)> {
    let mut out = Vec::new();
    allocator.allocate(count, &mut out).expect("enough is free");
    out.into_iter().map(|(start, count)| (start.0, count)).collect()
}

#[test]
fn a_block_owned_twice_is_damage() {
    let open = |pairs: &[(u32, u32)]| Allocator::from_owned(runs(pairs), 100, 100).map(|_| ());
    assert_eq!(open(&[(50, 10), (0, 50)]), Ok(()));
    assert_eq!(open(&[(50, 10), (0, 51)]), Err(Overlap::OwnedTwice(50)));
    assert_eq!(open(&[(0, 100), (7, 1), (50, 10)]), Err(Overlap::OwnedTwice(7)));
    assert_eq!(open(&[(90, 11)]), Err(Overlap::PastLimit { block: 100, limit: 100 }));
    assert_eq!(open(&[(u32::MAX, u32::MAX)]), Err(Overlap::PastLimit { block: u64::from(u32::MAX), limit: 100 }));
}

#[test]
fn small_requests_recycle_and_large_ones_stay_contiguous() {
    let mut allocator = Allocator::from_owned(runs(&[(0, 10), (20, 980)]), 1000, 1_000_000).expect("sound");
    assert_eq!(allocate(&mut allocator, 1), [(10, 1)]);
    assert_eq!(allocate(&mut allocator, 1), [(11, 1)]);
    assert_eq!(allocate(&mut allocator, 256), [(1000, 256)]);
    assert_eq!(allocate(&mut allocator, 8), [(12, 8)]);
    assert_eq!(allocate(&mut allocator, 1), [(1256, 1)]);
}

#[test]
fn a_retired_block_waits_for_its_batch() {
    let mut allocator = Allocator::from_owned(runs(&[(0, 100)]), 100, 100).expect("sound");
    allocator.retire(PhysicalBlock(5), 1);
    let first = allocator.begin_batch();
    allocator.retire(PhysicalBlock(6), 1);
    let second = allocator.begin_batch();
    assert_eq!(allocator.allocate(1, &mut Vec::new()), Err(Full { wanted: 1, free: 0 }));
    allocator.durable(first);
    assert_eq!(allocate(&mut allocator, 1), [(5, 1)]);
    assert_eq!(allocator.allocate(1, &mut Vec::new()), Err(Full { wanted: 1, free: 0 }));
    allocator.durable(second);
    assert_eq!(allocate(&mut allocator, 1), [(6, 1)]);
}

#[test]
fn zeroing_and_punching_come_to_rest() {
    let mut allocator = Allocator::from_owned(runs(&[]), 0, 1 << 22).expect("sound");
    let settle = |allocator: &mut Allocator| {
        let mut moves = 0;
        while let Some((start, count)) = allocator.zero_ahead() {
            allocator.zeroed(start, count);
            moves += 1;
        }
        while let Some((start, count)) = allocator.take_punchable(1 << 16) {
            allocator.punched(start, count);
            moves += 1;
        }
        assert!(moves < 1000);
        moves
    };
    assert_eq!(settle(&mut allocator), ZEROED_HIGH / u64::from(CHUNK));
    assert_eq!(settle(&mut allocator), 0);
    for _ in 0..1000 {
        allocate(&mut allocator, 256);
    }
    assert_eq!(settle(&mut allocator), 0, "large writes leave what was zeroed to small ones");
    allocator.retire(PhysicalBlock(ZEROED_HIGH as u32), 256_000);
    let batch = allocator.begin_batch();
    allocator.durable(batch);
    assert!(settle(&mut allocator) > 0 && allocator.free_written() == RECYCLE_MIN);
    allocator.set_budget(10 << 8);
    settle(&mut allocator);
    assert_eq!((settle(&mut allocator), allocator.occupied_blocks()), (0, 10 << 8));
}

#[test]
fn over_budget_scattered_blocks_are_used_before_new_ones() {
    let owned: Vec<_> = (0..500).map(|at| (at * 2, 1)).collect();
    let mut allocator = Allocator::from_owned(runs(&owned), 1000, 1_000_000).expect("sound");
    allocator.set_budget(1000);
    assert_eq!(allocate(&mut allocator, 300).len(), 300);
    assert_eq!((allocate(&mut allocator, 200).len(), allocator.occupied_blocks()), (200, 1000));
    assert_eq!(allocate(&mut allocator, 300), [(1000, 300)]);
}
