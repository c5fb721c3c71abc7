//! FelixConfiguration: settings of the dataplane.
//!
//! Every setting is optional; an absent one leaves the layer below in force (environment, node,
//! cluster, built-in default, as felix merges them). Settings of Calico's eBPF dataplane, of Go's
//! runtime and of other platforms are read and written back, without an effect here.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::{Dscp, GoDuration, LogLevel, Port, ProgramClusterRoutes, Toggle};
use crate::Net;
use crate::text::text_enum;

text_enum! {
    /// Whether the nftables dataplane is used.
    pub enum NFTablesMode { Enabled = "Enabled", Disabled = "Disabled", Auto = "Auto" }
}
text_enum! {
    /// Which flows nf_tables may offload.
    pub enum FlowTableOffload { All = "All", Disabled = "Disabled" }
}
text_enum! {
    /// Which iptables is used.
    pub enum IptablesBackend { Legacy = "Legacy", NFT = "NFT", Auto = "Auto" }
}
text_enum! {
    /// Whether our rules come first or last in a chain.
    pub enum ChainInsertMode { Insert = "Insert", Append = "Append" }
}
text_enum! {
    /// What becomes of traffic from a workload to its host after policy.
    pub enum EndpointToHostAction { Drop = "Drop", Return = "Return", Accept = "Accept" }
}
text_enum! {
    /// What becomes of traffic that policy allows.
    pub enum AllowAction { Accept = "Accept", Return = "Return" }
}
text_enum! {
    /// What becomes of traffic that policy denies.
    pub enum DenyAction { Drop = "Drop", Reject = "Reject" }
}
text_enum! {
    /// From what routes to remote workloads are made.
    pub enum RouteSource { WorkloadIPs = "WorkloadIPs", CalicoIPAM = "CalicoIPAM" }
}
text_enum! {
    /// Which destinations keep their source address.
    pub enum NatOutgoingExclusions { IPPoolsOnly = "IPPoolsOnly", IPPoolsAndHostIPs = "IPPoolsAndHostIPs" }
}
text_enum! {
    /// What becomes of packets to service addresses that nobody serves.
    pub enum ServiceLoopPrevention { Drop = "Drop", Reject = "Reject", Disabled = "Disabled" }
}
text_enum! {
    /// Whether pods may ask for further source prefixes.
    pub enum WorkloadSourceSpoofing { Disabled = "Disabled", Any = "Any" }
}
text_enum! {
    /// Whether addresses of pods and load balancers are answered for on the local subnet.
    pub enum LocalSubnetL2Reachability { Disabled = "Disabled", PodsAndLoadBalancers = "PodsAndLoadBalancers" }
}
text_enum! {
    /// The source-destination check of AWS.
    pub enum AWSSrcDstCheck { DoNothing = "DoNothing", Enable = "Enable", Disable = "Disable" }
}
text_enum! {
    /// How long policies are evaluated for flow logs.
    pub enum FlowLogsPolicyEvaluationMode { None = "None", Continuous = "Continuous" }
}
text_enum! {
    /// Protocol of a fail-safe port.
    pub enum FailsafeProtocol { Tcp = "tcp", Udp = "udp", Sctp = "sctp" }
}

/// A port that stays reachable whatever policy says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProtoPort {
    /// The protocol; TCP where none is given.
    #[serde(default = "ProtoPort::default_protocol")]
    pub protocol: FailsafeProtocol,
    /// The number.
    pub port: u16,
    /// The peers; all where none is given.
    #[serde(
        default,
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub net: Option<Net>,
}

impl FailsafeProtocol {
    /// The protocol number (IANA).
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl ProtoPort {
    const fn default_protocol() -> FailsafeProtocol {
        FailsafeProtocol::Tcp
    }

    fn defaults(udp: &[u16], tcp: &[u16]) -> Vec<Self> {
        let of = |protocol: FailsafeProtocol| {
            move |port: &u16| Self {
                protocol,
                port: *port,
                net: None,
            }
        };
        let udp = udp.iter().map(of(FailsafeProtocol::Udp));
        udp.chain(tcp.iter().map(of(FailsafeProtocol::Tcp)))
            .collect()
    }
}

/// A watchdog's time limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealthTimeoutOverride {
    /// The part of felix that is watched.
    pub name: String,
    /// Its limit.
    pub timeout: GoDuration,
}

