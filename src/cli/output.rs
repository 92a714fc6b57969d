//! Answers as a table for people or as JSON for scripts.

use super::CliError;
use serde::Serialize;
use std::io::Write;

/// How an answer is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Columns for people.
    #[default]
    Table,
    /// Every field, for scripts; sizes in bytes.
    Json,
}

/// The format option, the same on every command that answers something.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Output {
    /// How to write the answer.
    #[arg(short = 'o', long = "output", env = "TANDEM_OUTPUT", value_enum, default_value_t, value_name = "FORMAT")]
    pub format: Format,
}

/// One row of a table.
pub trait Row {
    /// Titles of the columns.
    const TITLES: &'static [&'static str];
    /// The cells, as many as there are titles.
    fn cells(&self) -> Vec<String>;
}

impl Output {
    /// Writes a list.
    pub fn rows<T: Row + Serialize>(self, rows: &[T]) -> Result<(), CliError> {
        match self.format {
            Format::Table => write(&table(T::TITLES, &rows.iter().map(Row::cells).collect::<Vec<_>>())),
            Format::Json => json(rows),
        }
    }
    /// Writes one thing: `lines` for people.
    pub fn one<T: Serialize>(self, thing: &T, lines: &[(&str, String)]) -> Result<(), CliError> {
        match self.format {
            Format::Table => {
                let width = lines.iter().map(|(title, _)| title.len()).max().unwrap_or(0) + 2;
                write(&lines.iter().map(|(title, value)| format!("{title:width$}{value}\n")).collect::<String>())
            }
            Format::Json => json(thing),
        }
    }
    /// Writes what was done for scripts; people hear of it only if it fails.
    pub fn silent<T: Serialize>(self, thing: &T) -> Result<(), CliError> {
        match self.format {
            Format::Table => Ok(()),
            Format::Json => json(thing),
        }
    }
    /// Writes what happened: a sentence for people, the thing itself for scripts.
    pub fn done<T: Serialize>(self, thing: &T, sentence: &str) -> Result<(), CliError> {
        match self.format {
            Format::Table => write(&format!("{sentence}\n")),
            Format::Json => json(thing),
        }
    }
}

fn json<T: Serialize + ?Sized>(thing: &T) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(thing).map_err(|e| CliError::Output(e.into()))?;
    write(&format!("{text}\n"))
}

/// A reader that has seen enough (`| head`) is no error.
fn write(text: &str) -> Result<(), CliError> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(CliError::Output(error)),
        _ => Ok(()),
    }
}

fn table(titles: &[&str], rows: &[Vec<String>]) -> String {
    let length = |text: &str| text.chars().count();
    let width =
        |column: usize| rows.iter().map(|r| length(&r[column])).chain([length(titles[column])]).max().unwrap_or(0);
    let widths: Vec<usize> = (0..titles.len()).map(width).collect();
    let titles: Vec<String> = titles.iter().map(|t| t.to_string()).collect();
    let mut text = String::new();
    for row in std::iter::once(&titles).chain(rows) {
        let line: String = row.iter().zip(&widths).map(|(c, w)| format!("{c:w$}  ", w = *w)).collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = vec![vec!["ä".to_string(), "10 GiB".to_string()], vec!["longer".into(), "".into()]];
        assert_eq!(table(&["NAME", "SIZE"], &rows), "NAME    SIZE\nä       10 GiB\nlonger\n");
    }
}
