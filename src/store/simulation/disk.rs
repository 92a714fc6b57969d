//! A disk that forgets, tears and reorders whatever was not synced, and that can fail at any call.

use crate::store::files::{Files, Name};
use crate::store::{File, Io};
use std::collections::BTreeMap;
use std::io;
use std::sync::Mutex;

pub const BLOCK: usize = 4096;
/// What the disk writes at once; smaller parts are never torn.
pub const UNIT: usize = 512;

type Block = Box<[u8; BLOCK]>;

/// Random numbers from a seed: splitmix64.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    /// True in `part` of `of` cases.
    pub fn chance(&mut self, part: usize, of: usize) -> bool {
        self.below(of) < part
    }
}

#[derive(Clone, Debug, Default)]
struct Content {
    durable: BTreeMap<u64, Block>,
    durable_size: u64,
    cached: BTreeMap<u64, Block>,
    size: u64,
    /// Writes that no sync has covered, in order.
    unsynced: Vec<(u64, Block)>,
    /// How many were ever dropped from the front of `unsynced`.
    synced: u64,
    /// Bytes from its start for which there is space, also on a full disk.
    reserved: u64,
}

#[derive(Clone, Copy, Debug)]
enum NameChange {
    Set(Name, usize),
    Swap(Name, Name),
    Remove(Name),
}

#[derive(Debug)]
struct State {
    random: Random,
    contents: Vec<Content>,
    names: BTreeMap<Name, usize>,
    durable_names: BTreeMap<Name, usize>,
    changes: Vec<NameChange>,
    /// Calls of [`Files`] until the machine stops.
    fuse: Option<u32>,
    /// Out of 1,000 blocking writes, how many fail.
    write_errors: usize,
    /// Blocking calls get no new space; nor do they where there was some, if this disk keeps none.
    full: bool,
    keeps_space: bool,
    units: usize,
}

#[derive(Debug)]
pub struct Disk(Mutex<State>);

/// A write that is in flight.
#[derive(Clone, Debug)]
pub struct Write {
    pub file: File,
    pub offset: u64,
    pub bytes: Vec<u8>,
}

impl Disk {
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0xd15c);
        let units = if random.chance(1, 2) { BLOCK / UNIT } else { 1 };
        let (contents, names, durable_names, changes, fuse) = Default::default();
        let (write_errors, full, keeps_space) = (0, false, true);
        let state =
            State { random, contents, names, durable_names, changes, fuse, write_errors, full, keeps_space, units };
        Self(Mutex::new(state))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().expect("nobody panicked in here")
    }

    pub fn set_fuse(&self, calls: Option<u32>) {
        self.state().fuse = calls;
    }

    pub fn has_blown(&self) -> bool {
        self.state().fuse == Some(0)
    }

    pub fn set_write_errors(&self, per_mille: usize) {
        self.state().write_errors = per_mille;
    }

    pub fn set_full(&self, full: bool) {
        self.state().full = full;
    }

    /// Even what was written before cannot be written over when it is full.
    pub fn keep_no_space(&self) {
        self.state().keeps_space = false;
    }

    pub fn keep_space(&self) {
        self.state().keeps_space = true;
    }

    pub fn read(&self, file: File, offset: u64, buffer: &mut [u8]) -> bool {
        self.state().read(Name::from(file), offset, buffer).is_ok()
    }

    pub fn write(&self, write: &Write) {
        self.state().write(Name::from(write.file), write.offset, &write.bytes).expect("the file is there");
    }

    /// Whether the write goes into blocks that were never written.
    pub fn is_first_write(&self, write: &Write) -> bool {
        let mut state = self.state();
        let content = state.content(Name::from(write.file)).expect("the file is there");
        !content.cached.contains_key(&(write.offset / BLOCK as u64))
    }

    /// What a sync that is issued now will cover.
    pub fn mark(&self, file: File) -> u64 {
        let mut state = self.state();
        let content = state.content(Name::from(file)).expect("the file is there");
        content.synced + content.unsynced.len() as u64
    }

    pub fn sync_to(&self, file: File, mark: u64) {
        self.state().sync(Name::from(file), mark).expect("the file is there");
    }

    pub fn punch(&self, file: File, what: Io) {
        let Io::Punch { offset, length } = what else { return };
        self.state().write(Name::from(file), offset, &vec![0; length as usize]).expect("the file is there");
    }

    /// The process dies: each block of a write in flight lands or does not.
    pub fn kill(&self, in_flight: &[Write]) {
        let mut state = self.state();
        for write in in_flight {
            for (index, block) in write.bytes.chunks(BLOCK).enumerate() {
                if state.random.chance(1, 2) {
                    let offset = write.offset + (index * BLOCK) as u64;
                    state.write(Name::from(write.file), offset, block).expect("the file is there");
                }
            }
        }
        state.fuse = None;
    }

    /// The power fails: of what was not synced, any part of any version is there.
    pub fn power_cut(&self, in_flight: &[Write]) {
        let mut state = self.state();
        for write in in_flight {
            state.write(Name::from(write.file), write.offset, &write.bytes).expect("the file is there");
        }
        let State { random, contents, units, .. } = &mut *state;
        contents.iter_mut().for_each(|content| content.cut(random, *units));
        let changes = state.changes.len();
        let kept = state.random.below(changes + 1);
        let changes = std::mem::take(&mut state.changes);
        changes.into_iter().take(kept).for_each(|change| apply(&mut state.durable_names, change));
        state.names = state.durable_names.clone();
        state.fuse = None;
    }

    /// Changes one bit of what is there; where.
    pub fn flip(&self, name: Name) -> Option<u64> {
        let mut state = self.state();
        let pick = state.random.next() as usize;
        let bit = state.random.below(BLOCK * 8);
        let content = state.content(name).ok()?;
        let count = content.cached.len();
        let block = *content.cached.keys().nth(pick % count.max(1))?;
        for blocks in [&mut content.cached, &mut content.durable] {
            if let Some(bytes) = blocks.get_mut(&block) {
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
        }
        Some(block * BLOCK as u64 + bit as u64 / 8)
    }
}

