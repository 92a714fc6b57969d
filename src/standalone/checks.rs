//! What a server needs of its machine, checked before anything is made: one sentence each, with what to do.

use super::{Arguments, Plan, PoolArgument, Storage, StorageArguments};
use crate::cli::Target;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};

/// Descriptors per attached volume: FUSE, loop, slots, pending, two logs and data, each in the engine or on its way to
/// the holder.
const DESCRIPTORS_PER_VOLUME: u64 = 10;
/// Descriptors of everything else: sockets, pools, the catalogue.
const DESCRIPTORS_BESIDES: u64 = 256;
/// Bytes of a Unix socket's path, without the final zero: a limit of the kernel.
const LONGEST_SOCKET_PATH: usize = 107;

/// What is missing.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// Not root.
    #[error("tandem must run as root: it makes block devices and mounts filesystems; use sudo")]
    NotRoot,
    /// A device of the kernel is missing.
    #[error(
        "cannot open {path}: {source}: load its module (`modprobe {module}`), or hand the device into the container"
    )]
    Device {
        /// Its path.
        path: &'static str,
        /// Its module.
        module: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The limit is below what the volumes may need.
    #[error(
        "too few descriptors: {limit} are allowed and {volumes} volumes need {needed}: raise the limit (`ulimit -n {needed}`, \
         LimitNOFILE={needed}) or lower --max-volumes-per-node to {affordable}"
    )]
    Descriptors {
        /// RLIMIT_NOFILE, the hard one.
        limit: u64,
        /// What was asked for.
        volumes: u32,
        /// For all of them.
        needed: u64,
        /// What the limit allows.
        affordable: u64,
    },
    /// The directory cannot be used.
    #[error("cannot write in {}: {source}: --dir must be a directory on a local filesystem that can be written", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Not a Unix socket.
    #[error("`{0}` is no endpoint: write unix:// and an absolute path that ends in .sock")]
    Endpoint(String),
    /// A path that the kernel does not take for a socket.
    #[error("the socket path {} has more than {LONGEST_SOCKET_PATH} bytes: choose a shorter --dir or --endpoint", .0.display())]
    SocketPath(PathBuf),
    /// Something else is there.
    #[error("{} is there and is no socket: remove it, or choose another --endpoint", .0.display())]
    NotASocket(PathBuf),
    /// Two pools of one name.
    #[error("the pool name `{0}` is given twice: give each pool a name of its own")]
    PoolTwice(String),
}

/// Checks the machine and the arguments, raises the descriptor limit, makes the directory.
pub fn prepare(arguments: Arguments) -> Result<Plan, CheckError> {
    let Arguments { storage, endpoint, max_volumes_per_node, engine } = arguments;
    let storage = prepare_storage(storage, max_volumes_per_node)?;
    let socket = socket(endpoint.as_deref(), &storage.dir)?;
    Ok(Plan { storage, socket, max_volumes_per_node, engine })
}

/// The part that needs no CSI.
pub(crate) fn prepare_storage(arguments: StorageArguments, volumes: u32) -> Result<Storage, CheckError> {
    let StorageArguments { dir, pools, node_id } = arguments;
    if !nix::unistd::geteuid().is_root() {
        return Err(CheckError::NotRoot);
    }
    for (path, module) in [("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")] {
        let opened = fs::OpenOptions::new().read(true).write(true).open(path);
        opened.map_err(|source| CheckError::Device { path, module, source })?;
    }
    descriptors(volumes)?;
    let dir = directory(&dir)?;
    let mut names = BTreeSet::new();
    if let Some(twice) = pools.iter().find(|pool| !names.insert(&pool.name)) {
        return Err(CheckError::PoolTwice(twice.name.clone()));
    }
    let default = || vec![PoolArgument { name: "default".into(), path: dir.join("pool") }];
    let pools = if pools.is_empty() { default() } else { pools };
    let node_id = node_id.unwrap_or_else(host_name);
    Ok(Storage { dir, pools, node_id })
}

/// The name of this machine; `localhost` where it has none.
pub fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_string();
    if name.is_empty() { "localhost".into() } else { name }
}

/// Children inherit the limit.
fn descriptors(volumes: u32) -> Result<(), CheckError> {
    let needed = DESCRIPTORS_BESIDES + DESCRIPTORS_PER_VOLUME * u64::from(volumes);
    let (soft, limit) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((0, 0));
    if limit < needed && setrlimit(Resource::RLIMIT_NOFILE, needed, needed).is_err() {
        let affordable = limit.saturating_sub(DESCRIPTORS_BESIDES) / DESCRIPTORS_PER_VOLUME;
        return Err(CheckError::Descriptors { limit, volumes, needed, affordable });
    }
    if soft < needed && limit >= needed {
        let raised = setrlimit(Resource::RLIMIT_NOFILE, limit, limit);
        raised.map_err(|_| CheckError::Descriptors { limit: soft, volumes, needed, affordable: 0 })?;
    }
    Ok(())
}

/// For a process that needs no device: the directory alone, made.
pub(crate) fn prepare_dir(dir: &Path) -> Result<PathBuf, CheckError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(CheckError::NotRoot);
    }
    directory(dir)
}

