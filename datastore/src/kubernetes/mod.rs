//! The Kubernetes API server as the datastore, with Calico's conventions.
//!
//! - Calico's kinds are custom resources, in `crd.projectcalico.org/v1` or `projectcalico.org/v3`, whichever the cluster
//!   serves ([`places`]). Namespaces, Pods, Services and the like are the API server's own.
//! - Calico's Node, WorkloadEndpoint and Profile are views of Kubernetes' Node, Pod, Namespace and ServiceAccount. They
//!   are read here, too, but a stream ([`crate::sync`]) follows the native kinds only ([`Datastore::is_stored`]). Of them
//!   only a Node can be written: as annotations ([`node`]).
//! - Native objects are updated by patches of what differs, under the revision that was read, and are kept as the few
//!   fields that are used ([`wire`]).
//! - Lists are paged, those of Pods in protobuf ([`protobuf`]). Connections are probed. Watches ask for bookmarks and are kept up over the server's regular ends; an expired revision, or
//!   one that the server never gave out, ends them with [`Error::RevisionGone`].
//! - The API server has no transactions over several objects: that a new IP pool overlaps with no other is checked again
//!   after it has been created; of several that were created at the same time the first one stays.
//!
//! The service account's token, certificates of authorities and a kubeconfig's token file are read anew while running.
//! What this module does not do: wait or retry (that is [`crate::sync`]'s), or install the resource definitions.

mod cluster;
mod connect;
mod event;
mod failure;
mod follow;
mod node;
mod places;
mod protobuf;
mod secret;
mod wire;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use cali_api::{AnyResource, Key, Kind, Revision, kubernetes};
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::Request;
use kube::core::params::{DeleteParams, GetParams, Preconditions};
use serde_json::{Value, json};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;

use self::cluster::{Cluster, Failed, Item, PAGE, Scope};
pub use self::connect::Settings;
use self::failure::{conflict, failure, is_missing};
use self::places::viewed;
use crate::admission;
use crate::error::Error;
use crate::store::{
    Datastore, List, Page, PageToken, Secret, SecretObject, Undecodable, Versioned, Warning,
    WatchStream,
};
use crate::stored;

/// One answer of the API server takes at most this long.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Events that wait for a slow reader of one watch; the rest waits in the API server.
const WATCH_BUFFER: usize = 256;
/// The revision of a list of a kind that the cluster does not serve.
const NOT_SERVED: &str = "not-served";

/// The API server as a datastore. All users of one process share its connections.
pub struct Kubernetes {
    settings: Settings,
    cluster: Mutex<Option<Arc<Cluster>>>,
}

/// Reads an object of `source` as what it is, or as the views of it that are of kind `told`.
fn decode(source: Kind, told: Kind, object: Value) -> Vec<Result<Versioned, Undecodable>> {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
    let revision = text("/metadata/resourceVersion")
        .unwrap_or_default()
        .to_owned();
    let name = text("/metadata/name").unwrap_or_default();
    let key = match text("/metadata/namespace") {
        Some(namespace) => Key::namespaced(source, namespace, name),
        None => Key::cluster(source, name),
    };
    match AnyResource::from_json(wire::read(source, object)) {
        Ok(object) => seen_as(told, object, &revision).map(Ok).collect(),
        Err(error) => vec![Err(Undecodable {
            key,
            revision: revision.into(),
            reason: error.to_string(),
        })],
    }
}

/// An object as what it is, or the views of it that are of kind `told`.
fn seen_as(told: Kind, object: AnyResource, revision: &str) -> impl Iterator<Item = Versioned> {
    let seen = if object.kind() == told {
        vec![object]
    } else {
        views(&object)
    };
    seen.into_iter()
        .filter(move |view| view.kind() == told)
        .map(move |view| stored::versioned(view, revision))
}

/// As [`decode`], of an object in a list.
fn decode_item(source: Kind, told: Kind, item: Item) -> Vec<Result<Versioned, Undecodable>> {
    let pod = match item {
        Item::Json(object) => return decode(source, told, object),
        Item::Pod(pod) => pod,
    };
    let revision = pod.metadata.resource_version.clone();
    let revision = revision.as_ref().map_or("", Revision::as_str);
    seen_as(told, AnyResource::K8sPod(pod), revision)
        .map(Ok)
        .collect()
}

