//! The calls: `ADD`, `DEL`, `CHECK`, `GC`, `STATUS`.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cali_api::kubernetes::annotation;
use cali_api::v3::WorkloadEndpoint;
use cali_api::{Cidr, StringMap};
use cali_control::cni::{Command, Failure, Plugin, Request};
use cali_datastore::Datastore;
use cali_ipam::Owner;
use cali_ipam::reserve::{Ask, Keeper};
use cali_netlink::together::Together;
use cali_netlink::{Errno, IfIndex, LinkRemover, NetNs, Netlink};
use serde_json::Value;

use super::Settings;
use super::directory::Directory;
use super::leftovers::who_owns;
use super::pods::{self, Known, Standing, Who};
use super::publish::{News, Publisher};
use super::sink::{Endpoint, EndpointSink, Leaving};
use super::stages::Stages;
use super::translations::Translations;
use crate::bandwidth;
use crate::config::Config;
use crate::nat::{self, PortMapping, Translation};
use crate::request::{Addresses, addresses, hardware_address};
use crate::result::{Added, Interface, render};
use crate::spec::{code, failure, failure_of};
use crate::wiring::{self, HOST_MAC, Made, Wired, Wish};

/// How long a `DEL` waits for route and policy to go. The address is not given out before that, or this time, is over.
const WAIT_FOR_REMOVAL: Duration = Duration::from_secs(10);
/// MTU of a pod where nothing says otherwise.
const DEFAULT_MTU: u32 = 1500;

/// Serves calls.
pub(super) struct Calls {
    pub(super) settings: Settings,
    pub(super) directory: Directory,
    pub(super) keeper: Keeper,
    pub(super) host: Netlink,
    pub(super) sink: Arc<dyn EndpointSink>,
    pub(super) publisher: Publisher,
    /// None where the kernel has no nf_tables.
    pub(super) translations: Option<Arc<Translations>>,
    removal: Together<IfIndex, cali_netlink::Result<bool>>,
    turns: Mutex<HashMap<Who, Arc<tokio::sync::Mutex<()>>>>,
}

/// An `ADD` or `DEL` with what was read of its configuration.
pub(super) struct Job<'a> {
    pub(super) request: &'a Request,
    pub(super) config: Config,
    pub(super) who: Who,
    pub(super) handle: String,
}

impl Job<'_> {
    fn alias(&self) -> String {
        wiring::alias(&self.request.container_id, &self.request.ifname)
    }
}

pub(super) fn kernel(doing: &str, error: &cali_netlink::Error) -> Failure {
    failure_of(code::KERNEL, format!("cannot {doing}"), error)
}

impl Calls {
    pub(super) fn new(
        settings: Settings,
        store: Arc<dyn Datastore>,
        keeper: Keeper,
        host: Netlink,
        sink: Arc<dyn EndpointSink>,
    ) -> cali_netlink::Result<Self> {
        let mut remover = LinkRemover::open(host.netns())?;
        let removal = Together::start("interfaces", move |devices: Vec<IfIndex>| {
            remover.remove(&devices)
        })?;
        let publisher = Publisher::start(Arc::clone(&store), &settings.node);
        let translations = match Translations::open(&settings.state_dir, &host) {
            Ok(translations) => Some(Arc::new(translations)),
            Err(error) => {
                tracing::error!(%error, "host ports cannot be served on this node");
                None
            }
        };
        Ok(Self {
            directory: Directory::start(store, &settings.node),
            settings,
            keeper,
            host,
            sink,
            publisher,
            translations,
            removal,
            turns: Mutex::new(HashMap::new()),
        })
    }