fn directory(dir: &Path) -> Result<PathBuf, CheckError> {
    let failed = |source| CheckError::Directory { path: dir.into(), source };
    // Sockets in it are a way to every byte of every volume: root only.
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    let dir = fs::canonicalize(dir).map_err(failed)?;
    let probe = dir.join("tandem.probe");
    fs::write(&probe, b"").and_then(|()| remove_if_there(&probe)).map_err(failed)?;
    // The longest socket in it is the one of the replica.
    checked_length(dir.join("replica.sock"))?;
    Ok(dir)
}

/// A process of the same node that starts at the same moment may have removed it.
fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn checked_length(path: PathBuf) -> Result<PathBuf, CheckError> {
    if path.as_os_str().len() > LONGEST_SOCKET_PATH { Err(CheckError::SocketPath(path)) } else { Ok(path) }
}

/// The path of the CSI socket, which is the default without an endpoint.
pub(crate) fn socket(endpoint: Option<&str>, dir: &Path) -> Result<PathBuf, CheckError> {
    let Some(endpoint) = endpoint else { return checked_length(dir.join("csi.sock")) };
    let path = Target::socket_path(endpoint);
    if endpoint.contains("://") != endpoint.starts_with("unix://")
        || !path.is_absolute()
        || path.extension() != Some("sock".as_ref())
    {
        return Err(CheckError::Endpoint(endpoint.into()));
    }
    if fs::symlink_metadata(path).is_ok_and(|found| !found.file_type().is_socket()) {
        return Err(CheckError::NotASocket(path.into()));
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|source| CheckError::Directory { path: parent.into(), source })?;
    }
    checked_length(path.into())
}

/// Writes the pid for scripts; never half of it.
pub fn write_pid(dir: &Path) -> Result<(), CheckError> {
    let written = dir.join("tandem.pid.new");
    fs::write(&written, format!("{}\n", std::process::id()))
        .and_then(|()| fs::rename(&written, dir.join("tandem.pid")))
        .map_err(|source| CheckError::Directory { path: dir.into(), source })
}

/// After this the pid may belong to somebody else.
pub fn remove_pid(dir: &Path) {
    if let Err(error) = fs::remove_file(dir.join("tandem.pid")) {
        tracing::warn!("cannot remove {}/tandem.pid: {error}", dir.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_an_absolute_unix_socket() {
        let dir = tempfile::Builder::new().prefix("tandem-").tempdir().expect("a directory");
        let at = |text: &str| socket(Some(text), dir.path());
        for wrong in ["tcp://127.0.0.1:1", "csi.sock", "unix://csi.sock", "/a/b", ""] {
            assert!(matches!(at(wrong), Err(CheckError::Endpoint(_))), "{wrong}");
        }
        let file = dir.path().join("file.sock");
        fs::write(&file, "").expect("written");
        assert!(matches!(at(&format!("unix://{}", file.display())), Err(CheckError::NotASocket(_))));
        let long = format!("unix://{}/{}.sock", dir.path().display(), "x".repeat(100));
        assert!(matches!(at(&long), Err(CheckError::SocketPath(_))));
        let good = dir.path().join("sub/csi.sock");
        assert_eq!(at(&format!("unix://{}", good.display())).expect("good"), good);
        assert_eq!(socket(None, dir.path()).expect("default"), dir.path().join("csi.sock"));
    }

    /// `tandem replica` and `tandem node` are started side by side on one directory.
    #[test]
    fn a_directory_is_checked_by_several_processes_at_once() {
        let dir = tempfile::Builder::new().prefix("tandem-").tempdir().expect("a directory");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..500).for_each(|_| drop(directory(dir.path()).expect("it can be written"))));
            }
        });
    }

    #[test]
    fn processes_that_start_together_do_not_take_their_directory_for_one_that_cannot_be_written() {
        let dir = tempfile::Builder::new().prefix("tandem-").tempdir().expect("a directory");
        let prepare = || (0..200).try_for_each(|_| directory(dir.path()).map(drop));
        std::thread::scope(|scope| {
            for thread in [0; 4].map(|_| scope.spawn(prepare)) {
                thread.join().expect("no panic").expect("it can be written");
            }
        });
        assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 0);
    }

    #[test]
    fn too_few_descriptors_name_what_would_do() {
        // The limit of a test process cannot be lowered for others: ask for more than any machine allows.
        let error = descriptors(u32::MAX).expect_err("nobody has that many");
        assert!(error.to_string().contains("lower --max-volumes-per-node to"), "{error}");
    }

    #[test]
    fn the_pid_file_holds_the_pid_and_goes() {
        let dir = tempfile::Builder::new().prefix("tandem-").tempdir().expect("a directory");
        write_pid(dir.path()).expect("written");
        let text = fs::read_to_string(dir.path().join("tandem.pid")).expect("there");
        assert_eq!(text.trim(), std::process::id().to_string());
        remove_pid(dir.path());
        assert!(!dir.path().join("tandem.pid").exists());
    }
}
