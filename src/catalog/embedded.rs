//! The catalogue in one file on this machine, with redb.
//!
//! Invariants: every commit is durable before the call returns, and is announced in the order of commits, whoever still waits
//! for the call; an object and its name change in one commit; every value
//! carries a crc32c of key and content, and the whole file is checked when it is opened, so a flipped bit is an error that
//! names the file. redb may panic on what it did not write: a panic is caught, reported as damage and final for this
//! process, because the state in memory may be wrong then. A new file appears under its name only when it is complete,
//! so an empty or short file is damage and never a new catalogue.

use super::{CatalogError, Change, CreateError, Object, OpenError, Stored, UpdateError, Version, WATCH_BACKLOG, Watch};
use crate::protocol::Generation;
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::broadcast;

/// Format of the file: tables and value encoding below. 2 has tables for nodes and configurations, and volumes whose
/// copies an older version would forget; a file of format 1 is raised when it is opened.
const FORMAT: u32 = 2;
const FIRST_FORMAT: u32 = 1;
/// "magic" and "version" counters.
const META: TableDefinition<'static, &str, u64> = TableDefinition::new("tandem-catalogue");
const FORMAT_KEY: &str = "format";
const VERSION_KEY: &str = "version";
/// Not there: 0.
const GENERATION_KEY: &str = "generation";
/// `kind/name` -> key.
const NAMES: TableDefinition<'static, &str, &str> = TableDefinition::new("names");
/// Memory for pages: the whole of a catalogue with thousands of volumes.
const CACHE_BYTES: usize = 16 << 20;
/// crc32c and version before the JSON.
const HEADER: usize = 12;

fn table<T: Object>() -> TableDefinition<'static, &'static str, &'static [u8]> {
    TableDefinition::new(T::KIND)
}

/// The catalogue; clones are the same one.
#[derive(Clone)]
pub struct Embedded(Arc<Inner>);

struct Inner {
    path: PathBuf,
    database: Database,
    /// redb panicked: nothing in memory can be trusted any more.
    broken: AtomicBool,
    changes: broadcast::Sender<Change>,
    /// Held from before a change until it is announced.
    order: Mutex<()>,
}

/// What goes wrong inside a transaction, before the file's name is added.
enum Trouble {
    Database(redb::Error),
    Damaged(String),
}

impl<E: Into<redb::Error>> From<E> for Trouble {
    fn from(error: E) -> Self {
        Self::Database(error.into())
    }
}

impl Trouble {
    fn named(self, path: &Path) -> CatalogError {
        let path = path.to_owned();
        match self {
            Self::Damaged(reason) | Self::Database(redb::Error::Corrupted(reason)) => {
                CatalogError::Damaged { path, reason }
            }
            Self::Database(redb::Error::Io(error)) if error.kind() == std::io::ErrorKind::InvalidData => {
                CatalogError::Damaged { path, reason: error.to_string() }
            }
            Self::Database(redb::Error::Io(error)) => CatalogError::Io { path, reason: error.to_string() },
            Self::Database(redb::Error::PreviousIo) => {
                CatalogError::Io { path, reason: "an earlier write failed; restart tandem".to_owned() }
            }
            Self::Database(other) => CatalogError::Damaged { path, reason: other.to_string() },
        }
    }
}

impl Inner {
    fn announce(&self, change: Change) {
        // Nobody watching is no error.
        let _ = self.changes.send(change);
    }
}

fn change<T: Object>(key: String) -> Change {
    Change { kind: T::KIND, key }
}

