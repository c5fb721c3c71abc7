//! `calictl top`: the cluster's nodes on one screen, renewed as they report: sessions, denied packets, how long a change of
//! policy takes. [`model`] keeps what was reported, [`draw`] paints it; only this file has a terminal and a datastore.
//!
//! Each node is asked for a report every few seconds by a CalicoNodeStatus that is deleted at the end (see `node::reports`).

mod draw;
mod model;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use cali_control::status::ReportQuery;
use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use tokio::sync::mpsc;

use crate::node::reports::{self, Answer, Feed};
use crate::{connection, output};
use model::Model;

#[derive(Debug, Args)]
pub(crate) struct Top {
    /// Only this node (repeatable)
    #[arg(long, value_name = "NAME")]
    node: Vec<String>,
    /// Seconds between two reports of a node
    #[arg(long, value_name = "SECONDS", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=3600))]
    interval: u32,
    /// Print what is reported now, and end; so it is where standard output is no terminal
    #[arg(long)]
    once: bool,
    /// How long the nodes may take to answer with --once, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    timeout: u64,
}

/// Between two looks at the keyboard.
const KEYS: Duration = Duration::from_millis(100);

pub(crate) async fn run(top: &Top) -> Result<ExitCode> {
    let store = connection::open().await?;
    let nodes = reports::names(store.as_ref(), &top.node).await?;
    let mut model = Model::of(
        &nodes,
        Duration::from_secs(top.interval.into()),
        crate::node::now()?,
    );
    if top.once || !std::io::stdout().is_terminal() {
        let limit = cali_lab::patient(Duration::from_secs(top.timeout.max(1)));
        let now = crate::node::now()?;
        for (node, answer) in reports::ask(&store, &nodes, &ReportQuery::default(), limit).await? {
            match answer {
                Answer::Report(report) => model.on_report(&node, *report, now),
                Answer::Silent(reason) => model.on_silence(&node, reason),
                Answer::Standing(_) => {}
            }
        }
        output::write(draw::plain(&model, crate::node::now()?));
        return Ok(ExitCode::SUCCESS);
    }
    let mut feed = Feed::start(store, &nodes, top.interval).await;
    for (node, reason) in feed.refused() {
        model.on_silence(node, reason.clone());
    }
    let mut terminal = ratatui::try_init().context("cannot draw on this terminal")?;
    let shown = show(&mut terminal, &mut feed, &mut model).await;
    ratatui::restore();
    // Whatever happened: nobody reads the reports any more.
    feed.end().await;
    shown.map(|()| ExitCode::SUCCESS)
}

/// Draws until `q`, or until the datastore tells nothing any more.
async fn show(
    terminal: &mut ratatui::DefaultTerminal,
    feed: &mut Feed,
    model: &mut Model,
) -> Result<()> {
    let mut keys = keyboard();
    let colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    loop {
        let now = crate::node::now()?;
        terminal
            .draw(|frame| draw::draw(frame, model, now, colour))
            .context("cannot draw")?;
        tokio::select! {
            reported = feed.next() => {
                let reported = reported.context("the datastore's stream of changes ended")?;
                for (node, report) in reported {
                    model.on_report(&node, report, crate::node::now()?);
                }
            }
            key = keys.recv() => match key {
                None | Some(Key::Quit) => return Ok(()),
                Some(Key::Sort) => model.sort_otherwise(),
                Some(Key::Move(by)) => model.scroll(by),
                Some(Key::Redraw) => {}
            },
            _ = tick.tick() => {}
        }
    }
}

/// What a person wants of the screen.
enum Key {
    Quit,
    Sort,
    Move(isize),
    Redraw,
}

/// Keys from a thread of their own, which ends when nobody listens.
fn keyboard() -> mpsc::Receiver<Key> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::spawn(move || {
        while !sender.is_closed() {
            let event = match event::poll(KEYS) {
                Ok(false) => continue,
                Ok(true) => event::read(),
                Err(error) => Err(error),
            };
            // A terminal that has gone away ends the program: nobody can quit it any more.
            let Ok(event) = event else { return };
            if let Some(key) = meaning(&event)
                && sender.blocking_send(key).is_err()
            {
                return;
            }
        }
    });
    receiver
}

fn meaning(event: &Event) -> Option<Key> {
    let key = match event {
        Event::Resize(..) => return Some(Key::Redraw),
        Event::Key(key) if key.kind == KeyEventKind::Press => key,
        _ => return None,
    };
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    Some(match key.code {
        KeyCode::Char('c' | 'd') if control => Key::Quit,
        KeyCode::Char('q') | KeyCode::Esc => Key::Quit,
        KeyCode::Char('s') => Key::Sort,
        KeyCode::Char('k') | KeyCode::Up => Key::Move(-1),
        KeyCode::Char('j') | KeyCode::Down => Key::Move(1),
        KeyCode::PageUp => Key::Move(-20),
        KeyCode::PageDown => Key::Move(20),
        _ => return None,
    })
}