impl Content {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        assert!(offset.is_multiple_of(BLOCK as u64) && bytes.len().is_multiple_of(BLOCK), "writes are whole blocks");
        for (index, chunk) in bytes.chunks(BLOCK).enumerate() {
            let number = offset / BLOCK as u64 + index as u64;
            let block: Block = Box::new(chunk.try_into().expect("a whole block"));
            self.cached.insert(number, block.clone());
            self.unsynced.push((number, block));
        }
        self.size = self.size.max(offset + bytes.len() as u64);
    }

    fn sync(&mut self, mark: u64) {
        let count = mark.saturating_sub(self.synced).min(self.unsynced.len() as u64);
        for (number, block) in self.unsynced.drain(..count as usize) {
            self.durable_size = self.durable_size.max((number + 1) * BLOCK as u64);
            self.durable.insert(number, block);
        }
        self.synced += count;
    }

    fn cut(&mut self, random: &mut Random, units: usize) {
        let mut versions: BTreeMap<u64, Vec<Block>> = BTreeMap::new();
        for (number, block) in self.unsynced.drain(..) {
            versions.entry(number).or_default().push(block);
        }
        // The new size may be lost as a whole, too.
        let keeps_size = random.chance(1, 2);
        for (number, versions) in versions {
            if !keeps_size && number * BLOCK as u64 >= self.durable_size {
                continue;
            }
            let mut block = self.durable.get(&number).cloned().unwrap_or_else(|| Box::new([0; BLOCK]));
            let length = BLOCK / units;
            for unit in 0..units {
                let pick = random.below(versions.len() + 1);
                if let Some(version) = versions.get(pick) {
                    block[unit * length..][..length].copy_from_slice(&version[unit * length..][..length]);
                }
            }
            self.durable_size = self.durable_size.max((number + 1) * BLOCK as u64);
            self.durable.insert(number, block);
        }
        self.cached = self.durable.clone();
        self.size = self.durable_size;
        self.synced = 0;
    }
}

impl State {
    fn content(&mut self, name: Name) -> io::Result<&mut Content> {
        let index = *self.names.get(&name).ok_or(io::ErrorKind::NotFound)?;
        Ok(&mut self.contents[index])
    }

    /// Each blocking call; an error once the machine has stopped.
    fn call(&mut self) -> io::Result<()> {
        match &mut self.fuse {
            Some(0) => Err(io::Error::other("the machine has stopped")),
            Some(calls) => {
                *calls -= 1;
                if *calls == 0 { Err(io::Error::other("the machine stops")) } else { Ok(()) }
            }
            None => Ok(()),
        }
    }

    fn fail(&mut self) -> io::Result<()> {
        let rate = self.write_errors;
        if self.random.chance(rate, 1000) { Err(io::Error::other("planned")) } else { Ok(()) }
    }

