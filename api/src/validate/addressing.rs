//! Pools, nodes, endpoints, BGP and dataplane settings.

use super::Findings;
use super::names::is_interface_name;
use crate::Cidr;
use crate::v3::{
    AllowedUse, BGPConfigurationSpec, BGPFilterRule, BGPFilterSpec, BGPPeerSpec, CommunityValue,
    EncapMode, FelixConfigurationSpec, FilterAction, HostEndpointSpec, IPAMConfigurationSpec,
    IPPoolSpec, NodeBGPSpec, NodeSpec, WorkloadEndpointSpec,
};

/// Largest metric of a route; local preference is its complement to 2147483647.
const MAX_PRIORITY: u32 = 2_147_483_646;

fn is_link_local(cidr: &Cidr) -> bool {
    let link_local = if cidr.is_v4() {
        "169.254.0.0/16"
    } else {
        "fe80::/10"
    };
    link_local
        .parse::<Cidr>()
        .is_ok_and(|range| range.contains_cidr(cidr))
}

pub(super) fn pool(spec: &IPPoolSpec, findings: &mut Findings) {
    let v4 = spec.cidr.is_v4();
    findings.require(
        !is_link_local(&spec.cidr),
        "spec.cidr",
        "lies in the link-local range",
    );
    let (smallest, largest) = if v4 { (20, 32) } else { (116, 128) };
    let block = spec.block_prefix_len();
    if !(smallest..=largest).contains(&block) {
        findings.add(
            "spec.blockSize",
            format!("must be between {smallest} and {largest}"),
        );
    }
    if spec.cidr.prefix_len() > block {
        findings.add("spec.cidr", format!("is smaller than a block (/{block})"));
    }
    findings.require(
        v4 || spec.ipip() == EncapMode::Never,
        "spec.ipipMode",
        "IPIP is only for IPv4",
    );
    findings.require(
        spec.ipip() == EncapMode::Never || spec.vxlan() == EncapMode::Never,
        "spec.vxlanMode",
        "excludes ipipMode",
    );
    findings.selector("spec.nodeSelector", &spec.node_selector, false);
    findings.selector("spec.namespaceSelector", &spec.namespace_selector, false);
    let uses = |allowed| spec.allowed_uses.contains(&allowed);
    if uses(AllowedUse::LoadBalancer) {
        let alone = spec.allowed_uses.len() == 1;
        findings.require(
            alone,
            "spec.allowedUses",
            "LoadBalancer excludes other uses",
        );
        let plain = spec.ipip() == EncapMode::Never && spec.vxlan() == EncapMode::Never;
        findings.require(
            plain,
            "spec.allowedUses",
            "LoadBalancer excludes encapsulation",
        );
        let everywhere = matches!(spec.node_selector.trim(), "" | "all()");
        findings.require(
            everywhere,
            "spec.nodeSelector",
            "must be all() for LoadBalancer",
        );
        findings.require(
            !spec.disable_bgp_export,
            "spec.disableBGPExport",
            "must be false for LoadBalancer",
        );
    }
    if uses(AllowedUse::Tunnel) && !spec.namespace_selector.is_empty() {
        findings.add("spec.namespaceSelector", "excludes the use Tunnel");
    }
}

pub(super) fn ipam_configuration(spec: &IPAMConfigurationSpec, findings: &mut Findings) {
    findings.require(
        spec.strict_affinity || spec.auto_allocates(),
        "spec.autoAllocateBlocks",
        "may only be false with strictAffinity",
    );
    findings.require(
        spec.ip_cooldown_seconds
            .is_none_or(|seconds| seconds <= 1200),
        "spec.ipCooldownSeconds",
        "must be between 0 and 1200",
    );
}

