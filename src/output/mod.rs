//! From typed answers to what is printed.

pub(crate) mod json;
pub(crate) mod metrics;
pub(crate) mod status;
pub(crate) mod text;
pub(crate) mod units;

/// The columns of the terminal that standard output is, or what COLUMNS says; `None` where there is no end to lines.
pub(crate) fn screen_width() -> Option<usize> {
    let said = std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok());
    let asked = || rustix::termios::tcgetwinsize(std::io::stdout()).ok().map(|size| size.ws_col.into());
    said.or_else(asked).filter(|columns| *columns > 0)
}
