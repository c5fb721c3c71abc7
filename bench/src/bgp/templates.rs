//! Configuration files: every daemon gets the same neighbours, all passive, and no policy.

use std::fmt::Write;

use super::shape::{Course, DEVICE, DEVICE_AS, Role, Shape};

/// Whether best routes go into the kernel.
fn installs(shape: &Shape) -> bool {
    shape.course == Course::Kernel
}

/// One table; everything that was learned may go out, and nothing else.
pub(super) fn bird(shape: &Shape, threads: bool) -> String {
    let mut out = format!("router id {DEVICE};\n");
    if threads {
        out.push_str("threads 2;\n");
    }
    let channel = if shape.layout.is_v6() { "ipv6" } else { "ipv4" };
    let _ = writeln!(
        out,
        "protocol device {{}}\nprotocol direct {{ {channel}; }}"
    );
    if installs(shape) {
        let _ = writeln!(
            out,
            "protocol kernel {{ {channel} {{ export where source = RTS_BGP; }}; }}"
        );
    }
    let device = shape.device();
    for (n, neighbour) in shape.neighbours.iter().enumerate() {
        let role = match neighbour.role {
            Role::Internal | Role::External => "",
            Role::Client => " rr client;",
            Role::Served => " rs client;",
        };
        let (address, asn) = (shape.address(neighbour), neighbour.asn);
        let _ = writeln!(
            out,
            "protocol bgp p{n} {{ local {device} as {DEVICE_AS}; neighbor {address} as {asn}; passive on;{role} \
             hold time 180; {channel} {{ import all; export where source = RTS_BGP; }}; }}"
        );
    }
    out
}

pub(super) fn frr(shape: &Shape) -> String {
    let mut out = format!(
        "log stdout errors\nrouter bgp {DEVICE_AS}\n bgp router-id {DEVICE}\n no bgp ebgp-requires-policy\n \
         no bgp default ipv4-unicast\n timers bgp 60 180\n"
    );
    for neighbour in &shape.neighbours {
        let (address, asn) = (shape.address(neighbour), neighbour.asn);
        let _ = writeln!(
            out,
            " neighbor {address} remote-as {asn}\n neighbor {address} passive"
        );
    }
    let family = if shape.layout.is_v6() { "ipv6" } else { "ipv4" };
    let _ = writeln!(out, " address-family {family} unicast");
    for neighbour in &shape.neighbours {
        let address = shape.address(neighbour);
        let _ = writeln!(out, "  neighbor {address} activate");
        match neighbour.role {
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
    for neighbour in &shape.neighbours {
        let (address, asn) = (shape.address(neighbour), neighbour.asn);
        let _ = write!(
            out,
            "[[neighbors]]\n[neighbors.config]\nneighbor-address = \"{address}\"\npeer-as = {asn}\n\
             [neighbors.transport.config]\npassive-mode = true\n\
             [neighbors.timers.config]\nhold-time = 180\n"
        );
        match neighbour.role {
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
        if shape.layout.is_v6() {
            out.push_str(
                "[[neighbors.afi-safis]]\n[neighbors.afi-safis.config]\nafi-safi-name = \"ipv6-unicast\"\n",
            );
        }
    }
    out
}

pub(super) fn openbgpd(shape: &Shape, socket: &str) -> String {
    let device = shape.device();
    let update = if installs(shape) { "yes" } else { "no" };
    let mut out = format!(
        "AS {DEVICE_AS}\nrouter-id {DEVICE}\nholdtime 180\nfib-update {update}\nlisten on {device}\nsocket \"{socket}\"\n"
    );
    if shape.neighbours.iter().any(|n| n.role == Role::Served) {
        out.push_str("transparent-as yes\n");
    }
    for neighbour in &shape.neighbours {
        let (address, asn) = (shape.address(neighbour), neighbour.asn);
        let client = if neighbour.role == Role::Client {
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
    let (device, install) = (shape.device(), installs(shape));
    let mut out = format!(
        "router-id = \"{DEVICE}\"\nas = {DEVICE_AS}\nlisten = [\"{device}\"]\ninstall = {install}\n"
    );
    for neighbour in &shape.neighbours {
        let (address, asn) = (shape.address(neighbour), neighbour.asn);
        let _ = write!(
            out,
            "[[neighbor]]\naddress = \"{address}\"\nas = {asn}\npassive = true\nhold-time = 180\n"
        );
        match neighbour.role {
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
        for shape in [Shape::reflector(3, 1), Shape::fan_in(2, 1).over_v6("v6")] {
            check(&shape);
        }
    }

    fn check(shape: &Shape) {
        let files = [
            bird(shape, true),
            frr(shape),
            gobgp(shape),
            openbgpd(shape, "/run/s"),
            cali(shape),
        ];
        for file in files {
            for neighbour in &shape.neighbours {
                assert!(
                    file.contains(&shape.address(neighbour).to_string()),
                    "{file}"
                );
            }
        }
    }
}
