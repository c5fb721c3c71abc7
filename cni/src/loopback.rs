//! The plugin `loopback`: brings `lo` of a pod's namespace up. containerd calls it for every pod before it looks at any list, by
//! this name, and starts no pod without it; the node's server has no part in it.

use std::path::Path;
use std::process::ExitCode;

use cali_control::cni::{Command, Failure};
use cali_netlink::{NetNs, Netlink};
use serde_json::{Value, json};

use crate::config::Config;
use crate::plugin::{self, Called};
use crate::spec::{Call, at_least, code, failure, failure_of};

/// The name that a runtime calls it by.
pub const NAME: &str = "loopback";
/// The device's name in every namespace.
const DEVICE: &str = "lo";

/// Whether this program was called as this plugin: by the last part of the path that it was started with.
#[must_use]
pub fn is_called(program: &str) -> bool {
    Path::new(program)
        .file_name()
        .is_some_and(|name| name == NAME)
}

/// Runs the executable.
#[must_use]
pub fn run() -> ExitCode {
    let (version, result) = match plugin::read_call() {
        Called::Answered(version, result) => (version, result),
        Called::With {
            call,
            config,
            known,
        } => {
            let result = serve(&call, &config, &known);
            (known.cni_version, result)
        }
    };
    plugin::print(&version, result)
}

fn serve(call: &Call, config: &Value, known: &Config) -> Result<Value, Failure> {
    match call.command {
        Command::Add => {
            set(&call.netns, true)?;
            let before = config.get("prevResult").filter(|value| value.is_object());
            Ok(before
                .cloned()
                .unwrap_or_else(|| added(&call.netns, &known.cni_version)))
        }
        // A namespace that is gone has no device.
        Command::Del if !Path::new(&call.netns).exists() => Ok(Value::Null),
        Command::Del => set(&call.netns, false).map(|()| Value::Null),
        Command::Check => match is_up(&call.netns)? {
            true => Ok(Value::Null),
            false => Err(failure(
                code::CHECK,
                format!("{DEVICE} is down in {}", call.netns),
            )),
        },
        Command::Gc | Command::Status | Command::PodCidrs => Ok(Value::Null),
    }
}

/// The result of an `ADD`: what the kernel gives to the device when it goes up.
fn added(netns: &str, version: &str) -> Value {
    let (four, six) = ("127.0.0.1/8", "::1/128");
    if !at_least(version, "0.3.0") {
        return json!({"cniVersion": version, "ip4": {"ip": four}, "ip6": {"ip": six}, "dns": {}});
    }
    let ip = |address: &str, family: &str| {
        let mut ip = json!({"address": address, "interface": 0});
        if !at_least(version, "1.0.0") {
            ip["version"] = json!(family);
        }
        ip
    };
    json!({
        "cniVersion": version,
        "interfaces": [{"name": DEVICE, "mac": "00:00:00:00:00:00", "sandbox": netns}],
        "ips": [ip(four, "4"), ip(six, "6")],
        "dns": {},
    })
}

fn open(netns: &str) -> Result<NetNs, Failure> {
    NetNs::open_path(Path::new(netns)).map_err(|e| {
        let msg = "environment variable CNI_NETNS: cannot open the namespace";
        failure_of(code::ENVIRONMENT, msg, &e)
    })
}

fn kernel(error: &dyn std::error::Error) -> Failure {
    failure_of(
        code::KERNEL,
        format!("cannot look after {DEVICE} of the namespace"),
        error,
    )
}

/// Runs with a handle on the namespace's network.
fn within<T>(
    netns: &str,
    work: impl AsyncFnOnce(Netlink) -> Result<T, cali_netlink::Error>,
) -> Result<T, Failure> {
    let netns = open(netns)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| kernel(&e))?;
    runtime
        .block_on(async { work(Netlink::open(&netns)?).await })
        .map_err(|e| kernel(&e))
}

fn set(netns: &str, up: bool) -> Result<(), Failure> {
    within(netns, async |pod| match pod.link_by_name(DEVICE)? {
        Some(link) => pod.set_link_up(link.index, up).await,
        None => Ok(()),
    })
}

fn is_up(netns: &str) -> Result<bool, Failure> {
    within(netns, async |pod| {
        Ok(pod.link_by_name(DEVICE)?.is_some_and(|link| link.up))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::VERSIONS;

    #[test]
    fn it_goes_by_its_name() {
        for (program, is) in [
            ("/opt/cni/bin/loopback", true),
            ("loopback", true),
            ("/opt/loopback/calico", false),
            ("calico-ipam", false),
        ] {
            assert_eq!(is_called(program), is, "{program}");
        }
    }

    #[test]
    fn results_are_of_the_version_that_was_asked_for() {
        for version in VERSIONS {
            assert_eq!(added("/run/netns/x", version)["cniVersion"], version);
        }
        assert_eq!(
            added("/run/netns/x", "0.3.1")["ips"][0],
            json!({"address": "127.0.0.1/8", "interface": 0, "version": "4"})
        );
        assert_eq!(added("x", "0.2.0")["ip6"], json!({"ip": "::1/128"}));
        let newest = added("/run/netns/x", "1.1.0");
        assert_eq!(newest["ips"][1].get("version"), None);
        assert_eq!(newest["interfaces"][0]["sandbox"], "/run/netns/x");
    }
}