/// Numbers of routing tables that may be used, both inclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteTableRange {
    /// The first.
    pub min: u32,
    /// The last.
    pub max: u32,
}

/// Time limits of connections in the eBPF dataplane; durations or `Auto`.
pub type BpfConntrackTimeouts = BTreeMap<String, String>;

macro_rules! settings {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[doc = $doc:literal])+ $field:ident: $type:ty = $json:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $($(#[doc = $doc])+ #[serde(rename = $json, skip_serializing_if = "Option::is_none")] pub $field: Option<$type>),+
        }
    };
}

settings! {
    /// Settings of the dataplane for the cluster (`default`) or one node (`node.<name>`).
    pub struct FelixConfigurationSpec {
        // Dataplane in general.
        /// Whether the built-in dataplane is used.
        use_internal_dataplane_driver: bool = "useInternalDataplaneDriver",
        /// Path of another dataplane.
        dataplane_driver: String = "dataplaneDriver",
        /// Time limit of the dataplane's watchdog.
        dataplane_watchdog_timeout: GoDuration = "dataplaneWatchdogTimeout",
        /// Whether IPv6 is programmed.
        ipv6_support: bool = "ipv6Support",
        /// Whether the host's forwarding sysctls are set.
        ip_forwarding: Toggle = "ipForwarding",
        /// Prefixes of workload interfaces, comma separated.
        interface_prefix: String = "interfacePrefix",
        /// Interfaces to leave alone, comma separated, `/.../` for regular expressions.
        interface_exclude: String = "interfaceExclude",
        /// Time between scans of interfaces.
        interface_refresh_interval: GoDuration = "interfaceRefreshInterval",
        /// Overrides of feature detection, `name=bool` comma separated.
        feature_detect_override: String = "featureDetectOverride",
        /// Switches of preview features, `name=value` comma separated.
        feature_gates: String = "featureGates",
        /// Time limit of netlink requests.
        netlink_timeout: GoDuration = "netlinkTimeout",
        /// Path of the cgroup hierarchy.
        cgroup_v2_path: String = "cgroupV2Path",

        // nftables.
        /// Whether the nftables dataplane is used.
        nftables_mode: NFTablesMode = "nftablesMode",
        /// Time between audits of the tables.
        nftables_refresh_interval: GoDuration = "nftablesRefreshInterval",
        /// What becomes of traffic that policy allows, in the filter hooks.
        nftables_filter_allow_action: AllowAction = "nftablesFilterAllowAction",
        /// What becomes of traffic that policy allows, in the mangle hooks.
        nftables_mangle_allow_action: AllowAction = "nftablesMangleAllowAction",
        /// What becomes of traffic that policy denies.
        nftables_filter_deny_action: DenyAction = "nftablesFilterDenyAction",
        /// Bits of the packet mark that may be used.
        nftables_mark_mask: u32 = "nftablesMarkMask",
        /// Which flows may be offloaded.
        nftables_flow_table_offload: FlowTableOffload = "nftablesFlowTableOffload",
        /// Regular expression for the host interfaces of the flow table.
        nftables_flow_table_data_iface_pattern: String = "nftablesFlowTableDataIfacePattern",

        // iptables and IP sets.
        /// Which iptables is used.
        iptables_backend: IptablesBackend = "iptablesBackend",
        /// Time between audits of the tables.
        iptables_refresh_interval: GoDuration = "iptablesRefreshInterval",
        /// Time after a write until it is checked.
        iptables_post_write_check_interval: GoDuration = "iptablesPostWriteCheckInterval",
        /// Path of the iptables lock.
        iptables_lock_file_path: String = "iptablesLockFilePath",
        /// Time limit for the iptables lock.
        iptables_lock_timeout: GoDuration = "iptablesLockTimeout",
        /// Time between attempts to take the iptables lock.
        iptables_lock_probe_interval: GoDuration = "iptablesLockProbeInterval",
        /// Bits of the packet mark that may be used.
        iptables_mark_mask: u32 = "iptablesMarkMask",
        /// What becomes of traffic that policy allows, in the filter table.
        iptables_filter_allow_action: AllowAction = "iptablesFilterAllowAction",
        /// What becomes of traffic that policy allows, in the mangle table.
        iptables_mangle_allow_action: AllowAction = "iptablesMangleAllowAction",
        /// What becomes of traffic that policy denies.
        iptables_filter_deny_action: DenyAction = "iptablesFilterDenyAction",
        /// Outgoing interfaces whose traffic gets the node's address.
        iptables_nat_outgoing_interface_filter: String = "iptablesNATOutgoingInterfaceFilter",
        /// Whether our rules come first or last in a chain.
        chain_insert_mode: ChainInsertMode = "chainInsertMode",
        /// Time between audits of IP sets.
        ipsets_refresh_interval: GoDuration = "ipsetsRefreshInterval",
        /// Limit of members of an IP set.
        max_ipset_size: u32 = "maxIpsetSize",

        // Policy.
        /// What becomes of traffic from a workload to its host after policy.
        default_endpoint_to_host_action: EndpointToHostAction = "defaultEndpointToHostAction",
        /// Ports that stay reachable on hosts.
        failsafe_inbound_host_ports: Vec<ProtoPort> = "failsafeInboundHostPorts",
        /// Ports that hosts can always reach.
        failsafe_outbound_host_ports: Vec<ProtoPort> = "failsafeOutboundHostPorts",
        /// Whether packets that connection tracking calls invalid pass.
        disable_conntrack_invalid_check: bool = "disableConntrackInvalidCheck",
        /// Prefix of lines that rules with action Log write.
        log_prefix: String = "logPrefix",
        /// Limit of such lines, such as `10/second`.
        log_action_rate_limit: String = "logActionRateLimit",
        /// Lines beyond the limit in a burst.
        log_action_rate_limit_burst: u32 = "logActionRateLimitBurst",
        /// Whether workloads may send VXLAN.
        allow_vxlan_packets_from_workloads: bool = "allowVXLANPacketsFromWorkloads",
        /// Whether workloads may send IPIP.
        allow_ipip_packets_from_workloads: bool = "allowIPIPPacketsFromWorkloads",
        /// Whether pods may ask for further source prefixes.
        workload_source_spoofing: WorkloadSourceSpoofing = "workloadSourceSpoofing",
        /// What becomes of packets to service addresses that nobody serves.
        service_loop_prevention: ServiceLoopPrevention = "serviceLoopPrevention",
        /// Ports of NodePort services.
        kube_node_port_ranges: Vec<Port> = "kubeNodePortRanges",
        /// Folder of the socket for application-layer policy.
        policy_sync_path_prefix: String = "policySyncPathPrefix",

        // Address translation.
        /// Ports for outgoing NAT.
        nat_port_range: Port = "natPortRange",
        /// Address for outgoing NAT.
        nat_outgoing_address: Ipv4Addr = "natOutgoingAddress",
        /// Which destinations keep their source address.
        nat_outgoing_exclusions: NatOutgoingExclusions = "natOutgoingExclusions",
        /// Whether floating addresses are translated.
        floating_ips: Toggle = "floatingIPs",

        // Routes.
        /// Time between audits of routes.
        route_refresh_interval: GoDuration = "routeRefreshInterval",
        /// Protocol number of our routes.
        device_route_protocol: u8 = "deviceRouteProtocol",
        /// Preferred source address of IPv4 routes to workloads.
        device_route_source_address: Ipv4Addr = "deviceRouteSourceAddress",
        /// Preferred source address of IPv6 routes to workloads.
        device_route_source_address_ipv6: Ipv6Addr = "deviceRouteSourceAddressIPv6",
        /// Whether foreign routes to workload interfaces are removed.
        remove_external_routes: bool = "removeExternalRoutes",
        /// From what routes to remote workloads are made.
        route_source: RouteSource = "routeSource",
        /// Routing tables that may be used.
        route_table_ranges: Vec<RouteTableRange> = "routeTableRanges",
        /// Deprecated form of `routeTableRanges`.
        route_table_range: RouteTableRange = "routeTableRange",
        /// Whether no route is touched.
        route_sync_disabled: bool = "routeSyncDisabled",
        /// Which cluster routes the dataplane programs.
        program_cluster_routes: ProgramClusterRoutes = "programClusterRoutes",
        /// Metric of IPv4 routes.
        ipv4_normal_route_priority: u32 = "ipv4NormalRoutePriority",
        /// Metric of IPv6 routes.
        ipv6_normal_route_priority: u32 = "ipv6NormalRoutePriority",
        /// Metric of preferred IPv4 routes during a live migration.
        ipv4_elevated_route_priority: u32 = "ipv4ElevatedRoutePriority",
        /// Metric of preferred IPv6 routes during a live migration.
        ipv6_elevated_route_priority: u32 = "ipv6ElevatedRoutePriority",
        /// Time for which preferred routes stay after a live migration.
        live_migration_route_convergence_time: GoDuration = "liveMigrationRouteConvergenceTime",
        /// Whether addresses of pods and load balancers are answered for on the local subnet.
        local_subnet_l2_reachability: LocalSubnetL2Reachability = "localSubnetL2Reachability",
        /// Time between announcements of them.
        local_subnet_l2_reachability_refresh_interval: GoDuration = "localSubnetL2ReachabilityRefreshInterval",

        // Encapsulation and encryption.
        /// Whether `tunl0` is set up; follows the pools where absent.
        ipip_enabled: bool = "ipipEnabled",
        /// MTU of `tunl0`; 0 means detected.
        ipip_mtu: u32 = "ipipMTU",
        /// Whether `vxlan.calico` is set up; follows the pools where absent.
        vxlan_enabled: bool = "vxlanEnabled",
        /// MTU of `vxlan.calico`; 0 means detected.
        vxlan_mtu: u32 = "vxlanMTU",
        /// MTU of `vxlan-v6.calico`; 0 means detected.
        vxlan_mtu_v6: u32 = "vxlanMTUV6",
        /// UDP port of VXLAN.
        vxlan_port: u16 = "vxlanPort",
        /// VXLAN network identifier.
        vxlan_vni: u32 = "vxlanVNI",
        /// Regular expression for the interfaces from which the MTU is detected.
        mtu_iface_pattern: String = "mtuIfacePattern",
        /// Whether pods wait for the file with the MTU.
        require_mtu_file: bool = "requireMTUFile",
        /// Prefixes of hosts outside the cluster that may send tunnel packets.
        external_nodes_cidr_list: Vec<Net> = "externalNodesList",
        /// Whether IPv4 is encrypted between nodes.
        wireguard_enabled: bool = "wireguardEnabled",
        /// Whether IPv6 is encrypted between nodes.
        wireguard_enabled_v6: bool = "wireguardEnabledV6",
        /// UDP port for IPv4.
        wireguard_listening_port: u16 = "wireguardListeningPort",
        /// UDP port for IPv6.
        wireguard_listening_port_v6: u16 = "wireguardListeningPortV6",
        /// Interface for IPv4.
        wireguard_interface_name: String = "wireguardInterfaceName",
        /// Interface for IPv6.
        wireguard_interface_name_v6: String = "wireguardInterfaceNameV6",
        /// MTU for IPv4; 0 means detected.
        wireguard_mtu: u32 = "wireguardMTU",
        /// MTU for IPv6; 0 means detected.
        wireguard_mtu_v6: u32 = "wireguardMTUV6",
        /// Priority of the routing rule.
        wireguard_routing_rule_priority: u32 = "wireguardRoutingRulePriority",
        /// Whether traffic between the hosts themselves is encrypted.
        wireguard_host_encryption_enabled: bool = "wireguardHostEncryptionEnabled",
        /// Interval of keepalives; 0 means none.
        wireguard_persistent_keep_alive: GoDuration = "wireguardKeepAlive",
        /// Whether the kernel polls the interface in a thread.
        wireguard_threading_enabled: bool = "wireguardThreadingEnabled",

        // Reports, logs, health, metrics.
        /// Time between status reports; 0 switches them off.
        reporting_interval: GoDuration = "reportingInterval",
        /// How long a status report is valid.
        reporting_ttl: GoDuration = "reportingTTL",
        /// Whether the state of endpoints is reported to the datastore.
        endpoint_reporting_enabled: bool = "endpointReportingEnabled",
        /// Time for which such reports are collected.
        endpoint_reporting_delay: GoDuration = "endpointReportingDelay",
        /// Folder of the files that report the state of endpoints.
        endpoint_status_path_prefix: String = "endpointStatusPathPrefix",
        /// Path of the log file; `none` for no file.
        log_file_path: String = "logFilePath",
        /// Level of the log file.
        log_severity_file: LogLevel = "logSeverityFile",
        /// Level of the standard output.
        log_severity_screen: LogLevel = "logSeverityScreen",
        /// Level of the system log.
        log_severity_sys: LogLevel = "logSeveritySys",
        /// Regular expression for the sources whose debug messages are logged.
        log_debug_filename_regex: String = "logDebugFilenameRegex",
        /// Whether health is served over HTTP.
        health_enabled: bool = "healthEnabled",
        /// Address of the health server.
        health_host: String = "healthHost",
        /// Port of the health server.
        health_port: u16 = "healthPort",
        /// Time limits of single watchdogs.
        health_timeout_overrides: Vec<HealthTimeoutOverride> = "healthTimeoutOverrides",
        /// Whether metrics are served.
        prometheus_metrics_enabled: bool = "prometheusMetricsEnabled",
        /// Address of the metrics server.
        prometheus_metrics_host: String = "prometheusMetricsHost",
        /// Port of the metrics server.
        prometheus_metrics_port: u16 = "prometheusMetricsPort",
        /// Certificate authority of the metrics server's clients.
        prometheus_metrics_ca_file: String = "prometheusMetricsCAFile",
        /// Certificate of the metrics server.
        prometheus_metrics_cert_file: String = "prometheusMetricsCertFile",
        /// Key of the metrics server.
        prometheus_metrics_key_file: String = "prometheusMetricsKeyFile",
        /// Which client certificates the metrics server asks for.
        prometheus_metrics_client_auth: String = "prometheusMetricsClientAuth",
        /// Whether metrics of the runtime are included.
        prometheus_go_metrics_enabled: bool = "prometheusGoMetricsEnabled",
        /// Whether metrics of the process are included.
        prometheus_process_metrics_enabled: bool = "prometheusProcessMetricsEnabled",
        /// Whether metrics of WireGuard are included.
        prometheus_wireguard_metrics_enabled: bool = "prometheusWireGuardMetricsEnabled",
        /// Time for which flows are collected.
        flow_logs_flush_interval: GoDuration = "flowLogsFlushInterval",
        /// The server to which flows are sent.
        flow_logs_goldmane_server: String = "flowLogsGoldmaneServer",
        /// Whether flows are offered on a local socket.
        flow_logs_local_reporter: Toggle = "flowLogsLocalReporter",
        /// How long policies are evaluated for flow logs.
        flow_logs_policy_evaluation_mode: FlowLogsPolicyEvaluationMode = "flowLogsPolicyEvaluationMode",
        /// Whether the version is reported to the project.
        usage_reporting_enabled: bool = "usageReportingEnabled",
        /// Time until the first such report.
        usage_reporting_initial_delay: GoDuration = "usageReportingInitialDelay",
        /// Time between such reports.
        usage_reporting_interval: GoDuration = "usageReportingInterval",

        // Platforms.
        /// Region of an OpenStack installation.
        openstack_region: String = "openstackRegion",
        /// Address of the metadata server.
        metadata_addr: String = "metadataAddr",
        /// Port of the metadata server.
        metadata_port: u16 = "metadataPort",
        /// The source-destination check of AWS.
        aws_src_dst_check: AWSSrcDstCheck = "awsSrcDstCheck",
        /// Whether Windows firewall rules are managed.
        windows_manage_firewall_rules: Toggle = "windowsManageFirewallRules",
        /// Whether sidecars are accelerated.
        sidecar_acceleration_enabled: bool = "sidecarAccelerationEnabled",
        /// Whether Istio's ambient mode is supported.
        istio_ambient_mode: Toggle = "istioAmbientMode",
        /// Code point that marks Istio's traffic.
        istio_dscp_mark: Dscp = "istioDSCPMark",

        // Go's runtime and debugging.
        /// Garbage collection threshold.
        go_gc_threshold: i64 = "goGCThreshold",
        /// Memory limit.
        go_memory_limit_mb: i64 = "goMemoryLimitMB",
        /// Limit of processors.
        go_max_procs: i64 = "goMaxProcs",
        /// Address of the profiler.
        debug_host: String = "debugHost",
        /// Port of the profiler.
        debug_port: u16 = "debugPort",
        /// Path of memory profiles.
        debug_memory_profile_path: String = "debugMemoryProfilePath",
        /// Whether the log waits instead of dropping lines.
        debug_disable_log_dropping: bool = "debugDisableLogDropping",
        /// Simulates a fault.
        debug_simulate_calc_graph_hang_after: GoDuration = "debugSimulateCalcGraphHangAfter",
        /// Simulates a fault.
        debug_simulate_dataplane_hang_after: GoDuration = "debugSimulateDataplaneHangAfter",
        /// Simulates a slow dataplane.
        debug_simulate_dataplane_apply_delay: GoDuration = "debugSimulateDataplaneApplyDelay",

        // XDP and eBPF: read and written back.
        /// See Calico's reference.
        xdp_enabled: bool = "xdpEnabled",
        /// See Calico's reference.
        generic_xdp_enabled: bool = "genericXDPEnabled",
        /// See Calico's reference.
        xdp_refresh_interval: GoDuration = "xdpRefreshInterval",
        /// See Calico's reference.
        bpf_enabled: bool = "bpfEnabled",
        /// See Calico's reference.
        bpf_disable_unprivileged: bool = "bpfDisableUnprivileged",
        /// See Calico's reference.
        bpf_jit_hardening: String = "bpfJITHardening",
        /// See Calico's reference.
        bpf_log_level: String = "bpfLogLevel",
        /// See Calico's reference.
        bpf_log_filters: BTreeMap<String, String> = "bpfLogFilters",
        /// See Calico's reference.
        bpf_ctlb_log_filter: String = "bpfCTLBLogFilter",
        /// See Calico's reference.
        bpf_conntrack_log_level: String = "bpfConntrackLogLevel",
        /// See Calico's reference.
        bpf_conntrack_cleanup_mode: String = "bpfConntrackCleanupMode",
        /// See Calico's reference.
        bpf_conntrack_timeouts: BpfConntrackTimeouts = "bpfConntrackTimeouts",
        /// See Calico's reference.
        bpf_data_iface_pattern: String = "bpfDataIfacePattern",
        /// See Calico's reference.
        bpf_l3_iface_pattern: String = "bpfL3IfacePattern",
        /// See Calico's reference.
        bpf_connect_time_load_balancing_enabled: bool = "bpfConnectTimeLoadBalancingEnabled",
        /// See Calico's reference.
        bpf_connect_time_load_balancing: String = "bpfConnectTimeLoadBalancing",
        /// See Calico's reference.
        bpf_host_networked_nat_without_ctlb: Toggle = "bpfHostNetworkedNATWithoutCTLB",
        /// See Calico's reference.
        bpf_external_service_mode: String = "bpfExternalServiceMode",
        /// See Calico's reference.
        bpf_dsr_optout_cidrs: Vec<Net> = "bpfDSROptoutCIDRs",
        /// See Calico's reference.
        bpf_ext_to_service_connmark: u32 = "bpfExtToServiceConnmark",
        /// See Calico's reference.
        bpf_kube_proxy_iptables_cleanup_enabled: bool = "bpfKubeProxyIptablesCleanupEnabled",
        /// See Calico's reference.
        bpf_kube_proxy_min_sync_period: GoDuration = "bpfKubeProxyMinSyncPeriod",
        /// See Calico's reference.
        bpf_kube_proxy_healthz_port: u16 = "bpfKubeProxyHealthzPort",
        /// See Calico's reference.
        bpf_kube_proxy_endpoint_slices_enabled: bool = "bpfKubeProxyEndpointSlicesEnabled",
        /// See Calico's reference.
        bpf_psnat_ports: Port = "bpfPSNATPorts",
        /// See Calico's reference.
        bpf_map_size_nat_frontend: u32 = "bpfMapSizeNATFrontend",
        /// See Calico's reference.
        bpf_map_size_nat_backend: u32 = "bpfMapSizeNATBackend",
        /// See Calico's reference.
        bpf_map_size_nat_affinity: u32 = "bpfMapSizeNATAffinity",
        /// See Calico's reference.
        bpf_map_size_route: u32 = "bpfMapSizeRoute",
        /// See Calico's reference.
        bpf_map_size_conntrack: u32 = "bpfMapSizeConntrack",
        /// See Calico's reference.
        bpf_map_size_conntrack_scaling: String = "bpfMapSizeConntrackScaling",
        /// See Calico's reference.
        bpf_map_size_conntrack_cleanup_queue: u32 = "bpfMapSizeConntrackCleanupQueue",
        /// See Calico's reference.
        bpf_map_size_per_cpu_conntrack: u32 = "bpfMapSizePerCpuConntrack",
        /// See Calico's reference.
        bpf_map_size_ip_sets: u32 = "bpfMapSizeIPSets",
        /// See Calico's reference.
        bpf_map_size_if_state: u32 = "bpfMapSizeIfState",
        /// See Calico's reference.
        bpf_host_conntrack_bypass: bool = "bpfHostConntrackBypass",
        /// See Calico's reference.
        bpf_enforce_rpf: String = "bpfEnforceRPF",
        /// See Calico's reference.
        bpf_policy_debug_enabled: bool = "bpfPolicyDebugEnabled",
        /// See Calico's reference.
        bpf_force_track_packets_from_ifaces: Vec<String> = "bpfForceTrackPacketsFromIfaces",
        /// See Calico's reference.
        bpf_disable_gro_for_ifaces: String = "bpfDisableGROForIfaces",
        /// See Calico's reference.
        bpf_exclude_cidrs_from_nat: Vec<Net> = "bpfExcludeCIDRsFromNAT",
        /// See Calico's reference.
        bpf_redirect_to_peer: String = "bpfRedirectToPeer",
        /// See Calico's reference.
        bpf_attach_type: String = "bpfAttachType",
        /// See Calico's reference.
        bpf_export_buffer_size_mb: u32 = "bpfExportBufferSizeMB",
        /// See Calico's reference.
        bpf_profiling: Toggle = "bpfProfiling",
        /// See Calico's reference.
        bpf_maglev_max_endpoints_per_service: u32 = "bpfMaglevMaxEndpointsPerService",
        /// See Calico's reference.
        bpf_maglev_max_services: u32 = "bpfMaglevMaxServices",
    }
}

