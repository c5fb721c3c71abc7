//! Configuration files: every daemon gets the same neighbours, all passive, and no policy.

use std::fmt::Write;

use super::shape::{DEVICE, DEVICE_AS, Neighbour, Role, Shape};

/// One table; everything that was learned may go out, and nothing else.
pub(super) fn bird(shape: &Shape, threads: bool) -> String {
    let mut out = format!("router id {DEVICE};\n");
    if threads {
        out.push_str("threads 2;\n");
    }
    out.push_str("protocol device {}\nprotocol direct { ipv4; }\n");
    for (n, neighbour) in shape.neighbours.iter().enumerate() {
        let role = match neighbour.role {
            Role::Internal | Role::External => "",
            Role::Client => " rr client;",
            Role::Served => " rs client;",
        };
        let Neighbour { address, asn, .. } = neighbour;
        let _ = writeln!(
            out,
            "protocol bgp p{n} {{ local {DEVICE} as {DEVICE_AS}; neighbor {address} as {asn}; passive on;{role} \
             hold time 180; ipv4 {{ import all; export where source = RTS_BGP; }}; }}"
        );
    }
    out
}

pub(super) fn frr(shape: &Shape) -> String {
    let mut out = format!(
        "log stdout errors\nrouter bgp {DEVICE_AS}\n bgp router-id {DEVICE}\n no bgp ebgp-requires-policy\n \
         no bgp default ipv4-unicast\n timers bgp 60 180\n"
    );
    for Neighbour { address, asn, .. } in &shape.neighbours {
        let _ = writeln!(
            out,
            " neighbor {address} remote-as {asn}\n neighbor {address} passive"
        );
    }
    out.push_str(" address-family ipv4 unicast\n");
    for Neighbour { address, role, .. } in &shape.neighbours {
        let _ = writeln!(out, "  neighbor {address} activate");
        match role {
            Role::Internal | Role::External => {}
            Role::Client => {
                let _ = writeln!(out, "  neighbor {address} route-reflector-client");
            }
            Role::Served => {
                let _ = writeln!(out, "  neighbor {address} route-server-client");
            }
        }
    }
    out.push_str(" exit-address-family\n");
    out
}

pub(super) fn gobgp(shape: &Shape) -> String {
    let mut out = format!("[global.config]\nas = {DEVICE_AS}\nrouter-id = \"{DEVICE}\"\n");
    for Neighbour {
        address, asn, role, ..
    } in &shape.neighbours
    {
        let _ = write!(
            out,
            "[[neighbors]]\n[neighbors.config]\nneighbor-address = \"{address}\"\npeer-as = {asn}\n\
             [neighbors.transport.config]\npassive-mode = true\n\
             [neighbors.timers.config]\nhold-time = 180\n"
        );
        match role {
            Role::Internal | Role::External => {}
            Role::Client => {
                let _ = write!(
                    out,
                    "[neighbors.route-reflector.config]\nroute-reflector-client = true\n\
                     route-reflector-cluster-id = \"{DEVICE}\"\n"
                );
            }
            Role::Served => {
                out.push_str("[neighbors.route-server.config]\nroute-server-client = true\n");
            }
        }
    }
    out
}

pub(super) fn openbgpd(shape: &Shape, socket: &str) -> String {
    let mut out = format!(
        "AS {DEVICE_AS}\nrouter-id {DEVICE}\nholdtime 180\nfib-update no\nlisten on {DEVICE}\nsocket \"{socket}\"\n"
    );
    if shape.neighbours.iter().any(|n| n.role == Role::Served) {
        out.push_str("transparent-as yes\n");
    }
    for Neighbour {
        address, asn, role, ..
    } in &shape.neighbours
    {
        let client = if *role == Role::Client {
            " route-reflector\n"
        } else {
            ""
        };
        let _ = writeln!(
            out,
            "neighbor {address} {{\n remote-as {asn}\n passive\n enforce neighbor-as no\n{client}}}"
        );
    }
    out.push_str("allow from any\nallow to any\n");
    out
}

pub(super) fn cali(shape: &Shape) -> String {
    let mut out = format!(
        "router-id = \"{DEVICE}\"\nas = {DEVICE_AS}\nlisten = [\"{DEVICE}\"]\ninstall = false\n"
    );
    for Neighbour {
        address, asn, role, ..
    } in &shape.neighbours
    {
        let _ = write!(
            out,
            "[[neighbor]]\naddress = \"{address}\"\nas = {asn}\npassive = true\nhold-time = 180\n"
        );
        match role {
            Role::Internal | Role::External => {}
            Role::Client => out.push_str("route-reflector-client = true\n"),
            Role::Served => out.push_str("next-hop = \"keep\"\n"),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_neighbour_is_in_every_file() {
        let shape = Shape::reflector(3, 1);
        let files = [
            bird(&shape, true),
            frr(&shape),
            gobgp(&shape),
            openbgpd(&shape, "/run/s"),
            cali(&shape),
        ];
        for file in files {
            for neighbour in &shape.neighbours {
                assert!(file.contains(&neighbour.address.to_string()), "{file}");
            }
        }
    }
}
