//! Addresses by another IPAM plugin (`ipam.type: host-local`, say), as the CNI specification has plugins delegate: its executable is
//! looked for in `CNI_PATH` and called with the same environment and configuration. Only the plugin does that: the server
//! need not see the host's folders. The words that Calico takes for a node's own ranges are replaced before.

use std::io::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use cali_control::cni::Failure;
use serde_json::{Value, json};

use crate::spec::{self, code, failure, failure_of};

/// Words for the node's range of each family, in whatever case, and what stands for them where no address is asked for: then only
/// the container counts.
const POD_CIDR: [(&str, &str); 2] = [("usePodCidr", "0.0.0.0/0"), ("usePodCidrIPv6", "::/0")];
/// The newest version that an IPAM plugin of 2022 speaks; results look the same since.
const NEWEST: &str = "1.0.0";
/// The oldest version whose results are lists.
const OLDEST: &str = "0.3.1";

/// Another IPAM plugin.
#[derive(Debug)]
pub(crate) struct Delegate<'a> {
    kind: &'a str,
    program: PathBuf,
}

impl<'a> Delegate<'a> {
    /// Looks for it in the folders of `CNI_PATH`. `kind` is a file name ([`crate::config::Config::delegate`]).
    pub(crate) fn find(kind: &'a str, path: Option<&str>) -> Result<Self, Failure> {
        let Some(path) = path.filter(|path| !path.is_empty()) else {
            let msg = format!(
                "environment variable CNI_PATH is missing; ipam.type {kind:?} is looked for there"
            );
            return Err(failure(code::ENVIRONMENT, msg));
        };
        let found = std::env::split_paths(path)
            .map(|folder| folder.join(kind))
            .find(|program| program.is_file());
        match found {
            Some(program) => Ok(Self { kind, program }),
            None => Err(failure(
                code::CONFIGURATION,
                format!(
                    "ipam.type is {kind:?}, and there is no such plugin in {path}; install it there"
                ),
            )),
        }
    }

