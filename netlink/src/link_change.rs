//! Low-rate changes (links, addresses, rules) over the `rtnetlink` crate.

use std::{
    net::IpAddr,
    os::fd::AsRawFd,
    sync::{Mutex, PoisonError},
};

use futures::Future;
use nix::errno::Errno;
use rtnetlink::{
    Handle, LinkBridge, LinkDummy, LinkIpIp, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan,
    LinkWireguard,
    packet_route::{
        link::{InfoData, InfoVeth, LinkAttribute, LinkMessage},
        rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage},
    },
    sys::{AsyncSocket, TokioSocket},
};

use crate::{
    Address, IfIndex, IpIp, LinkChange, NetNs, Netlink, NewLink, NewLinkKind, Rule, VethPeer,
    Vxlan,
    error::{Cause, Error, Result},
    socket::error_text,
};

const NETLINK_ROUTE: isize = 0;

/// The `rtnetlink` connection; made when it is first needed, and again when its runtime is gone.
#[derive(Debug)]
pub(crate) struct LowRate {
    netns: NetNs,
    handle: Mutex<Option<Handle>>,
}

impl LowRate {
    pub(crate) fn new(netns: NetNs) -> Self {
        Self {
            netns,
            handle: Mutex::new(None),
        }
    }

    fn handle(&self) -> Result<Handle> {
        let mut slot = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = slot.as_ref() {
            return Ok(handle.clone());
        }
        let fail = |error: &std::io::Error| Error::io("open", "netlink connection", error);
        let runtime = tokio::runtime::Handle::try_current()
            .map_err(|error| Error::invalid("open", "netlink connection", error.to_string()))?;
        let socket = self
            .netns
            .run(|| {
                let _context = runtime.enter();
                TokioSocket::new(NETLINK_ROUTE)
            })?
            .map_err(|error| fail(&error))?;
        socket
            .socket_ref()
            .set_ext_ack(true)
            .map_err(|error| fail(&error))?;
        socket
            .socket_ref()
            .set_cap_ack(true)
            .map_err(|error| fail(&error))?;
        let (connection, handle, _) = rtnetlink::from_socket(socket);
        runtime.spawn(connection);
        *slot = Some(handle.clone());
        Ok(handle)
    }

    fn forget(&self) {
        *self.handle.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// One request. A connection whose task has ended (its runtime was shut down) is made anew, once.
    async fn request<T, F>(
        &self,
        operation: &'static str,
        object: impl Fn() -> String,
        work: impl Fn(Handle) -> F,
    ) -> Result<T>
    where
        F: Future<Output = std::result::Result<T, rtnetlink::Error>>,
    {
        let mut result = work(self.handle()?).await;
        if matches!(result, Err(rtnetlink::Error::RequestFailed)) {
            self.forget();
            result = work(self.handle()?).await;
        }
        result.map_err(|error| Error::new(operation, object(), cause(error)))
    }
}

fn cause(error: rtnetlink::Error) -> Cause {
    match error {
        rtnetlink::Error::NetlinkError(message) => Cause::Kernel {
            errno: Errno::from_raw(message.raw_code().saturating_neg()),
            message: error_text(&message.header),
        },
        rtnetlink::Error::RequestFailed => Cause::NoAnswer,
        other => Cause::Invalid(other.to_string()),
    }
}

impl Netlink {
    /// Makes a device, and returns its index.
    pub async fn add_link(&self, link: &NewLink) -> Result<IfIndex> {
        let object = || format!("link {}", link.name);
        check_name(link)?;
        let message = new_link_message(link);
        self.low_rate()
            .request("add", object, |handle| {
                let message = message.clone();
                async move { handle.link().add(message).execute().await }
            })
            .await?;
        if let NewLinkKind::Veth(peer @ VethPeer { up: true, .. }) = &link.kind {
            self.bring_up_peer(peer).await?;
        }
        self.link_by_name(&link.name)?
            .map(|made| made.index)
            .ok_or_else(|| Error::errno("add", object(), Errno::ENODEV))
    }

    /// The kernel refuses a peer that is up at once (`veth_open` finds the pair not yet joined), so this comes after.
    async fn bring_up_peer(&self, peer: &VethPeer) -> Result<()> {
        let object = || format!("link {}", peer.name);
        let there = match &peer.netns {
            None => self.clone(),
            Some(netns) => {
                let fd = netns
                    .try_clone()
                    .map_err(|error| Error::io("bring up", object(), &error))?;
                Self::open(&NetNs::from_fd(fd))?
            }
        };
        let made = there
            .link_by_name(&peer.name)?
            .ok_or_else(|| Error::errno("bring up", object(), Errno::ENODEV))?;
        there.set_link_up(made.index, true).await
    }

    /// Changes a device.
    pub async fn change_link(&self, index: IfIndex, change: &LinkChange) -> Result<()> {
        let message = change_message(index, change);
        self.low_rate()
            .request(
                "change",
                || format!("link #{index}"),
                |handle| {
                    let message = message.clone();
                    async move { handle.link().change(message).execute().await }
                },
            )
            .await
    }