fn views(object: &AnyResource) -> Vec<AnyResource> {
    match object {
        AnyResource::K8sNode(origin) => vec![node::view(origin)],
        other => kubernetes::to_calico(other),
    }
}

fn object_of(key: &Key, value: Value) -> Result<Versioned, Error> {
    let revision = stored::revision_of(&value).unwrap_or_default().to_owned();
    Ok(stored::versioned(
        stored::from_value(key, value)?,
        &revision,
    ))
}

fn body(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

impl Kubernetes {
    /// Does not connect yet: the first call does.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            cluster: Mutex::new(None),
        }
    }

    async fn cluster(&self) -> Result<Arc<Cluster>, Error> {
        let mut slot = self.cluster.lock().await;
        let client = match slot.as_ref() {
            Some(cluster) if cluster.group.is_some() => return Ok(Arc::clone(cluster)),
            Some(cluster) => cluster.client.clone(),
            None => self.settings.connect().await?,
        };
        let discovered = tokio::time::timeout(CALL_TIMEOUT, self.settings.discover(&client)).await;
        let what = "ask the API server which kinds it serves";
        let group = match discovered {
            Ok(Ok(group)) => group,
            Ok(Err(error)) => return Err(Error::unavailable(what, error)),
            Err(late) => return Err(Error::unavailable(what, late)),
        };
        let cluster = Arc::new(Cluster { client, group });
        *slot = Some(Arc::clone(&cluster));
        Ok(cluster)
    }

    async fn list_scope(&self, kind: Kind, scope: Scope<'_>) -> Result<List, Error> {
        let cluster = self.cluster().await?;
        let sources = sources(&kind);
        let (mut items, mut undecodable, mut revision) = (Vec::new(), Vec::new(), None);
        for source in sources {
            let within = Scope {
                namespace: scope.namespace.filter(|_| kind.is_namespaced()),
                ..scope
            };
            let Some((found, at)) = cluster.scan(*source, within).await? else {
                tracing::warn!(
                    kind = kind.plural(),
                    "the cluster does not serve this kind; it counts as empty"
                );
                revision.get_or_insert_with(|| NOT_SERVED.to_owned());
                continue;
            };
            // The first list's revision: a watch from there tells what the second list holds once more, and misses nothing.
            revision.get_or_insert(at);
            sort_out(*source, kind, found, &mut items, &mut undecodable);
        }
        items.sort_by_key(|item: &Versioned| item.object.key());
        Ok(List {
            items,
            undecodable,
            revision: revision.unwrap_or_default().into(),
        })
    }

    async fn watch_fields(
        &self,
        kinds: &[Kind],
        fields: Option<&str>,
        from: &Revision,
    ) -> Result<WatchStream, Error> {
        let gone = || Error::RevisionGone {
            revision: from.clone(),
        };
        let cluster = self.cluster().await?;
        let not_served = from.as_str() == NOT_SERVED;
        let number: Option<u64> = from.as_str().parse().ok().filter(|number| *number > 0);
        if number.is_none() && !not_served {
            return Err(gone());
        }
        let (sender, receiver) = mpsc::channel(WATCH_BUFFER);
        let mut tasks = JoinSet::new();
        for told in kinds.iter().copied() {
            for source in sources(&told).iter().copied() {
                let probe = cluster.page(source, Scope::default(), None, 1).await?;
                if let (Some(page), Some(from)) = (&probe, number) {
                    // A revision from before a backup was restored, or of another cluster.
                    let latest: u64 = page.metadata.resource_version.parse().unwrap_or(u64::MAX);
                    if latest < from {
                        return Err(gone());
                    }
                } else if probe.is_some() {
                    return Err(gone());
                }
                let follower = follow::Follower {
                    cluster: Arc::clone(&cluster),
                    source,
                    told,
                    fields: fields.map(str::to_owned),
                    position: from.clone(),
                    silence: follow::SILENCE,
                    sender: sender.clone(),
                };
                if probe.is_some() {
                    tasks.spawn(follower.run());
                } else {
                    tasks.spawn(follower.run_not_served());
                }
            }
        }
        drop(sender);
        let task = tokio::spawn(async move { while tasks.join_next().await.is_some() {} });
        Ok(WatchStream::new(receiver, task))
    }

    /// Reads a view: the native object by its name where that tells it, otherwise among all of the namespace.
    async fn read_view(&self, key: &Key) -> Result<Versioned, Error> {
        let native = match key.kind {
            Kind::Node => Some(Key::cluster(Kind::K8sNode, key.name.clone())),
            Kind::Profile => profile_source(&key.name),
            _ => None,
        };
        if let Some(native) = native {
            let cluster = self.cluster().await?;
            let object = match cluster.read(&native).await {
                Err(Error::NotFound { .. }) => return Err(Error::NotFound { key: key.clone() }),
                other => other?,
            };
            let found = decode(native.kind, key.kind, object).into_iter().next();
            return match found {
                Some(Ok(view)) => Ok(view),
                Some(Err(bad)) => Err(Error::Undecodable {
                    key: bad.key,
                    reason: bad.reason,
                }),
                None => Err(Error::NotFound { key: key.clone() }),
            };
        }
        let list = self.list(key.kind, key.namespace.as_deref()).await?;
        list.items
            .into_iter()
            .find(|item| item.object.key() == *key)
            .ok_or_else(|| Error::NotFound { key: key.clone() })
    }

    /// Refuses writes of views, but those of a Node.
    fn writable(key: &Key, operation: &'static str) -> Result<(), Error> {
        let reason = match key.kind {
            Kind::Node if operation == "update" => return Ok(()),
            Kind::Node => "it is a view of the Node of Kubernetes, which kubelet creates",
            Kind::WorkloadEndpoint => "it is a view of a Pod",
            Kind::Profile => "it is a view of a Namespace or ServiceAccount",
            _ => return Ok(()),
        };
        Err(Error::Unsupported {
            operation,
            key: key.clone(),
            reason,
        })
    }

    async fn others(&self, cluster: &Cluster, kind: Kind) -> Result<Vec<Versioned>, Error> {
        if !admission::compares_with_others(kind) {
            return Ok(Vec::new());
        }
        let (items, _) = cluster
            .scan(kind, Scope::default())
            .await?
            .unwrap_or_default();
        let decoded = items
            .into_iter()
            .flat_map(|item| decode_item(kind, kind, item));
        Ok(decoded.flatten().collect())
    }

    async fn admit(
        &self,
        cluster: &Cluster,
        object: &AnyResource,
        old: Option<&AnyResource>,
    ) -> Result<(), Error> {
        let others = self.others(cluster, object.kind()).await?;
        let others: Vec<AnyResource> = others
            .iter()
            .map(|other| other.object.as_ref().clone())
            .collect();
        admission::check(object, old, &others)
    }

    /// Of pools that were created at the same time and overlap, all but the first are taken back.
    async fn admit_again(&self, cluster: &Cluster, created: &Versioned) -> Result<(), Error> {
        let kind = created.object.kind();
        let number = |revision: &Revision| revision.as_str().parse::<u64>().unwrap_or(0);
        let mine = number(&created.revision);
        let before: Vec<AnyResource> = self
            .others(cluster, kind)
            .await?
            .iter()
            .filter(|other| number(&other.revision) < mine)
            .map(|other| other.object.as_ref().clone())
            .collect();
        let Err(refused) = admission::check(&created.object, None, &before) else {
            return Ok(());
        };
        self.delete(&created.object.key(), Some(&created.revision))
            .await?;
        Err(refused)
    }

    /// Writes the status of an object whose status the server keeps apart.
    async fn put_status(
        &self,
        cluster: &Cluster,
        key: &Key,
        wanted: &Value,
        written: Value,
    ) -> Result<Value, Error> {
        let Some(status) = wanted.get("status").filter(|status| !status.is_null()) else {
            return Ok(written);
        };
        let shown = wire::read(key.kind, written.clone());
        if shown.get("status") == Some(status) {
            return Ok(written);
        }
        let patch = json!({"status": status});
        let request = cluster.at(key)?.patch_subresource(
            "status",
            &key.name,
            &PatchParams::default(),
            &Patch::Merge(&patch),
        );
        match cluster.send(request).await {
            Ok(object) => Ok(object),
            // The kind has no status of its own in this cluster.
            Err(error) if is_missing(&error) => Ok(written),
            Err(error) => Err(failure("write the status of", key, error)),
        }
    }

    /// Sends patches under a revision; what stands then.
    async fn patch(
        &self,
        cluster: &Cluster,
        key: &Key,
        revision: &Revision,
        (whole, status): (Option<Value>, Option<Value>),
    ) -> Result<Option<Value>, Error> {
        let mut revision = revision.as_str().to_owned();
        let mut stands = None;
        let parameters = PatchParams::default();
        for (mut patch, subresource) in [(whole, None), (status, Some("status"))]
            .into_iter()
            .filter_map(|(patch, part)| Some((patch?, part)))
        {
            stored::set_revision(&mut patch, &revision);
            let at = cluster.at(key)?;
            let patch = Patch::Merge(&patch);
            let request = match subresource {
                None => at.patch(&key.name, &parameters, &patch),
                Some(part) => at.patch_subresource(part, &key.name, &parameters, &patch),
            };
            let object = match cluster.send(request).await {
                Ok(object) => object,
                Err(error) => return Err(self.explained(cluster, key, "update", error).await),
            };
            if let Some(now) = stored::revision_of(&object) {
                now.clone_into(&mut revision);
            }
            stands = Some(object);
        }
        Ok(stands)
    }

    /// A refused write; for a conflict with the revision that stands.
    async fn explained(
        &self,
        cluster: &Cluster,
        key: &Key,
        verb: &'static str,
        error: Failed,
    ) -> Error {
        match failure(verb, key, error) {
            Error::Conflict { key, expected, .. } => match cluster.read(&key).await {
                Ok(now) => conflict(&key, &expected, &now),
                Err(error) => error,
            },
            other => other,
        }
    }

    async fn update_node(
        &self,
        key: &Key,
        object: &AnyResource,
        expected: &Revision,
    ) -> Result<Versioned, Error> {
        admission::check(object, None, &[])?;
        let cluster = self.cluster().await?;
        let native = Key::cluster(Kind::K8sNode, key.name.clone());
        let old = match cluster.read(&native).await {
            Err(Error::NotFound { .. }) => return Err(Error::NotFound { key: key.clone() }),
            other => other?,
        };
        if stored::revision_of(&old) != Some(expected.as_str()) {
            return Err(conflict(key, expected, &old));
        }
        let (AnyResource::K8sNode(origin), AnyResource::Node(node)) =
            (stored::from_value(&native, old.clone())?, object)
        else {
            return Err(Error::NotFound { key: key.clone() });
        };
        let stands = match node::patch(&origin, node) {
            None => old,
            patch => self
                .patch(&cluster, &native, expected, (None, patch))
                .await?
                .unwrap_or(old),
        };
        match decode(Kind::K8sNode, Kind::Node, stands).into_iter().next() {
            Some(Ok(view)) => Ok(view),
            _ => Err(Error::NotFound { key: key.clone() }),
        }
    }
}

