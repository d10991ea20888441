//! stub
use crate::request::Request;
use crate::tools::exec::Runner;
use crate::usage::{Usage, refuse};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    Netns(String),
    Pid(u32),
}
impl FromStr for Origin {
    type Err = Usage;
    fn from_str(text: &str) -> Result<Origin, Usage> {
        if let Some(n) = text.strip_prefix("netns:") {
            return Ok(Origin::Netns(n.into()));
        }
        if let Some(p) = text.strip_prefix("pid:").and_then(|p| p.parse().ok()) {
            return Ok(Origin::Pid(p));
        }
        refuse!("no")
    }
}
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Netns(n) => write!(f, "netns:{n}"),
            Origin::Pid(n) => write!(f, "pid:{n}"),
        }
    }
}
#[derive(Clone, Debug)]
pub(crate) struct Space {
    pub label: String,
    pub path: PathBuf,
    pub inode: u64,
}
#[derive(Clone, Debug)]
pub(crate) enum Absent {
    Gone(String),
    Unknown(String),
}
#[derive(Clone, Debug, Default)]
pub(crate) struct Cluster;
impl Cluster {
    pub(crate) fn of(_: Option<&Request>) -> Cluster {
        Cluster
    }
}
pub(crate) fn find(_: &Runner, origins: &[Origin], _: &Cluster) -> Vec<Result<Vec<Space>, Absent>> {
    use std::os::unix::fs::MetadataExt;
    origins
        .iter()
        .map(|o| {
            let path = match o {
                Origin::Netns(n) if n.starts_with('/') => PathBuf::from(n),
                Origin::Netns(n) => PathBuf::from("/run/netns").join(n),
                Origin::Pid(p) => PathBuf::from(format!("/proc/{p}/ns/net")),
            };
            match std::fs::metadata(&path) {
                Ok(m) => Ok(vec![Space { label: o.to_string(), inode: m.ino(), path }]),
                Err(e) => Err(Absent::Gone(e.to_string())),
            }
        })
        .collect()
}
