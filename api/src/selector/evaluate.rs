//! Whether an object is selected, and what an index may conclude from an expression.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::BuildHasher;

use super::{Node, Selector};

/// Something with labels.
pub trait Labels {
    /// The value of a label.
    fn get(&self, label: &str) -> Option<&str>;
}

impl<V: AsRef<str>> Labels for BTreeMap<String, V> {
    fn get(&self, label: &str) -> Option<&str> {
        Self::get(self, label).map(AsRef::as_ref)
    }
}

impl<V: AsRef<str>, H: BuildHasher> Labels for HashMap<String, V, H> {
    fn get(&self, label: &str) -> Option<&str> {
        Self::get(self, label).map(AsRef::as_ref)
    }
}

impl<T: Labels + ?Sized> Labels for &T {
    fn get(&self, label: &str) -> Option<&str> {
        (**self).get(label)
    }
}

/// An endpoint's own labels, then those of its profiles in order. The first that has a label
/// gives its value.
#[derive(Debug, Clone, Copy)]
pub struct Layered<'a, O, P> {
    /// What the endpoint itself carries.
    pub own: &'a O,
    /// What it inherits.
    pub inherited: &'a [P],
}

impl<O: Labels, P: Labels> Labels for Layered<'_, O, P> {
    fn get(&self, label: &str) -> Option<&str> {
        self.own
            .get(label)
            .or_else(|| self.inherited.iter().find_map(|parent| parent.get(label)))
    }
}

impl Node {
    fn matches(&self, labels: &impl Labels) -> bool {
        match self {
            Self::All => true,
            Self::Global => labels.get(crate::kubernetes::LABEL_NAMESPACE).is_none(),
            Self::Has(label) => labels.get(label).is_some(),
            Self::Equal(label, value) => labels.get(label) == Some(value),
            Self::NotEqual(label, value) => labels.get(label) != Some(value),
            Self::Contains(label, value) => labels
                .get(label)
                .is_some_and(|actual| actual.contains(&**value)),
            Self::StartsWith(label, value) => labels
                .get(label)
                .is_some_and(|actual| actual.starts_with(&**value)),
            Self::EndsWith(label, value) => labels
                .get(label)
                .is_some_and(|actual| actual.ends_with(&**value)),
            Self::In(label, values) => labels
                .get(label)
                .is_some_and(|actual| values.contains(actual)),
            Self::NotIn(label, values) => !labels
                .get(label)
                .is_some_and(|actual| values.contains(actual)),
            Self::Not(inner) => !inner.matches(labels),
            Self::And(members) => members.iter().all(|member| member.matches(labels)),
            Self::Or(members) => members.iter().any(|member| member.matches(labels)),
        }
    }
}

/// What an object must satisfy, for one label, in order to be selected.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Restriction {
    /// It has the label.
    Present,
    /// The label has one of these values. Without values nothing is ever selected.
    OneOf(BTreeSet<Box<str>>),
}

impl Restriction {
    /// Both hold.
    fn narrowed(self, other: Self) -> Self {
        match (self, other) {
            (Self::Present, other) | (other, Self::Present) => other,
            (Self::OneOf(a), Self::OneOf(b)) => Self::OneOf(a.intersection(&b).cloned().collect()),
        }
    }

    /// At least one of them holds.
    fn widened(self, other: Self) -> Self {
        match (self, other) {
            (Self::Present, _) | (_, Self::Present) => Self::Present,
            (Self::OneOf(mut a), Self::OneOf(b)) => {
                a.extend(b);
                Self::OneOf(a)
            }
        }
    }
}

type Restrictions = BTreeMap<Box<str>, Restriction>;

impl Node {
    fn restrictions(&self) -> Restrictions {
        let single = |label: &str, restriction| Restrictions::from([(label.into(), restriction)]);
        match self {
            Self::Has(label)
            | Self::Contains(label, _)
            | Self::StartsWith(label, _)
            | Self::EndsWith(label, _) => single(label, Restriction::Present),
            Self::Equal(label, value) => {
                single(label, Restriction::OneOf(BTreeSet::from([value.clone()])))
            }
            Self::In(label, values) => single(label, Restriction::OneOf(values.clone())),
            Self::Not(inner) => match &**inner {
                Self::NotEqual(label, value) => {
                    single(label, Restriction::OneOf(BTreeSet::from([value.clone()])))
                }
                Self::NotIn(label, values) => single(label, Restriction::OneOf(values.clone())),
                Self::Global => single(crate::kubernetes::LABEL_NAMESPACE, Restriction::Present),
                _ => Restrictions::new(),
            },
            Self::And(members) => {
                let mut all = Restrictions::new();
                for (label, restriction) in members.iter().flat_map(Self::restrictions) {
                    let narrowed = match all.remove(&label) {
                        Some(known) => known.narrowed(restriction),
                        None => restriction,
                    };
                    all.insert(label, narrowed);
                }
                all
            }
            Self::Or(members) => members
                .iter()
                .map(Self::restrictions)
                .reduce(|a, mut b| {
                    a.into_iter()
                        .filter_map(|(label, restriction)| {
                            let other = b.remove(&label)?;
                            Some((label, restriction.widened(other)))
                        })
                        .collect()
                })
                .unwrap_or_default(),
            Self::All | Self::Global | Self::NotEqual(..) | Self::NotIn(..) => Restrictions::new(),
        }
    }
}

impl Selector {
    /// Whether an object with these labels is selected.
    #[must_use]
    pub fn matches(&self, labels: &impl Labels) -> bool {
        self.0.matches(labels)
    }

    /// Necessary conditions, by label: every selected object satisfies each of them. An index
    /// looks objects up by the narrowest one and then asks [`Selector::matches`].
    #[must_use]
    pub fn restrictions(&self) -> BTreeMap<Box<str>, Restriction> {
        self.0.restrictions()
    }
}
