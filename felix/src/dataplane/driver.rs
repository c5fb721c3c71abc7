//! The task: what comes in, in which order it reaches the kernel, and what is told.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::update::SyncEvent;
use cali_api::v3::Toggle;
use cali_api::{Key, NodeName};
use cali_netlink::events::{Event, EventStream, Group, Notice};
use cali_netlink::nft::{Nft, NftEvent};
use cali_netlink::{Error, Netlink};
use cali_routes::{Backend, Input as RouteInput, KernelSettings, Writer, WriterState};
use ipip_vxlan::{GatewaysInUse, TunnelState, Tunnels, Wish};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{error, info, warn};
use typha::interest::Asker;

use super::access::{Announcement, Handle};
use super::asking::Asking;
use super::bystanders::Bystanders;
use super::endpoints::{EndpointChanges, Endpoints};
use super::enforcer::{BackendOverride, Enforcer};
use super::flow_guard::FlowGuard;
use super::host::{self, Interfaces};
use super::lockout::{self, Connection, Servers, Situation};
use super::metrics::Metrics;
use super::offload::Offload;
use super::own_addresses::OwnAddresses;
use super::packet_log::PacketLogger;
use super::resources::Resources;
use super::sockets;
use super::state::{EndpointState, State, StatusSink};
use crate::calc::{Batch, Delta, Direction, Graph, Input};
use crate::compile::IPVS_DEVICE;

/// How long routes wait for tunnels that do not get ready.
const TUNNELS_PATIENCE: Duration = Duration::from_secs(5);
/// Changes that come within this time become one step.
const COALESCE: Duration = Duration::from_millis(10);
/// Notifications that come within this time are taken in together.
const BURST: Duration = Duration::from_millis(5);
const BURST_LIMIT: usize = 1 << 16;
/// Announcements that may wait.
const QUEUE: usize = 256;

/// What the dataplane is to be.
#[derive(Debug, Clone)]
pub struct Config {
    /// The node's name in the datastore.
    pub node: NodeName,
    /// What carries routes between nodes.
    pub backend: Backend,
    /// How routes look in the kernel.
    pub routes: KernelSettings,
    /// How long a tunnel device outlives the last pool that asked for it.
    pub tunnel_linger: Duration,
    /// Where the dataplane's metrics are registered.
    pub metrics: prometheus::Registry,
    /// What the environment says of the backend that enforces policy.
    pub enforcement: BackendOverride,
    /// What this node lives by, which no policy of a host endpoint may cut.
    pub servers: Servers,
    /// How the stream of changes is asked for other nodes' endpoints; without it, all of them are in it.
    pub interest: Option<Asker>,
}

impl Config {
    /// Calico's defaults.
    #[must_use]
    pub fn new(node: NodeName) -> Self {
        Self {
            node,
            backend: Backend::default(),
            routes: KernelSettings::default(),
            tunnel_linger: Duration::from_secs(60),
            metrics: prometheus::Registry::new(),
            enforcement: BackendOverride::default(),
            servers: Servers::default(),
            interest: None,
        }
    }
}

