//! `tandem holder`: the process that keeps device descriptors while everything else may die.

use crate::replica::holder::{HolderError, run, run_successor};
use std::path::PathBuf;

/// Keep devices alive while the engine is away; the engine starts it by itself.
///
/// It ends when it holds nothing and no engine is connected, and ignores SIGTERM before that.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Socket on which the engine finds it: DIR/holder.sock.
    #[arg(long, env = "TANDEM_HOLDER_SOCKET", value_name = "PATH")]
    socket: PathBuf,
    /// Take everything over from the holder that runs there, which then ends: how a holder is upgraded.
    #[arg(long, env = "TANDEM_SUCCESSOR")]
    successor: bool,
}

pub fn hold(arguments: Arguments) -> Result<(), HolderError> {
    if arguments.successor { run_successor(&arguments.socket) } else { run(&arguments.socket) }
}
