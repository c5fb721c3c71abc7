//! A node's routes, as `ip -j route` prints them.

use crate::lab::{Lab, checked, programs};
use anyhow::{Context, Result};
use serde_json::Value;
use std::net::Ipv4Addr;

/// Keys of a printed route and the values they must have.
pub type Wanted = &'static [(&'static str, &'static str)];

/// The main table for IPv4.
pub fn routes_v4(lab: &Lab, node: &str) -> Result<Vec<Value>> {
    routes(lab, node, "-4")
}

/// The main table for IPv6.
pub fn routes_v6(lab: &Lab, node: &str) -> Result<Vec<Value>> {
    routes(lab, node, "-6")
}

fn routes(lab: &Lab, node: &str, family: &str) -> Result<Vec<Value>> {
    let text = lab.exec(node, &["ip", "-j", family, "route"])?;
    serde_json::from_str(&text).with_context(|| format!("ip route of {node} printed {text:?}"))
}

/// What `calictl node status` prints in a node.
pub fn node_status(lab: &Lab, node: &str) -> Result<String> {
    let calictl = programs().join("calictl").display().to_string();
    let words = ["lab", "exec", node, "--", &calictl, "node", "status"];
    checked(lab.calictl(&words).output()?, || {
        format!("node status of {node}")
    })
}

/// The IPv4 block of 64 addresses that a pod's address is from.
pub fn block_of(lab: &Lab, pod: &str) -> Result<String> {
    let address: Ipv4Addr = lab.pod_address(pod)?.parse()?;
    Ok(format!("{}/26", Ipv4Addr::from(u32::from(address) & !63)))
}

/// The route to exactly this destination with these values.
pub fn find<'a>(
    routes: &'a [Value],
    destination: &str,
    wanted: &[(&str, &str)],
) -> Result<&'a Value, String> {
    let is = |route: &Value, key: &str, value: &str| match &route[key] {
        Value::String(text) => text == value,
        other => *other == value.parse::<Value>().unwrap_or_default(),
    };
    routes
        .iter()
        .find(|route| {
            route["dst"] == destination && wanted.iter().all(|(key, value)| is(route, key, value))
        })
        .ok_or_else(|| {
            let all: Vec<String> = routes.iter().map(Value::to_string).collect();
            format!(
                "no route to {destination} with {wanted:?} among\n{}",
                all.join("\n")
            )
        })
}

/// The gateways of the route to exactly this destination, in order: several if it is spread over them.
pub fn gateways(routes: &[Value], destination: &str) -> Result<Vec<String>, String> {
    let route = find(routes, destination, &[])?;
    let of = |hop: &Value| hop["gateway"].as_str().map(str::to_owned);
    let mut gateways: Vec<String> = match route["nexthops"].as_array() {
        Some(hops) => hops.iter().filter_map(of).collect(),
        None => of(route).into_iter().collect(),
    };
    gateways.sort();
    Ok(gateways)
}