impl Embedded {
    /// Opens the catalogue, or makes an empty one where there is none. Checks every page and every value: blocking.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let opened = catch(path, || {
            if !path.exists() {
                create_file(path)?;
            }
            let database = open_database(path)?;
            raise_format(path, &database)?;
            check(path, &database)?;
            Ok::<_, OpenError>(database)
        });
        let database = opened??;
        let (changes, _) = broadcast::channel(WATCH_BACKLOG);
        let (path, broken, order) = (path.to_owned(), AtomicBool::new(false), Mutex::new(()));
        Ok(Self(Arc::new(Inner { path, database, broken, changes, order })))
    }

    /// The object with this key.
    pub async fn get<T: Object>(&self, key: &str) -> Result<Option<Stored<T>>, CatalogError> {
        let key = key.to_owned();
        self.run(move |inner| {
            let table = inner.database.begin_read()?.open_table(table::<T>())?;
            table.get(key.as_str())?.map(|value| decode(&key, value.value())).transpose()
        })
        .await
    }

    /// The object with this name.
    pub async fn find<T: Object>(&self, name: &str) -> Result<Option<Stored<T>>, CatalogError> {
        let name = format!("{}/{name}", T::KIND);
        self.run(move |inner| {
            let transaction = inner.database.begin_read()?;
            let Some(key) = transaction.open_table(NAMES)?.get(name.as_str())?.map(|key| key.value().to_owned()) else {
                return Ok(None);
            };
            match transaction.open_table(table::<T>())?.get(key.as_str())? {
                Some(value) => decode(&key, value.value()).map(Some),
                None => Err(Trouble::Damaged(format!("the name of {} {key} has no object", T::KIND))),
            }
        })
        .await
    }

    /// All objects of the kind, ordered by key.
    pub async fn list<T: Object>(&self) -> Result<Vec<Stored<T>>, CatalogError> {
        self.run(|inner| {
            let table = inner.database.begin_read()?.open_table(table::<T>())?;
            let mut objects = Vec::new();
            for entry in table.iter()? {
                let (key, value) = entry?;
                objects.push(decode(key.value(), value.value())?);
            }
            Ok(objects)
        })
        .await
    }

    /// Changes from now on, of all kinds. A watcher that lags must list again.
    pub fn watch(&self) -> Watch {
        Watch::local(self.0.changes.subscribe())
    }

    /// Puts a new object in.
    pub async fn create<T: Object>(&self, object: T) -> Result<Stored<T>, CreateError> {
        let written = object.clone();
        let result = self
            .write(Some(change::<T>(object.key())), move |transaction| {
                let (key, name) = (object.key(), object.name().map(|name| format!("{}/{name}", T::KIND)));
                let mut table = transaction.open_table(table::<T>())?;
                if table.get(key.as_str())?.is_some() {
                    return Ok(Err(key));
                }
                if let Some(name) = name {
                    let mut names = transaction.open_table(NAMES)?;
                    if let Some(taken) = names.get(name.as_str())? {
                        return Ok(Err(taken.value().to_owned()));
                    }
                    names.insert(name.as_str(), key.as_str())?;
                }
                let version = next_version(transaction)?;
                table.insert(key.as_str(), encode(&key, version, &object)?.as_slice())?;
                Ok(Ok(version))
            })
            .await?;
        let version = result.map_err(|key| CreateError::Exists { kind: T::KIND, key })?;
        Ok(Stored { version, object: written })
    }

    /// Replaces the object that was read as `stored.version` by `stored.object`.
    pub async fn update<T: Object>(&self, stored: Stored<T>) -> Result<Stored<T>, UpdateError> {
        let key = stored.object.key();
        let written = stored.object.clone();
        let result = self
            .write(Some(change::<T>(key.clone())), move |transaction| {
                let key = stored.object.key();
                let mut table = transaction.open_table(table::<T>())?;
                if !is_at::<T>(&table, &key, stored.version)? {
                    return Ok(Err(()));
                }
                if stored.object.name().is_none()
                    && let Some(name) = name_at::<T>(&table, &key)?
                {
                    transaction.open_table(NAMES)?.remove(name.as_str())?;
                }
                let version = next_version(transaction)?;
                table.insert(key.as_str(), encode(&key, version, &stored.object)?.as_slice())?;
                Ok(Ok(version))
            })
            .await?;
        let version = result.map_err(|()| UpdateError::Conflict { kind: T::KIND, key })?;
        Ok(Stored { version, object: written })
    }

    /// Takes out the object that was read as `stored.version`. One that is gone already is success.
    pub async fn delete<T: Object>(&self, stored: &Stored<T>) -> Result<(), UpdateError> {
        let key = stored.object.key();
        let (version, object) = (stored.version, stored.object.clone());
        let deleted = self
            .write(Some(change::<T>(key.clone())), move |transaction| {
                let key = object.key();
                let mut table = transaction.open_table(table::<T>())?;
                if table.get(key.as_str())?.is_none() {
                    return Ok(Ok(()));
                }
                if !is_at::<T>(&table, &key, version)? {
                    return Ok(Err(()));
                }
                table.remove(key.as_str())?;
                if let Some(name) = object.name() {
                    transaction.open_table(NAMES)?.remove(format!("{}/{name}", T::KIND).as_str())?;
                }
                Ok(Ok(()))
            })
            .await?;
        deleted.map_err(|()| UpdateError::Conflict { kind: T::KIND, key })
    }

    /// The catalogue's generation: 0 until it was rebuilt from the disks for the first time.
    pub async fn generation(&self) -> Result<Generation, CatalogError> {
        self.run(|inner| {
            let meta = inner.database.begin_read()?.open_table(META)?;
            Ok(Generation(meta.get(GENERATION_KEY)?.map_or(0, |value| value.value())))
        })
        .await
    }

    /// Raises the generation above its own and above the highest that was found on the disks; returns the new one.
    pub async fn raise_generation(&self, found: Generation) -> Result<Generation, CatalogError> {
        let raised = self
            .write(None, move |transaction| {
                let mut meta = transaction.open_table(META)?;
                let own = meta.get(GENERATION_KEY)?.map_or(0, |value| value.value());
                let next = own.max(found.0) + 1;
                meta.insert(GENERATION_KEY, next)?;
                Ok(Ok::<_, std::convert::Infallible>(Generation(next)))
            })
            .await?;
        let Ok(generation) = raised;
        Ok(generation)
    }

    #[cfg(test)]
    pub(super) fn announce<T: Object>(&self, key: String) {
        self.0.announce(change::<T>(key));
    }

    /// One write transaction; `Ok(Err(_))` of `f` takes everything back. The announcement is part of it: a caller that went away
    /// meanwhile does not make it.
    async fn write<R: Send + 'static, X: Send + 'static>(
        &self,
        change: Option<Change>,
        f: impl FnOnce(&WriteTransaction) -> Result<Result<R, X>, Trouble> + Send + 'static,
    ) -> Result<Result<R, X>, CatalogError> {
        self.run(move |inner| {
            let _order = inner.order.lock().unwrap_or_else(PoisonError::into_inner);
            let mut transaction = inner.database.begin_write()?;
            // Persist before the caller promises anything to anybody.
            transaction.set_durability(Durability::Immediate).map_err(|error| Trouble::Damaged(error.to_string()))?;
            let result = f(&transaction)?;
            match result {
                Ok(_) => {
                    transaction.commit()?;
                    change.into_iter().for_each(|change| inner.announce(change));
                }
                Err(_) => transaction.abort()?,
            }
            Ok(result)
        })
        .await
    }

    /// Runs it where blocking is allowed. The work goes on if the caller goes away.
    async fn run<R: Send + 'static>(
        &self,
        f: impl FnOnce(&Inner) -> Result<R, Trouble> + Send + 'static,
    ) -> Result<R, CatalogError> {
        let inner = self.0.clone();
        let work = move || {
            if inner.broken.load(Ordering::Acquire) {
                let reason = "it failed an earlier check; nothing was changed since".to_owned();
                return Err(CatalogError::Damaged { path: inner.path.clone(), reason });
            }
            match catch(&inner.path, || f(&inner)) {
                Ok(result) => result.map_err(|trouble| trouble.named(&inner.path)),
                Err(panicked) => {
                    inner.broken.store(true, Ordering::Release);
                    Err(panicked)
                }
            }
        };
        let path = self.0.path.clone();
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            Err(_) => Err(CatalogError::Io { path, reason: "the process is ending".to_owned() }),
        }
    }
}

