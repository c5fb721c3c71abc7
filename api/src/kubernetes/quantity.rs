//! Quantities of Kubernetes, such as `10M` or `1.5Gi`.

const SUFFIXES: [(&str, u64); 12] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("Pi", 1 << 50),
    ("Ei", 1 << 60),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("P", 1_000_000_000_000_000),
    ("E", 1_000_000_000_000_000_000),
];

/// The quantity as an integer, fractions rounded up as Kubernetes does.
pub(super) fn parse(text: &str) -> Option<u64> {
    let (number, factor) = SUFFIXES
        .iter()
        .find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?, *factor)))
        .unwrap_or((text, 1));
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty())
        || !digits(whole)
        || !digits(fraction)
        || fraction.len() > 18
    {
        return None;
    }
    let whole: u64 = if whole.is_empty() {
        0
    } else {
        whole.parse().ok()?
    };
    let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let fraction: u128 = if fraction.is_empty() {
        0
    } else {
        fraction.parse().ok()?
    };
    let total = (u128::from(whole) * scale + fraction) * u128::from(factor);
    u64::try_from(total.div_ceil(scale)).ok()
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn quantities_have_decimal_and_binary_suffixes() {
        for (text, value) in [
            ("10", Some(10)),
            ("1k", Some(1_000)),
            ("10M", Some(10_000_000)),
            ("1.5Gi", Some(3 << 29)),
            ("0.1", Some(1)),
            ("16E", Some(16_000_000_000_000_000_000)),
            ("19E", None),
            ("", None),
            ("M", None),
            ("-1", None),
            ("1 k", None),
            ("1K", None),
        ] {
            assert_eq!(parse(text), value, "{text}");
        }
    }
}