pub(super) fn node(spec: &NodeSpec, findings: &mut Findings) {
    let Some(bgp) = &spec.bgp else { return };
    findings.require(
        *bgp != NodeBGPSpec::default(),
        "spec.bgp",
        "must not be empty",
    );
    findings.require(
        bgp.ipv4_address.is_none_or(|address| address.is_ipv4()),
        "spec.bgp.ipv4Address",
        "is not IPv4",
    );
    findings.require(
        bgp.ipv6_address.is_none_or(|address| address.is_ipv6()),
        "spec.bgp.ipv6Address",
        "is not IPv6",
    );
    for (index, address) in spec.addresses.iter().enumerate() {
        if address.ip().is_none() {
            findings.add(
                format!("spec.addresses[{index}].address"),
                "is not an address",
            );
        }
    }
}

fn priority(path: &str, value: Option<u32>, findings: &mut Findings) {
    let legal = value.is_none_or(|value| (1..=MAX_PRIORITY).contains(&value));
    findings.require(legal, path, "must be between 1 and 2147483646");
}

pub(super) fn bgp_configuration(spec: &BGPConfigurationSpec, findings: &mut Findings) {
    findings.require(
        spec.listen_port != Some(0),
        "spec.listenPort",
        "must be between 1 and 65535",
    );
    if !spec.mesh_enabled() {
        findings.require(
            spec.node_mesh_password.is_none(),
            "spec.nodeMeshPassword",
            "needs the node-to-node mesh",
        );
        findings.require(
            spec.node_mesh_max_restart_time.is_none(),
            "spec.nodeMeshMaxRestartTime",
            "needs the node-to-node mesh",
        );
    }
    findings.require(
        spec.communities.is_empty() || !spec.prefix_advertisements.is_empty(),
        "spec.communities",
        "needs prefixAdvertisements",
    );
    for (index, advertisement) in spec.prefix_advertisements.iter().enumerate() {
        for (member, community) in advertisement.communities.iter().enumerate() {
            let named = spec
                .communities
                .iter()
                .any(|known| known.name == *community);
            if !named && community.parse::<CommunityValue>().is_err() {
                let path = format!("spec.prefixAdvertisements[{index}].communities[{member}]");
                findings.add(
                    path,
                    format!("{community:?} is neither a community nor the name of one"),
                );
            }
        }
    }
    priority(
        "spec.ipv4NormalRoutePriority",
        spec.ipv4_normal_route_priority,
        findings,
    );
    priority(
        "spec.ipv6NormalRoutePriority",
        spec.ipv6_normal_route_priority,
        findings,
    );
    let v4 = spec.local_workload_peering_ip_v4;
    findings.require(
        v4.is_none_or(|ip| ip.is_ipv4()),
        "spec.localWorkloadPeeringIPV4",
        "is not IPv4",
    );
    let v6 = spec.local_workload_peering_ip_v6;
    findings.require(
        v6.is_none_or(|ip| ip.is_ipv6()),
        "spec.localWorkloadPeeringIPV6",
        "is not IPv6",
    );
}

pub(super) fn bgp_peer(spec: &BGPPeerSpec, findings: &mut Findings) {
    for (path, selector) in [
        ("spec.nodeSelector", &spec.node_selector),
        ("spec.peerSelector", &spec.peer_selector),
        ("spec.localWorkloadSelector", &spec.local_workload_selector),
    ] {
        findings.selector(path, selector, false);
    }
    findings.require(
        spec.node.is_empty() || spec.node_selector.is_empty(),
        "spec.nodeSelector",
        "excludes node",
    );
    let ways = [
        spec.peer_ip.is_some(),
        !spec.peer_selector.is_empty(),
        !spec.local_workload_selector.is_empty(),
    ];
    findings.require(
        ways.iter().filter(|way| **way).count() == 1,
        "spec",
        "needs exactly one of peerIP, peerSelector and localWorkloadSelector",
    );
    findings.require(
        spec.peer_selector.is_empty() || spec.as_number.is_none(),
        "spec.asNumber",
        "must be empty with peerSelector: nodes have their own",
    );
    findings.require(
        spec.peer_selector.is_empty() && spec.peer_ip.is_none()
            || spec.local_workload_selector.is_empty(),
        "spec.localWorkloadSelector",
        "excludes peerIP and peerSelector",
    );
    findings.require(
        spec.local_workload_selector.is_empty() || spec.as_number.is_some(),
        "spec.asNumber",
        "is required with localWorkloadSelector",
    );
    findings.require(
        !spec.keep_original_next_hop || spec.next_hop_mode.is_none(),
        "spec.nextHopMode",
        "excludes keepOriginalNextHop",
    );
    if let Some(gateway) = spec.reachable_by {
        match spec.peer_ip {
            Some(peer) if peer.ip.is_ipv4() != gateway.is_ipv4() => {
                findings.add("spec.reachableBy", "is of another family than peerIP");
            }
            Some(_) => {}
            None => findings.add("spec.reachableBy", "needs peerIP"),
        }
    }
}

