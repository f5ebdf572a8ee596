//! The live table.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Alignment, Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line as Text, Span};
use ratatui::widgets::{Cell, Paragraph, Row, Table};
use ratatui::{DefaultTerminal, Frame};

use super::{HEADER, KEY_POLL, Line};

/// Columns of names; those after them are numbers.
const NAMES: usize = 3;

/// Shows what `look` finds, anew each `interval`, until q, Esc or Ctrl-C.
pub(super) fn show(interval: Duration, look: impl FnMut() -> Result<Vec<Line>>) -> Result<()> {
    ensure!(
        std::io::stdout().is_terminal(),
        "stdout is no terminal; use --once for a table as text"
    );
    let mut terminal = ratatui::try_init().context("cannot use this terminal")?;
    let outcome = live(&mut terminal, interval, look);
    // The terminal's own settings come back even after an error.
    ratatui::restore();
    outcome
}

fn live(
    terminal: &mut DefaultTerminal,
    interval: Duration,
    mut look: impl FnMut() -> Result<Vec<Line>>,
) -> Result<()> {
    loop {
        let lines = look()?;
        let next = Instant::now() + interval;
        terminal.draw(|frame| draw(frame, &lines, interval)).context("cannot draw")?;
        while Instant::now() < next {
            let wait = KEY_POLL.min(next.saturating_duration_since(Instant::now()));
            if !event::poll(wait).context("cannot read the keyboard")? {
                continue;
            }
            match event::read().context("cannot read the keyboard")? {
                Event::Key(key) if key.kind == KeyEventKind::Press => {
                    let control = key.modifiers.contains(KeyModifiers::CONTROL);
                    match key.code {
                        KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                        KeyCode::Char('c') if control => return Ok(()),
                        _ => {}
                    }
                }
                Event::Resize(..) => {
                    terminal.draw(|frame| draw(frame, &lines, interval)).context("cannot draw")?;
                }
                _ => {}
            }
        }
    }
}

fn draw(frame: &mut Frame<'_>, lines: &[Line], interval: Duration) {
    let areas = Layout::vertical([Constraint::Min(1), Constraint::Length(1)]).split(frame.area());
    let right = |text: &str| Cell::from(Text::from(text.to_owned()).alignment(Alignment::Right));
    let cell = |(column, text): (usize, &str)| {
        if column < NAMES { Cell::from(text.to_owned()) } else { right(text) }
    };
    let bold = Style::default().add_modifier(Modifier::BOLD | Modifier::REVERSED);
    let header = Row::new(HEADER.iter().copied().enumerate().map(cell)).style(bold);
    let rows = lines.iter().map(|line| {
        let style = if line.down {
            Style::default().fg(Color::Red)
        } else if line.cells[HEADER.len() - 1].parse::<u64>().is_ok_and(|drops| drops > 0) {
            Style::default().fg(Color::Yellow)
        } else {
            Style::default()
        };
        Row::new(line.cells.iter().map(String::as_str).enumerate().map(cell)).style(style)
    });
    let widths = (0..HEADER.len()).map(|column| {
        let longest = lines.iter().map(|line| line.cells[column].chars().count()).max();
        let width = longest.unwrap_or(0).max(HEADER[column].len());
        Constraint::Length(u16::try_from(width).unwrap_or(u16::MAX))
    });
    frame.render_widget(Table::new(rows, widths).header(header).column_spacing(2), areas[0]);
    let help = if lines.is_empty() {
        "no pod runs; start one with `outboard run POD.toml`.  q: leave".to_owned()
    } else {
        format!("every {interval:?}.  q: leave")
    };
    frame.render_widget(Paragraph::new(Span::raw(help)), areas[1]);
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;

    fn screen(lines: &[Line]) -> String {
        let mut terminal = Terminal::new(TestBackend::new(100, 4)).unwrap();
        terminal.draw(|frame| draw(frame, lines, Duration::from_secs(1))).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn the_screen_shows_each_device() {
        let cells = ["web", "root", "blk", "1.0K/s", "2B/s", "7", "65us", "1ms", "0.5", "0"];
        let text = screen(&[Line { cells: cells.map(str::to_owned), down: false }]);
        for part in HEADER.into_iter().chain(cells) {
            assert!(text.contains(part), "no {part}:\n{text}");
        }
    }

    #[test]
    fn an_empty_screen_says_what_to_do() {
        let text = screen(&[]);
        assert!(text.contains("no pod runs"), "{text}");
    }
}
