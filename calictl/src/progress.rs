//! A line on the terminal while something takes long: what is being done, and how far it is.
//!
//! Only on standard error, and only where that is a terminal: a pipe or a file sees nothing of it. It is gone when the work is
//! done, also when that fails, and before anything else is printed. It has no colour, so that `NO_COLOR` has nothing to forbid.

use std::io::{IsTerminal, stderr};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Shorter work shows nothing: it would only flicker.
const AFTER: Duration = Duration::from_millis(250);
/// How often the time that has passed is drawn anew.
const TICK: Duration = Duration::from_millis(100);

/// Work under way. Its line goes when it is dropped.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    /// Whoever draws, until the sender is gone.
    drawn: Option<(mpsc::Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    /// Work of so many steps.
    pub(crate) fn of(steps: usize, what: impl Into<String>) -> Self {
        let line = "{msg} [{bar:30}] {human_pos} of {human_len}, {elapsed}";
        Self::new(ProgressBar::new(steps as u64), line, what.into())
    }

    /// Work whose length shows only at its end.
    pub(crate) fn open_ended(what: impl Into<String>) -> Self {
        Self::new(
            ProgressBar::no_length(),
            "{spinner} {msg}, {elapsed}",
            what.into(),
        )
    }

    fn new(bar: ProgressBar, line: &str, what: String) -> Self {
        bar.set_draw_target(ProgressDrawTarget::hidden());
        if let Ok(style) = ProgressStyle::with_template(line) {
            bar.set_style(style.progress_chars("=> ").tick_chars("|/-\\ "));
        }
        bar.set_message(what);
        let drawn = stderr().is_terminal().then(|| {
            let (sender, ended) = mpsc::channel();
            let bar = bar.clone();
            (sender, std::thread::spawn(move || draw(&bar, &ended)))
        });
        Self { bar, drawn }
    }

    /// A step is done.
    pub(crate) fn step(&self) {
        self.bar.inc(1);
    }

    /// What is being done now.
    pub(crate) fn now(&self, what: impl Into<String>) {
        self.bar.set_message(what.into());
    }
}

/// Draws until the work has ended, and takes the line away.
fn draw(bar: &ProgressBar, ended: &mpsc::Receiver<()>) {
    if ended.recv_timeout(AFTER) != Err(RecvTimeoutError::Timeout) {
        return;
    }
    bar.set_draw_target(ProgressDrawTarget::stderr());
    loop {
        bar.tick();
        if ended.recv_timeout(TICK) != Err(RecvTimeoutError::Timeout) {
            break;
        }
    }
    bar.finish_and_clear();
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((sender, drawn)) = self.drawn.take() {
            drop(sender);
            // It cannot have panicked in a way that matters: nothing of the work is in it.
            let _ = drawn.join();
        }
    }
}