    /// Brings a device up or down.
    pub async fn set_link_up(&self, index: IfIndex, up: bool) -> Result<()> {
        self.change_link(
            index,
            &LinkChange {
                up: Some(up),
                ..LinkChange::default()
            },
        )
        .await
    }

    /// Moves a device into another namespace.
    pub async fn move_link(&self, index: IfIndex, netns: &NetNs) -> Result<()> {
        self.change_link(
            index,
            &LinkChange {
                netns: Some(netns.fd()),
                ..LinkChange::default()
            },
        )
        .await
    }

    /// Removes a device.
    pub async fn delete_link(&self, index: IfIndex) -> Result<()> {
        self.low_rate()
            .request(
                "delete",
                || format!("link #{index}"),
                |handle| async move { handle.link().del(index).execute().await },
            )
            .await
    }

    /// Adds an address; one that is there already is left as it is.
    pub async fn add_address(&self, address: &Address) -> Result<()> {
        self.low_rate()
            .request(
                "add",
                || format!("address {address}"),
                |handle| {
                    let mut request = handle
                        .address()
                        .add(
                            address.ifindex,
                            address.address.ip(),
                            address.address.prefix(),
                        )
                        .replace();
                    let message = request.message_mut();
                    message.header.scope = address.scope.into();
                    if let Some(peer) = address.peer {
                        set_peer(message, address.address.ip(), peer);
                    }
                    request.execute()
                },
            )
            .await
    }

    /// Removes an address.
    pub async fn delete_address(&self, address: &Address) -> Result<()> {
        self.low_rate()
            .request(
                "delete",
                || format!("address {address}"),
                |handle| {
                    let mut message = rtnetlink::packet_route::address::AddressMessage::default();
                    message.header.index = address.ifindex;
                    message.header.prefix_len = address.address.prefix();
                    message.header.family = if address.address.is_ipv6() {
                        rtnetlink::packet_route::AddressFamily::Inet6
                    } else {
                        rtnetlink::packet_route::AddressFamily::Inet
                    };
                    set_peer(
                        &mut message,
                        address.address.ip(),
                        address.peer.unwrap_or(address.address.ip()),
                    );
                    async move { handle.address().del(message).execute().await }
                },
            )
            .await
    }

    /// Adds a rule; the kernel takes an equal one only once (`NLM_F_EXCL`).
    pub async fn add_rule(&self, rule: &Rule) -> Result<()> {
        let message = rule_message(rule);
        self.low_rate()
            .request(
                "add",
                || format!("rule {rule}"),
                |handle| {
                    let mut request = handle.rule().add();
                    *request.message_mut() = message.clone();
                    async move { request.execute().await }
                },
            )
            .await
    }