/// A running dataplane. Dropping it ends the task and leaves the kernel forwarding as it is.
#[derive(Debug)]
pub struct Dataplane {
    handle: Handle,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Dataplane {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Dataplane {
    /// Starts in the namespace of `netlink`, with the stream of all objects that the node follows.
    ///
    /// # Errors
    /// The kernel's state cannot be read: the error says what is missing.
    pub fn start(
        config: Config,
        netlink: Netlink,
        updates: mpsc::Receiver<SyncEvent>,
        sink: Box<dyn StatusSink>,
    ) -> Result<Self, Error> {
        let nft = Nft::open(netlink.netns())?;
        let nft_events = Nft::events(netlink.netns())?;
        let link_events = netlink.events(&[Group::Link, Group::Ipv4Address, Group::Ipv6Address])?;
        let mut enforcer = Enforcer::new(netlink.netns().clone(), nft.clone(), config.enforcement);
        let mut own_addresses = OwnAddresses::default();
        enforcer.set_interfaces(own_addresses.look(&netlink)?);
        enforcer.set_ipvs(own_addresses.has_device(&netlink, IPVS_DEVICE)?);
        let routes = Writer::start(config.node.clone(), netlink.clone(), config.routes.clone())?;
        let resources = Resources::new(config.node.clone(), config.backend);
        let wish = Wish {
            linger: config.tunnel_linger,
            ..Wish::new(resources.resolver().clone())
        };
        let (wish, wish_out) = watch::channel(wish);
        let (in_use, in_use_out) = watch::channel(GatewaysInUse::new());
        let tunnels = Tunnels::start(netlink.clone(), wish_out, in_use_out)?;
        let (announcements, inbox) = mpsc::channel(QUEUE);
        let (state_out, state) = watch::channel(Arc::default());
        let graph = match config.interest {
            Some(_) => Graph::asking(config.node),
            None => Graph::new(config.node),
        };
        let driver = Driver {
            graph,
            asking: Asking::new(config.interest),
            offload: Offload::open(nft.clone(), netlink.clone()),
            bystanders: Bystanders::new(nft, netlink.netns(), Instant::now()),
            enforcer,
            own_addresses,
            servers: config.servers,
            lockout: Vec::new(),
            lockout_due: false,
            resources,
            endpoints: Endpoints::default(),
            interfaces: Interfaces::default(),
            flows: FlowGuard::open(&netlink),
            packet_log: PacketLogger::start(netlink.netns()),
            metrics: Metrics::new(&config.metrics),
            netlink,
            tunnel_state: tunnels.state(),
            followed: tunnels.followed(),
            tunnels_due: None,
            _tunnels: tunnels,
            wish,
            in_use,
            routes: routes.clone(),
            route_state: routes.state(),
            route_inputs: Vec::new(),
            waiting: Vec::new(),
            in_sync: false,
            written_once: false,
            step_at: None,
            sink,
            state: state_out,
        };
        let task = tokio::spawn(driver.run(updates, inbox, nft_events, link_events));
        Ok(Self {
            handle: Handle {
                announcements,
                state,
                routes,
            },
            task,
        })
    }

    /// Access that can be cloned and given away.
    #[must_use]
    pub const fn handle(&self) -> &Handle {
        &self.handle
    }
}

struct Driver {
    graph: Graph,
    asking: Asking,
    enforcer: Enforcer,
    own_addresses: OwnAddresses,
    servers: Servers,
    /// What the lock-out guard keeps open, in words.
    lockout: Vec<String>,
    lockout_due: bool,
    bystanders: Bystanders,
    resources: Resources,
    endpoints: Endpoints,
    interfaces: Interfaces,
    flows: FlowGuard,
    offload: Offload,
    packet_log: PacketLogger,
    metrics: Metrics,
    netlink: Netlink,
    tunnel_state: watch::Receiver<TunnelState>,
    /// The last wish that the tunnels have followed.
    followed: watch::Receiver<u64>,
    /// Until when routes wait for the tunnels.
    tunnels_due: Option<Instant>,
    _tunnels: Tunnels,
    wish: watch::Sender<Wish>,
    in_use: watch::Sender<GatewaysInUse>,
    routes: Writer,
    route_state: watch::Receiver<Arc<WriterState>>,
    /// Changes of the table that have not been handed on.
    route_inputs: Vec<RouteInput>,
    /// Announcers that wait for the next step.
    waiting: Vec<oneshot::Sender<()>>,
    in_sync: bool,
    /// Tunnels and routes have been written as the datastore had them when it was in sync.
    written_once: bool,
    step_at: Option<Instant>,
    sink: Box<dyn StatusSink>,
    state: watch::Sender<Arc<State>>,
}

impl Driver {
    async fn run(
        mut self,
        mut updates: mpsc::Receiver<SyncEvent>,
        mut inbox: mpsc::Receiver<Announcement>,
        mut nft_events: EventStream,
        mut link_events: EventStream,
    ) {
        let (mut updates_open, mut inbox_open) = (true, true);
        loop {
            let now = Instant::now();
            let far = now + Duration::from_secs(3600);
            let due = [
                self.step_at,
                self.enforcer_due(now),
                self.bystanders.next_due(),
                self.flows.next_due(),
                self.offload.next_due(),
                self.asking.next_due(now),
                self.tunnels_due,
            ]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(far);
            tokio::select! {
                event = updates.recv(), if updates_open => match event {
                    Some(event) => {
                        self.on_update(event);
                        while let Ok(event) = updates.try_recv() {
                            self.on_update(event);
                        }
                        self.step_at.get_or_insert(now + COALESCE);
                    }
                    None => {
                        error!("the stream of updates has ended; the kernel keeps what it has");
                        updates_open = false;
                    }
                },
                announcement = inbox.recv(), if inbox_open => match announcement {
                    Some(announcement) => {
                        self.on_announcement(announcement);
                        while let Ok(announcement) = inbox.try_recv() {
                            self.on_announcement(announcement);
                        }
                        // A pod waits for this.
                        self.step_at = Some(now);
                    }
                    None => inbox_open = false,
                },
                events = nft_events.next_burst(BURST, BURST_LIMIT) => match events {
                    Ok(events) => self.on_nft(events),
                    Err(error) => return error!(%error, "notifications of nf_tables have ended"),
                },
                events = link_events.next_burst(BURST, BURST_LIMIT) => match events {
                    Ok(events) => self.on_links(events),
                    Err(error) => return error!(%error, "notifications of links have ended"),
                },
                changed = self.route_state.changed() => match changed {
                    Ok(()) => self.on_routes(),
                    Err(_) => return error!("the task of the routes has ended"),
                },
                changed = self.tunnel_state.changed() => match changed {
                    Ok(()) => self.publish(),
                    Err(_) => return error!("the task of the tunnels has ended"),
                },
                changed = self.followed.changed() => match changed {
                    Ok(()) => self.step_at = Some(now),
                    Err(_) => return error!("the task of the tunnels has ended"),
                },
                () = tokio::time::sleep_until(due.into()) => self.step().await,
            }
        }
    }

    fn on_update(&mut self, event: SyncEvent) {
        match &event {
            SyncEvent::Updates(updates) => {
                for update in updates {
                    self.metrics.on_update(update.key.kind, Instant::now());
                    self.resources.on_update(update, &mut self.route_inputs);
                }
            }
            SyncEvent::Status(status) => info!(?status, "datastore"),
            // Policy waits for it.
            SyncEvent::Complete(_) => self.step_at = Some(Instant::now()),
        }
        self.graph.handle(Input::Sync(event));
    }

    fn on_announcement(&mut self, announcement: Announcement) {
        self.graph
            .handle(Input::Announce(announcement.key, announcement.endpoint));
        self.waiting.push(announcement.done);
    }

    fn on_nft(&mut self, events: Vec<Event>) {
        let now = Instant::now();
        let mut changes: Vec<NftEvent> = Vec::with_capacity(events.len());
        for event in events {
            match event {
                Event::Nft(event) => {
                    self.bystanders.on_event(&event, now);
                    changes.push(event);
                }
                Event::Overflow => {
                    self.enforcer.on_overflow(now);
                    self.bystanders.on_overflow(now);
                }
                _ => {}
            }
        }
        self.offload.on_events(&changes);
        self.enforcer.on_events(changes, now);
    }

    /// Interfaces that came, or came up, are set up; the last word about each counts.
    fn on_links(&mut self, events: Vec<Event>) {
        if self.own_addresses.on_events(&events) {
            self.on_addresses();
        }
        if events
            .iter()
            .any(|event| matches!(event, Event::Link(_) | Event::Overflow))
        {
            self.look_for_ipvs();
        }
        let mut names: BTreeSet<String> = BTreeSet::new();
        for event in events {
            match event {
                // A pod's interface comes with several notifications.
                Event::Link(Notice::Present(link)) if self.interfaces.stands(&link) => {}
                Event::Link(Notice::Present(link) | Notice::Gone(link)) => {
                    names.insert(link.name);
                }
                Event::Overflow => names.extend(
                    self.endpoints
                        .all()
                        .map(|(_, endpoint)| endpoint.interface.to_string()),
                ),
                _ => {}
            }
        }
        let mut touched = false;
        for name in names {
            if let Some((_, endpoint)) = self.endpoints.of_interface(&name) {
                self.interfaces.set_up(&self.netlink, endpoint);
                touched = true;
            }
        }
        if self.offload.touch() {
            self.step_at.get_or_insert(Instant::now() + COALESCE);
        }
        if touched {
            self.publish();
        }
    }

    /// Host endpoints may be known by the addresses of the node.
    fn on_addresses(&mut self) {
        match self.own_addresses.look(&self.netlink) {
            Ok(addresses) => {
                if self.enforcer.set_interfaces(addresses) {
                    self.lockout_due = true;
                    self.step_at.get_or_insert(Instant::now() + COALESCE);
                }
            }
            Err(error) => warn!(%error, "the addresses of this host cannot be read"),
        }
    }

    /// kube-proxy may change its mode while the node runs.
    fn look_for_ipvs(&mut self) {
        match self.own_addresses.has_device(&self.netlink, IPVS_DEVICE) {
            Ok(there) => {
                if self.enforcer.set_ipvs(there) {
                    info!(
                        there,
                        device = IPVS_DEVICE,
                        "kube-proxy's mode has changed: IPVS is at work where this device is there"
                    );
                    // Flows that began before are judged, and replies that IPVS translates must not take a short cut.
                    self.offload.take_down();
                    self.flows.suspect_all();
                    self.step_at = Some(Instant::now());
                }
            }
            Err(error) => warn!(%error, "the devices of this host cannot be read"),
        }
    }

    fn on_routes(&mut self) {
        let gateways = self.route_state.borrow_and_update().gateways.clone();
        self.in_use.send_if_modified(|current| {
            let changed = *current != gateways;
            if changed {
                *current = gateways;
            }
            changed
        });
        self.publish();
    }

    fn enforcer_due(&self, now: Instant) -> Option<Instant> {
        if self.in_sync {
            self.enforcer.next_due(now)
        } else {
            None
        }
    }

    /// One step: what has come in reaches the kernel. Rules come before the way to an endpoint, so that it is never
    /// reached without its policy; what it leaves behind goes before anybody else can have its address.
    async fn step(&mut self) {
        self.step_at = None;
        let mut changes = EndpointChanges::default();
        let batch = self.graph.flush();
        self.asking.ask(&mut self.graph, Instant::now());
        if let Some(batch) = batch {
            if batch.in_sync && !self.in_sync {
                // Not before the graph has said everything: what it has not said would be taken for gone.
                info!("the datastore is in sync");
                self.in_sync = true;
                self.route_inputs.push(RouteInput::InSync);
            }
            changes = self.on_batch(&batch).await;
            self.lockout_due = true;
        }
        if std::mem::take(&mut self.lockout_due) {
            self.guard_lifelines();
        }
        if self.in_sync {
            let graph = &self.graph;
            self.enforcer
                .retry_start(|| graph.whole(), Instant::now())
                .await;
            let start = Instant::now();
            self.enforcer.apply(self.flows.held()).await;
            let (took, settled) = (start.elapsed(), self.enforcer.is_settled());
            self.metrics.on_step(took, settled, Instant::now());
        }
        self.flows.free(&changes.freed);
        // Looking for flows takes the kernel longer than all the rest: whoever waits for what is new does not wait for that.
        let waited_for = !self.waiting.is_empty();
        if !waited_for {
            self.judge_flows();
        }
        self.wish_tunnels();
        let (gone, new): (VecDeque<_>, VecDeque<_>) = changes
            .routes
            .into_iter()
            .partition(|input| matches!(input, RouteInput::Remove(..)));
        if !gone.is_empty() && self.routes.apply(gone.into()).await.is_err() {
            return;
        }
        // Now that nothing leads to the former owners any more.
        self.flows.end_freed(&mut self.enforcer, Instant::now());
        for interface in changes.interfaces {
            match self.endpoints.of_interface(&interface) {
                Some((_, endpoint)) => self.interfaces.set_up(&self.netlink, endpoint),
                None => self.interfaces.forget(&interface),
            }
        }
        // What the datastore says of pools and nodes first, as soon as the tunnels have followed it, then workloads, then that it
        // was all.
        let mut inputs = if self.is_waiting_for_tunnels(Instant::now()) {
            Vec::new()
        } else {
            std::mem::take(&mut self.route_inputs)
        };
        let in_sync = inputs
            .iter()
            .position(|input| *input == RouteInput::InSync)
            .map(|at| inputs.remove(at));
        inputs.extend(new);
        let everything = in_sync.is_some();
        inputs.extend(in_sync);
        if !inputs.is_empty() {
            match self.routes.apply(inputs).await {
                Ok(failed) => {
                    self.written_once |= everything;
                    for failed in failed {
                        info!(prefix = %failed.prefix, reason = failed.reason, "route is not programmed");
                    }
                }
                Err(error) => return error!(%error, "routes cannot be written"),
            }
        }
        self.bystanders.look(Instant::now());
        self.offload_flows();
        self.publish();
        for done in self.waiting.drain(..) {
            // Whoever asked may have gone.
            let _ = done.send(());
        }
        if waited_for {
            self.judge_flows();
            if self.offload_flows() {
                self.publish();
            }
        }
    }

    /// No policy of a host endpoint cuts what this node lives by.
    fn guard_lifelines(&mut self) {
        if !self.enforcer.compiler().has_hosts() && self.lockout.is_empty() {
            return;
        }
        let sockets = sockets::read(self.netlink.netns());
        let own: BTreeSet<IpAddr> = self
            .enforcer
            .interfaces()
            .values()
            .flatten()
            .copied()
            .collect();
        let translated = self.flows.translated();
        let connections = sockets.connected.iter().map(|(here, there)| {
            // Who listens where was called.
            if sockets.listening.contains(&here.port()) {
                Connection {
                    client: there.ip(),
                    server: *here,
                }
            } else {
                Connection {
                    client: here.ip(),
                    server: *translated.get(&(*here, *there)).unwrap_or(there),
                }
            }
        });
        let connections = connections.collect();
        let nodes = self.enforcer.compiler().nodes();
        let situation = Situation {
            nodes: nodes.difference(&own).copied().collect(),
            own,
            connections,
            listening: sockets.listening,
        };
        let (kept, notices) = lockout::judge(self.enforcer.compiler(), &self.servers, &situation);
        self.enforcer.set_kept_open(&kept);
        for notice in notices
            .iter()
            .filter(|notice| !self.lockout.contains(notice))
        {
            error!(notice, "lock-out guard");
        }
        self.lockout = notices;
    }

    /// Ends established flows that the rules in the kernel forbid.
    fn judge_flows(&mut self) {
        let now = Instant::now();
        if !self.in_sync || !self.enforcer.is_settled() || !self.flows.is_due(now) {
            return;
        }
        self.flows
            .judge(&self.netlink, &mut self.enforcer, &self.endpoints, now);
        let (ended, held) = self.flows.counts();
        self.metrics.flows_ended.inc_by(ended);
        self.metrics
            .flows_held
            .set(i64::try_from(held).unwrap_or(i64::MAX));
    }

    /// While nothing is on its way that could forbid a flow, established ones may take the short cut. True where that gave
    /// reason to say something else than before.
    fn offload_flows(&mut self) -> bool {
        if !self.in_sync || !self.enforcer.is_settled() || !self.flows.is_idle() {
            return false;
        }
        let before: Vec<String> = self.offload.notices().cloned().collect();
        let wireguard = self.resources.wireguard();
        let tunnels = [
            ipip_vxlan::VXLAN_V4_DEVICE,
            ipip_vxlan::VXLAN_V6_DEVICE,
            ipip_vxlan::IPIP_DEVICE,
            &wireguard.family(true).device,
            &wireguard.family(false).device,
        ];
        let endpoints = self.endpoints.all().map(|(_, endpoint)| endpoint);
        let ipvs = self.enforcer.compiler().has_ipvs();
        self.offload
            .put_up(endpoints, &tunnels, ipvs, Instant::now());
        self.metrics
            .offload_devices
            .set(i64::try_from(self.offload.devices()).unwrap_or(i64::MAX));
        !self.offload.notices().eq(&before)
    }

    async fn on_batch(&mut self, batch: &Batch) -> EndpointChanges {
        for delta in &batch.deltas {
            if let Delta::Settings(spec) = delta {
                self.resources.on_settings(spec, &mut self.route_inputs);
                self.offload.configure(spec);
                self.packet_log.set_prefix(spec.log_prefix.as_deref());
                if spec.ip_forwarding != Some(Toggle::Disabled)
                    && let Err(error) = host::enable_forwarding(&self.netlink)
                {
                    warn!(%error, "forwarding cannot be switched on");
                }
            }
        }
        let graph = &self.graph;
        self.enforcer
            .on_batch(batch, || graph.whole(), Instant::now())
            .await;
        let suspects = self.enforcer.take_suspects();
        let changes = self.endpoints.on_batch(batch);
        if batch.in_sync || (self.in_sync && (!suspects.is_empty() || !changes.freed.is_empty())) {
            self.offload.take_down();
        }
        self.offload.touch();
        if batch.in_sync {
            // Whoever was here before may have enforced another policy.
            self.flows.adopt(&mut self.enforcer, Instant::now());
            self.flows.suspect_all();
        } else if self.in_sync {
            self.flows.suspect(suspects);
        }
        changes
    }

    fn wish_tunnels(&mut self) {
        let (resolver, settings, in_sync) = (
            self.resources.resolver(),
            self.resources.tunnels(),
            self.in_sync,
        );
        let (wireguard, holders) = (self.resources.wireguard(), self.resources.holders());
        self.wish.send_if_modified(|wish| {
            // Who holds what matters to the encryption alone.
            let encryption =
                wish.wireguard == *wireguard && (!wireguard.any() || wish.holders == *holders);
            let same = wish.in_sync == in_sync
                && encryption
                && wish.settings == *settings
                && wish.resolver == *resolver;
            if !same {
                wish.resolver = resolver.clone();
                wish.settings = settings.clone();
                wish.wireguard = wireguard.clone();
                wish.holders = holders.clone();
                wish.in_sync = in_sync;
                wish.number += 1;
                self.tunnels_due
                    .get_or_insert(Instant::now() + TUNNELS_PATIENCE);
            }
            !same
        });
    }

    /// Whether a wish of the tunnels' is not in the kernel yet: routes to its gateways would come before their neighbours.
    fn is_waiting_for_tunnels(&mut self, now: Instant) -> bool {
        let followed = *self.followed.borrow_and_update() == self.wish.borrow().number;
        if followed || self.tunnels_due.is_some_and(|due| due <= now) {
            self.tunnels_due = None;
        }
        self.tunnels_due.is_some()
    }

    fn publish(&mut self) {
        let routes = self.route_state.borrow().clone();
        let endpoints = self.endpoints.all().map(|(key, endpoint)| {
            let mut policies = Vec::new();
            for direction in [Direction::Ingress, Direction::Egress] {
                for policy in endpoint
                    .tiers(direction)
                    .iter()
                    .flat_map(|tier| &tier.policies)
                {
                    if !policies.contains(policy) {
                        policies.push(policy.clone());
                    }
                }
            }
            let state = EndpointState {
                interface: endpoint.interface.clone(),
                addresses: endpoint.addresses.clone(),
                policies,
                problem: self.problem_of(key, &routes),
            };
            (key.clone(), state)
        });
        let held_back = self.graph.held_back().map(|(key, endpoint)| {
            let state = EndpointState {
                interface: endpoint.interface.clone(),
                addresses: endpoint.addresses.clone(),
                policies: Vec::new(),
                problem: Some("its policy waits for endpoints that it selects".to_owned()),
            };
            (key.clone(), state)
        });
        let mut notices: Vec<String> = self.resources.notices().to_vec();
        notices.extend_from_slice(self.bystanders.notices());
        notices.extend(self.enforcer.notices());
        notices.extend_from_slice(&self.lockout);
        notices.extend(self.offload.notices().cloned());
        notices.extend(self.asking.notice(&self.graph, Instant::now()));
        let state = State {
            ready: self.written_once && self.enforcer.is_settled(),
            endpoints: endpoints.chain(held_back).collect(),
            refused: self.enforcer.refused(),
            unusable: self.graph.problems(),
            notices,
            wireguard_devices: [true, false]
                .map(|v4| self.resources.wireguard().family(v4).device.clone()),
            tunnels: self.tunnel_state.borrow_and_update().clone(),
            routes,
        };
        let sink = &mut self.sink;
        self.state.send_if_modified(|current| {
            let changed = **current != state;
            if changed {
                *current = Arc::new(state);
                sink.on_state(current);
            }
            changed
        });
    }

    /// Why an endpoint is not programmed.
    fn problem_of(&self, key: &Key, routes: &WriterState) -> Option<String> {
        let endpoint = self.endpoints.get(key)?;
        if !self.in_sync {
            return Some("the datastore is not in sync yet".to_owned());
        }
        match self.endpoints.of_interface(&endpoint.interface) {
            Some((owner, _)) if owner != key => {
                return Some(format!(
                    "interface {} belongs to {owner}",
                    endpoint.interface
                ));
            }
            _ => {}
        }
        if let Some(problem) = self.interfaces.problem(&endpoint.interface) {
            return Some(problem.clone());
        }
        if let Err(problem) = self.enforcer.has_endpoint(&endpoint.interface) {
            return Some(problem);
        }
        if !self.enforcer.is_settled() {
            return Some("its rules are being written".to_owned());
        }
        let waiting = routes
            .waiting
            .iter()
            .find(|(prefix, _)| endpoint.addresses.contains(prefix));
        if let Some((prefix, reason)) = waiting {
            return Some(format!("route {prefix}: {reason}"));
        }
        let refused = |address: &cali_api::Cidr| {
            let network = cali_routes::network(address).to_string();
            routes
                .quarantined
                .iter()
                .find(|refused| refused.route.split(' ').next() == Some(&network))
        };
        endpoint
            .addresses
            .iter()
            .find_map(refused)
            .map(|refused| format!("route {}: {}", refused.route, refused.reason))
    }
}