/// The pods that the scheduler has bound to a node; the kubelet asks the same.
fn bound_to(node: &str) -> String {
    format!("spec.nodeName={node}")
}

/// The kinds whose objects are read for this one.
fn sources(kind: &Kind) -> &[Kind] {
    match viewed(*kind) {
        [] => std::slice::from_ref(kind),
        natives => natives,
    }
}

/// What was found becomes objects of `kind`; what cannot be read is kept apart.
fn sort_out(
    source: Kind,
    kind: Kind,
    found: Vec<Item>,
    items: &mut Vec<Versioned>,
    undecodable: &mut Vec<Undecodable>,
) {
    for decoded in found
        .into_iter()
        .flat_map(|item| decode_item(source, kind, item))
    {
        match decoded {
            Ok(object) => items.push(object),
            Err(bad) => undecodable.push(bad),
        }
    }
}

/// The object of which a profile is a view.
fn profile_source(name: &str) -> Option<Key> {
    if let Some(namespace) = name.strip_prefix(kubernetes::NAMESPACE_PROFILE_PREFIX) {
        return Some(Key::cluster(Kind::K8sNamespace, namespace));
    }
    let rest = name.strip_prefix(kubernetes::SERVICE_ACCOUNT_PROFILE_PREFIX)?;
    let (namespace, account) = rest.split_once('.')?;
    Some(Key::namespaced(Kind::K8sServiceAccount, namespace, account))
}