    /// Removes a rule.
    pub async fn delete_rule(&self, rule: &Rule) -> Result<()> {
        let message = rule_message(rule);
        self.low_rate()
            .request(
                "delete",
                || format!("rule {rule}"),
                |handle| {
                    let message = message.clone();
                    async move { handle.rule().del(message).execute().await }
                },
            )
            .await
    }
}

/// `IFA_LOCAL` is our end, `IFA_ADDRESS` the other one (or ours again).
fn set_peer(
    message: &mut rtnetlink::packet_route::address::AddressMessage,
    own: IpAddr,
    other: IpAddr,
) {
    use rtnetlink::packet_route::address::AddressAttribute;
    message.attributes.retain(|attribute| {
        !matches!(
            attribute,
            AddressAttribute::Address(_) | AddressAttribute::Local(_)
        )
    });
    message.attributes.push(AddressAttribute::Local(own));
    message.attributes.push(AddressAttribute::Address(other));
}

pub(crate) fn check_name(link: &NewLink) -> Result<()> {
    if link.name.is_empty() || link.name.len() > 15 {
        let object = format!("link {}", link.name);
        return Err(Error::invalid("add", object, "a name has 1 to 15 bytes"));
    }
    Ok(())
}

fn with_common<T>(mut builder: LinkMessageBuilder<T>, link: &NewLink) -> LinkMessage {
    if let Some(mtu) = link.mtu {
        builder = builder.mtu(mtu);
    }
    if let Some(mac) = link.mac {
        builder = builder.address(mac.0.to_vec());
    }
    if let Some(master) = link.master {
        builder = builder.controller(master);
    }
    if link.up {
        builder = builder.up();
    }
    builder.build()
}

pub(crate) fn new_link_message(link: &NewLink) -> LinkMessage {
    match &link.kind {
        NewLinkKind::Veth(peer) => with_common(
            LinkMessageBuilder::<LinkVeth>::new(&link.name, &peer.name)
                .set_info_data(InfoData::Veth(InfoVeth::Peer(peer_message(peer)))),
            link,
        ),
        NewLinkKind::Bridge => with_common(LinkMessageBuilder::<LinkBridge>::new(&link.name), link),
        NewLinkKind::Vxlan(vxlan) => with_common(vxlan_builder(&link.name, vxlan), link),
        NewLinkKind::IpIp(ipip) => with_common(ipip_builder(&link.name, ipip), link),
        NewLinkKind::Wireguard => {
            with_common(LinkMessageBuilder::<LinkWireguard>::new(&link.name), link)
        }
        NewLinkKind::Dummy => with_common(LinkMessageBuilder::<LinkDummy>::new(&link.name), link),
    }
}

fn peer_message(peer: &VethPeer) -> LinkMessage {
    let mut builder = LinkMessageBuilder::<LinkUnspec>::new().name(peer.name.clone());
    if let Some(mac) = peer.mac {
        builder = builder.address(mac.0.to_vec());
    }
    if let Some(mtu) = peer.mtu {
        builder = builder.mtu(mtu);
    }
    if let Some(netns) = &peer.netns {
        builder = builder.setns_by_fd(netns.as_raw_fd());
    }
    builder.build()
}

fn vxlan_builder(name: &str, vxlan: &Vxlan) -> LinkMessageBuilder<LinkVxlan> {
    let mut builder = LinkMessageBuilder::<LinkVxlan>::new(name)
        .id(vxlan.vni)
        .port(vxlan.port)
        .learning(vxlan.learning)
        .udp_csum(vxlan.udp_csum);
    builder = match vxlan.local {
        Some(IpAddr::V4(local)) => builder.local(local),
        Some(IpAddr::V6(local)) => {
            let zero_checksum = !vxlan.udp_csum;
            builder
                .local6(local)
                .udp_zero_csum6_tx(zero_checksum)
                .udp_zero_csum6_rx(zero_checksum)
        }
        None => builder,
    };
    match vxlan.device {
        Some(device) => builder.dev(device),
        None => builder,
    }
}

fn ipip_builder(name: &str, ipip: &IpIp) -> LinkMessageBuilder<LinkIpIp> {
    let mut builder = LinkMessageBuilder::<LinkIpIp>::new(name)
        .ttl(ipip.ttl)
        .pmtudisc(ipip.pmtudisc);
    if let Some(local) = ipip.local {
        builder = builder.local(local);
    }
    if let Some(remote) = ipip.remote {
        builder = builder.remote(remote);
    }
    builder
}

pub(crate) fn change_message(index: IfIndex, change: &LinkChange) -> LinkMessage {
    let mut builder = LinkUnspec::new_with_index(index);
    if let Some(name) = &change.name {
        builder = builder.name(name.clone());
    }
    if let Some(mtu) = change.mtu {
        builder = builder.mtu(mtu);
    }
    if let Some(mac) = change.mac {
        builder = builder.address(mac.0.to_vec());
    }
    builder = match change.master {
        Some(Some(master)) => builder.controller(master),
        Some(None) => builder.nocontroller(),
        None => builder,
    };
    if let Some(alias) = &change.alias {
        builder = builder.append_extra_attribute(LinkAttribute::IfAlias(alias.clone()));
    }
    if let Some(netns) = &change.netns {
        builder = builder.setns_by_fd(netns.as_raw_fd());
    }
    match change.up {
        Some(true) => builder.up().build(),
        Some(false) => builder.down().build(),
        None => builder.build(),
    }
}

fn rule_message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = if rule.v6 {
        rtnetlink::packet_route::AddressFamily::Inet6
    } else {
        rtnetlink::packet_route::AddressFamily::Inet
    };
    message.header.action = RuleAction::ToTable;
    message.header.table = u8::try_from(rule.table).unwrap_or(0);
    if rule.invert {
        message.header.flags |= RuleFlags::Invert;
    }
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Table(rule.table));
    attributes.push(RuleAttribute::Priority(rule.priority));
    if let Some((mark, mask)) = rule.fwmark {
        attributes.push(RuleAttribute::FwMark(mark));
        attributes.push(RuleAttribute::FwMask(mask));
    }
    if let Some(from) = rule.from {
        message.header.src_len = from.prefix();
        attributes.push(RuleAttribute::Source(from.network()));
    }
    if let Some(to) = rule.to {
        message.header.dst_len = to.prefix();
        attributes.push(RuleAttribute::Destination(to.network()));
    }
    if let Some(iif) = &rule.iif {
        attributes.push(RuleAttribute::Iifname(iif.clone()));
    }
    if let Some(oif) = &rule.oif {
        attributes.push(RuleAttribute::Oifname(oif.clone()));
    }
    if let Some(len) = rule.suppress_prefix_len {
        attributes.push(RuleAttribute::SuppressPrefixLen(len));
    }
    if rule.protocol != 0 {
        attributes.push(RuleAttribute::Protocol(rule.protocol.into()));
    }
    message
}
