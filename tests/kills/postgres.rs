//! A PostgreSQL with clients that note every row whose commit was acknowledged.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Clients that insert rows, beside pgbench.
const CLIENTS: u64 = 4;
/// Ids of a client start at its number times this.
const APART: u64 = 1_000_000_000;
/// A start with recovery may take this long.
const PATIENCE: Duration = Duration::from_secs(300);

/// The server process with its data directory on the volume and its socket beside.
pub struct Server {
    programs: PathBuf,
    data: PathBuf,
    sockets: PathBuf,
    process: Option<Child>,
}

/// Clients at work.
pub struct Clients {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Vec<u64>>>,
    pgbench: Child,
}

/// The newest PostgreSQL of the machine.
fn programs() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL is installed").flatten();
    let mut found: Vec<_> = versions.map(|v| v.path().join("bin")).filter(|bin| bin.join("initdb").exists()).collect();
    found.sort();
    found.pop().expect("initdb is installed")
}

impl Server {
    /// A new database below `mount`; `dir` must outlive it.
    pub fn create(dir: &Path, mount: &Path) -> Self {
        let (data, sockets) = (mount.join("data"), dir.join("sockets"));
        // The user postgres passes through the directory of the test.
        for path in [dir, &dir.join("targets"), mount] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("our own directory");
        }
        let user = nix::unistd::User::from_name("postgres").expect("users").expect("the user postgres");
        for path in [&data, &sockets] {
            fs::create_dir_all(path).expect("a directory");
            fs::set_permissions(path, fs::Permissions::from_mode(0o700)).expect("our own directory");
            nix::unistd::chown(path, Some(user.uid), Some(user.gid)).expect("our own directory");
        }
        let server = Self { programs: programs(), data, sockets, process: None };
        let made = server.program("initdb").args(["-A", "trust", "--no-instructions", "-D"]).arg(&server.data).output();
        let made = made.expect("initdb");
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let server = server.start_again();
        server.sql("create table kept (id bigint primary key, filler text)");
        let made = server.client("pgbench").args(["-i", "-q", "-s", "5", "postgres"]).output().expect("pgbench");
        assert!(made.status.success(), "pgbench -i: {}", String::from_utf8_lossy(&made.stderr));
        server
    }

    fn program(&self, name: &str) -> Command {
        let user = nix::unistd::User::from_name("postgres").expect("users").expect("the user postgres");
        let mut command = Command::new(self.programs.join(name));
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw()).current_dir("/").stdin(Stdio::null());
        command
    }

    fn client(&self, name: &str) -> Command {
        let mut command = self.program(name);
        command.arg("-h").arg(&self.sockets);
        command
    }

    /// Starts it, with recovery if it was stopped at once, and waits until it answers.
    pub fn start_again(mut self) -> Self {
        let log = fs::File::options().create(true).append(true).open(self.sockets.join("log")).expect("log");
        let sockets = format!("unix_socket_directories={}", self.sockets.display());
        let mut command = self.program("postgres");
        command.arg("-D").arg(&self.data).args(["-c", "listen_addresses=", "-c", &sockets]);
        // Checkpoints under way while the engine dies, and small memory: the disk is what is tested.
        command.args(["-c", "max_wal_size=64MB", "-c", "checkpoint_timeout=30s", "-c", "shared_buffers=32MB"]);
        let process = command.stdout(Stdio::null()).stderr(log).spawn().expect("postgres");
        self.process = Some(process);
        let began = Instant::now();
        while !self.client("psql").args(["-qAtc", "select 1", "postgres"]).output().expect("psql").status.success() {
            assert!(began.elapsed() < PATIENCE, "PostgreSQL does not start\n{}", self.log());
            std::thread::sleep(Duration::from_millis(100));
        }
        self
    }

    fn log(&self) -> String {
        fs::read_to_string(self.sockets.join("log")).unwrap_or_default()
    }

    fn sql(&self, text: &str) -> String {
        let output = self.client("psql").args(["-qAt", "-c", text, "postgres"]).output().expect("psql");
        assert!(output.status.success(), "{text}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    /// As a crash of PostgreSQL does it: nothing is written any more.
    pub fn stop_at_once(&mut self) -> bool {
        let Some(mut process) = self.process.take() else { return true };
        let pid = nix::unistd::Pid::from_raw(i32::try_from(process.id()).expect("pid"));
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGQUIT);
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            if process.try_wait().expect("our own child").is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = process.kill();
        false
    }

    /// Rows are inserted and noted until the clients are told to finish.
    pub fn start_clients(&self) -> Clients {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (1..=CLIENTS).map(|client| {
            let mut command = self.client("psql");
            command.args(["-qAt", "-v", "ON_ERROR_STOP=1", "postgres"]);
            let session = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("psql");
            let stop = stop.clone();
            std::thread::spawn(move || insert(session, client * APART, &stop))
        });
        let mut pgbench = self.client("pgbench");
        pgbench.args(["-n", "-c", "2", "-T", "100000", "postgres"]);
        let pgbench = pgbench.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("pgbench");
        Clients { stop: stop.clone(), threads: threads.collect(), pgbench }
    }

    /// Every committed row is there, the books of pgbench balance, and the server saw no error of its disk.
    pub fn check(&self, committed: &[u64], when: &str) {
        let there: BTreeSet<u64> =
            self.sql("select id from kept").lines().map(|line| line.parse().expect("an id")).collect();
        let missing: Vec<_> = committed.iter().filter(|id| !there.contains(id)).collect();
        assert!(missing.is_empty(), "{when}: {} of {} rows are missing: {missing:?}", missing.len(), committed.len());
        let books = "select (select sum(abalance) from pgbench_accounts) = (select coalesce(sum(delta), 0) from \
                     pgbench_history) and (select sum(tbalance) from pgbench_tellers) = (select coalesce(sum(delta), \
                     0) from pgbench_history)";
        assert_eq!(self.sql(books).trim(), "t", "{when}: the books do not balance");
        let log = self.log();
        let bad =
            ["Input/output error", "PANIC", "could not read", "could not write", "could not fsync", "invalid page"];
        let found: Vec<_> = log.lines().filter(|line| bad.iter().any(|word| line.contains(word))).collect();
        assert!(found.is_empty(), "{when}: PostgreSQL says: {found:?}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop_at_once();
    }
}

/// One row per transaction; an id is noted when its commit was answered.
fn insert(mut session: Child, first: u64, stop: &AtomicBool) -> Vec<u64> {
    let mut input = session.stdin.take().expect("piped");
    let mut answers = BufReader::new(session.stdout.take().expect("piped"));
    let mut committed = Vec::new();
    let mut id = first;
    while !stop.load(SeqCst) {
        id += 1;
        // The answer comes after the commit: it is a transaction of its own.
        writeln!(input, "insert into kept values ({id}, repeat('x', 200)) returning id;").expect("psql lives");
        assert_eq!(answer(&mut answers), Some(id), "the insert of {id} failed");
        committed.push(id);
    }
    drop(input);
    session.wait().expect("our own child");
    committed
}

fn answer(answers: &mut BufReader<ChildStdout>) -> Option<u64> {
    let mut line = String::new();
    answers.read_line(&mut line).ok()?;
    line.trim().parse().ok()
}

impl Clients {
    /// The ids of all rows whose commit was answered. Panics if a client saw an error.
    pub fn finish(mut self) -> Vec<u64> {
        self.stop.store(true, SeqCst);
        let ended = self.pgbench.try_wait().expect("our own child");
        let threads = std::mem::take(&mut self.threads);
        let committed = threads.into_iter().flat_map(|thread| thread.join().expect("no error")).collect();
        assert_eq!(ended, None, "pgbench gave up");
        committed
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        let _ = self.pgbench.kill();
        // Its connections may wait for a device that a failed test froze: not waited for then.
        if !std::thread::panicking() {
            let _ = self.pgbench.wait();
        }
    }
}