#[async_trait]
impl Datastore for Kubernetes {
    fn is_stored(&self, kind: Kind) -> bool {
        viewed(kind).is_empty()
    }

    async fn get(&self, key: &Key) -> Result<Versioned, Error> {
        if !viewed(key.kind).is_empty() {
            return self.read_view(key).await;
        }
        let cluster = self.cluster().await?;
        object_of(key, cluster.read(key).await?)
    }

    async fn list(&self, kind: Kind, namespace: Option<&str>) -> Result<List, Error> {
        self.list_scope(kind, Scope::namespace(namespace)).await
    }

    async fn list_pods(&self, node: &str) -> Result<List, Error> {
        let fields = bound_to(node);
        let scope = Scope {
            namespace: None,
            fields: Some(&fields),
        };
        self.list_scope(Kind::K8sPod, scope).await
    }

    async fn list_page(
        &self,
        kind: Kind,
        namespace: Option<&str>,
        after: Option<&PageToken>,
        limit: usize,
    ) -> Result<Page, Error> {
        let cluster = self.cluster().await?;
        let sources = sources(&kind);
        // Which of the native kinds is read, how many of it at a time, and how far.
        let (at, most, token) = after
            .map(|token| token.0.splitn(3, ' '))
            .and_then(|mut parts| {
                let (at, most) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
                Some((at, most, parts.next()?))
            })
            .unwrap_or((0, PAGE, ""));
        let source = sources.get(at).copied().unwrap_or(kind);
        let within = Scope::namespace(namespace.filter(|_| kind.is_namespaced()));
        let token = Some(token).filter(|token| !token.is_empty());
        let limit = u32::try_from(limit).unwrap_or(u32::MAX).clamp(1, most);
        let answer = cluster.later_page(source, within, token, limit).await?;
        let (found, revision, next) = match answer {
            Some(answer) => {
                let most = answer.next_limit();
                let next = answer.metadata.next.filter(|token| !token.is_empty());
                (
                    answer.items,
                    answer.metadata.resource_version,
                    next.map(|token| format!("{at} {most} {token}")),
                )
            }
            None => (Vec::new(), NOT_SERVED.to_owned(), None),
        };
        let (mut items, mut undecodable) = (Vec::new(), Vec::new());
        sort_out(source, kind, found, &mut items, &mut undecodable);
        let next = match next {
            Some(token) => Some(PageToken(token)),
            None => (at + 1 < sources.len()).then(|| PageToken(format!("{} {PAGE} ", at + 1))),
        };
        Ok(Page {
            items,
            undecodable,
            revision: revision.into(),
            next,
        })
    }

