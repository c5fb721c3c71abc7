//! What the node on which this command runs says of policies and endpoints: the column PROGRAMMED of `calictl get -o wide`.

use crate::sockets;
use cali_api::{Key, Kind};
use cali_control::paths::run_dir;
use cali_control::status::{EndpointStatus, NodeRequest, NodeResponse, Quarantined};

/// The node's words about its endpoints, and about what it cannot use or the kernel refused.
#[derive(Debug, Default)]
pub(crate) struct Programmed {
    endpoints: Vec<EndpointStatus>,
    quarantined: Vec<Quarantined>,
}

impl Programmed {
    /// Asks the node; `None` for kinds of which it says nothing, and where no node answers.
    pub(crate) async fn ask(kind: Kind) -> Option<Self> {
        if !matches!(
            kind,
            Kind::NetworkPolicy | Kind::GlobalNetworkPolicy | Kind::WorkloadEndpoint
        ) {
            return None;
        }
        let run_dir = run_dir();
        let endpoints = sockets::node(&run_dir, NodeRequest::Endpoints).await.ok()?;
        let status = sockets::node(&run_dir, NodeRequest::Status).await.ok()?;
        match (endpoints, status) {
            (NodeResponse::Endpoints(endpoints), NodeResponse::Status(status)) => Some(Self {
                endpoints,
                quarantined: status.quarantined,
            }),
            _ => None,
        }
    }

    /// What is said of an object; `-` where it has nothing to do with this node.
    pub(crate) fn cell(&self, key: &Key) -> String {
        match key.kind {
            Kind::WorkloadEndpoint => self.endpoint(key),
            _ => self.policy(key),
        }
    }

    fn endpoint(&self, key: &Key) -> String {
        let namespace = key.namespace.as_deref().unwrap_or_default();
        let name = format!("{namespace}/{}", key.name);
        let found = self
            .endpoints
            .iter()
            .find(|endpoint| endpoint.endpoint == name);
        match found {
            None => "-".to_owned(),
            Some(endpoint) => match &endpoint.problem {
                None => "yes".to_owned(),
                Some(problem) => format!("no: {problem}"),
            },
        }
    }

    fn policy(&self, key: &Key) -> String {
        let text = key.to_string();
        let refused = self.quarantined.iter().find(|one| {
            one.object == text
                || one.caused_by.contains(&text)
                || felix::compile::is_chain_of(&one.object, key)
        });
        if let Some(refused) = refused {
            return format!("no: {}", refused.reason);
        }
        let users = self
            .endpoints
            .iter()
            .filter(|endpoint| endpoint.policies.contains(&text));
        let users: Vec<&EndpointStatus> = users.collect();
        let done = users.iter().filter(|endpoint| endpoint.programmed).count();
        match users.iter().find_map(|endpoint| endpoint.problem.as_ref()) {
            _ if users.is_empty() => "-".to_owned(),
            Some(problem) => format!("{done} of {} endpoints: {problem}", users.len()),
            None => format!("yes, {done} endpoints"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(name: &str) -> Key {
        Key::namespaced(Kind::NetworkPolicy, "a", name)
    }

    fn endpoint(name: &str, policies: &[&str], problem: Option<&str>) -> EndpointStatus {
        EndpointStatus {
            endpoint: format!("a/{name}"),
            interface: format!("cali{name}"),
            addresses: Vec::new(),
            policies: policies
                .iter()
                .map(|name| policy(name).to_string())
                .collect(),
            programmed: problem.is_none(),
            problem: problem.map(str::to_owned),
        }
    }

    #[test]
    fn policies_and_endpoints_say_whether_they_are_in_the_kernel_and_why_not() {
        let quarantined = |object: String, reason: &str| Quarantined {
            object,
            reason: reason.to_owned(),
            caused_by: Vec::new(),
        };
        let node = Programmed {
            endpoints: vec![
                endpoint("one", &["good", "half"], None),
                endpoint("two", &["half"], Some("no interface")),
            ],
            quarantined: vec![
                quarantined(policy("bad").to_string(), "selector: unexpected end"),
                quarantined("chain cali-pi-np/a/refused".to_owned(), "EINVAL"),
            ],
        };
        for (name, cell) in [
            ("good", "yes, 1 endpoints"),
            ("half", "1 of 2 endpoints: no interface"),
            ("elsewhere", "-"),
            ("bad", "no: selector: unexpected end"),
            ("refused", "no: EINVAL"),
        ] {
            assert_eq!(node.cell(&policy(name)), cell, "{name}");
        }
        let workload = |name: &str| Key::namespaced(Kind::WorkloadEndpoint, "a", name);
        assert_eq!(node.cell(&workload("one")), "yes");
        assert_eq!(node.cell(&workload("two")), "no: no interface");
        assert_eq!(node.cell(&workload("three")), "-");
    }
}
