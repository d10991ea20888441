//! Patterns of names, as a shell has them. Pure.

/// May this text stand for several interfaces?
pub(crate) fn is_pattern(text: &str) -> bool {
    let class = |(_, rest): (&str, &str)| rest.contains(']');
    text.contains(['*', '?']) || text.split_once('[').is_some_and(class)
}

/// As fnmatch(3) does: `*` any text, `?` one character, `[a-c]` one of these, `[!a-c]` one of no others; a backslash takes
/// the next character as it is.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut at, mut from) = (0, 0);
    // After the last `*`: where the pattern goes on, and how much of the name it has taken.
    let mut star: Option<(usize, usize)> = None;
    loop {
        if pattern.get(at) == Some(&'*') {
            at += 1;
            star = Some((at, from));
            continue;
        }
        if at == pattern.len() && from == name.len() {
            return true;
        }
        let step = name.get(from).and_then(|c| one(&pattern[at..], *c));
        match (step, &mut star) {
            (Some(length), _) => (at, from) = (at + length, from + 1),
            (None, Some((after, taken))) if *taken < name.len() => {
                *taken += 1;
                (at, from) = (*after, *taken);
            }
            _ => return false,
        }
    }
}

/// The length of the pattern's first part, if that takes this character.
fn one(pattern: &[char], c: char) -> Option<usize> {
    let (is_taken, length) = match pattern {
        ['?', ..] => (true, 1),
        ['\\', next, ..] => (*next == c, 2),
        ['[', rest @ ..] => class(rest, c).unwrap_or((c == '[', 1)),
        [first, ..] => (*first == c, 1),
        [] => return None,
    };
    is_taken.then_some(length)
}

/// `a-c]` behind its bracket; `None` where nothing ends it.
fn class(set: &[char], c: char) -> Option<(bool, usize)> {
    let is_not = matches!(set.first(), Some('!' | '^'));
    let first = usize::from(is_not);
    // A bracket that comes first is one of the characters.
    let end = (first + 1..set.len()).find(|at| set[*at] == ']')?;
    let (mut at, mut is_in) = (first, false);
    while at < end {
        match set[at..end] {
            [low, '-', high, ..] => (is_in, at) = (is_in || (low..=high).contains(&c), at + 3),
            _ => (is_in, at) = (is_in || set[at] == c, at + 1),
        }
    }
    Some((is_in != is_not, end + 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_matches_as_fnmatch_does() {
        for (pattern, taken, left) in [
            ("eth*", &["eth", "eth0", "eth10"][..], &["et", "veth0", ""][..]),
            ("*", &["", "a", "*"], &[]),
            ("*0", &["0", "eth0", "00", "e0t0"], &["eth01", ""]),
            ("a*b*c", &["abc", "axbxc", "abbcc"], &["ab", "acb", "abcd"]),
            ("eth?", &["eth0", "eth\u{e9}"], &["eth", "eth10"]),
            ("eth[0-2]", &["eth0", "eth2"], &["eth3", "eth[0-2]", "eth"]),
            ("eth[!0-2a]*", &["eth3", "ethb0"], &["eth0", "etha", "eth"]),
            ("e[^a]", &["eb"], &["ea"]),
            ("e[]x]", &["e]", "ex"], &["ea"]),
            ("e[!]x]", &["ea"], &["e]", "ex"]),
            ("e[a-]*", &["e-", "ea1"], &["eb"]),
            ("e[*", &["e[", "e[0"], &["e0"]),
            ("[?][*]", &["?*"], &["ab"]),
            (r"a\**", &["a*", "a*b"], &["ab"]),
            (r"a\?[", &["a?["], &["ab["]),
        ] {
            for name in taken {
                assert!(matches(pattern, name), "{pattern} takes {name}");
            }
            for name in left {
                assert!(!matches(pattern, name), "{pattern} leaves {name}");
            }
        }
        // No time that doubles with each star.
        assert!(!matches(&format!("{}c", "a*".repeat(30)), &format!("{}b", "a".repeat(100))));
    }

    #[test]
    fn a_name_without_wildcards_is_no_pattern() {
        assert!(["eth*", "eth?", "[ab]0", "a[!b]"].iter().all(|text| is_pattern(text)));
        assert!(!["eth0", "a[b", "a]b[", r"a\b", "", "it's"].iter().any(|text| is_pattern(text)));
    }
}
