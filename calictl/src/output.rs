//! What a person sees: lines that survive a closed pipe, errors with their causes, colour only on a terminal.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

/// How much of something is shown, and to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Form {
    /// For people.
    #[value(alias = "ps")]
    Table,
    /// With more columns.
    Wide,
    /// Everything, for programs.
    Json,
}

/// Writes to standard output. A reader that has closed the pipe (`| head`) ends the program quietly.
pub(crate) fn write(text: impl Display) {
    if let Err(error) = write!(io::stdout(), "{text}").and_then(|()| io::stdout().flush()) {
        let code = i32::from(error.kind() != io::ErrorKind::BrokenPipe);
        std::process::exit(code);
    }
}

/// [`write`] with a line end.
pub(crate) fn line(text: impl Display) {
    write(format_args!("{text}\n"));
}

/// Prints an error and its causes on standard error, each cause once.
pub(crate) fn error(error: &anyhow::Error) {
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    // Nothing can be done about a closed standard error.
    let _ = writeln!(io::stderr(), "{} {text}", Style::ERROR.paint("error:"));
}

/// Says on standard error what the person should know, and goes on.
pub(crate) fn warning(text: impl Display) {
    // Nothing can be done about a closed standard error.
    let _ = writeln!(io::stderr(), "{} {text}", Style::WARNING.paint("warning:"));
}

/// A colour, used only where standard error or output is a terminal and `NO_COLOR` is not set.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Style(&'static str);

impl Style {
    pub(crate) const ERROR: Self = Self("1;31");
    pub(crate) const WARNING: Self = Self("1;33");
    pub(crate) const GOOD: Self = Self("32");
    pub(crate) const BAD: Self = Self("31");
    pub(crate) const TITLE: Self = Self("1");
    pub(crate) const DIM: Self = Self("2");

    pub(crate) fn paint(self, text: impl Display) -> String {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        if plain || !io::stdout().is_terminal() {
            text.to_string()
        } else {
            format!("\x1b[{}m{text}\x1b[0m", self.0)
        }
    }
}
