//! Rules, conditions, edits and their evaluation.

use std::hash::{Hash, Hasher};
use std::net::IpAddr;

use foldhash::fast::RandomState;
use smallvec::SmallVec;
use std::collections::HashSet;

use super::pattern::InterfacePattern;
use crate::rib::RouteSource;
use crate::wire::{Attributes, Community, LargeCommunity, PeerKind, Prefix};

/// LOCAL_PREF of a path that has none (RFC 4271 leaves it open; 100 is what all implementations use).
pub const DEFAULT_LOCAL_PREF: u32 = 100;

/// Calico maps route priority (the kernel metric) to LOCAL_PREF: they add up to this.
const PRIORITY_BASE: u32 = 2_147_483_647;

/// The priority that `BGPFilter` sees for a LOCAL_PREF.
pub const fn priority_of_local_pref(local_pref: u32) -> u32 {
    PRIORITY_BASE.saturating_sub(local_pref)
}

/// The LOCAL_PREF that a `BGPFilter` priority stands for.
pub const fn local_pref_of_priority(priority: u32) -> u32 {
    PRIORITY_BASE.saturating_sub(priority)
}

/// Why a route starts here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LocalKind {
    /// An address block affine to this node.
    Block,
    /// A workload or tunnel address of this node.
    Workload,
    /// A service address or service range.
    Service,
    /// A static announcement of the configuration.
    Static,
    /// A connected network.
    Direct,
}

/// How a prefix relates to the rule's CIDR (`matchOperator`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CidrOperator {
    /// The CIDR itself.
    Equal,
    /// Anything but the CIDR itself.
    NotEqual,
    /// The CIDR or inside it, within the length range.
    In,
    /// Not that.
    NotIn,
}

/// `cidr`, `matchOperator` and `prefixLength` of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CidrMatch {
    /// The CIDR.
    pub cidr: Prefix,
    /// The relation.
    pub operator: CidrOperator,
    /// Shortest and longest prefix, both included. Only `In` and `NotIn` look at it.
    pub length: (u8, u8),
}

impl CidrMatch {
    /// Without `prefixLength`: from the CIDR's own length to host routes.
    pub const fn new(cidr: Prefix, operator: CidrOperator) -> Self {
        Self {
            cidr,
            operator,
            length: (cidr.len(), cidr.family().max_prefix_len()),
        }
    }

    /// With `prefixLength`; a missing bound has its default.
    #[must_use]
    pub fn with_length(mut self, min: Option<u8>, max: Option<u8>) -> Self {
        self.length = (min.unwrap_or(self.length.0), max.unwrap_or(self.length.1));
        self
    }

    fn matches(&self, prefix: &Prefix) -> bool {
        let inside = || {
            self.cidr.contains(prefix) && (self.length.0..=self.length.1).contains(&prefix.len())
        };
        match self.operator {
            CidrOperator::Equal => *prefix == self.cidr,
            CidrOperator::NotEqual => *prefix != self.cidr,
            CidrOperator::In => inside(),
            CidrOperator::NotIn => !inside(),
        }
    }
}

/// A set of prefixes with "is anything of it around this prefix": pools, service ranges, local blocks.
/// One hash lookup per distinct length, however large the set is.
#[derive(Clone, Debug, Default)]
pub struct PrefixSet {
    members: HashSet<Prefix, RandomState>,
    lengths_v4: SmallVec<[u8; 4]>,
    lengths_v6: SmallVec<[u8; 4]>,
}

impl PrefixSet {
    /// Whether `prefix` itself is a member.
    pub fn has(&self, prefix: &Prefix) -> bool {
        self.members.contains(prefix)
    }

    /// Whether a member is, or encloses, `prefix`.
    pub fn covers(&self, prefix: &Prefix) -> bool {
        let lengths = match prefix.addr() {
            IpAddr::V4(_) => &self.lengths_v4,
            IpAddr::V6(_) => &self.lengths_v6,
        };
        lengths
            .iter()
            .filter(|len| **len <= prefix.len())
            .filter_map(|len| Prefix::new(prefix.addr(), *len))
            .any(|outer| self.members.contains(&outer))
    }

    /// Whether there is no member.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }
}

impl FromIterator<Prefix> for PrefixSet {
    fn from_iter<I: IntoIterator<Item = Prefix>>(iter: I) -> Self {
        let mut set = Self::default();
        for prefix in iter {
            let lengths = match prefix.addr() {
                IpAddr::V4(_) => &mut set.lengths_v4,
                IpAddr::V6(_) => &mut set.lengths_v6,
            };
            if !lengths.contains(&prefix.len()) {
                lengths.push(prefix.len());
            }
            set.members.insert(prefix);
        }
        set
    }
}

impl PartialEq for PrefixSet {
    fn eq(&self, other: &Self) -> bool {
        self.members == other.members
    }
}

impl Eq for PrefixSet {}

