//! The command line: what an operator types, and the processes that `standalone` starts.
//!
//! Operator commands hold no state and open no disk: they ask the two processes of a running installation over the
//! sockets in its directory. CSI things go through the CSI socket, so that a person gets what Kubernetes would get.

mod certificates;
mod client;
mod completions;
mod copies;
mod holder;
mod mirror;
mod node;
mod nodes;
mod output;
mod pool;
mod process;
mod promote;
mod recover;
mod role;
mod snapshot;
mod status;
pub mod units;
mod verify;
mod volume;

pub use client::{Target, volumes_in_use};
pub use output::Format;

use crate::standalone;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Storage for Kubernetes: a CSI driver that makes block volumes out of local disks and outlives its own software.
///
/// Start a server with `tandem standalone --dir DIR`, then make a volume and mount it:
///
///   tandem volume create data --size 10Gi
///
///   tandem volume stage data /mnt/staging
///
///   tandem volume publish data /mnt/data --staging /mnt/staging
#[derive(Debug, Parser)]
#[command(name = "tandem", version, max_term_width = 110, disable_help_subcommand = true)]
pub struct Arguments {
    /// What the processes write to stderr: a level, or filters such as info,tandem::replica=debug.
    #[arg(
        long,
        global = true,
        env = "RUST_LOG",
        default_value = "info",
        value_name = "FILTER",
        hide_short_help = true
    )]
    log: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Standalone(standalone::Arguments),
    Status(status::Arguments),
    #[command(subcommand)]
    Volume(volume::Command),
    #[command(subcommand)]
    Snapshot(snapshot::Command),
    #[command(subcommand)]
    Pool(pool::Command),
    Verify(verify::Arguments),
    #[command(subcommand)]
    Certificates(certificates::Command),
    #[command(hide = true)]
    Holder(holder::Arguments),
    Recover(recover::Arguments),
    Promote(promote::Arguments),
    Completions(completions::Arguments),
    #[command(flatten)]
    Process(process::Command),
}

/// Why a command did not do what was asked. Each text ends in what to do.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Nobody listens.
    #[error(
        "nobody answers on {socket}: is `tandem standalone` running for this directory (--dir or TANDEM_DIR)? ({reason})"
    )]
    Unreachable {
        /// Path of the socket.
        socket: String,
        /// What the system said.
        reason: String,
    },
    /// The server said no.
    #[error("{doing}: {answer}")]
    Refused {
        /// What was asked, with the name of the thing.
        doing: String,
        /// The server's own sentence.
        answer: String,
    },
    /// A name that is none.
    #[error("there is no {kind} `{name}`: `tandem {kind} list` shows what there is")]
    Unknown {
        /// volume, snapshot, pool.
        kind: &'static str,
        /// As it was typed.
        name: String,
    },
    /// A name that several things have.
    #[error("`{name}` names several {kind}s ({ids}): use an id")]
    Ambiguous {
        /// volume or snapshot.
        kind: &'static str,
        /// As it was typed.
        name: String,
        /// The candidates.
        ids: String,
    },
    /// Verify found damage. What it found has been printed.
    #[error("{0} problems found: restore what is damaged from a snapshot or a backup")]
    Damaged(u64),
    /// Copies are not the same. Where has been printed.
    #[error(
        "{0} differ between the copies: `tandem snapshot create` and then `tandem verify` on each of the nodes names blocks that \
         have changed on disk; promote the copy that is right, then `tandem volume resync` makes the other one equal to it"
    )]
    Differ(String),
    /// A directory that must exist could not be made.
    #[error("cannot make the directory {path}: {source}")]
    Directory {
        /// The path.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The server itself.
    #[error(transparent)]
    Standalone(#[from] standalone::StandaloneError),
    /// The engine process.
    #[error(transparent)]
    Replica(#[from] crate::replica::RunError),
    /// A pool that cannot have this name.
    #[error(transparent)]
    PoolName(crate::replica::pool::BadPoolName),
    /// The CSI process.
    #[error(transparent)]
    Csi(#[from] crate::csi::ServeError),
    /// The holder process.
    #[error(transparent)]
    Holder(#[from] crate::replica::holder::HolderError),
    /// A predecessor of a process that does not end.
    #[error(transparent)]
    Lock(#[from] standalone::LockError),
    /// A certificate.
    #[error(transparent)]
    Certificate(#[from] crate::tls::IssueError),
    /// A directory of certificates.
    #[error(transparent)]
    Credentials(#[from] crate::tls::CredentialsError),
    /// Flags or facts that do not go together.
    #[error("{0}")]
    Together(String),
    /// The machine lacks something.
    #[error(transparent)]
    Check(#[from] standalone::CheckError),
    /// The terminal or pipe went away.
    #[error("cannot write the answer: {0}")]
    Output(std::io::Error),
    /// No runtime: out of threads or descriptors.
    #[error("cannot start: {0}")]
    Runtime(std::io::Error),
}

/// Reads the command line, does it, says in one sentence why not. Exit code 1 for a refusal, 2 for wrong usage.
pub fn main() -> ExitCode {
    let Arguments { log, command } = Arguments::parse();
    match run(&log, command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tandem: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(log: &str, command: Command) -> Result<(), CliError> {
    match command {
        // No log and no runtime: it has one thread, which must be the one that takes the signals.
        Command::Holder(arguments) => {
            crate::logging::start(log, "holder");
            holder::hold(arguments).map_err(CliError::from)
        }
        Command::Standalone(arguments) => {
            crate::logging::start(log, "standalone");
            // One thread: the children's parent-death signal is bound to the thread that starts them.
            block_on(async { standalone::run(arguments, log).await.map_err(CliError::from) })
        }
        Command::Recover(arguments) => {
            crate::logging::start(log, "recover");
            block_on(recover::run(arguments, log))
        }
        Command::Promote(arguments) => block_on(promote::run(arguments)),
        Command::Process(command) => process::run(command, log),
        Command::Certificates(command) => certificates::run(command),
        Command::Completions(arguments) => completions::run(arguments),
        Command::Status(arguments) => block_on(status::run(arguments)),
        Command::Volume(command) => block_on(volume::run(command)),
        Command::Snapshot(command) => block_on(snapshot::run(command)),
        Command::Pool(command) => block_on(pool::run(command)),
        Command::Verify(arguments) => block_on(verify::run(arguments)),
    }
}

fn block_on(work: impl Future<Output = Result<(), CliError>>) -> Result<(), CliError> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::Runtime)?.block_on(work)
}

#[cfg(test)]
mod tests;