pub(super) fn bgp_filter(spec: &BGPFilterSpec, findings: &mut Findings) {
    for (name, rules, v4, export) in [
        ("exportV4", &spec.export_v4, true, true),
        ("importV4", &spec.import_v4, true, false),
        ("exportV6", &spec.export_v6, false, true),
        ("importV6", &spec.import_v6, false, false),
    ] {
        for (index, rule) in rules.iter().enumerate() {
            filter_rule(&format!("spec.{name}[{index}]"), rule, v4, export, findings);
        }
    }
}

fn filter_rule(path: &str, rule: &BGPFilterRule, v4: bool, export: bool, findings: &mut Findings) {
    let field = |name: &str| format!("{path}.{name}");
    let family = if v4 { "IPv4" } else { "IPv6" };
    if rule.cidr.is_some_and(|cidr| cidr.is_v4() != v4) {
        findings.add(field("cidr"), format!("is not {family}"));
    }
    findings.require(
        rule.cidr.is_some() == rule.match_operator.is_some(),
        &field("matchOperator"),
        "goes together with cidr",
    );
    if let Some(range) = rule.prefix_length {
        let width = if v4 { 32 } else { 128 };
        let legal = range.min.unwrap_or(0) <= range.max.unwrap_or(width)
            && range.max.unwrap_or(width) <= width;
        findings.require(
            legal,
            &field("prefixLength"),
            "is not a range of prefix lengths",
        );
        findings.require(rule.cidr.is_some(), &field("prefixLength"), "needs cidr");
    }
    if !export {
        findings.require(
            rule.source.is_none(),
            &field("source"),
            "is only for export rules",
        );
        findings.require(
            rule.interface.is_empty(),
            &field("interface"),
            "is only for export rules",
        );
    }
    findings.require(
        rule.interface.len() <= 15,
        &field("interface"),
        "is longer than 15 characters",
    );
    if let Some(communities) = &rule.communities {
        findings.require(
            communities.values.len() == 1,
            &field("communities.values"),
            "must have exactly one entry",
        );
    }
    priority(&field("priority"), rule.priority, findings);
    findings.require(
        rule.operations.is_empty() || rule.action == FilterAction::Accept,
        &field("operations"),
        "is only allowed with action Accept",
    );
    findings.require(
        rule.operations.len() <= 10,
        &field("operations"),
        "has more than 10 entries",
    );
    for (index, operation) in rule.operations.iter().enumerate() {
        let path = format!("{path}.operations[{index}]");
        let set = [
            operation.add_community.is_some(),
            operation.prepend_as_path.is_some(),
            operation.set_priority.is_some(),
        ];
        let one = set.iter().filter(|set| **set).count() == 1;
        findings.require(
            one,
            &path,
            "needs exactly one of addCommunity, prependASPath and setPriority",
        );
        if let Some(prepend) = &operation.prepend_as_path {
            let legal = (1..=10).contains(&prepend.prefix.len());
            findings.require(
                legal,
                &format!("{path}.prependASPath.prefix"),
                "must have 1 to 10 entries",
            );
        }
        priority(
            &format!("{path}.setPriority.value"),
            operation.set_priority.as_ref().map(|set| set.value),
            findings,
        );
    }
}