    pub(super) async fn handle(
        &self,
        request: &Request,
        netns: Option<NetNs>,
    ) -> Result<Value, Failure> {
        let config = Config::read(&request.config)?;
        match request.command {
            Command::Status => return self.status(&config).await,
            Command::Gc => return self.collect(&config).await,
            Command::PodCidrs => {
                let wait = self.settings.wait_for_pod;
                return self.directory.pod_cidrs(wait).await.map(Value::from);
            }
            Command::Add | Command::Del | Command::Check => {}
        }
        let handle = config.handle(&request.container_id, &request.ifname);
        let who = Who::of(&request.args, &request.container_id);
        let job = Job {
            request,
            config,
            who,
            handle,
        };
        let turn = self.turn(&job.who);
        let guard = turn.lock().await;
        let result = match (request.plugin, request.command) {
            (Plugin::Network, Command::Add) => self.add(&job, need(netns)?).await,
            (Plugin::Network, Command::Check) => self.check(&job, need(netns)?).await,
            (Plugin::Network, _) => self.delete(&job, netns).await,
            (Plugin::Ipam, Command::Add) => self.add_addresses(&job).await,
            (Plugin::Ipam, Command::Check) => self.check_addresses(&job).await,
            (Plugin::Ipam, _) => self.release(&job.handle).await.map(|()| Value::Null),
        };
        drop(guard);
        self.end_turn(&job.who, turn);
        result
    }