    /// Calls it. Nothing printed is null.
    pub(crate) fn call(&self, verb: &str, config: &Value) -> Result<Value, Failure> {
        let failed = |e: &dyn std::error::Error| {
            let msg = format!("cannot call {}", self.program.display());
            failure_of(code::IO, msg, e)
        };
        let mut child = Command::new(&self.program)
            .env("CNI_COMMAND", verb)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(|e| failed(&e))?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that ends early says why itself.
            let _ = stdin.write_all(config.to_string().as_bytes());
        }
        let output = child.wait_with_output().map_err(|e| failed(&e))?;
        let printed: Option<Value> = serde_json::from_slice(&output.stdout).ok();
        match printed {
            Some(result) if output.status.success() => Ok(result),
            None if output.status.success() && output.stdout.is_empty() => Ok(Value::Null),
            other => Err(self.complaint(verb, &output.status.to_string(), other.as_ref())),
        }
    }

    /// `STATUS` or `GC`, which plugins of before version 1.1 do not know.
    pub(crate) fn call_if_known(&self, verb: &str, config: &Value) -> Result<(), Failure> {
        match self.call(verb, config) {
            Err(f) if [code::INCOMPATIBLE_VERSION, code::ENVIRONMENT].contains(&f.code) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    fn complaint(&self, verb: &str, status: &str, printed: Option<&Value>) -> Failure {
        let text = |key: &str| printed.and_then(|p| p.get(key)?.as_str());
        let number = printed.and_then(|p| p.get("code")?.as_u64()?.try_into().ok());
        Failure {
            code: number.unwrap_or(code::IO),
            msg: format!(
                "{} says to {verb}: {}",
                self.kind,
                text("msg").unwrap_or("nothing that can be read")
            ),
            details: text("details").map_or_else(|| status.to_owned(), str::to_owned),
        }
    }
}

/// Whether the node's ranges have to be known before an `ADD`.
pub(crate) fn needs_pod_cidrs(config: &Value) -> bool {
    let mut config = config.clone();
    let mut needs = false;
    for subnet in subnets(&mut config) {
        needs |= word(subnet).is_some();
    }
    needs
}

/// The configuration for an `ADD`.
pub(crate) fn for_add(config: &Value, pod_cidrs: &[String]) -> Result<Value, Failure> {
    let mut config = in_known_version(config);
    for subnet in subnets(&mut config) {
        let Some(family) = word(subnet) else { continue };
        let range = pod_cidrs.iter().find(|c| c.contains(':') == (family == 1));
        let Some(range) = range else {
            let msg = format!(
                "ipam: {subnet} is asked for, and Kubernetes has given this node no such range (spec.podCIDRs of the Node: {pod_cidrs:?})"
            );
            return Err(failure(code::CONFIGURATION, msg));
        };
        *subnet = json!(range);
    }
    Ok(config)
}

/// The configuration for every other call.
pub(crate) fn for_others(config: &Value) -> Value {
    let mut config = in_known_version(config);
    for subnet in subnets(&mut config) {
        if let Some(family) = word(subnet) {
            *subnet = json!(POD_CIDR[family].1);
        }
    }
    config
}

/// A configuration for the others in the version of the call: `STATUS` and `GC` are of 1.1.
pub(crate) fn with_version(mut config: Value, call: &Value) -> Value {
    config["cniVersion"] = call["cniVersion"].clone();
    config
}

/// The addresses of a result.
pub(crate) fn addresses(kind: &str, result: &Value) -> Result<Vec<IpAddr>, Failure> {
    let ips = result.get("ips").and_then(Value::as_array);
    let addresses: Option<Vec<IpAddr>> = ips.into_iter().flatten().map(address).collect();
    match addresses {
        Some(addresses) if !addresses.is_empty() => Ok(addresses),
        _ => Err(failure(
            code::IO,
            format!("{kind} gave no address: {result}"),
        )),
    }
}

fn address(ip: &Value) -> Option<IpAddr> {
    let text = ip.get("address")?.as_str()?;
    text.split('/').next()?.parse().ok()
}

/// The family that a word stands for, as index of [`POD_CIDR`].
fn word(subnet: &Value) -> Option<usize> {
    let text = subnet.as_str()?;
    POD_CIDR
        .iter()
        .position(|(word, _)| word.eq_ignore_ascii_case(text))
}

/// `ipam.subnet`, and that of each range of `ipam.ranges`.
fn subnets(config: &mut Value) -> Vec<&mut Value> {
    let mut found = Vec::new();
    let Some(ipam) = config.get_mut("ipam").and_then(Value::as_object_mut) else {
        return found;
    };
    for (key, value) in ipam {
        match key.as_str() {
            "subnet" => found.push(value),
            "ranges" => {
                let sets = value.as_array_mut().into_iter().flatten();
                let ranges = sets.filter_map(Value::as_array_mut).flatten();
                found.extend(ranges.filter_map(|range| range.get_mut("subnet")));
            }
            _ => {}
        }
    }
    found
}

/// The same with a version that the other plugin speaks.
fn in_known_version(config: &Value) -> Value {
    let mut config = config.clone();
    let asked = config["cniVersion"]
        .as_str()
        .unwrap_or(spec::DEFAULT_VERSION);
    let version = match asked {
        newer if spec::at_least(newer, NEWEST) => NEWEST,
        older if !spec::at_least(older, OLDEST) => OLDEST,
        same => same,
    }
    .to_owned();
    if let Some(previous) = config.get_mut("prevResult").filter(|p| p.is_object()) {
        previous["cniVersion"] = json!(version);
    }
    config["cniVersion"] = json!(version);
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(ipam: Value) -> Value {
        json!({"cniVersion": "1.1.0", "name": "n", "ipam": ipam, "prevResult": {"cniVersion": "1.1.0"}})
    }

    #[test]
    fn words_become_the_nodes_ranges() {
        let ranges = ["10.1.2.0/24".to_owned(), "fd00:1::/64".to_owned()];
        let top = config(json!({"type": "host-local", "subnet": "usepodcidr"}));
        assert!(needs_pod_cidrs(&top));
        let given = for_add(&top, &ranges).unwrap();
        assert_eq!(given["ipam"]["subnet"], "10.1.2.0/24");
        let both = config(
            json!({"type": "host-local", "ranges": [[{"subnet": "usePodCidr"}], [{"subnet": "usePodCidrIPv6"}]]}),
        );
        let given = for_add(&both, &ranges).unwrap();
        assert_eq!(
            given["ipam"]["ranges"],
            json!([[{"subnet": "10.1.2.0/24"}], [{"subnet": "fd00:1::/64"}]])
        );
        assert_eq!(
            for_others(&both)["ipam"]["ranges"],
            json!([[{"subnet": "0.0.0.0/0"}], [{"subnet": "::/0"}]])
        );
        assert_eq!(
            for_add(&both, &ranges[..1]).unwrap_err().code,
            code::CONFIGURATION
        );
        let fixed = config(json!({"type": "host-local", "subnet": "10.9.0.0/24"}));
        assert!(!needs_pod_cidrs(&fixed));
        assert_eq!(for_add(&fixed, &[]).unwrap()["ipam"], fixed["ipam"]);
    }

    #[test]
    fn the_version_is_one_that_the_other_speaks() {
        let of = |version: &str| {
            let mut config = config(json!({}));
            config["cniVersion"] = json!(version);
            for_others(&config)
        };
        assert_eq!(of("1.1.0")["cniVersion"], "1.0.0");
        assert_eq!(of("1.1.0")["prevResult"]["cniVersion"], "1.0.0");
        assert_eq!(of("0.4.0")["cniVersion"], "0.4.0");
        assert_eq!(of("0.1.0")["cniVersion"], "0.3.1");
    }

    #[test]
    fn a_result_without_addresses_is_none() {
        let given = json!({"ips": [{"address": "10.0.0.2/24"}, {"address": "fd00::2/64"}]});
        let wanted: Vec<IpAddr> = ["10.0.0.2", "fd00::2"].map(|a| a.parse().unwrap()).into();
        assert_eq!(addresses("x", &given).unwrap(), wanted);
        for bad in [
            json!(null),
            json!({"ips": []}),
            json!({"ips": [{"address": "?"}]}),
        ] {
            assert!(addresses("x", &bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_plugin_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        let missing = Delegate::find("host-local", Some(path)).unwrap_err();
        assert!(missing.msg.contains("host-local") && missing.msg.contains(path));
        assert_eq!(
            Delegate::find("host-local", None).unwrap_err().code,
            code::ENVIRONMENT
        );
    }
}
