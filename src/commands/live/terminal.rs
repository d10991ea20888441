//! The terminal: another screen while the view is there, and as it was before at the end, however that comes.

use std::io::{self, Stdout, Write};

use crossterm::cursor::{Hide, MoveTo, Show};
use crossterm::style::{Attribute, Color, Print, SetAttribute, SetForegroundColor};
use crossterm::terminal::{self, Clear, ClearType, EnterAlternateScreen, LeaveAlternateScreen};
use crossterm::{execute, queue};

use super::view::{Line, Tone};

/// Put back as it was when this goes, and at a panic.
pub(super) struct Terminal {
    out: Stdout,
    has_color: bool,
    shown: Vec<Line>,
    size: (usize, usize),
}

impl Terminal {
    pub(super) fn take(has_color: bool) -> io::Result<Terminal> {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            give_back();
            before(info);
        }));
        terminal::enable_raw_mode()?;
        let mut out = io::stdout();
        if let Err(err) = execute!(out, EnterAlternateScreen, Hide) {
            give_back();
            return Err(err);
        }
        Ok(Terminal { out, has_color, shown: Vec::new(), size: (0, 0) })
    }

    /// Columns and lines.
    pub(super) fn size() -> (usize, usize) {
        terminal::size().map_or((80, 24), |(columns, lines)| (columns.into(), lines.into()))
    }

    /// Writes the lines that differ from those that are shown.
    pub(super) fn show(&mut self, lines: Vec<Line>, size: (usize, usize)) -> io::Result<()> {
        if size != self.size {
            self.shown.clear();
            self.size = size;
            queue!(self.out, Clear(ClearType::All))?;
        }
        for (at, line) in lines.iter().enumerate().take(size.1) {
            if self.shown.get(at) == Some(line) {
                continue;
            }
            queue!(self.out, MoveTo(0, at as u16))?;
            for (text, tone) in line {
                self.tone(*tone)?;
                queue!(self.out, Print(text))?;
                if *tone != Tone::Plain {
                    queue!(self.out, SetAttribute(Attribute::Reset))?;
                }
            }
            queue!(self.out, Clear(ClearType::UntilNewLine))?;
        }
        self.shown = lines;
        self.out.flush()
    }

    fn tone(&mut self, tone: Tone) -> io::Result<()> {
        let color = match tone {
            Tone::Plain => return Ok(()),
            Tone::Bold => return queue!(self.out, SetAttribute(Attribute::Bold)),
            Tone::Dim => return queue!(self.out, SetAttribute(Attribute::Dim)),
            Tone::Good => Color::DarkGreen,
            Tone::Warn => Color::DarkYellow,
            Tone::Bad => Color::DarkRed,
        };
        if self.has_color { queue!(self.out, SetForegroundColor(color)) } else { Ok(()) }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        give_back();
    }
}

/// A terminal that is gone takes nothing any more.
fn give_back() {
    let _ = execute!(io::stdout(), LeaveAlternateScreen, Show);
    let _ = terminal::disable_raw_mode();
}
