//! Route filters: compiled rules as pure functions.
//!
//! A [`Policy`] is an ordered list of [`Rule`]s. All conditions of a rule must hold; the first rule with a final action
//! decides, [`Action::Next`] applies its edits and goes on. Calico's `BGPFilter` rules and its built-in import and export
//! bodies are such lists, made by `config` from resources. Nothing here knows about resources.
//!
//! Evaluation never edits: it returns which edits apply ([`Verdict`]), so that the table can apply one combination of edits once
//! to attributes that many prefixes share.

mod model;
mod pattern;

pub use model::{
    Action, CidrMatch, CidrOperator, Condition, DEFAULT_LOCAL_PREF, Edit, EditSet, LocalKind,
    Policy, PolicyBuilder, PrefixSet, PriorityRange, RouteView, Rule, SourceMatch, Verdict,
    local_pref_of_priority, priority_of_local_pref,
};
pub use pattern::InterfacePattern;
