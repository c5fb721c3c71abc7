//! The full condition behind a selector of a policy or rule: the selector itself, and the limits on
//! namespace and service account that stand around it.
//!
//! A policy's text spreads one condition over several fields (`selector`, `namespaceSelector`,
//! `serviceAccounts`, the policy's own namespace). An endpoint inherits its namespace's labels with
//! the prefix `pcns.` and its service account's with `pcsa.`, so all terms look at one set of labels.

use std::fmt::{self, Write};
use std::sync::Arc;

use cali_api::selector::{Labels, Selector};
use sha2::{Digest, Sha256};

/// The label that names an endpoint's namespace.
pub(crate) const NAMESPACE_LABEL: &str = "projectcalico.org/namespace";
/// The label that names an endpoint's service account.
pub(crate) const SERVICE_ACCOUNT_LABEL: &str = "projectcalico.org/serviceaccount";

#[derive(Debug, Clone)]
enum Term {
    /// On the item's labels.
    Labels(Selector),
    /// Not so, on the item's labels.
    NotLabels(Selector),
    /// On the labels of the item's namespace.
    Namespace(Selector),
    /// On the labels of the item's service account.
    ServiceAccount(Selector),
    /// In this namespace.
    InNamespace(Arc<str>),
    /// In some namespace, or in none.
    Namespaced(bool),
    /// The service account is one of these.
    ServiceAccountNames(Vec<String>),
}

/// A conjunction of terms. Without any it matches everything.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scope {
    terms: Vec<Term>,
}

impl Scope {
    /// Limits the scope to items with these labels. A selector for everything adds nothing.
    pub(crate) fn labels(mut self, selector: Selector) -> Self {
        if selector.to_string() != "all()" {
            self.terms.push(Term::Labels(selector));
        }
        self
    }

    /// Limits the scope to items without these labels.
    pub(crate) fn not_labels(mut self, selector: Selector) -> Self {
        self.terms.push(Term::NotLabels(selector));
        self
    }

    /// Limits the scope by a namespace selector: `all()` means in any namespace, `global()` in none.
    pub(crate) fn namespaces(mut self, selector: Selector) -> Self {
        self.terms.push(match selector.to_string().as_str() {
            "all()" => Term::Namespaced(true),
            "global()" => Term::Namespaced(false),
            _ => Term::Namespace(selector),
        });
        self
    }

    /// Limits the scope to one namespace.
    pub(crate) fn in_namespace(mut self, namespace: impl Into<Arc<str>>) -> Self {
        self.terms.push(Term::InNamespace(namespace.into()));
        self
    }

    /// Limits the scope by the labels of the service account.
    pub(crate) fn service_accounts(mut self, selector: Selector) -> Self {
        self.terms.push(Term::ServiceAccount(selector));
        self
    }

    /// Limits the scope to service accounts with one of these names.
    pub(crate) fn service_account_names(mut self, names: &[String]) -> Self {
        let mut names = names.to_vec();
        names.sort_unstable();
        names.dedup();
        self.terms.push(Term::ServiceAccountNames(names));
        self
    }

    /// Whether an item with these labels is meant.
    pub(super) fn matches<L: Labels>(&self, labels: &L) -> bool {
        self.terms.iter().all(|term| match term {
            Term::Labels(selector) => selector.matches(labels),
            Term::NotLabels(selector) => !selector.matches(labels),
            Term::Namespace(selector) => selector.matches(&Prefixed { prefix: "pcns.", labels }),
            Term::ServiceAccount(selector) => selector.matches(&Prefixed { prefix: "pcsa.", labels }),
            Term::InNamespace(namespace) => labels.get(NAMESPACE_LABEL) == Some(namespace),
            Term::Namespaced(expected) => labels.get(NAMESPACE_LABEL).is_some() == *expected,
            Term::ServiceAccountNames(names) => {
                labels.get(SERVICE_ACCOUNT_LABEL).is_some_and(|name| names.iter().any(|one| one == name))
            }
        })
    }

    /// The one namespace that the scope is limited to, if there is one.
    pub(super) fn namespace(&self) -> Option<&Arc<str>> {
        self.terms.iter().find_map(|term| match term {
            Term::InNamespace(namespace) => Some(namespace),
            _ => None,
        })
    }

    /// The same for equal texts, in every process.
    pub(super) fn identity(&self, prefix: &str) -> String {
        let digest = Sha256::digest(self.to_string());
        digest.iter().take(12).fold(format!("{prefix}-"), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.terms.is_empty() {
            return f.write_str("all()");
        }
        for (at, term) in self.terms.iter().enumerate() {
            if at > 0 {
                f.write_str(" && ")?;
            }
            match term {
                Term::Labels(selector) => write!(f, "({selector})")?,
                Term::NotLabels(selector) => write!(f, "!({selector})")?,
                Term::Namespace(selector) => write!(f, "namespace ({selector})")?,
                Term::ServiceAccount(selector) => write!(f, "serviceaccount ({selector})")?,
                Term::InNamespace(namespace) => write!(f, "{NAMESPACE_LABEL} == '{namespace}'")?,
                Term::Namespaced(true) => write!(f, "has({NAMESPACE_LABEL})")?,
                Term::Namespaced(false) => write!(f, "!has({NAMESPACE_LABEL})")?,
                Term::ServiceAccountNames(names) => {
                    write!(f, "{SERVICE_ACCOUNT_LABEL} in {{'{}'}}", names.join("', '"))?;
                }
            }
        }
        Ok(())
    }
}

/// Labels as a namespace's or service account's own selector names them.
struct Prefixed<'a, L> {
    prefix: &'static str,
    labels: &'a L,
}

impl<L: Labels> Labels for Prefixed<'_, L> {
    fn get(&self, key: &str) -> Option<&str> {
        if key == NAMESPACE_LABEL {
            return self.labels.get(key);
        }
        self.labels.get(&[self.prefix, key].concat())
    }
}