    async fn create(&self, object: AnyResource) -> Result<Versioned, Error> {
        let (key, object) = admission::for_create(object)?;
        Self::writable(&key, "create")?;
        let cluster = self.cluster().await?;
        self.admit(&cluster, &object, None).await?;
        let mut wanted = stored::to_value(&object)?;
        wire::forget_origin(&mut wanted);
        let sent = wire::write(
            key.kind,
            cluster.group(),
            &cluster.place(key.kind)?,
            wanted.clone(),
        );
        let request = cluster
            .at(&key)?
            .create(&PostParams::default(), body(&sent));
        let written = match cluster.send(request).await {
            Ok(written) => written,
            Err(error) => return Err(failure("create", &key, error)),
        };
        let written = self.put_status(&cluster, &key, &wanted, written).await?;
        let created = object_of(&key, wire::read(key.kind, written))?;
        if admission::compares_with_others(key.kind) {
            self.admit_again(&cluster, &created).await?;
        }
        Ok(created)
    }

    async fn update(&self, object: AnyResource) -> Result<Versioned, Error> {
        let (key, object, expected) = admission::for_update(object)?;
        Self::writable(&key, "update")?;
        if key.kind == Kind::Node {
            return self.update_node(&key, &object, &expected).await;
        }
        let cluster = self.cluster().await?;
        let old = cluster.read(&key).await?;
        if stored::revision_of(&old) != Some(expected.as_str()) {
            return Err(conflict(&key, &expected, &old));
        }
        let identity = stored::identity(&old);
        let old_object = stored::from_value(&key, old.clone()).ok();
        self.admit(&cluster, &object, old_object.as_ref()).await?;
        let mut wanted = stored::to_value(&object)?;
        stored::set_identity(&mut wanted, &identity);
        if key.kind.is_native() {
            let mut before =
                old_object.map_or_else(|| Ok(old.clone()), |old| stored::to_value(&old))?;
            stored::set_revision(&mut before, expected.as_str());
            let patches = wire::patches(key.kind, &before, &wanted);
            let stands = self.patch(&cluster, &key, &expected, patches).await?;
            return object_of(
                &key,
                stands.map_or(old, |stands| wire::read(key.kind, stands)),
            );
        }
        let sent = wire::write(
            key.kind,
            cluster.group(),
            &cluster.place(key.kind)?,
            wanted.clone(),
        );
        let request = cluster
            .at(&key)?
            .replace(&key.name, &PostParams::default(), body(&sent));
        let written = match cluster.send(request).await {
            Ok(written) => written,
            Err(error) => return Err(self.explained(&cluster, &key, "update", error).await),
        };
        let written = self.put_status(&cluster, &key, &wanted, written).await?;
        object_of(&key, wire::read(key.kind, written))
    }

