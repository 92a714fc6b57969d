//! The core against a model of what is around it: a kernel that submits, slots that survive, a disk that applies operations
//! block by block, and kills at any moment.
//!
//! The oracle knows when it submitted what, when the answer came and what reads returned. A block's value is legal unless a
//! later write began after the value was certainly there and ended before the read began.

mod mirror;
mod planted;

pub(super) use planted::Planted;

use super::*;
use proptest::prelude::*;

fn sole() -> Replica {
    Replica::sole(crate::volume::InstanceId::from_bytes([1; 16]))
}

/// Mistakes around the core that the oracle must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Around {
    Correct,
    /// The slot is not marked done before the reply, so an acknowledged discard is replayed.
    ReplyBeforeDone,
    /// Operations of a killed engine reach the disk after the replay.
    NoDrain,
    /// Filled slots are replayed in the order of the slots, not of arrival.
    ReplayOutOfOrder,
}

const BLOCKS: usize = 2;
const SLOTS: usize = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Free,
    Filled(usize),
    Done(usize),
}

/// A request as its submitter sees it. Times count events of the history.
#[derive(Clone, Debug)]
struct Submitted {
    request: Request,
    at: u64,
    answered: Option<u64>,
    /// What a read found in each of its blocks: the index of the mutation, or none since the beginning.
    found: [Option<usize>; BLOCKS],
    /// Until when a mutation was certainly on the disk, per block: its answer, or that of a read that saw it.
    certain: [u64; BLOCKS],
}

struct Running {
    operation: OperationId,
    id: usize,
    remaining: Vec<usize>,
}

struct World {
    replica: Replica,
    around: Around,
    slots: [Slot; SLOTS],
    history: Vec<Submitted>,
    disk: [Option<usize>; BLOCKS],
    running: Vec<Running>,
    late: Vec<Running>,
    completing: Vec<usize>,
    replied: Vec<usize>,
    time: u64,
    overlapped: bool,
}

fn blocks(request: Request) -> Vec<usize> {
    request.range().map_or(vec![], |r| (r.start() as usize..r.end() as usize).collect())
}

impl World {
    fn new(planted: Option<Planted>, around: Around) -> Self {
        let mut replica = sole();
        replica.planted = planted;
        Self {
            replica,
            around,
            slots: [Slot::Free; SLOTS],
            history: vec![],
            disk: [None; BLOCKS],
            running: vec![],
            late: vec![],
            completing: vec![],
            replied: vec![],
            time: 0,
            overlapped: false,
        }
    }

    fn step(&mut self, input: Input) {
        let mut outputs = vec![];
        self.replica.step(Now(Duration::from_secs(self.time)), input, &mut outputs);
        for output in outputs {
            match output {
                Output::Disk { operation, tag, request } => {
                    let Slot::Filled(id) = self.slots[tag.0 as usize] else { panic!("started {tag:?}: not filled") };
                    let conflict = |other: &Running| admission::conflicts(self.history[other.id].request, request);
                    self.overlapped |= self.running.iter().any(conflict);
                    self.running.push(Running { operation, id, remaining: blocks(request) });
                }
                Output::Complete { tag, result } => {
                    assert_eq!(result, Ok(()), "nothing fails in this world but for want of space");
                    self.completing.push(tag.0 as usize);
                }
                Output::Apply { .. }
                | Output::ApplyPiece { .. }
                | Output::Compare { .. }
                | Output::ReadPiece { .. }
                | Output::FlushHere { .. }
                | Output::Persist { .. }
                | Output::WriteHot { .. }
                | Output::Plan { .. }
                | Output::NextRange { .. }
                | Output::Send { .. }
                | Output::Propose { .. }
                | Output::ReadConfiguration
                | Output::FenceDevice => panic!("a volume with one copy needs no {output:?}"),
            }
        }
    }

