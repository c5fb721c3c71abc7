//! Routes in the one form that the answers of all daemons are brought into.

use anyhow::{Context, Result, bail};
use cali_api::Cidr;
use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

/// A community of any of the three kinds that are exchanged here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Community {
    /// RFC 1997.
    Standard(u16, u16),
    /// RFC 8092.
    Large(u32, u32, u32),
    /// RFC 4360, route target of a two-octet AS.
    RouteTarget(u16, u32),
}

impl Community {
    /// From the 32 bits of the wire.
    pub fn from_bits(bits: u32) -> Self {
        let [a, b, c, d] = bits.to_be_bytes();
        Self::Standard(u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
    }

    /// From its numbers, separated by anything that is no digit.
    fn numbers<const N: usize>(text: &str) -> Result<[u32; N]> {
        let numbers: Vec<u32> = text
            .split(|character: char| !character.is_ascii_digit())
            .filter(|word| !word.is_empty())
            .map(str::parse)
            .collect::<Result<_, _>>()
            .with_context(|| format!("no community: {text:?}"))?;
        numbers
            .try_into()
            .map_err(|_| anyhow::anyhow!("a community of {N} numbers expected: {text:?}"))
    }

    /// `64512:1`, `(64512,1)`.
    pub fn standard(text: &str) -> Result<Self> {
        let [a, b] = Self::numbers(text)?;
        Ok(Self::Standard(a.try_into()?, b.try_into()?))
    }

    /// `64512:1:2`, `(64512, 1, 2)`.
    pub fn large(text: &str) -> Result<Self> {
        let [a, b, c] = Self::numbers(text)?;
        Ok(Self::Large(a, b, c))
    }

    /// `rt:64512:77`, `RT:64512:77`, `rt 64512:77`, `(rt, 64512, 77)`, `target:64512:77`.
    pub fn extended(text: &str) -> Result<Self> {
        let kind = text.trim_start_matches('(').to_ascii_lowercase();
        if !kind.starts_with("rt") && !kind.starts_with("target") {
            bail!("an extended community that is no route target: {text:?}");
        }
        let [a, b] = Self::numbers(text)?;
        Ok(Self::RouteTarget(a.try_into()?, b))
    }
}

impl fmt::Display for Community {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Standard(a, b) => write!(f, "{a}:{b}"),
            Self::Large(a, b, c) => write!(f, "{a}:{b}:{c}"),
            Self::RouteTarget(a, b) => write!(f, "rt:{a}:{b}"),
        }
    }
}

/// What a speaker is to originate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    pub prefix: Cidr,
    pub communities: BTreeSet<Community>,
}

impl Announcement {
    /// A route without communities.
    pub fn plain(prefix: &str) -> Self {
        Self::with(prefix, [])
    }

    /// A route with these communities.
    pub fn with(prefix: &str, communities: impl IntoIterator<Item = Community>) -> Self {
        Self {
            prefix: prefix.parse().expect("a prefix"),
            communities: communities.into_iter().collect(),
        }
    }

    /// Communities in each of the three kinds, in the words of one daemon.
    pub fn words(&self, word: impl Fn(&Community) -> String) -> [Vec<String>; 3] {
        let mut kinds = [Vec::new(), Vec::new(), Vec::new()];
        for community in &self.communities {
            let kind = match community {
                Community::Standard(..) => 0,
                Community::Large(..) => 1,
                Community::RouteTarget(..) => 2,
            };
            kinds[kind].push(word(community));
        }
        kinds
    }
}

/// A path that a speaker learned from another.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    pub prefix: Cidr,
    pub next_hop: IpAddr,
    pub as_path: Vec<u32>,
    pub communities: BTreeSet<Community>,
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} via {} path {:?}",
            self.prefix, self.next_hop, self.as_path
        )?;
        for community in &self.communities {
            write!(f, " {community}")?;
        }
        Ok(())
    }
}

/// Routes, one in a line, for a failed test.
pub fn listed(routes: &[Route]) -> String {
    if routes.is_empty() {
        return "  (none)".to_owned();
    }
    let lines: Vec<String> = routes.iter().map(|route| format!("  {route}")).collect();
    lines.join("\n")
}

/// AS numbers of a path without sets, as daemons print it.
pub fn as_path(text: &str) -> Result<Vec<u32>> {
    text.split_whitespace()
        .map(|word| {
            word.parse()
                .with_context(|| format!("no AS path: {text:?}"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_daemons_spelling_is_one_community() {
        for text in ["64512:1", "(64512,1)", "(64512, 1)"] {
            assert_eq!(
                Community::standard(text).unwrap(),
                Community::Standard(64512, 1)
            );
        }
        for text in ["64512:2:3", "(64512, 2, 3)"] {
            assert_eq!(
                Community::large(text).unwrap(),
                Community::Large(64512, 2, 3)
            );
        }
        for text in [
            "rt:64512:77",
            "RT:64512:77",
            "rt 64512:77",
            "(rt, 64512, 77)",
            "target:64512:77",
        ] {
            assert_eq!(
                Community::extended(text).unwrap(),
                Community::RouteTarget(64512, 77)
            );
        }
        assert_eq!(
            Community::from_bits(4_227_858_433),
            Community::Standard(64512, 1)
        );
        assert!(Community::extended("soo:1:2").is_err());
        assert!(Community::standard("1:2:3").is_err());
    }
}