impl FelixConfigurationSpec {
    /// UDP port of VXLAN where none is set.
    pub const DEFAULT_VXLAN_PORT: u16 = 4789;
    /// VXLAN network identifier where none is set.
    pub const DEFAULT_VXLAN_VNI: u32 = 4096;

    /// `nftablesMarkMask` where neither it nor `iptablesMarkMask` is set.
    const DEFAULT_MARK_MASK: u32 = 0xffff_0000;

    /// The bits of packet marks that are ours, from the lowest on. Calico gives them out in this order: the first says "accepted",
    /// the sixth is that of WireGuard.
    pub fn mark_bits(&self) -> impl Iterator<Item = u32> + use<> {
        let mask = self.nftables_mark_mask.or(self.iptables_mark_mask);
        let mask = mask.unwrap_or(Self::DEFAULT_MARK_MASK);
        (0..u32::BITS)
            .map(|bit| 1 << bit)
            .filter(move |bit| mask & bit != 0)
    }

    /// Ports of the host that no policy closes: the configured ones, or Calico's (DHCP, SSH, BGP, etcd, Typha, API server).
    #[must_use]
    pub fn failsafe_inbound(&self) -> Vec<ProtoPort> {
        let tcp = [22, 179, 2379, 2380, 5473, 6443, 6666, 6667];
        self.failsafe_inbound_host_ports
            .clone()
            .unwrap_or_else(|| ProtoPort::defaults(&[68], &tcp))
    }

    /// Ports of others that no policy closes: the configured ones, or Calico's (DNS, DHCP, BGP, etcd, Typha, API server).
    #[must_use]
    pub fn failsafe_outbound(&self) -> Vec<ProtoPort> {
        let tcp = [179, 2379, 2380, 5473, 6443, 6666, 6667];
        self.failsafe_outbound_host_ports
            .clone()
            .unwrap_or_else(|| ProtoPort::defaults(&[53, 67], &tcp))
    }

    /// Preferred source address of routes to workloads of this family.
    #[must_use]
    pub fn device_route_source(&self, v4: bool) -> Option<IpAddr> {
        if v4 {
            self.device_route_source_address.map(IpAddr::V4)
        } else {
            self.device_route_source_address_ipv6.map(IpAddr::V6)
        }
    }
}