    fn submit(&mut self, kind: u8, start: u8, length: u8) {
        let Some(slot) = self.slots.iter().position(|s| *s == Slot::Free) else { return };
        let start = u64::from(start) % BLOCKS as u64;
        let count = 1 + u32::from(length) % (BLOCKS as u32 - start as u32);
        let range = BlockRange::new(start, count).expect("not empty");
        let request = match kind % 6 {
            0 | 1 => Request::Read(range),
            2 | 3 => Request::Write(range),
            4 => Request::Discard(range),
            _ => Request::Flush,
        };
        let certain = [u64::MAX; BLOCKS];
        self.history.push(Submitted { request, at: self.time, answered: None, found: [None; BLOCKS], certain });
        self.slots[slot] = Slot::Filled(self.history.len() - 1);
        self.step(Input::Request { tag: Tag(slot as u32), request });
    }

    fn apply(running: &mut Running, pick: u8, history: &mut [Submitted], disk: &mut [Option<usize>; BLOCKS]) {
        if running.remaining.is_empty() {
            return;
        }
        let block = running.remaining.swap_remove(usize::from(pick) % running.remaining.len());
        if history[running.id].request.is_mutation() {
            disk[block] = Some(running.id);
        } else {
            history[running.id].found[block] = disk[block];
        }
    }

    fn complete(&mut self, i: usize) {
        if i >= self.running.len() || !self.running[i].remaining.is_empty() {
            return;
        }
        let operation = self.running.swap_remove(i).operation;
        self.step(Input::Completed { operation, result: Ok(()) });
    }

    fn no_space(&mut self, i: usize) {
        let Some(running) = self.running.get(i) else { return };
        let request = self.history[running.id].request;
        if matches!(request, Request::Write(_)) && running.remaining.len() == blocks(request).len() {
            let operation = self.running.swap_remove(i).operation;
            self.step(Input::Completed { operation, result: Err(DiskError::NoSpace) });
        }
    }

    /// Marks done, replies, or frees the slot: three moments between which a kill may fall.
    fn answer(&mut self, i: usize) -> Result<(), String> {
        let Some(&slot) = self.completing.get(i) else { return Ok(()) };
        match self.slots[slot] {
            Slot::Filled(id) if self.around == Around::ReplyBeforeDone && !self.replied.contains(&slot) => {
                self.replied.push(slot);
                self.reply(id)
            }
            Slot::Filled(id) => {
                self.slots[slot] = Slot::Done(id);
                Ok(())
            }
            Slot::Done(id) if !self.replied.contains(&slot) => {
                self.replied.push(slot);
                self.reply(id)
            }
            Slot::Done(_) => {
                self.slots[slot] = Slot::Free;
                self.completing.swap_remove(i);
                self.replied.retain(|s| *s != slot);
                self.step(Input::Replied { tag: Tag(slot as u32) });
                Ok(())
            }
            Slot::Free => unreachable!("a slot is free only after its reply"),
        }
    }

    fn reply(&mut self, id: usize) -> Result<(), String> {
        if self.history[id].answered.is_some() {
            return Ok(()); // ENOENT: the kernel has its answer already
        }
        self.history[id].answered = Some(self.time);
        let Submitted { request, at, found, .. } = self.history[id].clone();
        for block in blocks(request) {
            if request.is_mutation() {
                self.history[id].certain[block] = self.history[id].certain[block].min(self.time);
            } else {
                self.check(block, found[block], at)?;
                if let Some(seen) = found[block] {
                    self.history[seen].certain[block] = self.history[seen].certain[block].min(self.time);
                }
            }
        }
        Ok(())
    }

    fn check(&self, block: usize, value: Option<usize>, read_at: u64) -> Result<(), String> {
        let since = value.map_or(0, |id| self.history[id].certain[block]);
        for (id, later) in self.history.iter().enumerate() {
            let touches = later.request.is_mutation() && blocks(later.request).contains(&block);
            if touches && Some(id) != value && later.at > since && later.certain[block] < read_at {
                return Err(format!("block {block} is {value:?}, but {id} was acknowledged after that"));
            }
        }
        Ok(())
    }

