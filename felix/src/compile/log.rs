//! What rules with action Log say, and how that is read back.
//!
//! The kernel hands their packets to a group of `nfnetlink_log`: 1 for ingress, 2 for egress, as Calico's do. The prefix names the
//! policy, the direction and the rule; it is cut in the name, so that the rest is always there.

use std::time::Duration;

use cali_api::v3::FelixConfigurationSpec;

use crate::calc::Direction;

/// Both groups.
pub(crate) const GROUPS: [u16; 2] = [group(Direction::Ingress), group(Direction::Egress)];

/// The group of a direction.
pub(crate) const fn group(direction: Direction) -> u16 {
    match direction {
        Direction::Ingress => 1,
        Direction::Egress => 2,
    }
}

/// The prefix of one rule, at most `limit` octets (`NF_LOG_PREFIXLEN` is 128 with the final zero).
pub(crate) fn prefix(owner: &str, direction: Direction, number: usize, limit: usize) -> String {
    let tail = format!(" {direction} {number}");
    let mut end = owner
        .len()
        .min(limit.saturating_sub("log ".len() + tail.len()));
    while !owner.is_char_boundary(end) {
        end -= 1;
    }
    format!("log {}{tail}", &owner[..end])
}

/// A prefix, read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Logged<'a> {
    /// The policy as in [`super::policy_text`], or `pro/` and the profile's name. Long ones are cut.
    pub(crate) owner: &'a str,
    /// `ingress` or `egress`.
    pub(crate) direction: &'a str,
    /// The rule's place in its direction, from 0.
    pub(crate) rule: usize,
}

/// Reads a prefix of [`prefix`].
pub(crate) fn read(prefix: &str) -> Option<Logged<'_>> {
    let mut parts = prefix.strip_prefix("log ")?.rsplitn(3, ' ');
    let rule = parts.next()?.parse().ok()?;
    let direction = parts.next()?;
    let owner = parts.next()?;
    Some(Logged {
        owner,
        direction,
        rule,
    })
}

/// How many packets rules with action Log say in a time (`logActionRateLimit`, `logActionRateLimitBurst`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogRate {
    /// Packets in `per`.
    pub packets: u16,
    /// A second, a minute, an hour or a day.
    pub per: Unit,
    /// Packets beyond that in a burst.
    pub burst: u32,
}

/// A unit of [`LogRate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Unit {
    Second,
    Minute,
    Hour,
    Day,
}

impl Unit {
    /// As Calico's field and iptables write it.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Second => "second",
            Self::Minute => "minute",
            Self::Hour => "hour",
            Self::Day => "day",
        }
    }

    /// Its length.
    pub const fn duration(self) -> Duration {
        Duration::from_secs(match self {
            Self::Second => 1,
            Self::Minute => 60,
            Self::Hour => 3600,
            Self::Day => 24 * 3600,
        })
    }
}

impl LogRate {
    /// Calico's default burst.
    const BURST: u32 = 5;

    /// The settings' limit; `None`: no limit is asked for, or it cannot be read.
    pub fn of(spec: &FelixConfigurationSpec) -> Option<Self> {
        let (packets, unit) = spec.log_action_rate_limit.as_deref()?.split_once('/')?;
        let units = [Unit::Second, Unit::Minute, Unit::Hour, Unit::Day];
        Some(Self {
            packets: packets
                .parse()
                .ok()
                .filter(|packets| (1..=9999).contains(packets))?,
            per: units.into_iter().find(|known| known.text() == unit)?,
            burst: spec
                .log_action_rate_limit_burst
                .filter(|burst| *burst > 0)
                .unwrap_or(Self::BURST),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_read_back_however_long_the_name_is() {
        for owner in ["gnp/web", "np/shop/a name", &"ü".repeat(100)] {
            for limit in [63, 127] {
                let text = prefix(owner, Direction::Egress, 12, limit);
                assert!(text.len() <= limit, "{text}");
                let logged = read(&text).expect("a prefix");
                assert!(owner.starts_with(logged.owner), "{text}");
                assert_eq!((logged.direction, logged.rule), ("egress", 12));
            }
        }
        for other in ["", "log", "log a", "log a b", "log a ingress x", "seen"] {
            assert_eq!(read(other), None, "{other}");
        }
    }

    #[test]
    fn rates_are_read_as_calico_writes_them() {
        let rate = |text: &str, burst| {
            LogRate::of(&FelixConfigurationSpec {
                log_action_rate_limit: Some(text.to_owned()),
                log_action_rate_limit_burst: burst,
                ..FelixConfigurationSpec::default()
            })
        };
        let ten = LogRate {
            packets: 10,
            per: Unit::Minute,
            burst: 5,
        };
        assert_eq!(rate("10/minute", None), Some(ten));
        assert_eq!(
            rate("10/minute", Some(20)),
            Some(LogRate { burst: 20, ..ten })
        );
        for bad in ["", "10", "0/second", "10000/second", "10/week", "x/day"] {
            assert_eq!(rate(bad, None), None, "{bad}");
        }
        assert_eq!(LogRate::of(&FelixConfigurationSpec::default()), None);
    }
}