    /// Whether the first `bytes` of a file can be written now. The logs were written when the tree was made.
    fn has_space(&mut self, name: Name, bytes: u64) -> io::Result<()> {
        let (is_full, keeps_space) = (self.full, self.keeps_space || matches!(name, Name::Log(_)));
        let content = self.content(name)?;
        let is_there = keeps_space && bytes <= content.size.max(content.reserved);
        if is_full && !is_there { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn read(&mut self, name: Name, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let content = self.content(name)?;
        if offset + buffer.len() as u64 > content.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let within = (at % BLOCK as u64) as usize;
            let length = (BLOCK - within).min(buffer.len() - done);
            match content.cached.get(&(at / BLOCK as u64)) {
                Some(block) => buffer[done..done + length].copy_from_slice(&block[within..within + length]),
                None => buffer[done..done + length].fill(0),
            }
            done += length;
        }
        Ok(())
    }

    fn write(&mut self, name: Name, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.content(name)?.write(offset, bytes);
        Ok(())
    }

    fn sync(&mut self, name: Name, mark: u64) -> io::Result<()> {
        self.content(name)?.sync(mark);
        Ok(())
    }

    fn change(&mut self, change: NameChange) {
        apply(&mut self.names, change);
        self.changes.push(change);
    }
}

fn apply(names: &mut BTreeMap<Name, usize>, change: NameChange) {
    match change {
        NameChange::Set(name, index) => {
            names.retain(|_, there| *there != index);
            names.insert(name, index);
        }
        NameChange::Swap(one, other) => {
            if let (Some(first), Some(second)) = (names.remove(&one), names.remove(&other)) {
                names.extend([(one, second), (other, first)]);
            }
        }
        NameChange::Remove(name) => {
            names.remove(&name);
        }
    }
}

impl Files for Disk {
    fn create(&self, name: Name) -> io::Result<()> {
        let mut state = self.state();
        state.call()?;
        if state.names.contains_key(&name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        state.contents.push(Content::default());
        let index = state.contents.len() - 1;
        state.change(NameChange::Set(name, index));
        Ok(())
    }

    fn size(&self, name: Name) -> io::Result<Option<u64>> {
        let mut state = self.state();
        state.call()?;
        Ok(state.content(name).ok().map(|content| content.size))
    }

    fn read_at(&self, name: Name, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut state = self.state();
        state.call()?;
        state.read(name, offset, buffer)
    }

    fn write_at(&self, name: Name, offset: u64, buffer: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        state.call()?;
        state.fail()?;
        state.has_space(name, offset + buffer.len() as u64)?;
        state.write(name, offset, buffer)
    }

    fn sync(&self, name: Name) -> io::Result<()> {
        let mut state = self.state();
        state.call()?;
        state.fail()?;
        state.sync(name, u64::MAX)
    }

    fn rename(&self, from: Name, to: Name) -> io::Result<()> {
        let mut state = self.state();
        state.call()?;
        let index = *state.names.get(&from).ok_or(io::ErrorKind::NotFound)?;
        state.change(NameChange::Set(to, index));
        Ok(())
    }

    fn exchange(&self, one: Name, other: Name) -> io::Result<()> {
        let mut state = self.state();
        state.call()?;
        for name in [one, other] {
            state.content(name)?;
        }
        state.change(NameChange::Swap(one, other));
        Ok(())
    }

    fn remove(&self, name: Name) -> io::Result<()> {
        let mut state = self.state();
        state.call()?;
        state.change(NameChange::Remove(name));
        Ok(())
    }

    fn sync_names(&self) -> io::Result<()> {
        let mut state = self.state();
        state.call()?;
        state.fail()?;
        state.durable_names = state.names.clone();
        state.changes.clear();
        Ok(())
    }

    fn reserve(&self, name: Name, bytes: u64) -> io::Result<()> {
        if self.size(name)?.is_none() {
            self.create(name)?;
        }
        let mut state = self.state();
        state.has_space(name, bytes)?;
        let content = state.content(name)?;
        content.reserved = content.reserved.max(bytes);
        Ok(())
    }

    fn reserved(&self, name: Name) -> io::Result<u64> {
        if self.size(name)?.is_none() {
            return Ok(0);
        }
        let mut state = self.state();
        let is_kept = state.keeps_space || !state.full;
        let content = state.content(name)?;
        Ok(if is_kept { content.size.max(content.reserved) } else { 0 })
    }
}