fn open_database(path: &Path) -> Result<Database, OpenError> {
    if std::fs::metadata(path).is_ok_and(|file| file.len() == 0) {
        return Err(CatalogError::Damaged { path: path.to_owned(), reason: "it is empty".to_owned() }.into());
    }
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    builder.open(path).map_err(|error| match error {
        redb::DatabaseError::DatabaseAlreadyOpen => OpenError::InUse { path: path.to_owned() },
        other => Trouble::from(other).named(path).into(),
    })
}

/// Makes an empty catalogue: complete under another name first, then linked, which fails where somebody was faster.
fn create_file(path: &Path) -> Result<(), OpenError> {
    let fresh = path.with_extension("redb.new");
    let io = |error: std::io::Error| CatalogError::Io { path: path.to_owned(), reason: error.to_string() };
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error).into()),
        _ => {}
    }
    let initialise = || -> Result<(), Trouble> {
        let database = Database::create(&fresh)?;
        let transaction = database.begin_write()?;
        {
            let mut meta = transaction.open_table(META)?;
            meta.insert(FORMAT_KEY, u64::from(FORMAT))?;
            meta.insert(VERSION_KEY, 0)?;
            transaction.open_table(NAMES)?;
            transaction.open_table(table::<super::Volume>())?;
            transaction.open_table(table::<super::Snapshot>())?;
            transaction.open_table(table::<super::GroupSnapshot>())?;
            transaction.open_table(table::<super::Node>())?;
            transaction.open_table(table::<super::VolumeConfiguration>())?;
        }
        transaction.commit()?;
        Ok(())
    };
    initialise().map_err(|trouble| trouble.named(path))?;
    let linked = std::fs::hard_link(&fresh, path).and_then(|()| std::fs::remove_file(&fresh));
    match linked {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
        other => other.map_err(io)?,
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Persist the name too: an empty catalogue after a power cut would forget volumes made meanwhile.
    std::fs::File::open(directory).and_then(|directory| directory.sync_all()).map_err(io)?;
    Ok(())
}