    fn kill(&mut self, order: u8) -> Result<(), String> {
        let planted = self.replica.planted;
        self.replica = sole();
        self.replica.planted = planted;
        let old = std::mem::take(&mut self.running);
        if self.around == Around::NoDrain {
            self.late.extend(old);
        }
        self.completing.clear();
        self.replied.clear();
        for i in 0..SLOTS {
            if let Slot::Done(id) = self.slots[i] {
                self.reply(id)?;
                self.slots[i] = Slot::Free;
            }
        }
        let mut again: Vec<usize> = (0..SLOTS).filter(|i| matches!(self.slots[*i], Slot::Filled(_))).collect();
        if self.around == Around::ReplayOutOfOrder && !again.is_empty() {
            let middle = usize::from(order) % again.len();
            again.rotate_left(middle);
        } else {
            // Ids rise in order of arrival, like the sequence number that a slot carries.
            again.sort_by_key(|i| match self.slots[*i] {
                Slot::Filled(id) | Slot::Done(id) => id,
                Slot::Free => usize::MAX,
            });
        }
        for slot in again {
            if let Slot::Filled(id) = self.slots[slot] {
                let request = self.history[id].request;
                self.step(Input::Request { tag: Tag(slot as u32), request });
            }
        }
        Ok(())
    }

    fn act(&mut self, (what, a, b, c): (u8, u8, u8, u8)) -> Result<(), String> {
        self.time += 1;
        match what {
            0..=11 => self.submit(a, b, c),
            12..=23 if !self.running.is_empty() => {
                let i = usize::from(a) % self.running.len();
                for pick in 0..=b % 2 {
                    Self::apply(&mut self.running[i], pick, &mut self.history, &mut self.disk);
                }
            }
            24..=35 => self.complete(usize::from(a) % self.running.len().max(1)),
            36..=55 => self.answer(usize::from(a) % self.completing.len().max(1))?,
            56 => self.kill(b)?,
            57 => self.no_space(usize::from(a) % self.running.len().max(1)),
            58 => self.step(Input::SpaceFreed),
            59 if !self.late.is_empty() => {
                let i = usize::from(a) % self.late.len();
                Self::apply(&mut self.late[i], b, &mut self.history, &mut self.disk);
            }
            _ => {}
        }
        Ok(())
    }

    /// Lets everything come to its end; every request must get its answer.
    fn settle(&mut self) -> Result<(), String> {
        for _ in 0..1000 {
            self.time += 1;
            self.step(Input::SpaceFreed);
            for running in &mut self.running {
                for _ in 0..BLOCKS {
                    Self::apply(running, 0, &mut self.history, &mut self.disk);
                }
            }
            self.complete(0);
            self.answer(0)?;
            if self.slots.iter().all(|s| *s == Slot::Free) {
                break;
            }
        }
        self.time += 1;
        if let Some(lost) = self.history.iter().position(|s| s.answered.is_none()) {
            return Err(format!("request {lost} was never answered"));
        }
        (0..BLOCKS).try_for_each(|block| self.check(block, self.disk[block], self.time))
    }
}

fn run(planted: Option<Planted>, around: Around, schedule: &[(u8, u8, u8, u8)]) -> Result<bool, String> {
    let mut world = World::new(planted, around);
    schedule.iter().try_for_each(|action| world.act(*action))?;
    world.settle()?;
    Ok(world.overlapped)
}

fn schedule() -> impl Strategy<Value = Vec<(u8, u8, u8, u8)>> {
    proptest::collection::vec((0u8..60, any::<u8>(), any::<u8>(), any::<u8>()), 1..300)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn no_answer_is_contradicted_and_none_is_missing(schedule in schedule()) {
        let overlapped = run(None, Around::Correct, &schedule).map_err(TestCaseError::fail)?;
        prop_assert!(!overlapped, "two conflicting operations ran side by side");
    }
}

/// How many of the seeded schedules the oracle objects to.
fn caught(planted: Option<Planted>, around: Around) -> usize {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let schedules = (0..3000).map(|_| {
        (0..300)
            .map(|_| {
                let r = next();
                (r[0] % 60, r[1], r[2], r[3])
            })
            .collect::<Vec<_>>()
    });
    schedules.filter(|s| run(planted, around, s).is_err()).count()
}

#[test]
fn the_oracle_objects_to_no_correct_run() {
    assert_eq!(caught(None, Around::Correct), 0);
}

