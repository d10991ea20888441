//! Why a copy was not sent, each reason named once. The counters' order, `status -v`, `explain` and the table of docs/maps.md
//! come from here; tests compare them.

/// In the order of `struct drops`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Reason {
    Clone,
    Remote,
    Unresolved,
    Oversize,
    TooLong,
    Resize,
    Fragment,
    Rate,
    Relay,
    Depth,
    Gone,
    Out,
    Down,
}

/// Name, what happened, what to do; Markdown.
type Words = [&'static str; 3];

impl Reason {
    pub(crate) const ALL: [Reason; 13] = [
        Reason::Clone,
        Reason::Remote,
        Reason::Unresolved,
        Reason::Oversize,
        Reason::TooLong,
        Reason::Resize,
        Reason::Fragment,
        Reason::Rate,
        Reason::Relay,
        Reason::Depth,
        Reason::Gone,
        Reason::Out,
        Reason::Down,
    ];

    const fn words(self) -> Words {
        match self {
            Reason::Clone => [
                "clone",
                "the kernel could not clone the packet, the relay is gone, or too many devices stand on one another",
                "`snifctl sync` makes the relay again; under load the machine is short of memory: look at `free`",
            ],
            Reason::Remote => [
                "remote",
                "the session no longer has that remote",
                "nothing: these were on their way as it was removed",
            ],
            Reason::Unresolved => [
                "unresolved",
                "the remote has no route, or its next hop has never answered",
                "put the route or the next hop right, then `snifctl sync`; `snifctl doctor` checks both",
            ],
            Reason::Oversize => [
                "oversize",
                "the copy is larger than the MTU, and `--oversize drop` or `--df` forbids the rest",
                "raise the MTU of the way to the remote, or choose `--oversize segment`, `fragment` or `truncate`",
            ],
            Reason::TooLong => [
                "too_long",
                "no outer IP packet can hold it: more than 65,535 bytes with its header",
                "choose `--oversize segment` or `--snaplen`",
            ],
            Reason::Resize => [
                "resize",
                "the kernel refused to grow, cut or untag the copy",
                "where it lasts, `--snaplen` makes copies smaller; else tell us, with `snifctl doctor`'s output",
            ],
            Reason::Fragment => [
                "fragment",
                "a fragment could not be made",
                "choose `--oversize segment`, or raise the MTU of the way to the remote",
            ],
            Reason::Rate => [
                "rate",
                "more than `--max-rate` lets through",
                "raise `--max-rate`, or copy less with `--filter`, `--sample` or `--snaplen`",
            ],
            Reason::Relay => [
                "relay",
                "lost between the relay's two programs: by a rule of the bridge family, or as a part of it is down",
                "`snifctl status` names the rules; `snifctl sync` sets the relay up again",
            ],
            Reason::Depth => [
                "depth",
                "already inside two of the session's tunnel headers: a copy of a copy that has come back",
                "do not watch the interface on which the collector's own traffic returns, or filter it out",
            ],
            Reason::Gone => [
                "gone",
                "the out interface no longer exists",
                "`snifctl sync` looks for another one; `snifctl watch` does so by itself",
            ],
            Reason::Out => [
                "out",
                "the out interface or its queue refused a fragment of the copy",
                "the out link is too slow: copy less, cap it with `--max-rate`, or lengthen its queue",
            ],
            Reason::Down => [
                "down",
                "the remote does not answer, so no copy is made for it",
                "start the collector; `snifctl sync` or `snifctl watch` asks again",
            ],
        }
    }

    /// As in the counters, in JSON and in metrics.
    pub(crate) fn name(self) -> &'static str {
        self.words()[0]
    }

    pub(crate) fn happened(self) -> &'static str {
        self.words()[1]
    }

    /// What to do about it.
    pub(crate) fn remedy(self) -> &'static str {
        self.words()[2]
    }

    pub(crate) fn of(name: &str) -> Option<Reason> {
        Reason::ALL.into_iter().find(|reason| reason.name() == name)
    }
}

/// One of the tables of docs/maps.md.
#[cfg(test)]
fn table(column: &str, of: fn(Reason) -> &'static str) -> String {
    let line = |reason: &Reason| format!("| `{}` | {} |\n", reason.name(), of(*reason));
    format!("| reason | {column} |\n|---|---|\n{}", Reason::ALL.iter().map(line).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reasons_are_those_of_the_header_in_its_order_and_the_docs_have_their_table() {
        let header = include_str!("../../bpf/snifctl.h");
        let fields =
            header.lines().skip_while(|line| *line != "struct drops {").skip(1).take_while(|line| *line != "};");
        let names = fields.filter_map(|line| line.trim().strip_prefix("__u64 ")?.split(';').next());
        assert_eq!(Reason::ALL.map(Reason::name).to_vec(), names.collect::<Vec<_>>());
        assert!(Reason::ALL.iter().enumerate().all(|(at, reason)| *reason as usize == at), "out of order");
        let docs = include_str!("../../docs/maps.md");
        for table in [table("what happened", Reason::happened), table("what to do", Reason::remedy)] {
            assert!(docs.contains(&table), "docs/maps.md is to have:\n{table}");
        }
    }
}