    pub(super) fn turn(&self, who: &Who) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(turns.entry(who.clone()).or_default())
    }

    pub(super) fn end_turn(&self, who: &Who, turn: Arc<tokio::sync::Mutex<()>>) {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        // Ours and the table's: nobody else waits.
        if Arc::strong_count(&turn) == 2 {
            turns.remove(who);
        }
    }

    pub(super) async fn known(&self, job: &Job<'_>) -> Result<Known, Failure> {
        let uid = job.request.args.get("K8S_POD_UID").map(String::as_str);
        let uid = uid.filter(|uid| !uid.is_empty());
        self.directory
            .known(&job.who, uid, self.settings.wait_for_pod)
            .await
    }

    async fn add(&self, job: &Job<'_>, netns: NetNs) -> Result<Value, Failure> {
        self.sink
            .ready()
            .map_err(|e| failure_of(code::TRY_AGAIN, "the node is not ready for pods", &e))?;
        let ports = nat::ports(
            job.config
                .runtime_config
                .port_mappings
                .as_deref()
                .unwrap_or_default(),
        )?;
        let mut stages = Stages::start();
        let known = self.known(job).await?;
        stages.end("pod");
        let had_addresses = self.keeper.attachment(&job.handle).await.is_some();
        let addresses = self.acquire(job, &known).await?;
        stages.end("address");
        let result = self
            .wire_and_program(job, &known, &netns, &addresses, ports, &mut stages)
            .await;
        stages.tell("ADD");
        if let Err(failure) = &result
            && !had_addresses
        {
            tracing::info!(
                container = job.request.container_id,
                error = failure.msg,
                "ADD is undone"
            );
            self.undo(job, &addresses).await;
        }
        result
    }

    async fn wire_and_program(
        &self,
        job: &Job<'_>,
        known: &Known,
        netns: &NetNs,
        addresses: &[IpAddr],
        ports: Vec<PortMapping>,
        stages: &mut Stages,
    ) -> Result<Value, Failure> {
        let mut wish = self.wish(job, addresses)?;
        wish.route_localnet = !ports.is_empty();
        wish.pod_mac = hardware_address(&job.config, &known.annotations())?;
        let wired = self
            .wire(netns, &wish)
            .await
            .map_err(|e| kernel("make the pod's interface", &e))?;
        stages.end("interface");
        let cidrs: Vec<Cidr> = addresses.iter().copied().map(Cidr::host).collect();
        let workload = pods::endpoint(
            known,
            &Standing {
                node: &self.settings.node,
                who: &job.who,
                network: &job.config.name,
                container_id: &job.request.container_id,
                ifname: &job.request.ifname,
                addresses: &cidrs,
                mac: cali_api::MacAddr(wired.pod_mac.0),
            },
        )?;
        self.limit_bandwidth(job, &workload, netns, &wired);
        let endpoint = Endpoint {
            workload: workload.clone(),
            host_index: wired.host_index,
        };
        let limit = match job.config.policy_setup_timeout_seconds {
            0 => self.settings.wait_for_policy,
            seconds => Duration::from_secs(seconds),
        };
        self.program(endpoint, limit).await?;
        stages.end("policy");
        self.translate(job, &workload, addresses, ports)?;
        stages.end("ports");
        self.publisher
            .tell(job.who.clone(), News::Up(Box::new(workload)));
        Ok(render(&added(job, &wish, &wired), &job.config.cni_version))
    }

    /// Returns once route and policy are in the kernel.
    pub(super) async fn program(&self, endpoint: Endpoint, limit: Duration) -> Result<(), Failure> {
        match tokio::time::timeout(limit, self.sink.endpoint_up(endpoint)).await {
            Ok(programmed) => programmed.map_err(|e| {
                failure_of(
                    code::TRY_AGAIN,
                    "route and policy could not be programmed",
                    &e,
                )
            }),
            Err(_) => {
                let msg = format!("route and policy were not programmed within {limit:?}");
                Err(failure(code::TRY_AGAIN, msg))
            }
        }
    }

    /// Limits both directions. A limit that cannot be set is no reason to keep the pod from running.
    fn limit_bandwidth(
        &self,
        job: &Job<'_>,
        workload: &WorkloadEndpoint,
        netns: &NetNs,
        wired: &Wired,
    ) {
        let asked = job.config.runtime_config.bandwidth;
        let buckets = bandwidth::buckets(workload.spec.qos_controls.as_ref(), asked);
        let host = buckets
            .ingress
            .map(|bucket| self.host.limit_rate(wired.host_index, &bucket));
        let inside = buckets.egress.map(|bucket| {
            let pod = Netlink::open(netns)?;
            match pod.link_by_name(&job.request.ifname)? {
                Some(link) => pod.limit_rate(link.index, &bucket),
                None => Ok(()),
            }
        });
        for error in [host, inside].into_iter().flatten().filter_map(Result::err) {
            tracing::warn!(
                container = job.request.container_id,
                %error,
                kernel_lacks_tbf = error.is_not_found(),
                "the pod's bandwidth is not limited as asked"
            );
        }
    }

    /// Leads ports and addresses of the host to the container.
    fn translate(
        &self,
        job: &Job<'_>,
        workload: &WorkloadEndpoint,
        addresses: &[IpAddr],
        ports: Vec<PortMapping>,
    ) -> Result<(), Failure> {
        let floating: Vec<_> = workload
            .spec
            .ip_nats
            .iter()
            .map(|nat| (nat.external_ip, nat.internal_ip))
            .collect();
        if !floating.is_empty() && !job.config.feature_control.floating_ips {
            let msg = format!(
                "annotation {} is not enabled (feature_control.floating_ips)",
                annotation::FLOATING_IPS
            );
            return Err(failure(code::POD, msg));
        }
        let translation = Translation {
            sequence: 0,
            addresses: addresses.to_vec(),
            ports,
            floating,
        };
        match &self.translations {
            Some(translations) => translations.put(
                &job.handle,
                &job.request.container_id,
                &job.request.ifname,
                translation,
            ),
            None if translation.is_empty() => Ok(()),
            None => Err(failure(
                code::UNSUPPORTED_FIELD,
                "host ports and floating addresses need nf_tables, which this kernel does not have",
            )),
        }
    }

    /// Makes the interface. What is in its way goes first, together with what leaves for other reasons.
    async fn wire(&self, pod: &NetNs, wish: &Wish) -> cali_netlink::Result<Wired> {
        let mut gone = BTreeSet::new();
        loop {
            let (host, pod, wish) = (self.host.clone(), pod.clone(), wish.clone());
            let made = tokio::task::spawn_blocking(move || wiring::make(&host, &pod, &wish));
            let made = made.await.unwrap_or_else(|_| {
                let name = "the interface of a pod";
                Err(cali_netlink::Error::errno("make", name, Errno::ECANCELED))
            });
            match made? {
                Made::Stands(wired) => return Ok(wired),
                Made::InTheWay(index) if gone.insert(index) => self.remove(index).await?,
                Made::InTheWay(index) => {
                    let name = format!("link #{index}");
                    return Err(cali_netlink::Error::errno("remove", name, Errno::EBUSY));
                }
            }
        }
    }

    /// Removes an interface of the host; that it is gone already is no error. Those of many pods go together.
    async fn remove(&self, index: IfIndex) -> cali_netlink::Result<()> {
        self.removal.ask(index).await?.map(|_| ())
    }

    async fn undo(&self, job: &Job<'_>, addresses: &[IpAddr]) {
        let mut stages = Stages::start();
        let gone = self.take_down(job, &job.who, addresses, &mut stages).await;
        let released = match gone {
            Ok(_) => self.release(&job.handle).await,
            Err(e) => Err(still_there(&e)),
        };
        if let Err(e) = released {
            tracing::warn!(
                handle = job.handle,
                error = e.msg,
                details = e.details,
                "addresses of a failed ADD stay taken until DEL"
            );
        }
    }

    fn wish(&self, job: &Job<'_>, addresses: &[IpAddr]) -> Result<Wish, Failure> {
        Ok(Wish {
            host_name: job.who.interface(),
            pod_name: job.request.ifname.clone(),
            alias: job.alias(),
            addresses: addresses.to_vec(),
            mtu: self.mtu(&job.config)?,
            pod_mac: None,
            route_localnet: false,
            forwarding: job.config.container_settings.allow_ip_forwarding,
        })
    }

    fn mtu(&self, config: &Config) -> Result<u32, Failure> {
        if config.mtu != 0 {
            return Ok(config.mtu);
        }
        let path = self.settings.state_dir.join("mtu");
        match std::fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().map_err(|_| {
                failure(
                    code::CONFIGURATION,
                    format!("{} does not hold a number: {text:?}", path.display()),
                )
            }),
            Err(_) if config.require_mtu_file => Err(failure(
                code::TRY_AGAIN,
                format!("{} is not there yet", path.display()),
            )),
            Err(_) => Ok(DEFAULT_MTU),
        }
    }

    async fn check(&self, job: &Job<'_>, netns: NetNs) -> Result<Value, Failure> {
        if job.config.prev_result.is_none() {
            return Err(failure(code::CONFIGURATION, "CHECK needs prevResult"));
        }
        let pod = Netlink::open(&netns).map_err(|e| kernel("enter the pod's namespace", &e))?;
        let promised = promised(job.config.prev_result.as_ref());
        let wish = self.wish(job, &promised)?;
        let mut defects = wiring::defects(&self.host, &pod, &wish)
            .map_err(|e| kernel("look at the pod's interface", &e))?;
        if let Some(translations) = &self.translations {
            let missing = translations.defects(&job.handle);
            defects.extend(missing.map_err(|e| kernel("look at the pod's host ports", &e))?);
        }
        if let Some(attachment) = self.keeper.attachment(&job.handle).await {
            let given: BTreeSet<IpAddr> = attachment.addresses.iter().map(|h| h.address).collect();
            for address in promised.iter().filter(|a| !given.contains(*a)) {
                defects.push(format!("{address} is not the container's"));
            }
        }
        if defects.is_empty() {
            return Ok(Value::Null);
        }
        let mut failure = failure(code::CHECK, "the pod's network is not as it was made");
        failure.details = defects.join("; ");
        Err(failure)
    }

    async fn delete(&self, job: &Job<'_>, netns: Option<NetNs>) -> Result<Value, Failure> {
        let attachment = self.keeper.attachment(&job.handle).await;
        let addresses: Vec<IpAddr> = match &attachment {
            Some(attachment) => attachment.addresses.iter().map(|h| h.address).collect(),
            // Managed by nobody, or by another plugin: the container's for as long as it has its interface.
            None if wiring::host_side(&self.host, &job.who.interface(), &job.alias())
                .is_ok_and(|l| l.is_some()) =>
            {
                promised(job.config.prev_result.as_ref())
            }
            None => Vec::new(),
        };
        // The runtime may leave CNI_ARGS out; the journal remembers the pod.
        let owner = attachment.as_ref().map(|a| &a.owner);
        let who = match (&job.who, owner.and_then(who_owns)) {
            (Who::Container { .. }, Some(pod)) => pod,
            _ => job.who.clone(),
        };
        let mut stages = Stages::start();
        let removed = self.take_down(job, &who, &addresses, &mut stages).await;
        let removed = removed.map_err(|e| still_there(&e))?;
        if let Some(netns) = netns.filter(|_| !removed) {
            match Netlink::open(&netns) {
                Ok(pod) => {
                    let removed = wiring::remove_in_pod(&pod, &job.request.ifname).await;
                    removed.map_err(|e| still_there(&e))?;
                }
                // What was a namespace is none any more: its devices are gone.
                Err(e) => {
                    tracing::warn!(container = job.request.container_id, error = %e, "cannot enter a pod's namespace")
                }
            }
        }
        let container_id = job.request.container_id.clone();
        self.publisher.tell(who, News::Down { container_id });
        stages.end("interface");
        self.release(&job.handle).await?;
        stages.end("address");
        stages.tell("DEL");
        Ok(Value::Null)
    }

    /// Ends route and policy, then removes the interface, unless a newer sandbox of the same pod has taken its place. True where
    /// the pair is gone for certain.
    ///
    /// # Errors
    /// The interface may be there still: nobody else may be given its addresses.
    async fn take_down(
        &self,
        job: &Job<'_>,
        who: &Who,
        addresses: &[IpAddr],
        stages: &mut Stages,
    ) -> cali_netlink::Result<bool> {
        if let Some(translations) = &self.translations
            && let Err(e) = translations.take(&job.handle)
        {
            tracing::warn!(
                container = job.request.container_id,
                error = e.msg,
                details = e.details,
                "host ports still lead to a container that leaves"
            );
        }
        let interface = who.interface();
        let overtaken = match self.host.link_by_name(&interface) {
            Ok(link) => link.is_some_and(|l| l.alias.is_some_and(|alias| alias != job.alias())),
            Err(_) => false,
        };
        if !overtaken {
            let leaving = Leaving {
                key: who.endpoint_key(&self.settings.node),
                interface,
                addresses: addresses.to_vec(),
                container_id: job.request.container_id.clone(),
            };
            match tokio::time::timeout(WAIT_FOR_REMOVAL, self.sink.endpoint_down(leaving)).await {
                Ok(Ok(())) => {}
                Ok(Err(e)) => {
                    tracing::warn!(container = job.request.container_id, error = %e, "route and policy could not be removed in time")
                }
                Err(_) => tracing::warn!(
                    container = job.request.container_id,
                    "route and policy were not removed in time"
                ),
            }
        }
        stages.end("policy");
        match wiring::host_side(&self.host, &who.interface(), &job.alias())? {
            Some(link) => self.remove(link.index).await.map(|()| true),
            None => Ok(false),
        }
    }

    /// Whether a pod that the configuration is for could be served now.
    async fn status(&self, config: &Config) -> Result<Value, Failure> {
        let not_available =
            |msg: &str, e: &dyn std::error::Error| Err(failure_of(code::NOT_AVAILABLE, msg, e));
        if let Err(e) = self.sink.ready() {
            return not_available("the node is not ready for pods", &e);
        }
        let none = StringMap::new();
        if config.delegate().is_none()
            && let Addresses::Pools {
                v4,
                v6,
                pools_v4,
                pools_v6,
            } = addresses(config, &none, &none)?
        {
            let node = &self.settings.node;
            let ask = Ask {
                owner: Owner::new(&format!("{}.status.{node}", config.name)).with("node", node),
                v4,
                v6,
                pools_v4,
                pools_v6,
                namespace_labels: None,
            };
            if let Err(e) = self.keeper.available(&ask).await {
                return not_available("no address is to be had for a pod", &e);
            }
        }
        Ok(Value::Null)
    }
}

