//! snifctl run by someone who is not root, or by root without capabilities.

use std::ffi::OsStr;
use std::process::Command;

use super::judge::Said;
use super::{Lab, Ns};

/// A copy of the built snifctl that everyone may run: the build directory may be private.
pub(crate) struct PublicCopy(tempfile::TempDir);

impl PublicCopy {
    pub(crate) fn new() -> PublicCopy {
        let dir = tempfile::Builder::new().prefix("sniflab").tempdir().expect("a directory");
        let copy = Command::new("install").args(["-m", "0755", env!("CARGO_BIN_EXE_snifctl")]).arg(dir.path()).status();
        assert!(copy.expect("run install").success());
        let open = Command::new("chmod").arg("0755").arg(dir.path()).status();
        assert!(open.expect("run chmod").success());
        PublicCopy(dir)
    }

    pub(crate) fn said(&self, lab: &Lab, args: &[&str]) -> Said {
        self.said_with(lab, &[], args)
    }

    /// The same of a user with these ambient capabilities.
    pub(crate) fn said_with<S: AsRef<OsStr>>(&self, lab: &Lab, caps: &[&str], args: &[S]) -> Said {
        let caps = caps.iter().fold("-all".to_string(), |all, cap| format!("{all},+{}", cap.to_lowercase()));
        let (inherited, ambient) = (format!("--inh-caps={caps}"), format!("--ambient-caps={caps}"));
        let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", &inherited, &ambient, "--"];
        let mut command = lab.command(Ns::Host, &nobody);
        command.arg(self.0.path().join("snifctl")).args(args).output().expect("run setpriv").into()
    }

    /// The copy, to give it capabilities of its own.
    pub(crate) fn path(&self) -> String {
        self.0.path().join("snifctl").to_string_lossy().into_owned()
    }
}

/// The words that run a command as root with these capabilities and no others.
pub(crate) fn bounded(caps: &[&str]) -> Vec<String> {
    let caps = caps.iter().fold("-all".to_string(), |all, cap| format!("{all},+{}", cap.to_lowercase()));
    ["setpriv", "--bounding-set", &caps, "--inh-caps", &caps, "--"].map(String::from).to_vec()
}
