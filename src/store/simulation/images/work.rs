//! What is done on the filesystem, what it promises, and what an image must have after it.

use super::super::disk::Random;
use super::record::Event;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

const FILES: u32 = 24;
const STEPS: u32 = 140;
const PAGES: u32 = 96;
const PAGE: usize = 4096;
/// What a disk writes at once.
const SECTOR: usize = 512;

/// One thing that the workload does and then makes durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A file is replaced by one with this content, as a whole.
    Put { file: u32, content: u32 },
    /// A file is removed.
    Remove { file: u32 },
    /// Pages of the database are overwritten in place; version 0 is all of them.
    Overwrite { version: u32 },
}

fn name(file: u32) -> String {
    format!("d{}/f{file}", file % 3)
}

/// Any length, also none of whole blocks.
fn content(number: u32) -> Vec<u8> {
    let mut random = Random::new(u64::from(number) + 77);
    let length = 1 + random.below(if number.is_multiple_of(5) { 200_000 } else { 9_000 });
    (0..length).map(|_| random.next() as u8).collect()
}

fn pages(version: u32) -> Vec<u32> {
    if version == 0 {
        return (0..PAGES).collect();
    }
    let mut random = Random::new(u64::from(version) + 5_000);
    (0..1 + random.below(5)).map(|_| random.below(PAGES as usize) as u32).collect()
}

/// Each sector says which page and version it is of.
fn page(number: u32, version: u32) -> [u8; PAGE] {
    let mut bytes = [version as u8; PAGE];
    for (index, sector) in bytes.chunks_mut(SECTOR).enumerate() {
        sector[..4].copy_from_slice(&number.to_le_bytes());
        sector[4..8].copy_from_slice(&version.to_le_bytes());
        sector[8] = index as u8;
    }
    bytes
}

fn sync(path: &Path) {
    File::open(path).and_then(|file| file.sync_all()).expect("fsync");
}

fn overwrite(root: &Path, version: u32) {
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(false).open(root.join("database")).expect("database");
    for number in pages(version) {
        file.write_all_at(&page(number, version), u64::from(number) * PAGE as u64).expect("written");
    }
    file.sync_data().expect("fdatasync");
}

fn put(root: &Path, file: u32, number: u32) {
    let path = root.join(name(file));
    let fresh = path.with_extension("new");
    let mut out = File::create(&fresh).expect("a file");
    out.write_all(&content(number)).expect("written");
    out.sync_all().expect("fsync");
    fs::rename(&fresh, &path).expect("renamed");
    sync(path.parent().expect("a directory"));
}

/// What must be there before the first cut.
pub fn prepare(root: &Path, note: &dyn Fn(Event)) {
    (0..3).for_each(|n| fs::create_dir(root.join(format!("d{n}"))).expect("a directory"));
    note(Event::Started(Step::Overwrite { version: 0 }));
    overwrite(root, 0);
    sync(root);
    note(Event::Promised(Step::Overwrite { version: 0 }));
}

/// Does it all, and notes when each step begins and when it is promised.
pub fn work(root: &Path, note: &dyn Fn(Event)) {
    for number in 1..=STEPS {
        let file = number.wrapping_mul(7) % FILES;
        let step = match number % 5 {
            0 | 2 => Step::Put { file, content: number },
            4 if root.join(name(file)).exists() => Step::Remove { file },
            _ => Step::Overwrite { version: number },
        };
        // Dirty pages that nobody asks for: the filesystem writes them when it likes, beside the others.
        let mut churn = OpenOptions::new().append(true).create(true).open(root.join("churn")).expect("a file");
        churn.write_all(&content(number * 5)).expect("written");
        note(Event::Started(step));
        match step {
            Step::Put { file, content } => put(root, file, content),
            Step::Remove { file } => {
                let path = root.join(name(file));
                fs::remove_file(&path).expect("removed");
                sync(path.parent().expect("a directory"));
            }
            Step::Overwrite { version } => overwrite(root, version),
        }
        note(Event::Promised(step));
        if number.is_multiple_of(40) {
            fs::remove_file(root.join("churn")).expect("removed");
            File::create(root.join("churn")).and_then(|file| file.sync_all()).expect("fsync");
        }
    }
}

/// What an image may have.
pub struct Expected {
    /// `None`: no such file.
    files: BTreeMap<u32, Vec<Option<u32>>>,
    pages: BTreeMap<u32, Vec<u32>>,
}

impl Expected {
    /// After these events: what was promised, and whatever was begun since.
    pub fn after(events: &[Event]) -> Self {
        let files = (0..FILES).map(|file| (file, vec![None])).collect();
        let mut expected = Self { files, pages: BTreeMap::new() };
        for event in events {
            match *event {
                Event::Started(step) => expected.may(step, false),
                Event::Promised(step) => expected.may(step, true),
                Event::Submitted(_) | Event::Completed(_) => {}
            }
        }
        expected
    }

    /// It may be there, or must.
    fn may(&mut self, step: Step, must: bool) {
        fn add<T>(known: &mut Vec<T>, value: T, must: bool) {
            if must {
                known.clear();
            }
            known.push(value);
        }
        match step {
            Step::Put { file, content } => add(self.files.entry(file).or_default(), Some(content), must),
            Step::Remove { file } => add(self.files.entry(file).or_default(), None, must),
            Step::Overwrite { version } => {
                pages(version).into_iter().for_each(|page| add(self.pages.entry(page).or_default(), version, must));
            }
        }
    }

    /// Compares a mounted image.
    pub fn compare(&self, root: &Path) -> Result<(), String> {
        for (&file, allowed) in &self.files {
            let found = match fs::read(root.join(name(file))) {
                Ok(found) => Some(found),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
                Err(error) => return Err(format!("{}: {error}", name(file))),
            };
            if !allowed.iter().any(|allowed| allowed.map(content) == found) {
                let length = found.map(|found| found.len());
                return Err(format!("{} has {length:?} bytes and is none of the contents {allowed:?}", name(file)));
            }
        }
        let database = fs::read(root.join("database")).map_err(|error| format!("database: {error}"))?;
        if database.len() != PAGES as usize * PAGE {
            return Err(format!("the database has {} bytes", database.len()));
        }
        for (number, found) in (0..).zip(database.chunks(PAGE)) {
            let versions: Vec<_> = self.pages[&number].iter().map(|version| page(number, *version)).collect();
            for (index, sector) in found.chunks(SECTOR).enumerate() {
                let is_known = versions.iter().any(|version| version[index * SECTOR..][..SECTOR] == *sector);
                if !is_known {
                    let there = &sector[..12];
                    let allowed = &self.pages[&number];
                    return Err(format!(
                        "page {number}, sector {index}: {there:?} is of none of the versions {allowed:?}"
                    ));
                }
            }
        }
        Ok(())
    }
}