/// The addresses stay the container's, and `DEL` is asked for again.
fn still_there(error: &cali_netlink::Error) -> Failure {
    failure_of(
        code::TRY_AGAIN,
        "the pod's interface cannot be removed; it keeps its addresses until it is gone",
        error,
    )
}

fn need(netns: Option<NetNs>) -> Result<NetNs, Failure> {
    netns.ok_or_else(|| {
        failure(
            code::ENVIRONMENT,
            "the call came without the pod's namespace",
        )
    })
}

/// The addresses of a previous result.
fn promised(result: Option<&Value>) -> Vec<IpAddr> {
    let ips = result.and_then(|r| r.get("ips")).and_then(Value::as_array);
    ips.into_iter()
        .flatten()
        .filter_map(|ip| ip.get("address")?.as_str()?.split('/').next()?.parse().ok())
        .collect()
}

fn added(job: &Job<'_>, wish: &Wish, wired: &Wired) -> Added {
    let interface = |name: &str, mac: String, sandbox: Option<String>| Interface {
        name: name.to_owned(),
        mac,
        sandbox,
        mtu: wired.mtu,
    };
    Added {
        interfaces: vec![
            interface(&wish.host_name, HOST_MAC.to_string(), None),
            interface(
                &wish.pod_name,
                wired.pod_mac.to_string(),
                Some(job.request.netns.clone()),
            ),
        ],
        addresses: wish.addresses.clone(),
        gateways: wiring::gateways(&wish.addresses),
    }
}