    async fn delete(&self, key: &Key, revision: Option<&Revision>) -> Result<Versioned, Error> {
        Self::writable(key, "delete")?;
        let cluster = self.cluster().await?;
        let old = cluster.read(key).await?;
        if let Some(expected) = revision
            && stored::revision_of(&old) != Some(expected.as_str())
        {
            return Err(conflict(key, expected, &old));
        }
        let parameters = DeleteParams::default().preconditions(Preconditions {
            resource_version: revision.map(|revision| revision.as_str().to_owned()),
            uid: Some(stored::identity(&old).uid),
        });
        let request = cluster.at(key)?.delete(&key.name, &parameters);
        if let Err(error) = cluster.send(request).await {
            return Err(self.explained(&cluster, key, "delete", error).await);
        }
        object_of(key, old).map_err(|error| match error {
            Error::Undecodable { key, reason } => Error::Undecodable {
                key,
                reason: format!("{reason} (it has been deleted)"),
            },
            other => other,
        })
    }

    async fn watch(&self, kinds: &[Kind], from: &Revision) -> Result<WatchStream, Error> {
        self.watch_fields(kinds, None, from).await
    }

    async fn watch_pods(&self, node: &str, from: &Revision) -> Result<WatchStream, Error> {
        let fields = bound_to(node);
        self.watch_fields(&[Kind::K8sPod], Some(&fields), from)
            .await
    }

    async fn warn(&self, warning: &Warning) -> Result<(), Error> {
        let cluster = self.cluster().await?;
        let what = || format!("write an Event about {}", warning.about);
        let now = SystemTime::now();
        let (namespace, name, event) = event::event(warning, cluster.group(), now);
        let events = || Request::new(format!("/api/v1/namespaces/{namespace}/events"));
        let request = events().create(&PostParams::default(), body(&event));
        match cluster.send(request).await {
            Ok(_) => return Ok(()),
            Err(Failed::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(error.unavailable(what())),
        }
        let stands = cluster.send(events().get(&name, &GetParams::default()));
        let stands = stands.await.map_err(|error| error.unavailable(what()))?;
        let patch = Patch::Merge(event::again(&stands, now));
        let request = events().patch(&name, &PatchParams::default(), &patch);
        match cluster.send(request).await {
            Ok(_) => Ok(()),
            Err(error) => Err(error.unavailable(what())),
        }
    }

    async fn tell_network(&self, node: &str, serves: bool) -> Result<(), Error> {
        let cluster = self.cluster().await?;
        let key = Key::cluster(Kind::K8sNode, node);
        // Read whole: conditions are none of what is kept of a Node elsewhere.
        let stands = cluster.at(&key)?.get(node, &GetParams::default());
        let stands = match cluster.send(stands).await {
            Ok(stands) => stands,
            Err(error) => return Err(error.unavailable(format!("read {key}"))),
        };
        let Some(patch) = node::network_condition(&stands, serves, SystemTime::now()) else {
            return Ok(());
        };
        // Conditions are merged by their type, so that those of others stay.
        let request = cluster.at(&key)?.patch_subresource(
            "status",
            node,
            &PatchParams::default(),
            &Patch::Strategic(&patch),
        );
        match cluster.send(request).await {
            Ok(_) => Ok(()),
            Err(error) => Err(error.unavailable(format!("write the conditions of {key}"))),
        }
    }

    async fn secret(&self, namespace: &str, name: &str) -> Result<Option<Secret>, Error> {
        let read = self.secret_object(namespace, name).await?;
        Ok(read.map(|object| object.data))
    }

    async fn secret_object(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<Option<SecretObject>, Error> {
        secret::read(&*self.cluster().await?, namespace, name).await
    }

    async fn replace_secret(
        &self,
        namespace: &str,
        name: &str,
        new: &SecretObject,
    ) -> Result<bool, Error> {
        secret::replace(&*self.cluster().await?, namespace, name, new).await
    }
}