/// Makes a file of an older format one of this format.
fn raise_format(path: &Path, database: &Database) -> Result<(), OpenError> {
    let raise = || -> Result<(), Trouble> {
        if read_format(database)? != u64::from(FIRST_FORMAT) {
            return Ok(());
        }
        let transaction = database.begin_write()?;
        transaction.open_table(table::<super::Node>())?;
        transaction.open_table(table::<super::VolumeConfiguration>())?;
        transaction.open_table(META)?.insert(FORMAT_KEY, u64::from(FORMAT))?;
        transaction.commit()?;
        Ok(())
    };
    raise().map_err(|trouble| trouble.named(path).into())
}

/// Format and every value.
fn check(path: &Path, database: &Database) -> Result<(), OpenError> {
    let format = read_format(database).map_err(|trouble| trouble.named(path))?;
    if format != u64::from(FORMAT) {
        let found = u32::try_from(format).unwrap_or(u32::MAX);
        return Err(OpenError::Format { path: path.to_owned(), found, known: FORMAT });
    }
    let values = || -> Result<(), Trouble> {
        let transaction = database.begin_read()?;
        check_kind::<super::Volume>(&transaction)?;
        check_kind::<super::Snapshot>(&transaction)?;
        check_kind::<super::GroupSnapshot>(&transaction)?;
        check_kind::<super::Node>(&transaction)?;
        check_kind::<super::VolumeConfiguration>(&transaction)
    };
    values().map_err(|trouble| trouble.named(path).into())
}