/// A write is executed but not marked done; a read sees it and is answered, a newer write is answered; then the kill.
fn kill_between_completion_and_mark(planted: Option<Planted>) -> Result<(), String> {
    let mut world = World::new(planted, Around::Correct);
    let act = |world: &mut World, what, a, times| (0..times).try_for_each(|_| world.act((what, a, 1, 0)));
    for (position, kind) in [(0, 2), (1, 0), (1, 2)] {
        act(&mut world, 0, kind, 1)?;
        act(&mut world, 12, 0, 1)?;
        act(&mut world, 24, 0, 1)?;
        act(&mut world, 36, 1, 3 * position)?;
    }
    act(&mut world, 56, 0, 1)?;
    world.settle()
}

#[test]
fn planted_range_released_before_the_reply_is_caught() {
    assert_eq!(kill_between_completion_and_mark(None), Ok(()));
    assert!(kill_between_completion_and_mark(Some(Planted::ReleaseAtComplete)).is_err());
}

#[test]
fn planted_overlapping_requests_side_by_side_are_caught() {
    assert!(caught(Some(Planted::StartOverlapping), Around::Correct) > 0);
}

#[test]
fn planted_replay_of_an_acknowledged_discard_is_caught() {
    // Harmless alone, which is why both rules exist: the range that is still held keeps newer writes out.
    assert_eq!(caught(None, Around::ReplyBeforeDone), 0);
    assert!(caught(Some(Planted::ReleaseAtComplete), Around::ReplyBeforeDone) > 0);
}

#[test]
fn planted_missing_drain_barrier_is_caught() {
    assert!(caught(None, Around::NoDrain) > 0);
}

#[test]
fn planted_replay_out_of_order_is_caught() {
    assert!(caught(None, Around::ReplayOutOfOrder) > 0);
}

fn range(start: u64, count: u32) -> BlockRange {
    BlockRange::new(start, count).expect("not empty")
}

fn outputs(replica: &mut Replica, input: Input) -> Vec<Output> {
    let mut outputs = vec![];
    replica.step(Now::default(), input, &mut outputs);
    outputs
}

#[test]
fn a_waiting_request_blocks_later_ones_that_overlap_it() {
    let mut r = sole();
    let mut ask = |tag, request| outputs(&mut r, Input::Request { tag: Tag(tag), request }).len();
    assert_eq!(ask(1, Request::Write(range(0, 2))), 1);
    assert_eq!(ask(2, Request::Write(range(1, 2))), 0);
    assert_eq!(ask(3, Request::Read(range(2, 1))), 0, "would starve the second one");
    assert_eq!(ask(4, Request::Flush), 1);
    assert_eq!(ask(5, Request::Seal(SealName(0))), 1);
    assert_eq!(ask(6, Request::Read(range(7, 1))), 1);
    assert_eq!(ask(7, Request::Read(range(7, 1))), 1, "reads do not exclude each other");
    assert_eq!(r.status(Now::default()).queued, 2);
}

#[test]
fn a_write_without_space_waits_and_a_seal_is_refused() {
    let mut r = sole();
    outputs(&mut r, Input::Request { tag: Tag(1), request: Request::Write(range(0, 1)) });
    outputs(&mut r, Input::Request { tag: Tag(2), request: Request::Seal(SealName(3)) });
    let full = |operation| Input::Completed { operation: OperationId(operation), result: Err(DiskError::NoSpace) };
    assert_eq!(outputs(&mut r, full(0)), []);
    assert_eq!(outputs(&mut r, full(1)), [Output::Complete { tag: Tag(2), result: Err(DiskError::NoSpace) }]);
    assert_eq!(outputs(&mut r, Input::Request { tag: Tag(3), request: Request::Write(range(0, 1)) }), []);
    assert_eq!(r.status(Now::default()).no_space, 1);
    let again = outputs(&mut r, Input::SpaceFreed);
    let request = Request::Write(range(0, 1));
    assert_eq!(again, [Output::Disk { operation: OperationId(2), tag: Tag(1), request }]);
}

#[test]
fn a_failed_disk_is_answered_as_such() {
    let mut r = sole();
    outputs(&mut r, Input::Request { tag: Tag(9), request: Request::Write(range(5, 5)) });
    let failed = Input::Completed { operation: OperationId(0), result: Err(DiskError::Failed) };
    assert_eq!(outputs(&mut r, failed), [Output::Complete { tag: Tag(9), result: Err(DiskError::Failed) }]);
}