pub(super) fn host_endpoint(spec: &HostEndpointSpec, findings: &mut Findings) {
    findings.require(!spec.node.is_empty(), "spec.node", "is required");
    findings.require(
        !spec.interface_name.is_empty() || !spec.expected_ips.is_empty(),
        "spec",
        "needs interfaceName or expectedIPs",
    );
    let legal =
        matches!(spec.interface_name.as_str(), "" | "*") || is_interface_name(&spec.interface_name);
    findings.require(
        legal,
        "spec.interfaceName",
        "must be \"*\" or an interface name of at most 15 characters",
    );
    for (index, port) in spec.ports.iter().enumerate() {
        findings.require(
            port.port != 0,
            &format!("spec.ports[{index}].port"),
            "must not be 0",
        );
    }
}

pub(super) fn workload_endpoint(spec: &WorkloadEndpointSpec, findings: &mut Findings) {
    findings.require(
        is_interface_name(&spec.interface_name),
        "spec.interfaceName",
        "must be an interface name of at most 15 characters",
    );
    for (index, network) in spec.ip_networks.iter().enumerate() {
        findings.require(
            network.is_host(),
            &format!("spec.ipNetworks[{index}]"),
            "must be a single address",
        );
    }
    for (index, nat) in spec.ip_nats.iter().enumerate() {
        let path = format!("spec.ipNATs[{index}]");
        let same = nat.internal_ip.is_ipv4() == nat.external_ip.is_ipv4();
        findings.require(same, &path, "mixes IPv4 and IPv6");
        let own = spec
            .ip_networks
            .iter()
            .any(|network| network.contains(nat.internal_ip));
        findings.require(
            own,
            &format!("{path}.internalIP"),
            "is not one of ipNetworks",
        );
    }
}

pub(super) fn felix_configuration(spec: &FelixConfigurationSpec, findings: &mut Findings) {
    for (path, pattern) in [
        ("spec.mtuIfacePattern", &spec.mtu_iface_pattern),
        (
            "spec.nftablesFlowTableDataIfacePattern",
            &spec.nftables_flow_table_data_iface_pattern,
        ),
        ("spec.bpfDataIfacePattern", &spec.bpf_data_iface_pattern),
        ("spec.bpfL3IfacePattern", &spec.bpf_l3_iface_pattern),
    ] {
        if let Some(pattern) = pattern {
            findings.regex(path, pattern);
        }
    }
    for (path, name) in [
        (
            "spec.wireguardInterfaceName",
            &spec.wireguard_interface_name,
        ),
        (
            "spec.wireguardInterfaceNameV6",
            &spec.wireguard_interface_name_v6,
        ),
    ] {
        let legal = name.as_deref().is_none_or(is_interface_name);
        findings.require(
            legal,
            path,
            "must be an interface name of at most 15 characters",
        );
    }
    findings.require(
        spec.kube_node_port_ranges
            .as_ref()
            .is_none_or(|ranges| ranges.len() <= 7),
        "spec.kubeNodePortRanges",
        "has more than 7 entries",
    );
    for (index, range) in spec.route_table_ranges.iter().flatten().enumerate() {
        let path = format!("spec.routeTableRanges[{index}]");
        findings.require(
            range.min >= 1 && range.min <= range.max,
            &path,
            "is not a range of table numbers",
        );
        // local, main and default (linux/rtnetlink.h).
        findings.require(
            range.max < 253 || range.min > 255,
            &path,
            "contains the kernel's tables 253 to 255",
        );
    }
    for (path, mask) in [
        ("spec.iptablesMarkMask", spec.iptables_mark_mask),
        ("spec.nftablesMarkMask", spec.nftables_mark_mask),
    ] {
        findings.require(
            mask.is_none_or(|mask| mask.count_ones() >= 8),
            path,
            "needs at least 8 bits",
        );
    }
    for (path, value) in [
        (
            "spec.ipv4NormalRoutePriority",
            spec.ipv4_normal_route_priority,
        ),
        (
            "spec.ipv6NormalRoutePriority",
            spec.ipv6_normal_route_priority,
        ),
        (
            "spec.ipv4ElevatedRoutePriority",
            spec.ipv4_elevated_route_priority,
        ),
        (
            "spec.ipv6ElevatedRoutePriority",
            spec.ipv6_elevated_route_priority,
        ),
    ] {
        priority(path, value, findings);
    }
}
