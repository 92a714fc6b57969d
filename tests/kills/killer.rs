//! Kills at random moments, and what an application had to wait for each.

use crate::pulse::Pulse;
use crate::support::diagnosis;
use crate::support::installation::Installation;
use std::fmt;
use std::time::{Duration, Instant};

/// What the issue wants; printed, not asserted: the machine may be busy with other things.
const WANTED: Duration = Duration::from_secs(2);
/// Most milliseconds that everything works before the next kill.
const REST_MS: u64 = 600;
/// One kill of so many strikes while the last one is still recovered from.
const HASTY: u64 = 4;
/// A killed process is back within this or the test fails.
const PATIENCE: Duration = Duration::from_secs(300);

/// How many kills of what.
#[derive(Clone, Copy)]
pub struct Plan {
    pub engine: u32,
    pub server: u32,
    pub csi: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Engine,
    Server,
    Csi,
}

/// Kills the processes of an installation by their ids.
pub struct Killer<'a> {
    tandem: &'a mut Installation,
    pulse: &'a Pulse,
    victims: Vec<Victim>,
    random: u64,
}

/// Stalls by victim.
pub struct Report(Vec<(Victim, Duration)>);

impl<'a> Killer<'a> {
    pub fn new(tandem: &'a mut Installation, pulse: &'a Pulse, plan: Plan) -> Self {
        let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_nanos();
        let mut victims = vec![Victim::Engine; plan.engine as usize];
        victims.extend(vec![Victim::Server; plan.server as usize]);
        victims.extend(vec![Victim::Csi; plan.csi as usize]);
        let mut killer = Self { tandem, pulse, victims: Vec::new(), random: (seed as u64) | 1 };
        for at in (1..victims.len()).rev() {
            victims.swap(at, (killer.next() % (at as u64 + 1)) as usize);
        }
        killer.victims = victims;
        killer
    }

    fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// Kills them all, one after the other.
    pub async fn run(mut self) -> Report {
        let mut stalls = Vec::new();
        self.pulse.longest();
        for victim in std::mem::take(&mut self.victims) {
            match victim {
                Victim::Engine => self.kill("replica").await,
                Victim::Csi => self.kill("csi").await,
                Victim::Server => {
                    self.tandem.kill();
                    self.tandem.start_again().await;
                }
            }
            let is_hasty = self.next().is_multiple_of(HASTY);
            if !is_hasty {
                self.wait_for_an_answer().await;
            }
            tokio::time::sleep(Duration::from_millis(self.next() % REST_MS)).await;
            stalls.push((victim, self.pulse.longest()));
        }
        self.wait_for_an_answer().await;
        Report(stalls)
    }

    /// Until an application that was waiting goes on: what was under way at the kill, and one request more.
    async fn wait_for_an_answer(&mut self) {
        let (began, count) = (Instant::now(), self.pulse.count());
        while self.pulse.count() < count + 2 {
            assert!(!self.pulse.has_ended(), "the pulse met an error: it says above which");
            assert!(!self.tandem.has_ended(), "the server ended by itself");
            if began.elapsed() > PATIENCE {
                // Now: the way out of a failed test ends those that wait.
                diagnosis::print(self.tandem.dir());
                panic!("requests are not answered any more");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn kill(&self, role: &str) {
        let pid = self.wait_for(role).await;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).expect("ours");
    }

    /// The process, which may be on its way back from the last kill.
    async fn wait_for(&self, role: &str) -> i32 {
        let began = Instant::now();
        loop {
            if let Some(pid) = self.tandem.pids(role).first() {
                return *pid;
            }
            assert!(began.elapsed() < PATIENCE, "the {role} process does not come back");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for victim in [Victim::Engine, Victim::Server, Victim::Csi] {
            let mut stalls: Vec<_> = self.0.iter().filter(|(v, _)| *v == victim).map(|(_, stall)| *stall).collect();
            stalls.sort_unstable();
            let (Some(longest), Some(middle)) = (stalls.last(), stalls.get(stalls.len() / 2)) else { continue };
            let long = stalls.iter().filter(|stall| **stall > WANTED).count();
            let kills = stalls.len();
            writeln!(
                f,
                "{kills} kills of {victim:?}: stall median {} ms, longest {} ms, {long} longer than {WANTED:?}",
                middle.as_millis(),
                longest.as_millis(),
            )?;
        }
        write!(f, "{} kills altogether", self.0.len())
    }
}
