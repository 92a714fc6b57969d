//! fio with verification, run after run until it is told to end.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::SeqCst};
use std::thread::JoinHandle;

/// Of one run; every run reads back all it wrote.
const SECONDS: u32 = 15;

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// The process, to end it on the way out of a failed test.
    pid: AtomicI32,
}

/// fio on one device or file.
pub struct Fio {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<u32>>,
}

impl Fio {
    pub fn on_device(device: &Path) -> Self {
        Self::start(device.to_owned(), &["--size=256m", "--bsrange=4k-64k"])
    }

    pub fn on_file(file: &Path) -> Self {
        Self::start(file.to_owned(), &["--size=256m", "--bsrange=4k-32k", "--fdatasync=32"])
    }

    fn start(path: PathBuf, more: &'static [&'static str]) -> Self {
        let shared = Arc::new(Shared::default());
        let working = shared.clone();
        let thread = std::thread::spawn(move || {
            let mut runs = 0;
            while !working.stop.load(SeqCst) {
                run(&path, more, &working);
                runs += 1;
            }
            runs
        });
        Self { shared, thread: Some(thread) }
    }

    /// Waits for the end of the run that is under way; the number of runs. Panics if one failed.
    pub fn finish(mut self) -> u32 {
        self.shared.stop.store(true, SeqCst);
        self.thread.take().expect("runs until now").join().expect("no error")
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        let pid = self.shared.pid.load(SeqCst);
        if self.thread.is_some() && pid > 0 {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

fn run(path: &Path, more: &[&str], shared: &Shared) {
    let child: Child = Command::new("fio")
        .args(["--name=tandem-kills", "--direct=1", "--ioengine=libaio", "--rw=randwrite", "--iodepth=32"])
        .args(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--verify_backlog=512"])
        .args(["--time_based", "--output-format=terse"])
        .arg(format!("--runtime={SECONDS}"))
        .arg(format!("--filename={}", path.display()))
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("fio");
    shared.pid.store(i32::try_from(child.id()).expect("pid"), SeqCst);
    let output = child.wait_with_output().expect("our own child");
    shared.pid.store(0, SeqCst);
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "fio on {}: {}\n{text}", path.display(), output.status);
}
