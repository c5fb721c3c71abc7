//! The screen of `top`, and its plain form for what is no terminal.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Cell, Paragraph, Row as Cells, Table};

use super::model::{Model, Row, State};
use crate::bgp::age;
use crate::bgp_table::table;

const HEADER: [&str; 9] = [
    "NODE",
    "STATE",
    "VERSION",
    "UPTIME",
    "SESSIONS",
    "ENDPOINTS",
    "ROUTES",
    "DENIED",
    "POLICY p50 / p99",
];
const STATE: usize = 1;
const VERSION: usize = 2;
const UPTIME: usize = 3;
/// With a blank between two columns, 99 cells.
const WIDTHS: [Constraint; 9] = [
    Constraint::Min(12),
    Constraint::Length(9),
    Constraint::Length(9),
    Constraint::Length(8),
    Constraint::Length(9),
    Constraint::Length(9),
    Constraint::Length(7),
    Constraint::Length(11),
    Constraint::Length(17),
];
/// Lines of the list of troubles, with its border.
const TROUBLES: u16 = 9;

pub(super) fn draw(frame: &mut Frame<'_>, model: &Model, now: u64, colour: bool) {
    let rows = model.rows(now);
    let troubles = troubles(&rows);
    let wanted = u16::try_from(troubles.len() + 1).unwrap_or(TROUBLES);
    let [head, nodes, below, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Min(3),
        Constraint::Length(if troubles.is_empty() {
            0
        } else {
            wanted.min(TROUBLES)
        }),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(Paragraph::new(summary(&rows)).style(bold()), head);
    let columns = columns(frame.area().width);
    let shown = rows.iter().skip(model.first).map(|row| {
        let cells = cells(row);
        Cells::new(columns.iter().map(|column| {
            let cell = Cell::from(cells[*column].clone());
            match *column {
                STATE => cell.style(style(row.state, colour)),
                _ => cell,
            }
        }))
    });
    let heading = Cells::new(columns.iter().map(|column| HEADER[*column]))
        .style(Style::new().add_modifier(Modifier::DIM));
    frame.render_widget(
        Table::new(shown, columns.iter().map(|column| WIDTHS[*column]))
            .header(heading)
            .block(Block::new().borders(Borders::TOP)),
        nodes,
    );
    let lines: Vec<Line<'_>> = troubles
        .iter()
        .map(|(name, text)| {
            Line::from(vec![
                Span::styled(format!("{name}  "), bold()),
                Span::raw(text.as_str()),
            ])
        })
        .collect();
    let title = Block::new().borders(Borders::TOP).title("Troubles");
    frame.render_widget(Paragraph::new(lines).block(title), below);
    let help = format!(
        "q quit   s sort (by {})   up/down scroll",
        model.order.as_str()
    );
    frame.render_widget(
        Paragraph::new(help).style(Style::new().add_modifier(Modifier::DIM)),
        foot,
    );
}

/// The columns that fit: on a narrow screen those go that say least about trouble.
fn columns(width: u16) -> Vec<usize> {
    let left_out: &[usize] = match width {
        99.. => &[],
        89.. => &[VERSION],
        _ => &[VERSION, UPTIME],
    };
    (0..HEADER.len())
        .filter(|column| !left_out.contains(column))
        .collect()
}

/// The same as text.
pub(super) fn plain(model: &Model, now: u64) -> String {
    let rows = model.rows(now);
    let lines: Vec<[String; 9]> = rows.iter().map(cells).collect();
    let mut text = format!("{}\n{}", summary(&rows), table(&HEADER, &lines));
    for (name, trouble) in troubles(&rows) {
        text.push_str(&format!("{name}: {trouble}\n"));
    }
    text
}

fn bold() -> Style {
    Style::new().add_modifier(Modifier::BOLD)
}

fn style(state: State, colour: bool) -> Style {
    if !colour {
        return Style::new();
    }
    Style::new().fg(match state {
        State::Ready => Color::Green,
        State::NotReady => Color::Yellow,
        State::Silent => Color::Red,
        State::Asked => Color::Gray,
    })
}

fn summary(rows: &[Row]) -> String {
    let count = |state| rows.iter().filter(|row| row.state == state).count();
    let silent = count(State::Silent) + count(State::Asked);
    let (up, all) = rows
        .iter()
        .filter_map(|row| row.sessions)
        .fold((0, 0), |(up, all), row| (up + row.0, all + row.1));
    let denied: f64 = rows.iter().filter_map(|row| row.denied.0).sum();
    let mut text = format!(
        "{} of {} nodes report, {} ready · {up} of {all} sessions up",
        rows.len() - silent,
        rows.len(),
        count(State::Ready),
    );
    if rows.iter().any(|row| row.denied.0.is_some()) {
        text.push_str(&format!(" · {denied:.1} packets/s denied"));
    }
    let slowest = rows
        .iter()
        .filter_map(|row| row.latency)
        .map(|[_, most]| most)
        .max_by(f64::total_cmp);
    if let Some(slowest) = slowest {
        text.push_str(&format!(" · policy in {} at most", ms(slowest)));
    }
    text
}

fn cells(row: &Row) -> [String; 9] {
    let dash = || "-".to_owned();
    let known = row.up.is_some();
    let number = |number: u64| if known { number.to_string() } else { dash() };
    [
        row.name.clone(),
        match row.state {
            State::Ready => "ready",
            State::NotReady => "not ready",
            State::Silent => "silent",
            State::Asked => "asked",
        }
        .to_owned(),
        if row.version.is_empty() {
            dash()
        } else {
            row.version.clone()
        },
        row.up.map_or_else(dash, |up| age(0, up)),
        row.sessions
            .map_or_else(dash, |(up, all)| format!("{up} of {all}")),
        number(row.endpoints),
        number(row.routes),
        match row.denied {
            (Some(rate), _) => format!("{rate:.1}/s"),
            (None, Some(all)) => all.to_string(),
            (None, None) => dash(),
        },
        row.latency
            .map_or_else(dash, |[half, most]| format!("{} / {}", ms(half), ms(most))),
    ]
}

fn ms(milliseconds: f64) -> String {
    if milliseconds < 1000.0 {
        format!("{milliseconds:.0} ms")
    } else {
        format!("{:.1} s", milliseconds / 1000.0)
    }
}

/// Node and what is wrong there.
fn troubles(rows: &[Row]) -> Vec<(String, String)> {
    rows.iter()
        .flat_map(|row| {
            row.troubles
                .iter()
                .map(|trouble| (row.name.clone(), trouble.clone()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::model::tests::sample;
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    #[test]
    fn a_screen_shows_every_node_and_its_troubles() {
        let mut terminal = Terminal::new(TestBackend::new(110, 14)).expect("a terminal");
        let model = sample();
        terminal
            .draw(|frame| draw(frame, &model, 4604, true))
            .expect("drawn");
        insta::assert_snapshot!(terminal.backend());
    }

    #[test]
    fn a_screen_of_eighty_columns_cuts_nothing_that_says_what_is_wrong() {
        let mut terminal = Terminal::new(TestBackend::new(80, 14)).expect("a terminal");
        let model = sample();
        terminal
            .draw(|frame| draw(frame, &model, 4604, false))
            .expect("drawn");
        insta::assert_snapshot!(terminal.backend());
    }

    #[test]
    fn a_small_screen_is_no_reason_to_fail() {
        for (width, height) in [(1, 1), (20, 3), (60, 6)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
            let model = sample();
            terminal
                .draw(|frame| draw(frame, &model, 4604, false))
                .expect("drawn");
        }
    }

    #[test]
    fn a_pipe_gets_the_same_as_text() {
        insta::assert_snapshot!(plain(&sample(), 4604));
    }
}
