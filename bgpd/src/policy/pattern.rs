//! Interface patterns of `BGPFilter` (`*` stands for any characters).

use std::fmt;

/// An interface name with `*` wildcards, as in `cali*` or `*.calico`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct InterfacePattern(Box<str>);

impl InterfacePattern {
    /// A pattern from its text.
    pub fn new(text: &str) -> Self {
        Self(text.into())
    }

    /// Whether `name` matches as a whole.
    pub fn matches(&self, name: &str) -> bool {
        let mut parts = self.0.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = name.strip_prefix(first) else {
            return false;
        };
        let Some(last) = parts.next_back() else {
            return rest.is_empty();
        };
        for part in parts {
            match rest.find(part) {
                Some(at) => rest = &rest[at + part.len()..],
                None => return false,
            }
        }
        rest.ends_with(last)
    }
}

impl fmt::Display for InterfacePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for InterfacePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}
