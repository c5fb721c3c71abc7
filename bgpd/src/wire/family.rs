//! Address families (RFC 4760 §3) and small sets of those that this speaker carries.

use std::fmt;

/// An AFI/SAFI pair as it appears on the wire; also represents families that we do not carry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Family {
    /// Address family identifier.
    pub afi: u16,
    /// Subsequent address family identifier.
    pub safi: u8,
}

impl Family {
    /// IPv4 unicast (1/1).
    pub const IPV4_UNICAST: Self = Self { afi: 1, safi: 1 };
    /// IPv6 unicast (2/1).
    pub const IPV6_UNICAST: Self = Self { afi: 2, safi: 1 };
    /// The families that this speaker carries, in table order.
    pub const SUPPORTED: [Self; 2] = [Self::IPV4_UNICAST, Self::IPV6_UNICAST];

    /// Position in per-family arrays (0 for IPv4, 1 for IPv6), or `None` when not carried.
    pub const fn index(self) -> Option<usize> {
        match (self.afi, self.safi) {
            (1, 1) => Some(0),
            (2, 1) => Some(1),
            _ => None,
        }
    }

    /// Longest prefix of the family in bits.
    pub const fn max_prefix_len(self) -> u8 {
        if self.afi == 1 { 32 } else { 128 }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.index() {
            Some(0) => f.write_str("ipv4-unicast"),
            Some(_) => f.write_str("ipv6-unicast"),
            None => write!(f, "afi{}/safi{}", self.afi, self.safi),
        }
    }
}

impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A set of carried families (members of [`Family::SUPPORTED`]; others cannot be inserted).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct FamilySet(u8);

impl FamilySet {
    /// No family.
    pub const EMPTY: Self = Self(0);
    /// Every carried family.
    pub const ALL: Self = Self(0b11);
    /// IPv4 unicast alone.
    pub const IPV4: Self = Self(0b01);
    /// IPv6 unicast alone.
    pub const IPV6: Self = Self(0b10);

    /// Adds `family`; says whether it is one that we carry.
    pub fn insert(&mut self, family: Family) -> bool {
        match family.index() {
            Some(bit) => {
                self.0 |= 1 << bit;
                true
            }
            None => false,
        }
    }

    /// Whether `family` is in the set.
    pub fn contains(self, family: Family) -> bool {
        family.index().is_some_and(|bit| self.0 & (1 << bit) != 0)
    }

    /// Families in both sets.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Families in either set.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Families in `self` that are not in `other`.
    #[must_use]
    pub const fn difference(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether no family is in the set.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The members, in table order.
    pub fn iter(self) -> impl Iterator<Item = Family> {
        Family::SUPPORTED
            .into_iter()
            .filter(move |f| self.contains(*f))
    }
}

impl FromIterator<Family> for FamilySet {
    fn from_iter<I: IntoIterator<Item = Family>>(iter: I) -> Self {
        let mut set = Self::EMPTY;
        for family in iter {
            set.insert(family);
        }
        set
    }
}

impl fmt::Debug for FamilySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}
