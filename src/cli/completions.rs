//! `tandem completions`: the completion script of a shell, on stdout.

use super::{Arguments as Program, CliError};
use clap::CommandFactory;
use std::io::Write;

/// Print the completion script of a shell.
///
/// For bash: tandem completions bash > /etc/bash_completion.d/tandem
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The shell.
    shell: clap_complete::Shell,
}

pub fn run(Arguments { shell }: Arguments) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Program::command(), "tandem", &mut script);
    std::io::stdout().write_all(&script).map_err(CliError::Output)
}
