//! How Wireshark is told what there is to choose: https://www.wireshark.org/docs/man-pages/extcap.html

/// An option in the dialog.
pub(super) struct Argument<'a> {
    pub call: &'a str,
    pub display: &'a str,
    pub kind: &'a str,
    pub tip: &'a str,
    /// More of it, in braces.
    pub more: &'a str,
    /// What a selector offers; the first stands if nothing is chosen.
    pub values: Vec<String>,
}

pub(super) fn sentences(arguments: &[Argument]) -> String {
    let lines = (0..).zip(arguments).map(|(n, Argument { call, display, kind, tip, more, values }): (usize, _)| {
        let values = values.iter().enumerate().map(|(at, value)| {
            format!("value {{arg={n}}}{{value={value}}}{{display={value}}}{{default={}}}\n", at == 0)
        });
        let line =
            format!("arg {{number={n}}}{{call=--{call}}}{{display={display}}}{{type={kind}}}{{tooltip={tip}}}{more}\n");
        line + &values.collect::<String>()
    });
    lines.collect()
}

/// The flags that sentences offer.
#[cfg(test)]
pub(super) fn offered(sentences: &str) -> Vec<String> {
    let call = |line: &str| Some(line.split_once("{call=")?.1.split_once('}')?.0.to_string());
    sentences.lines().filter_map(call).collect()
}