/// Which routes by origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceMatch {
    /// Learned from a BGP peer (`source: RemotePeers`).
    RemotePeers,
    /// Originated here, for any reason.
    AnyLocal,
    /// Originated here for this reason.
    Local(LocalKind),
}

/// Route priorities (see [`priority_of_local_pref`]), both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PriorityRange {
    /// Smallest.
    pub min: u32,
    /// Largest.
    pub max: u32,
}

/// One condition of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// `cidr` with `matchOperator` and `prefixLength`.
    Cidr(CidrMatch),
    /// `prefixLength` alone.
    Length {
        /// Shortest.
        min: u8,
        /// Longest.
        max: u8,
    },
    /// Is a member of the set, or inside one.
    CoveredBy(PrefixSet),
    /// Is exactly a member of the set.
    OneOf(PrefixSet),
    /// Where the route comes from.
    Source(SourceMatch),
    /// The route's interface (never true for routes without one).
    Interface(InterfacePattern),
    /// Kind of the session that the policy is applied to.
    PeerType(PeerKind),
    /// Has the community.
    Community(Community),
    /// Has the large community.
    LargeCommunity(LargeCommunity),
    /// AS_PATH starts with these numbers.
    AsPathPrefix(Box<[u32]>),
    /// Route priority is in the range.
    Priority(PriorityRange),
    /// The condition does not hold.
    Not(Box<Self>),
}

/// One change to a route that a rule accepts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Edit {
    /// Attach a community.
    AddCommunity(Community),
    /// Attach a large community.
    AddLargeCommunity(LargeCommunity),
    /// Put these numbers in front of AS_PATH.
    PrependAsPath(Box<[u32]>),
    /// Set LOCAL_PREF.
    SetLocalPref(u32),
    /// Set MED.
    SetMed(u32),
    /// Prefer the path over local routes (import; Calico's protocol preference 200 for a workload that is moving in).
    PreferOverLocal,
}

/// What a rule does with a route that meets its conditions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Final: take it, with the edits so far.
    Accept,
    /// Final: refuse it.
    Reject,
    /// Apply the edits and look at the following rules. They see the route unedited, except that [`Edit::SetLocalPref`]
    /// counts for later [`Condition::Priority`].
    Next,
}

/// Conditions, edits, action. No condition: always.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Where it comes from, for explanations ("BGPFilter x importV4[2]").
    pub origin: Box<str>,
    /// All must hold.
    pub conditions: Vec<Condition>,
    /// Applied on accept and next.
    pub edits: Vec<Edit>,
    /// The outcome.
    pub action: Action,
}

/// A route as a policy sees it.
#[derive(Clone, Copy, Debug)]
pub struct RouteView<'a> {
    /// Destination.
    pub prefix: Prefix,
    /// Attributes (before the policy).
    pub attributes: &'a Attributes,
    /// Where it comes from.
    pub source: RouteSource,
    /// Interface of a local route.
    pub interface: Option<&'a str>,
    /// Kind of the session that the policy is applied to.
    pub peer: PeerKind,
}

/// Which edits of a policy apply, in order, by number.
pub type EditSet = SmallVec<[u16; 4]>;

/// Outcome of an evaluation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Take it, with these edits (see [`Policy::apply`]).
    Accept(EditSet),
    /// Refuse it; the rule that did, or `None` for the default.
    Reject(Option<u16>),
}

/// A compiled, immutable list of rules.
#[derive(Clone, Debug)]
pub struct Policy {
    rules: Vec<CompiledRule>,
    edits: Vec<Edit>,
    default: Action,
    sources: Vec<Rule>,
}

#[derive(Clone, Debug)]
struct CompiledRule {
    conditions: Vec<Condition>,
    /// Range of `Policy::edits`.
    edits: (u16, u16),
    action: Action,
}

/// Builds a [`Policy`].
#[derive(Clone, Debug, Default)]
pub struct PolicyBuilder {
    rules: Vec<Rule>,
}

impl PolicyBuilder {
    /// Adds a rule at the end.
    #[must_use]
    pub fn rule(
        mut self,
        origin: &str,
        conditions: Vec<Condition>,
        edits: Vec<Edit>,
        action: Action,
    ) -> Self {
        self.rules.push(Rule {
            origin: origin.into(),
            conditions,
            edits,
            action,
        });
        self
    }

    /// Adds rules at the end.
    #[must_use]
    pub fn rules(mut self, rules: impl IntoIterator<Item = Rule>) -> Self {
        self.rules.extend(rules);
        self
    }