fn read_format(database: &Database) -> Result<u64, Trouble> {
    let meta = database.begin_read()?.open_table(META)?;
    let format = meta.get(FORMAT_KEY)?.map(|value| value.value());
    format.ok_or_else(|| Trouble::Damaged("it has no format number".to_owned()))
}

fn check_kind<T: Object>(transaction: &redb::ReadTransaction) -> Result<(), Trouble> {
    let names = transaction.open_table(NAMES)?;
    for entry in transaction.open_table(table::<T>())?.iter()? {
        let (key, value) = entry?;
        let stored: Stored<T> = decode(key.value(), value.value())?;
        let Some(name) = stored.object.name() else { continue };
        let indexed = names.get(format!("{}/{name}", T::KIND).as_str())?.map(|key| key.value().to_owned());
        if indexed.as_deref() != Some(key.value()) {
            return Err(Trouble::Damaged(format!("{} {} is not found by its name", T::KIND, key.value())));
        }
    }
    Ok(())
}

fn next_version(transaction: &WriteTransaction) -> Result<Version, Trouble> {
    let mut meta = transaction.open_table(META)?;
    let last = meta.get(VERSION_KEY)?.map(|value| value.value());
    let last = last.ok_or_else(|| Trouble::Damaged("it has no version counter".to_owned()))?;
    meta.insert(VERSION_KEY, last + 1)?;
    Ok(Version(last + 1))
}

fn is_at<T: Object>(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    key: &str,
    version: Version,
) -> Result<bool, Trouble> {
    match table.get(key)? {
        Some(value) => Ok(decode::<T>(key, value.value())?.version == version),
        None => Ok(false),
    }
}

/// What finds the object by its name, if it has one.
fn name_at<T: Object>(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    key: &str,
) -> Result<Option<String>, Trouble> {
    let Some(value) = table.get(key)? else { return Ok(None) };
    let stored = decode::<T>(key, value.value())?;
    Ok(stored.object.name().map(|name| format!("{}/{name}", T::KIND)))
}

/// crc32c (little endian, over key and the rest), version, JSON.
fn encode<T: Object>(key: &str, version: Version, object: &T) -> Result<Vec<u8>, Trouble> {
    let json = serde_json::to_vec(object).map_err(|error| Trouble::Damaged(format!("cannot be encoded: {error}")))?;
    let mut value = vec![0; 4];
    value.extend(version.0.to_le_bytes());
    value.extend(json);
    let crc = checksum(key, &value[4..]);
    value[..4].copy_from_slice(&crc.to_le_bytes());
    Ok(value)
}

fn decode<T: Object>(key: &str, value: &[u8]) -> Result<Stored<T>, Trouble> {
    let damaged = |what: &str| Trouble::Damaged(format!("{} {key}: {what}", T::KIND));
    let (crc, rest) = value.split_first_chunk::<4>().ok_or_else(|| damaged("too short"))?;
    if value.len() < HEADER || u32::from_le_bytes(*crc) != checksum(key, rest) {
        return Err(damaged("the checksum does not fit"));
    }
    let (version, json) = rest.split_first_chunk::<8>().ok_or_else(|| damaged("too short"))?;
    let object: T = serde_json::from_slice(json).map_err(|error| damaged(&error.to_string()))?;
    if object.key() != key {
        return Err(damaged("it is under a wrong key"));
    }
    Ok(Stored { version: Version(u64::from_le_bytes(*version)), object })
}

fn checksum(key: &str, rest: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(key.as_bytes()), rest)
}

fn catch<R>(path: &Path, f: impl FnOnce() -> R) -> Result<R, CatalogError> {
    // What a panic leaves half changed is never used again: the caller closes or marks the database.
    catch_unwind(AssertUnwindSafe(f)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let reason = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown");
        CatalogError::Damaged { path: path.to_owned(), reason: format!("the database code gave up: {reason}") }
    })
}

#[cfg(test)]
mod tests;
