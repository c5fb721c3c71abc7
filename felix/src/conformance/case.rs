//! Cases as users write them.

use std::collections::BTreeMap;
use std::sync::Arc;

use cali_api::AnyResource;
use serde::Deserialize;
use serde_json::{Value, json};

use super::lab::{Lab, Place};
use super::probe::Probe;

/// The node's name in the objects of a case.
pub const NODE: &str = "node";
/// The place beyond `eth0`.
pub const WORLD: &str = "world";
/// The place beyond `eth1`.
pub const LAN: &str = "lan";
/// The node itself.
pub const HOST: &str = "host";

/// A file of cases.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct File {
    /// The cases, in order.
    pub cases: Vec<Case>,
}

/// One case.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Case {
    /// The fact that it shows.
    pub name: String,
    /// Namespaces with their labels.
    #[serde(default)]
    pub namespaces: BTreeMap<String, BTreeMap<String, String>>,
    /// Pods.
    #[serde(default)]
    pub pods: Vec<Pod>,
    /// Further objects: policies, sets, endpoints.
    #[serde(default)]
    pub objects: Vec<Value>,
    /// Problems that the conversion of native objects must report, each by a part of its text.
    #[serde(default)]
    pub problems: Vec<String>,
    /// Probes with what must come of them.
    pub probes: Vec<ProbeText>,
}

/// A pod.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Pod {
    /// `namespace/name`.
    pub name: String,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Container ports.
    #[serde(default)]
    pub ports: Vec<Value>,
    /// Its service account.
    #[serde(default)]
    pub service_account: Option<String>,
}

/// A probe.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ProbeText {
    /// Pod, `world`, `lan` or `host`.
    pub from: String,
    /// Pod, `world`, `lan` or `host`.
    pub to: String,
    /// What [`Probe`] reads.
    pub what: String,
    /// Port of the sender; any when absent.
    #[serde(default)]
    pub source_port: u16,
    /// 4 or 6; both when absent.
    #[serde(default)]
    pub ip_version: Option<u8>,
    /// The denial comes without an answer.
    #[serde(default)]
    pub silent: bool,
    /// What must come of it.
    pub allowed: bool,
    /// What would come of it if staged policies were committed.
    #[serde(default)]
    pub staged: Option<bool>,
}

impl ProbeText {
    /// What to send.
    ///
    /// # Errors
    /// The text is no probe.
    pub fn what(&self) -> Result<Probe, String> {
        self.what.parse().map_err(|error| format!("{error}"))
    }
}

impl Case {
    /// All objects as the graph gets them: native ones converted, wired to the lab's interfaces.
    ///
    /// # Errors
    /// An object cannot be read, or its conversion reports another problem than the case names.
    pub fn objects(&self, lab: &Lab) -> Result<Vec<Arc<AnyResource>>, String> {
        let mut objects = Vec::new();
        let mut expected: Vec<&String> = self.problems.iter().collect();
        for value in self.manifests(lab)? {
            let text = value.to_string();
            let object = AnyResource::from_json(value)
                .map_err(|error| format!("{}: {error}: {text}", self.name))?;
            let converted = cali_api::kubernetes::convert(&object);
            for problem in converted.problems {
                let known = expected.iter().position(|part| problem.contains(*part));
                match known {
                    Some(known) => expected.swap_remove(known),
                    None => return Err(format!("{}: {problem}", self.name)),
                };
            }
            objects.extend(converted.resources);
        }
        if let Some(missing) = expected.first() {
            return Err(format!("{}: nobody reports {missing:?}", self.name));
        }
        for object in &mut objects {
            if let AnyResource::WorkloadEndpoint(endpoint) = object {
                let nets = &endpoint.spec.ip_networks;
                let here = |place: &&Place| nets.iter().any(|net| net.contains(place.v4.into()));
                if let Some(place) = lab.pods.iter().find(here) {
                    endpoint.spec.interface_name.clone_from(&place.interface);
                }
            }
        }
        Ok(objects.into_iter().map(Arc::new).collect())
    }

    fn manifests(&self, lab: &Lab) -> Result<Vec<Value>, String> {
        if self.pods.len() > lab.pods.len() {
            return Err(format!("{}: more pods than the lab has", self.name));
        }
        let mut all = Vec::new();
        for (name, labels) in &self.namespaces {
            all.push(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}));
        }
        let mut settings = json!({"nftablesFilterDenyAction": "Reject", "iptablesFilterDenyAction": "Reject",
                                  "defaultEndpointToHostAction": "Accept"});
        for object in &self.objects {
            if object["kind"] == "FelixConfiguration" && object["metadata"]["name"] == "default" {
                for (name, value) in object["spec"].as_object().into_iter().flatten() {
                    settings[name] = value.clone();
                }
            } else {
                all.push(object.clone());
            }
        }
        all.push(
            json!({"apiVersion": "projectcalico.org/v3", "kind": "FelixConfiguration",
                        "metadata": {"name": "default"}, "spec": settings}),
        );
        for (pod, place) in self.pods.iter().zip(&lab.pods) {
            let Some((namespace, name)) = pod.name.split_once('/') else {
                return Err(format!(
                    "{}: {:?} is not namespace/name",
                    self.name, pod.name
                ));
            };
            all.push(json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"namespace": namespace, "name": name, "labels": pod.labels},
                "spec": {"nodeName": NODE, "serviceAccountName": pod.service_account,
                         "containers": [{"name": "c", "ports": pod.ports}]},
                "status": {"phase": "Running", "podIP": place.v4, "podIPs": [{"ip": place.v4}, {"ip": place.v6}]},
            }));
        }
        Ok(all)
    }

    /// The place of a name; `None` for the node itself.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn place<'a>(&self, lab: &'a Lab, name: &str) -> Result<Option<&'a Place>, String> {
        match name {
            HOST => return Ok(None),
            WORLD => return Ok(Some(&lab.world)),
            LAN => return Ok(Some(&lab.lan)),
            _ => {}
        }
        let number = self.pods.iter().position(|pod| pod.name == name);
        number
            .and_then(|number| lab.pods.get(number))
            .map(Some)
            .ok_or_else(|| format!("{}: no pod {name}", self.name))
    }
}
