//! The configuration file: a `CalicoAPIConfig`, as `calicoctl` reads it, as the environment's variables. Pure.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Fields of `spec` and the variables of the same meaning.
const FIELDS: [(&str, &str); 19] = [
    ("datastoreType", "DATASTORE_TYPE"),
    ("sqlitePath", "CALI_SQLITE_PATH"),
    ("etcdEndpoints", "ETCD_ENDPOINTS"),
    ("etcdDiscoverySrv", "ETCD_DISCOVERY_SRV"),
    ("etcdUsername", "ETCD_USERNAME"),
    ("etcdPassword", "ETCD_PASSWORD"),
    ("etcdKeyFile", "ETCD_KEY_FILE"),
    ("etcdCertFile", "ETCD_CERT_FILE"),
    ("etcdCACertFile", "ETCD_CA_CERT_FILE"),
    ("kubeconfig", "KUBECONFIG"),
    ("kubeconfigInline", "K8S_KUBECONFIG_INLINE"),
    ("k8sAPIEndpoint", "K8S_API_ENDPOINT"),
    ("k8sKeyFile", "K8S_KEY_FILE"),
    ("k8sCertFile", "K8S_CERT_FILE"),
    ("k8sCAFile", "K8S_CA_FILE"),
    ("k8sAPIToken", "K8S_API_TOKEN"),
    ("k8sInsecureSkipTLSVerify", "K8S_INSECURE_SKIP_TLS_VERIFY"),
    ("k8sCurrentContext", "K8S_CURRENT_CONTEXT"),
    ("calicoAPIGroup", "CALICO_API_GROUP"),
];

/// Settings of Calico's client that mean nothing here: limits of requests, and what only its daemons read.
const WITHOUT_MEANING: [&str; 4] = [
    "k8sDisableNodePoll",
    "k8sUsePodCIDR",
    "k8sClientQPS",
    "k8sClientBurst",
];

/// PEM text in the file itself.
const INLINE: [(&str, &str); 3] = [
    ("etcdKey", "etcdKeyFile"),
    ("etcdCert", "etcdCertFile"),
    ("etcdCACert", "etcdCACertFile"),
];

/// The variables that the file `name` stands for.
pub(super) fn variables(name: &str, text: &str) -> Result<BTreeMap<String, String>> {
    let document: Value =
        serde_saphyr::from_str(text).with_context(|| format!("{name} is no YAML"))?;
    let kind = document["kind"].as_str().unwrap_or_default();
    let version = document["apiVersion"].as_str().unwrap_or_default();
    if (kind, version) != ("CalicoAPIConfig", "projectcalico.org/v3") {
        bail!(
            "{name} is no configuration of this program: it begins with apiVersion: projectcalico.org/v3 and kind: CalicoAPIConfig"
        );
    }
    let mut variables = BTreeMap::new();
    let spec = match &document["spec"] {
        Value::Null => return Ok(variables),
        Value::Object(spec) => spec,
        other => bail!("{name}: spec is {other}, it must be fields and their values"),
    };
    for (field, value) in spec {
        if let Some((_, variable)) = FIELDS.iter().find(|(known, _)| known == field) {
            let text = match value {
                Value::Null => continue,
                Value::String(text) => text.clone(),
                Value::Bool(_) | Value::Number(_) => value.to_string(),
                other => bail!("{name}: spec.{field} is {other}, it must be a text"),
            };
            if !text.is_empty() {
                variables.insert((*variable).to_owned(), text);
            }
        } else if let Some((_, instead)) = INLINE.iter().find(|(known, _)| known == field) {
            bail!(
                "{name}: spec.{field} holds a PEM text, which is not read: write it into a file and name that in {instead}"
            );
        } else if !WITHOUT_MEANING.contains(&field.as_str()) {
            let known: Vec<&str> = FIELDS.iter().map(|(known, _)| *known).collect();
            bail!(
                "{name}: there is no field spec.{field}; there are {}",
                known.join(", ")
            );
        }
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "apiVersion: projectcalico.org/v3\nkind: CalicoAPIConfig\nmetadata:\n";

    #[test]
    fn calicos_file_is_the_environments_variables() {
        let text = format!(
            "{HEAD}spec:\n  datastoreType: etcdv3\n  etcdEndpoints: 'https://a:2379,https://b:2379'\n  etcdPassword: ''\n  \
             k8sInsecureSkipTLSVerify: true\n  k8sClientQPS: 50\n"
        );
        let found = variables("f", &text).expect("a configuration");
        let found: Vec<(&str, &str)> = found
            .iter()
            .map(|(n, v)| (n.as_str(), v.as_str()))
            .collect();
        assert_eq!(
            found,
            [
                ("DATASTORE_TYPE", "etcdv3"),
                ("ETCD_ENDPOINTS", "https://a:2379,https://b:2379"),
                ("K8S_INSECURE_SKIP_TLS_VERIFY", "true"),
            ]
        );
        assert!(variables("f", HEAD).expect("a configuration").is_empty());
    }

    #[test]
    fn what_it_cannot_mean_is_refused_with_the_place() {
        for (text, reason) in [
            ("kind: Pod", "begins with"),
            ("{", "no YAML"),
            (
                &format!("{HEAD}spec: {{datastore: etcdv3}}"),
                "no field spec.datastore",
            ),
            (&format!("{HEAD}spec: {{etcdCert: PEM}}"), "etcdCertFile"),
            (
                &format!("{HEAD}spec: {{kubeconfig: [a]}}"),
                "must be a text",
            ),
            (&format!("{HEAD}spec: 1"), "must be fields"),
        ] {
            let error = format!("{:#}", variables("the-file", text).expect_err(text));
            assert!(
                error.contains("the-file") && error.contains(reason),
                "{error}"
            );
        }
    }
}
