//! Durations and log levels in Go's spelling.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::text::{serde_as_text, text_enum};

text_enum! {
    /// The least severe message that is logged.
    pub enum LogLevel {
        None = "None",
        Trace = "Trace",
        Debug = "Debug",
        Info = "Info",
        Warning = "Warning",
        Error = "Error",
        Fatal = "Fatal",
        Panic = "Panic",
    }
}

/// A duration in the text form of Go's `time.Duration`, such as `1m30s` or `50ms`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GoDuration(pub Duration);

/// A text that is no duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a duration (numbers with units, such as \"90s\", \"1m30s\" or \"50ms\")")]
pub struct GoDurationError(String);

const NANOSECOND: u128 = 1;
const UNITS: [(&str, u128); 8] = [
    ("ns", NANOSECOND),
    ("us", 1_000 * NANOSECOND),
    ("\u{b5}s", 1_000 * NANOSECOND),
    ("\u{3bc}s", 1_000 * NANOSECOND),
    ("ms", 1_000_000 * NANOSECOND),
    ("s", 1_000_000_000 * NANOSECOND),
    ("m", 60_000_000_000 * NANOSECOND),
    ("h", 3_600_000_000_000 * NANOSECOND),
];

/// The number before a unit, in nanoseconds. Digits beyond a nanosecond are dropped.
fn scaled(number: &str, unit: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let whole = if whole.is_empty() {
        0
    } else {
        whole.parse::<u64>().ok()?
    };
    let mut total = u128::from(whole) * unit;
    let mut weight = unit;
    for digit in fraction.bytes() {
        weight /= 10;
        total += weight * u128::from(digit.checked_sub(b'0').filter(|digit| *digit < 10)?);
    }
    Some(total)
}

impl FromStr for GoDuration {
    type Err = GoDurationError;

    fn from_str(text: &str) -> Result<Self, GoDurationError> {
        let refuse = || GoDurationError(text.to_owned());
        if text == "0" {
            return Ok(Self::default());
        }
        let mut rest = text;
        let mut total: u128 = 0;
        while !rest.is_empty() {
            let digits = rest
                .find(|c: char| !c.is_ascii_digit() && c != '.')
                .ok_or_else(refuse)?;
            let (number, tail) = rest.split_at(digits);
            let end = tail
                .find(|c: char| c.is_ascii_digit() || c == '.')
                .unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(end);
            let (_, unit) = UNITS
                .iter()
                .find(|(name, _)| *name == unit)
                .ok_or_else(refuse)?;
            total += scaled(number, *unit).ok_or_else(refuse)?;
            rest = tail;
        }
        // Go's limit is a signed 64-bit count of nanoseconds.
        match i64::try_from(total) {
            Ok(nanos) if !text.is_empty() => Ok(Self(Duration::from_nanos(nanos.unsigned_abs()))),
            _ => Err(refuse()),
        }
    }
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.as_nanos();
        if nanos == 0 {
            return f.write_str("0s");
        }
        if nanos < 1_000_000_000 {
            let (unit, size) = match nanos {
                0..1_000 => ("ns", 1),
                1_000..1_000_000 => ("\u{b5}s", 1_000),
                _ => ("ms", 1_000_000),
            };
            return write!(f, "{}{unit}", decimal(nanos, size));
        }
        let (hours, minutes) = (nanos / 3_600_000_000_000, nanos / 60_000_000_000 % 60);
        if hours > 0 {
            write!(f, "{hours}h")?;
        }
        if hours > 0 || minutes > 0 {
            write!(f, "{minutes}m")?;
        }
        write!(f, "{}s", decimal(nanos % 60_000_000_000, 1_000_000_000))
    }
}

/// `value / unit` with as many decimals as it needs.
fn decimal(value: u128, unit: u128) -> String {
    let (whole, fraction) = (value / unit, value % unit);
    if fraction == 0 {
        return whole.to_string();
    }
    let width = unit.ilog10() as usize;
    let digits = format!("{fraction:0width$}");
    format!("{whole}.{}", digits.trim_end_matches('0'))
}

serde_as_text!(GoDuration, "a duration such as \"90s\"");

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn text_round_trips(nanos in 0u64..=i64::MAX as u64) {
            let duration = GoDuration(Duration::from_nanos(nanos));
            prop_assert_eq!(duration.to_string().parse::<GoDuration>().unwrap(), duration);
        }

        #[test]
        fn any_text_is_read_or_refused_without_panic(text in "[0-9.hmsnuµx -]{0,30}") {
            let _ = text.parse::<GoDuration>();
        }
    }

    #[test]
    fn spelling_is_the_one_of_go() {
        for (text, canonical) in [
            ("0", "0s"),
            ("0s", "0s"),
            ("90s", "1m30s"),
            ("5m0s", "5m0s"),
            ("1h", "1h0m0s"),
            ("50ms", "50ms"),
            ("1.5s", "1.5s"),
            ("1500us", "1.5ms"),
            (".5s", "500ms"),
            ("10m", "10m0s"),
            ("12ns", "12ns"),
        ] {
            assert_eq!(
                text.parse::<GoDuration>().unwrap().to_string(),
                canonical,
                "{text}"
            );
        }
        for text in ["", "5", "s", "-1s", "1s ", "1x", "1..5s", "9999999999h"] {
            assert!(text.parse::<GoDuration>().is_err(), "{text}");
        }
    }
}
