//! A real sshd in the host namespace, and what a client in the collector's needs to come in.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::{Lab, Ns, OUT_IP, OUT_IP6, PATIENCE, poll};

/// It listens at the out link's addresses, and ends with this value. Its connections end with the lab.
pub(crate) struct Sshd {
    child: Child,
    dir: PathBuf,
}

impl Sshd {
    pub(crate) fn start(lab: &Lab) -> Sshd {
        let dir = lab.fresh_path("ssh");
        fs::create_dir(&dir).expect("a directory");
        // Where the package's own unit would make it: sshd wants it, and leaves it empty.
        fs::create_dir_all("/run/sshd").expect("sshd's directory");
        fs::set_permissions("/run/sshd", fs::Permissions::from_mode(0o755)).expect("its mode");
        let at = |name: &str| dir.join(name);
        let host = key(&at("host"));
        fs::write(at("authorized"), key(&at("user"))).expect("the authorized key");
        fs::write(at("known"), format!("{OUT_IP} {host}{OUT_IP6} {host}")).expect("the known host");
        let path = dir.display();
        let server = format!(
            "ListenAddress {OUT_IP}\nListenAddress {OUT_IP6}\nHostKey {path}/host\nAuthorizedKeysFile {path}/authorized\n\
             UsePAM no\nStrictModes no\nPidFile none\nAllowUsers root\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n\
             KbdInteractiveAuthentication no\n"
        );
        fs::write(at("server"), server).expect("sshd's configuration");
        let client = format!(
            "User root\nIdentityFile {path}/user\nIdentitiesOnly yes\nStrictHostKeyChecking yes\n\
             UserKnownHostsFile {path}/known\nGlobalKnownHostsFile none\n"
        );
        fs::write(at("client"), client).expect("ssh's configuration");
        let mut command = lab.command(Ns::Host, &["/usr/sbin/sshd", "-D", "-e", "-f"]);
        let log = fs::File::create(at("log")).expect("a file");
        let child = command.arg(at("server")).stdout(Stdio::null()).stderr(log).spawn().expect("start sshd");
        let sshd = Sshd { child, dir };
        let listens = poll(PATIENCE, || sshd.log().contains("Server listening on 2001").then_some(()));
        assert!(listens.is_some(), "{}", sshd.log());
        sshd
    }

    /// The client's configuration.
    pub(crate) fn client(&self) -> PathBuf {
        self.dir.join("client")
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes a key. Its public half.
fn key(path: &Path) -> String {
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f"]).arg(path).status();
    assert!(made.expect("run ssh-keygen").success());
    fs::read_to_string(path.with_extension("pub")).expect("a public key")
}

/// A child of a process, by what it runs.
pub(crate) fn child_of(parent: u32, name: &str) -> Option<u32> {
    children(parent).into_iter().find(|pid| runs(*pid, name))
}

/// The children of a process, theirs, and so on.
pub(crate) fn descendants(parent: u32) -> Vec<u32> {
    children(parent).into_iter().flat_map(|child| [vec![child], descendants(child)].concat()).collect()
}

fn children(parent: u32) -> Vec<u32> {
    let pids = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| stat(*pid, 3).as_deref() == Some(&parent.to_string())).collect()
}

/// Is this the name of what a process runs?
pub(crate) fn runs(pid: u32, name: &str) -> bool {
    stat(pid, 1).as_deref() == Some(&format!("({name})"))
}

fn stat(pid: u32, word: usize) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.split_whitespace().nth(word).map(String::from)
}
