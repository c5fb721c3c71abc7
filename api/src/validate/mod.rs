//! What Calico refuses although it can be read.
//!
//! The checks are those of Calico's schemas and client libraries, in one place for every
//! datastore. References between objects (does the tier exist, do pools overlap) are not checked
//! here: that needs the other objects.

mod addressing;
mod names;
mod policy;

use regex::Regex;

use crate::AnyResource;
use crate::kubernetes;
use crate::selector::{MAX_LENGTH, Selector};

/// What is wrong with a field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {message}")]
pub struct FieldError {
    /// The field, such as `spec.ingress[0].source.selector`.
    pub path: String,
    /// What is wrong with it.
    pub message: String,
}

/// Collects what is wrong.
#[derive(Debug, Default)]
struct Findings(Vec<FieldError>);

impl Findings {
    fn add(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.0.push(FieldError {
            path: path.into(),
            message: message.into(),
        });
    }

    fn require(&mut self, holds: bool, path: &str, message: &str) {
        if !holds {
            self.add(path, message);
        }
    }

    /// A selector that must parse; `global()` is only for namespace selectors of rules.
    fn selector(&mut self, path: &str, expression: &str, global_allowed: bool) {
        if expression.len() > MAX_LENGTH {
            self.add(path, format!("is longer than {MAX_LENGTH} characters"));
        }
        match Selector::parse(expression) {
            Ok(selector) if !global_allowed && selector.uses_global() => {
                self.add(
                    path,
                    "global() is only allowed in the namespaceSelector of a rule",
                );
            }
            Ok(_) => {}
            Err(error) => self.add(path, format!("not a selector: {error}")),
        }
    }

    fn regex(&mut self, path: &str, expression: &str) {
        if let Err(error) = Regex::new(expression) {
            let text = error.to_string();
            let reason = text
                .lines()
                .last()
                .unwrap_or_default()
                .trim_start_matches("error: ");
            self.add(path, format!("not a regular expression: {reason}"));
        }
    }
}

/// What the conversion would leave out. A rule that has no effect is not wrong.
fn kubernetes_network_policy(object: &AnyResource, findings: &mut Findings) {
    for problem in kubernetes::convert(object).problems {
        if let Some((path, message)) = problem.split_once(": ")
            && path.starts_with("spec.")
        {
            findings.add(path, message);
        }
    }
}

/// Checks an object against Calico's rules; tells all that is wrong.
pub fn validate(object: &AnyResource) -> Result<(), Vec<FieldError>> {
    let mut findings = Findings::default();
    names::check(object, &mut findings);
    match object {
        AnyResource::NetworkPolicy(object) => policy::network_policy(&object.spec, &mut findings),
        AnyResource::GlobalNetworkPolicy(object) => {
            policy::global_network_policy(&object.spec, &mut findings)
        }
        AnyResource::StagedNetworkPolicy(object) => {
            policy::staged_network_policy(&object.spec, &mut findings)
        }
        AnyResource::StagedGlobalNetworkPolicy(object) => {
            policy::staged_global_network_policy(&object.spec, &mut findings);
        }
        AnyResource::Tier(object) => {
            policy::tier(&object.metadata.name, &object.spec, &mut findings)
        }
        AnyResource::Profile(object) => policy::profile(&object.spec, &mut findings),
        AnyResource::IPPool(object) => addressing::pool(&object.spec, &mut findings),
        AnyResource::IPAMConfiguration(object) => {
            addressing::ipam_configuration(&object.spec, &mut findings)
        }
        AnyResource::Node(object) => addressing::node(&object.spec, &mut findings),
        AnyResource::BGPConfiguration(object) => {
            addressing::bgp_configuration(&object.spec, &mut findings)
        }
        AnyResource::BGPPeer(object) => addressing::bgp_peer(&object.spec, &mut findings),
        AnyResource::BGPFilter(object) => addressing::bgp_filter(&object.spec, &mut findings),
        AnyResource::HostEndpoint(object) => addressing::host_endpoint(&object.spec, &mut findings),
        AnyResource::WorkloadEndpoint(object) => {
            addressing::workload_endpoint(&object.spec, &mut findings)
        }
        AnyResource::FelixConfiguration(object) => {
            addressing::felix_configuration(&object.spec, &mut findings)
        }
        // An API server checks these itself; the other datastores take them as users wrote them.
        AnyResource::K8sNetworkPolicy(_) => kubernetes_network_policy(object, &mut findings),
        _ => {}
    }
    if findings.0.is_empty() {
        Ok(())
    } else {
        Err(findings.0)
    }
}

#[cfg(test)]
mod tests;
