//! `metrics`: the counters for Prometheus: printed, in a file, or served.

mod server;

use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::cli::MetricsArgs;
use crate::output::metrics;
use crate::session::counted::{self, Known};
use crate::session::engine::{Context, Open};
use crate::session::home::Wait;
use crate::tools::exec::print;
use crate::tools::interrupt;
use crate::tools::rights;

pub(crate) use server::{Listen, Server};

/// Another snifctl may be at work for so long; Prometheus gives up after 10 s.
const PATIENCE: Duration = Duration::from_secs(8);

pub(super) fn run(context: &Context, args: &MetricsArgs) -> Result<ExitCode> {
    let mut collector = Collector::new(context, args.name.clone());
    let Some(listen) = &args.listen else {
        interrupt::watch();
        if let Some(name) = &args.name {
            Open::to_read(&collector.context)?.chosen(Some(name))?;
        }
        let text = collector.text()?;
        match &args.textfile {
            Some(path) => replace(path, &text)?,
            None => print(&text)?,
        }
        return Ok(if collector.errors == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    };
    rights::to_read()?;
    let (sender, signals) = mpsc::channel();
    interrupt::serve(false, move || {
        let _ = sender.send(());
    });
    let _server = Server::start(listen, collector)?;
    let _ = signals.recv();
    Ok(ExitCode::SUCCESS)
}

/// Writes the file beside it and renames it: who reads it finds the old one or the new one, whole.
fn replace(path: &Path, text: &str) -> Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || -> Result<()> {
        let mut file = tempfile::Builder::new().prefix(".snifctl-").tempfile_in(dir)?;
        file.write_all(text.as_bytes())?;
        file.as_file().set_permissions(Permissions::from_mode(0o644))?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(|err| {
        let (place, dir) = (path.display(), dir.display());
        anyhow!("--textfile {place} cannot be written ({err:#}); it needs a directory to stand in: mkdir -p {dir}")
    })
}

/// Reads the sessions, as often as it is asked.
pub(crate) struct Collector {
    context: Context,
    /// Only this session.
    name: Option<String>,
    errors: u64,
    known: Known,
}

impl Collector {
    pub(crate) fn new(context: &Context, name: Option<String>) -> Collector {
        let wait = Wait(context.wait.0.or(Some(PATIENCE)));
        Collector { context: Context { wait, ..*context }, name, errors: 0, known: Known::default() }
    }

    /// All metrics. A session that cannot be read is left out, and counted.
    ///
    /// # Errors
    /// Nothing at all can be read.
    pub(crate) fn text(&mut self) -> Result<String> {
        let read = self.read();
        if read.is_err() {
            self.errors += 1;
        }
        read
    }

    fn read(&mut self) -> Result<String> {
        let open = Open::to_read(&self.context)?;
        let sessions = counted::all(&open, self.name.as_deref(), &mut self.known, |err| {
            eprintln!("snifctl: {err:#}");
            self.errors += 1;
        })?;
        Ok(metrics::metrics(&sessions, self.errors))
    }
}
