//! Threads that the process is no use without: when one panics, the process ends at once and the next one goes on.
//!
//! A panic ends only its thread. An engine process without its engine would look alive, answer calls, and leave every
//! device standing still for ever; one that dies is started again within moments, and no request is lost.

/// Keep it as the first local of such a thread: it is dropped before what the thread owns, which may wait for the disk.
pub(crate) struct EndsProcess(pub &'static str);

impl Drop for EndsProcess {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("thread {} panicked: the process ends, and devices stand still until the next one", self.0);
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    const PANICS: &str = "TANDEM_TEST_PANICS";

    fn panic_in_a_thread() {
        let work = || {
            let _fatal = EndsProcess("test");
            panic!("wanted");
        };
        let ended = std::thread::spawn(work).join();
        panic!("the process lives: {ended:?}");
    }

    #[test]
    fn a_panic_of_such_a_thread_ends_the_process() {
        if std::env::var_os(PANICS).is_some() {
            return panic_in_a_thread();
        }
        let name = "replica::fatal::tests::a_panic_of_such_a_thread_ends_the_process";
        let mut again = Command::new(std::env::current_exe().expect("this program"));
        again.args(["--exact", name]).env(PANICS, "1").stdout(Stdio::null()).stderr(Stdio::null());
        let status = again.status().expect("this program");
        assert_eq!(status.signal(), Some(nix::libc::SIGABRT), "{status}");
    }
}
