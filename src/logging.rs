//! Log lines of all processes on one stderr: each begins with the role and the pid of its process.

use std::io::{self, Write};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Starts logging of this process. A filter that cannot be read is said once, and `info` holds.
pub fn start(filter: &str, role: &'static str) {
    let parsed = EnvFilter::try_new(filter);
    let failed = parsed.as_ref().err().map(ToString::to_string);
    let filter = parsed.unwrap_or_else(|_| EnvFilter::new("info"));
    let writer = Prefixed { prefix: format!("{role}[{}] ", std::process::id()) };
    tracing_subscriber::fmt()
        .compact()
        .with_ansi(false)
        .with_target(false)
        .with_env_filter(filter)
        .with_writer(writer)
        .init();
    if let Some(reason) = failed {
        tracing::warn!("the log filter cannot be read, so it is `info`: {reason}");
    }
}

struct Prefixed {
    prefix: String,
}

struct Line<'a> {
    prefix: &'a str,
}

impl<'a> MakeWriter<'a> for Prefixed {
    type Writer = Line<'a>;
    fn make_writer(&'a self) -> Line<'a> {
        Line { prefix: &self.prefix }
    }
}

impl Write for Line<'_> {
    /// One call per event, so one line of several processes is never torn by another.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let line = [self.prefix.as_bytes(), event].concat();
        io::stderr().lock().write_all(&line)?;
        Ok(event.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
