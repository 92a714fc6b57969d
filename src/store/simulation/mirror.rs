//! A mirrored volume in the simulation: copies leave and return, and whatever changed since one left must be in its plan.
//!
//! The other copies are only imagined: a copy that leaves has what this one has then, but for hot extents, where nothing is
//! known. As the protocol does, a write starts only where a durable mark is, and a mark goes only when all that is there is
//! flushed.

use super::oracle::{Content, ZEROS};
use super::world::{Kind, Operation, Outcome, World};
use crate::protocol::{
    COMPARED_BLOCKS, Configuration, ConfigurationVersion, DiskError, EXTENT_BLOCKS, Extent, Generation, Lacks, Missing,
    OperationId, Record, Stamp, Suspects,
};
use crate::store::Reserve;
use crate::volume::{BlockRange, BootId, InstanceId, MAX_REQUEST_BLOCKS, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

/// Blocks of the mirrored volume at the beginning: four extents, the last one not whole.
pub const BLOCKS: u64 = 3 * EXTENT_BLOCKS + 40;

type Marks = BTreeSet<Extent>;

/// What a copy had when it left.
#[derive(Clone, Debug)]
pub struct Left {
    contents: BTreeMap<u64, Content>,
    hot: Marks,
    reserve: Reserve,
}

/// What is durable about the mirrored volume, and what may be after a crash.
#[derive(Debug)]
pub struct Mirroring {
    pub volume: VolumeId,
    version: u64,
    record: Option<Record>,
    left: BTreeMap<Stamp, Left>,
    next_record: Option<(Record, BTreeMap<Stamp, Left>)>,
    hot: Marks,
    next_hot: Option<Marks>,
}

fn extents(range: BlockRange) -> impl Iterator<Item = Extent> {
    let number = |block: u64| (block / EXTENT_BLOCKS) as u32;
    (number(range.start())..=number(range.end() - 1)).map(Extent)
}

fn extent_of(block: u64) -> Extent {
    Extent((block / EXTENT_BLOCKS) as u32)
}

fn copy(number: u8) -> InstanceId {
    InstanceId::from_bytes([number; 16])
}

fn boot() -> BootId {
    BootId::from_bytes([7; 16])
}

impl Mirroring {
    pub fn new(volume: VolumeId) -> Self {
        let (left, hot) = Default::default();
        Self { volume, version: 0, record: None, left, next_record: None, hot, next_hot: None }
    }

    /// Durably marked, also if the set that is being written is.
    fn is_marked(&self, range: BlockRange) -> bool {
        extents(range).all(|extent| {
            self.hot.contains(&extent) && self.next_hot.as_ref().is_none_or(|next| next.contains(&extent))
        })
    }

    fn record_is_durable(&mut self) {
        let Some((record, left)) = self.next_record.take() else { return };
        self.left.extend(left);
        let named: BTreeSet<_> = record.configuration.candidates.values().copied().collect();
        self.left.retain(|since, _| named.contains(&Lacks::Since(*since)));
        self.record = Some(record);
    }
}

impl World {
    /// Whether the range may be written now; if not, its marks are asked for.
    pub fn may_write(&mut self, volume: VolumeId, range: BlockRange) -> Result<bool, String> {
        let Some(mirror) = self.mirror.as_ref().filter(|mirror| mirror.volume == volume) else { return Ok(true) };
        if mirror.is_marked(range) {
            return Ok(true);
        }
        let marks = mirror.hot.iter().copied().chain(extents(range)).collect();
        self.mark(marks)?;
        Ok(false)
    }

    pub fn mirror_step(&mut self) -> Outcome {
        match self.random.below(100) {
            0..45 => self.clear_marks(),
            45..55 => self.check_plans(),
            _ => self.reconfigure(),
        }
    }

    /// Starts an update; its operation has no range.
    fn begin(&mut self, kind: Kind, volume: VolumeId) -> OperationId {
        self.next += 1;
        let (number, buffer, latest) = (self.next, Vec::new(), Vec::new());
        let id = OperationId(u64::from(number));
        self.operations.insert(id, Operation { kind, volume, range: None, number, buffer, latest });
        id
    }

    fn mark(&mut self, mut marks: Marks) -> Outcome {
        // Marks behind the end are in no plan; they make a set that a power cut can tear.
        let (first, more) = (1000 + self.random.below(100) as u32, self.random.below(300) as u32);
        marks.extend((0..more).filter(|_| more < 150).map(|number| Extent(first + 3 * number)));
        let Some(mirror) = self.mirror.as_mut().filter(|mirror| mirror.record.is_some() && mirror.next_hot.is_none())
        else {
            return Ok(());
        };
        let volume = mirror.volume;
        mirror.next_hot = Some(marks.clone());
        let id = self.begin(Kind::Marks, volume);
        self.say(|| format!("{}: marks {marks:?}", id.0));
        let marks: Vec<Extent> = marks.into_iter().collect();
        let mut out = Vec::new();
        self.store().write_hot(id, volume, &marks, &mut out);
        self.take(out)
    }

    /// Clears marks of extents where everything is known and flushed, and nothing is under way.
    fn clear_marks(&mut self) -> Outcome {
        let Some(mirror) = &self.mirror else { return Ok(()) };
        let Some(volume) = self.oracle.volumes.get(&mirror.volume) else { return Ok(()) };
        let unflushed = volume.touched.iter().filter(|(_, block)| block.now.len() > 1 || block.kept.len() > 1);
        let ranges = self.operations.values().filter(|operation| operation.volume == mirror.volume);
        let busy = ranges.filter_map(|operation| operation.range).flat_map(extents);
        let needed: Marks = unflushed.map(|(number, _)| extent_of(*number)).chain(busy).collect();
        let marks: Marks = mirror.hot.intersection(&needed).copied().collect();
        if marks == mirror.hot { Ok(()) } else { self.mark(marks) }
    }

    /// A copy leaves, returns, or leaves a second time.
    pub fn reconfigure(&mut self) -> Outcome {
        let roll = self.random.below(100);
        let number = 2 + self.random.below(3) as u8;
        let reserve = if self.random.chance(1, 8) { Reserve::Refused } else { Reserve::Promised };
        let Some(mirror) = self.mirror.as_mut().filter(|mirror| mirror.next_record.is_none()) else { return Ok(()) };
        let first = || {
            let secondaries = (2..5).map(copy).collect();
            Record { configuration: Configuration::first(Generation(1), copy(1), secondaries), intact: true }
        };
        let mut next = mirror.record.clone().unwrap_or_else(first);
        if mirror.record.is_some() && roll < 95 {
            mirror.version += 1 + u64::from(self.random.chance(1, 3));
            next.configuration.stamp.version = ConfigurationVersion(10 + mirror.version);
            let since = Lacks::Since(next.configuration.stamp);
            let candidates = &mut next.configuration.candidates;
            if !candidates.contains_key(&copy(number)) || roll < 30 {
                next.configuration.secondaries.remove(&copy(number));
                candidates.insert(copy(number), since);
            } else {
                candidates.remove(&copy(number));
                next.configuration.secondaries.insert(copy(number));
            }
        }
        self.persist(next, reserve)
    }

    fn persist(&mut self, next: Record, reserve: Reserve) -> Outcome {
        let Some(mirror) = &self.mirror else { return Ok(()) };
        let volume = mirror.volume;
        let hot: Marks = mirror.hot.iter().chain(mirror.next_hot.iter().flatten()).copied().collect();
        let mut contents = BTreeMap::new();
        for (number, block) in &self.oracle.volumes[&volume].touched {
            match block.now[..] {
                _ if hot.contains(&extent_of(*number)) => {}
                [content] => _ = contents.insert(*number, content),
                _ => return Err(format!("block {number} is not known and not marked")),
            }
        }
        let stamp = next.configuration.stamp;
        let leaves = next.configuration.candidates.values().any(|lacks| *lacks == Lacks::Since(stamp));
        let leaves = leaves && !mirror.left.contains_key(&stamp);
        let left = leaves.then_some((stamp, Left { contents, hot, reserve })).into_iter().collect();
        self.coverage.leaves += u64::from(leaves);
        if let Some(mirror) = &mut self.mirror {
            mirror.next_record = Some((next.clone(), left));
        }
        self.delicate = if self.random.chance(1, 4) { 16 } else { self.delicate };
        let id = self.begin(Kind::Persist, volume);
        self.say(|| format!("{}: {:?}", id.0, next.configuration));
        let mut out = Vec::new();
        self.store().persist(id, volume, next, boot(), reserve, &mut out);
        self.take(out)
    }

    pub fn update_done(&mut self, kind: Kind, result: Result<(), DiskError>) -> Outcome {
        let Some(mirror) = &mut self.mirror else { return Ok(()) };
        if result.is_err() {
            // What of it is on disk is known after the next crash; until then there are no updates.
            return Ok(());
        }
        match kind {
            Kind::Persist => mirror.record_is_durable(),
            _ => mirror.hot = mirror.next_hot.take().ok_or("no marks are being written")?,
        }
        Ok(())
    }

    /// After a crash there is what was durable, or what was being written, and never a mix.
    pub fn resolve_mirror(&mut self) -> Outcome {
        let Some(mut mirror) = self.mirror.take() else { return Ok(()) };
        let found = self.store().mirrored(mirror.volume);
        let record = found.map(|found| found.record.clone());
        let hot: Marks = found.iter().flat_map(|found| found.hot).copied().collect();
        if found.is_some_and(|found| found.boot != boot()) {
            return Err("the boot id is another".into());
        }
        if record.is_some() && record.as_ref() == mirror.next_record.as_ref().map(|(next, _)| next) {
            mirror.record_is_durable();
        }
        if record != mirror.record {
            return Err(format!("the record is {record:?}, expected {:?} or {:?}", mirror.record, mirror.next_record));
        }
        if mirror.next_hot.as_ref() == Some(&hot) {
            mirror.hot = hot.clone();
        }
        if hot != mirror.hot {
            return Err(format!("hot are {hot:?}, expected {:?} or {:?}", mirror.hot, mirror.next_hot));
        }
        (mirror.next_record, mirror.next_hot) = (None, None);
        let bases = self.store().tree.bases.len();
        if bases > mirror.left.len() {
            return Err(format!("{bases} bases for {} copies that left", mirror.left.len()));
        }
        self.mirror = Some(mirror);
        Ok(())
    }

    /// Whatever changed since a copy left is in its plan, and it is not simply everything.
    pub fn check_plans(&mut self) -> Outcome {
        let Some(mirror) = &self.mirror else { return Ok(()) };
        let (id, left) = (mirror.volume, mirror.left.clone());
        if self.store().failure().is_some() {
            // What is read may be older than what was acknowledged.
            let planned = self.store().plan(id, None, &Suspects::Marked([].into()));
            return planned.err().map(drop).ok_or_else(|| "copies are made equal to a disk that has failed".into());
        }
        for (since, left) in left {
            let (planned, blocks) = self.planned(id, Lacks::Since(since))?;
            self.coverage.plans += 1;
            let hot = left.hot.iter().filter(|extent| u64::from(extent.0) * EXTENT_BLOCKS < blocks).count();
            let known = left.reserve == Reserve::Promised && hot < 3;
            if known && planned.len() as u64 > blocks - 64 {
                return Err(format!("all of {blocks} blocks are in the plan since {since:?}"));
            }
            for (number, content) in self.settled(id) {
                let before = left.contents.get(&number).copied().unwrap_or(ZEROS);
                let differs = left.hot.contains(&extent_of(number)) || before != content;
                if differs && !planned.contains(&number) {
                    return Err(format!("block {number} changed since {since:?} and is not in the plan"));
                }
            }
        }
        if self.mirror.as_ref().is_some_and(|mirror| mirror.record.is_some()) {
            let (planned, _) = self.planned(id, Lacks::Everything)?;
            let missing = self.settled(id).into_iter().find(|(number, _)| !planned.contains(number));
            if let Some((number, _)) = missing {
                return Err(format!("block {number} is not in the plan of everything"));
            }
        }
        Ok(())
    }

    /// Blocks of the volume whose content is known, and which nothing is changing.
    fn settled(&self, id: VolumeId) -> Vec<(u64, Content)> {
        let ranges = self.operations.values().filter(|operation| operation.volume == id);
        let busy: Vec<BlockRange> = ranges.filter_map(|operation| operation.range).collect();
        let is_busy = |number: u64| busy.iter().any(|range| (range.start()..range.end()).contains(&number));
        let touched = self.oracle.volumes.get(&id).into_iter().flat_map(|volume| &volume.touched);
        let settled = touched.filter(|(number, block)| block.now.len() == 1 && !is_busy(**number));
        settled.map(|(number, block)| (*number, block.now[0])).collect()
    }

    /// The blocks of a plan, and those of the volume.
    fn planned(&mut self, id: VolumeId, lacks: Lacks) -> Result<(BTreeSet<u64>, u64), String> {
        let known = self.store().volumes().into_iter().find(|info| info.volume == id).ok_or("the volume is gone")?;
        self.store().plan(id, Some(lacks), &Suspects::Marked([].into())).map_err(|error| error.to_string())?;
        let (mut planned, mut end) = (BTreeSet::new(), 0);
        while let Some(missing) = self.store().next_missing(id).map_err(|error| error.to_string())? {
            let range = missing.range();
            let (most, blocks) = match missing {
                Missing::Known(piece) => (MAX_REQUEST_BLOCKS, piece.runs().collect()),
                Missing::Suspected(range) => (COMPARED_BLOCKS, vec![range]),
            };
            if range.start() < end || range.end() > known.size.blocks() || range.count() > most {
                return Err(format!("{missing:?} follows a range that ends with {end}"));
            }
            planned.extend(blocks.into_iter().flat_map(|run| run.start()..run.end()));
            end = range.end();
        }
        Ok((planned, known.size.blocks()))
    }

    /// Where a request of the mirrored volume begins: around the borders of its extents.
    pub fn mirrored_start(&mut self, blocks: u64) -> u64 {
        let near = [0, EXTENT_BLOCKS - 16, 2 * EXTENT_BLOCKS - 16, blocks - 40][self.random.below(4)];
        near + self.random.below(32) as u64
    }

    /// Whether nobody ever wrote into the range: it is not read each time, which is most of the volume.
    pub fn is_untouched(&self, id: VolumeId, range: BlockRange) -> bool {
        let volume = &self.oracle.volumes[&id];
        self.mirror.is_some()
            && volume.touched.range(range.start()..range.end()).next().is_none()
            && volume.base.range(range.start()..range.end()).next().is_none()
    }
}
