//! Who supplies the routes to other nodes' blocks: block affinities or BGP, exactly one of them per pool mode.

use ipip_vxlan::Encap;

/// `CALICO_NETWORKING_BACKEND`: what carries routes between nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Backend {
    /// BGP runs (`bird`).
    #[default]
    Bgp,
    /// No BGP; tunnels carry everything (`vxlan`).
    Vxlan,
    /// No BGP, and nobody else distributes routes (`none`).
    None,
}

/// One side of the `programClusterRoutes` pair (FelixConfiguration and BGPConfiguration).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterRoutes {
    /// Neither kind of pool.
    Disabled,
    /// IPIP pools.
    EnabledIpipOnly,
    /// Pools without encapsulation.
    EnabledNoEncapOnly,
    /// Both kinds.
    Enabled,
}

impl ClusterRoutes {
    const fn ipip(self) -> bool {
        matches!(self, Self::EnabledIpipOnly | Self::Enabled)
    }

    const fn no_encap(self) -> bool {
        matches!(self, Self::EnabledNoEncapOnly | Self::Enabled)
    }
}

/// Who supplies the routes of one kind of pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Supplier {
    /// The block affinities in the datastore.
    BlockAffinity,
    /// The paths that bgpd has chosen.
    Bgp,
    /// The block affinities, if the node is on-link (host-gw).
    OnLinkBlockAffinity,
}

/// The table of docs/architecture.md §5, after the settings have been applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suppliers {
    ipip: Supplier,
    no_encap: Supplier,
}

impl Default for Suppliers {
    fn default() -> Self {
        Self {
            ipip: Supplier::BlockAffinity,
            no_encap: Supplier::Bgp,
        }
    }
}

impl Suppliers {
    /// Decides from the backend and the `programClusterRoutes` pair. A pair that names both sides or neither is
    /// resolved to exactly one, and the second value says so in words for an operator.
    #[must_use]
    pub fn decide(
        backend: Backend,
        felix: ClusterRoutes,
        bgp: ClusterRoutes,
    ) -> (Self, Vec<String>) {
        if backend != Backend::Bgp {
            let chosen = Self {
                ipip: Supplier::BlockAffinity,
                no_encap: Supplier::OnLinkBlockAffinity,
            };
            return (chosen, Vec::new());
        }
        let mut notices = Vec::new();
        let mut one =
            |kind: &str, felix: bool, bgp: bool, by_felix: Supplier, default: Supplier| match (
                felix, bgp,
            ) {
                (true, false) => by_felix,
                (false, true) => Supplier::Bgp,
                (both, _) => {
                    let who = if both {
                        "both FelixConfiguration and BGPConfiguration"
                    } else {
                        "neither of them"
                    };
                    let kept = if default == Supplier::Bgp {
                        "BGP"
                    } else {
                        "block affinities"
                    };
                    notices.push(format!(
                        "programClusterRoutes: {who} supply {kind} routes; {kept} supply them"
                    ));
                    default
                }
            };
        let ipip = one(
            "IPIP",
            felix.ipip(),
            bgp.ipip(),
            Supplier::BlockAffinity,
            Supplier::BlockAffinity,
        );
        let no_encap = one(
            "unencapsulated",
            felix.no_encap(),
            bgp.no_encap(),
            Supplier::OnLinkBlockAffinity,
            Supplier::Bgp,
        );
        (Self { ipip, no_encap }, notices)
    }

    /// The one supplier for pools of this mode.
    #[must_use]
    pub const fn of(&self, encap: Encap) -> Supplier {
        match encap {
            Encap::Vxlan(_) => Supplier::BlockAffinity,
            Encap::Ipip(_) => self.ipip,
            Encap::None => self.no_encap,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipip_vxlan::Scope;

    const IPIP: Encap = Encap::Ipip(Scope::Always);
    const VXLAN: Encap = Encap::Vxlan(Scope::CrossSubnet);

    #[test]
    fn calicos_defaults_need_no_notice() {
        let (suppliers, notices) = Suppliers::decide(
            Backend::Bgp,
            ClusterRoutes::EnabledIpipOnly,
            ClusterRoutes::EnabledNoEncapOnly,
        );
        assert_eq!(suppliers, Suppliers::default());
        assert_eq!(notices, Vec::<String>::new());
    }

    #[test]
    fn vxlan_is_never_supplied_by_bgp() {
        let (suppliers, _) = Suppliers::decide(
            Backend::Bgp,
            ClusterRoutes::Disabled,
            ClusterRoutes::Enabled,
        );
        assert_eq!(suppliers.of(VXLAN), Supplier::BlockAffinity);
        assert_eq!(suppliers.of(IPIP), Supplier::Bgp);
    }

    #[test]
    fn an_inconsistent_pair_gets_one_supplier_and_a_notice() {
        for pair in [
            (ClusterRoutes::Enabled, ClusterRoutes::Enabled),
            (ClusterRoutes::Disabled, ClusterRoutes::Disabled),
        ] {
            let (suppliers, notices) = Suppliers::decide(Backend::Bgp, pair.0, pair.1);
            assert_eq!(suppliers, Suppliers::default(), "{pair:?}");
            assert_eq!(notices.len(), 2, "{notices:?}");
        }
    }

    #[test]
    fn without_bgp_block_affinities_supply_all() {
        let (suppliers, notices) = Suppliers::decide(
            Backend::None,
            ClusterRoutes::Disabled,
            ClusterRoutes::Enabled,
        );
        assert_eq!(suppliers.of(Encap::None), Supplier::OnLinkBlockAffinity);
        assert_eq!(suppliers.of(IPIP), Supplier::BlockAffinity);
        assert!(notices.is_empty());
    }
}