    /// Compiles. A route that no rule decides is accepted or refused as `accept_by_default` says.
    pub fn build(self, accept_by_default: bool) -> Policy {
        let mut edits: Vec<Edit> = Vec::new();
        let mut rules = Vec::with_capacity(self.rules.len());
        for rule in &self.rules {
            let number = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
            let start = number(edits.len());
            if rule.action != Action::Reject {
                edits.extend(rule.edits.iter().cloned());
            }
            rules.push(CompiledRule {
                conditions: rule.conditions.clone(),
                edits: (start, number(edits.len())),
                action: rule.action,
            });
        }
        let default = if accept_by_default {
            Action::Accept
        } else {
            Action::Reject
        };
        Policy {
            rules,
            edits,
            default,
            sources: self.rules,
        }
    }
}

impl Policy {
    /// Accepts everything unchanged.
    pub fn accept_all() -> Self {
        PolicyBuilder::default().build(true)
    }

    /// Refuses everything (RFC 8212).
    pub fn reject_all() -> Self {
        PolicyBuilder::default().build(false)
    }

    /// Decides about one route.
    pub fn evaluate(&self, route: &RouteView<'_>) -> Verdict {
        let mut edits = EditSet::new();
        let mut local_pref = route.attributes.local_pref.unwrap_or(DEFAULT_LOCAL_PREF);
        for (number, rule) in self.rules.iter().enumerate() {
            if !rule.conditions.iter().all(|c| holds(c, route, local_pref)) {
                continue;
            }
            match rule.action {
                Action::Reject => return Verdict::Reject(u16::try_from(number).ok()),
                Action::Accept | Action::Next => edits.extend(rule.edits.0..rule.edits.1),
            }
            if rule.action == Action::Accept {
                return Verdict::Accept(edits);
            }
            for edit in &self.edits[usize::from(rule.edits.0)..usize::from(rule.edits.1)] {
                if let Edit::SetLocalPref(value) = edit {
                    local_pref = *value;
                }
            }
        }
        match self.default {
            Action::Reject => Verdict::Reject(None),
            Action::Accept | Action::Next => Verdict::Accept(edits),
        }
    }

    /// Carries out the edits of a [`Verdict::Accept`] of this policy. Returns whether the path is to be preferred over local
    /// routes ([`Edit::PreferOverLocal`]).
    pub fn apply(&self, edits: &[u16], attributes: &mut Attributes) -> bool {
        let mut preferred = false;
        for edit in edits.iter().filter_map(|n| self.edits.get(usize::from(*n))) {
            match edit {
                Edit::AddCommunity(community) => attributes.add_community(*community),
                Edit::AddLargeCommunity(community) => attributes.add_large_community(*community),
                Edit::PrependAsPath(asns) => attributes.as_path = attributes.as_path.prepend(asns),
                Edit::SetLocalPref(value) => attributes.local_pref = Some(*value),
                Edit::SetMed(value) => attributes.med = Some(*value),
                Edit::PreferOverLocal => preferred = true,
            }
        }
        preferred
    }

    /// Whether applying the edits sets MED, which is then kept towards external peers.
    pub fn sets_med(&self, edits: &[u16]) -> bool {
        edits
            .iter()
            .any(|n| matches!(self.edits.get(usize::from(*n)), Some(Edit::SetMed(_))))
    }

    /// Name of the rule with this number, for explanations.
    pub fn rule_origin(&self, number: u16) -> Option<&str> {
        self.sources
            .get(usize::from(number))
            .map(|rule| &*rule.origin)
    }
}

impl PartialEq for Policy {
    fn eq(&self, other: &Self) -> bool {
        self.default == other.default && self.sources == other.sources
    }
}

impl Eq for Policy {}

impl Hash for Policy {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // Coarse on purpose: equality decides, and there are few policies.
        self.sources.len().hash(state);
        self.edits.hash(state);
        self.default.hash(state);
    }
}

fn holds(condition: &Condition, route: &RouteView<'_>, local_pref: u32) -> bool {
    let attributes = route.attributes;
    match condition {
        Condition::Cidr(cidr) => cidr.matches(&route.prefix),
        Condition::Length { min, max } => (*min..=*max).contains(&route.prefix.len()),
        Condition::CoveredBy(set) => set.covers(&route.prefix),
        Condition::OneOf(set) => set.has(&route.prefix),
        Condition::Source(source) => match (source, route.source) {
            (SourceMatch::RemotePeers, RouteSource::Bgp(_))
            | (SourceMatch::AnyLocal, RouteSource::Local(_)) => true,
            (SourceMatch::Local(wanted), RouteSource::Local(kind)) => *wanted == kind,
            _ => false,
        },
        Condition::Interface(pattern) => route.interface.is_some_and(|name| pattern.matches(name)),
        Condition::PeerType(kind) => *kind == route.peer,
        Condition::Community(community) => attributes.has_community(*community),
        Condition::LargeCommunity(c) => attributes.large_communities.binary_search(c).is_ok(),
        Condition::AsPathPrefix(asns) => attributes.as_path.starts_with(asns),
        Condition::Priority(range) => {
            (range.min..=range.max).contains(&priority_of_local_pref(local_pref))
        }
        Condition::Not(inner) => !holds(inner, route, local_pref),
    }
}
