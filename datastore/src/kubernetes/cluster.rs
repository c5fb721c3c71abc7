//! One connected cluster: requests with a time limit, and lists in pages.

use bytes::Bytes;
use cali_api::kubernetes::Pod;
use cali_api::{Key, Kind, Revision};
use http::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use http_body_util::BodyExt;
use kube::Client;
use kube::client::Body;
use kube::core::params::{GetParams, ListParams};
use kube::core::{Request, Status};
use serde::Deserialize;
use serde_json::Value;

use super::failure::failure;
use super::places::{Group, Place, place};
use super::{CALL_TIMEOUT, protobuf, wire};
use crate::error::Error;

/// How often a list that expired between its pages is begun again.
const LIST_ATTEMPTS: usize = 3;

/// A connected cluster.
pub(super) struct Cluster {
    pub(super) client: Client,
    /// The group of Calico's kinds; `None` while the cluster serves none.
    pub(super) group: Option<Group>,
}

/// A page of a list, as the server sends it.
#[derive(Deserialize)]
pub(super) struct Answer {
    pub(super) metadata: PageMetadata,
    #[serde(default)]
    pub(super) items: Vec<Item>,
    /// How large the answer was, where that decides how many objects are asked for next.
    #[serde(skip)]
    pub(super) octets: usize,
}

impl Answer {
    /// Objects in the next page. For each page the API server looks for its place anew, which takes it as long as a thousand
    /// Pods: so of Pods, as many are asked for as are expected in [`PAGE_OCTETS`].
    pub(super) fn next_limit(&self) -> u32 {
        let objects = PAGE_OCTETS.saturating_mul(self.items.len()) / self.octets.max(1);
        match self.octets {
            0 => PAGE,
            _ => u32::try_from(objects)
                .unwrap_or(MAX_PAGE)
                .clamp(PAGE, MAX_PAGE),
        }
    }
}

/// Objects in the first page of a list, and in each where they come in JSON.
pub(super) const PAGE: u32 = 500;
/// Objects in any page, at most.
const MAX_PAGE: u32 = 10_000;
/// The aim for a page of Pods.
const PAGE_OCTETS: usize = 16 << 20;

/// An object of a list.
#[derive(Deserialize)]
#[serde(from = "Value")]
pub(super) enum Item {
    /// As the server has it.
    Json(Value),
    /// What is used of a Pod.
    Pod(Box<Pod>),
}

impl From<Value> for Item {
    fn from(object: Value) -> Self {
        Self::Json(object)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PageMetadata {
    pub(super) resource_version: String,
    #[serde(default, rename = "continue")]
    pub(super) next: Option<String>,
}

/// Which objects of a kind.
#[derive(Clone, Copy, Default)]
pub(super) struct Scope<'a> {
    /// Of this namespace only.
    pub(super) namespace: Option<&'a str>,
    /// Those that this field selector holds for.
    pub(super) fields: Option<&'a str>,
}

impl<'a> Scope<'a> {
    pub(super) fn namespace(namespace: Option<&'a str>) -> Self {
        Self {
            namespace,
            fields: None,
        }
    }
}

pub(super) type BuiltRequest = Result<http::Request<Vec<u8>>, kube::core::request::Error>;

impl Cluster {
    pub(super) fn place(&self, kind: Kind) -> Result<Place, Error> {
        match self.group {
            Some(group) => Ok(place(kind, group)),
            None if kind.is_native() => Ok(place(kind, Group::Internal)),
            None => Err(Error::unavailable(
                format!("find {}", kind.plural()),
                "the API server serves neither crd.projectcalico.org/v1 nor projectcalico.org/v3: apply the manifests in deploy/crds",
            )),
        }
    }

    pub(super) fn group(&self) -> Group {
        self.group.unwrap_or(Group::Internal)
    }

    /// One page; `None` if the cluster does not serve the kind.
    pub(super) async fn page(
        &self,
        kind: Kind,
        scope: Scope<'_>,
        next: Option<&str>,
        limit: u32,
    ) -> Result<Option<Answer>, Error> {
        served(kind, next, self.ask(kind, scope, next, limit).await?)
    }

    /// As [`Self::page`]; where the first page's instant is gone, the server goes on with what stands now.
    pub(super) async fn later_page(
        &self,
        kind: Kind,
        scope: Scope<'_>,
        next: Option<&str>,
        limit: u32,
    ) -> Result<Option<Answer>, Error> {
        let answer = match self.ask(kind, scope, next, limit).await? {
            Err(Failed::Api(status)) if status.code == 410 => {
                match status.metadata.as_ref().and_then(|of| of.continue_.clone()) {
                    Some(now) => self.ask(kind, scope, Some(&now), limit).await?,
                    None => Err(Failed::Api(status)),
                }
            }
            answer => answer,
        };
        served(kind, next, answer)
    }

    /// Asks for one page.
    async fn ask(
        &self,
        kind: Kind,
        scope: Scope<'_>,
        next: Option<&str>,
        limit: u32,
    ) -> Result<Result<Answer, Failed>, Error> {
        let mut parameters = ListParams::default();
        if limit > 0 {
            parameters = parameters.limit(limit);
        }
        if let Some(next) = next {
            parameters = parameters.continue_token(next);
        }
        if let Some(fields) = scope.fields {
            parameters = parameters.fields(fields);
        }
        let request = Request::new(self.place(kind)?.path(scope.namespace)).list(&parameters);
        if kind == Kind::K8sPod {
            return Ok(call_pods(&self.client, request).await);
        }
        Ok(call(&self.client, request).await)
    }

    /// All objects of a kind as the server has them, and the revision; `None` if it is not served.
    pub(super) async fn scan(
        &self,
        kind: Kind,
        scope: Scope<'_>,
    ) -> Result<Option<(Vec<Item>, String)>, Error> {
        let mut attempt = 0;
        'list: loop {
            attempt += 1;
            // The last attempt is not paged, so that it cannot expire.
            let is_paged = attempt < LIST_ATTEMPTS;
            let mut limit = if is_paged { PAGE } else { 0 };
            let (mut items, mut next): (Vec<Item>, Option<String>) = (Vec::new(), None);
            loop {
                let page = match self.page(kind, scope, next.as_deref(), limit).await {
                    Err(Error::RevisionGone { .. }) if attempt < LIST_ATTEMPTS => continue 'list,
                    Err(error) => return Err(error),
                    Ok(None) => return Ok(None),
                    Ok(Some(page)) => page,
                };
                if is_paged {
                    limit = page.next_limit();
                }
                items.extend(page.items.into_iter().map(|item| match item {
                    Item::Json(object) => Item::Json(wire::read(kind, object)),
                    pod @ Item::Pod(_) => pod,
                }));
                next = page.metadata.next.filter(|token| !token.is_empty());
                if next.is_none() {
                    return Ok(Some((items, page.metadata.resource_version)));
                }
            }
        }
    }

    pub(super) async fn send(&self, request: BuiltRequest) -> Result<Value, Failed> {
        call(&self.client, request).await
    }

    /// Reads an object in the form of [`wire::read`].
    pub(super) async fn read(&self, key: &Key) -> Result<Value, Error> {
        let request = self.at(key)?.get(&key.name, &GetParams::default());
        match self.send(request).await {
            Ok(object) => Ok(wire::read(key.kind, object)),
            Err(error) => Err(failure("read", key, error)),
        }
    }

    pub(super) fn at(&self, key: &Key) -> Result<Request, Error> {
        let path = self.place(key.kind)?.path(key.namespace.as_deref());
        Ok(Request::new(path))
    }
}

/// How a call failed.
pub(super) enum Failed {
    Api(Box<Status>),
    Other(crate::Cause),
}

impl Failed {
    pub(super) fn unavailable(self, operation: String) -> Error {
        match self {
            Self::Api(status) => Error::unavailable(operation, kube::Error::Api(status)),
            Self::Other(cause) => Error::unavailable(operation, cause),
        }
    }
}

pub(super) async fn call<T: serde::de::DeserializeOwned>(
    client: &Client,
    request: BuiltRequest,
) -> Result<T, Failed> {
    let request = request.map_err(|error| Failed::Other(error.into()))?;
    match tokio::time::timeout(CALL_TIMEOUT, client.request(request)).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) => Err(Failed::Api(status)),
        Ok(Err(error)) => Err(Failed::Other(error.into())),
        Err(late) => Err(Failed::Other(late.into())),
    }
}

/// Asks for a list of Pods; in protobuf, where the server speaks it.
async fn call_pods(client: &Client, request: BuiltRequest) -> Result<Answer, Failed> {
    let mut request = request.map_err(|error| Failed::Other(error.into()))?;
    let accepted = const { HeaderValue::from_static(protobuf::ACCEPTED) };
    request.headers_mut().insert(ACCEPT, accepted);
    let call = async {
        let answer = client.send(request.map(Body::from)).await?;
        let (head, body) = answer.into_parts();
        Ok((head, body.collect().await?.to_bytes()))
    };
    let (head, body) = match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(answer) => answer.map_err(|error: kube::Error| Failed::Other(error.into()))?,
        Err(late) => return Err(Failed::Other(late.into())),
    };
    let is_protobuf = head
        .headers
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(protobuf::MEDIA_TYPE.as_bytes()));
    if !head.status.is_success() {
        let status = refusal(head.status, body, is_protobuf);
        return Err(Failed::Api(Box::new(status)));
    }
    if is_protobuf {
        protobuf::pods(body).map_err(|error| Failed::Other(error.into()))
    } else {
        serde_json::from_slice(&body).map_err(|error| Failed::Other(error.into()))
    }
}

/// What the server, or something on the way to it, says of a call that it refuses.
fn refusal(code: http::StatusCode, body: Bytes, is_protobuf: bool) -> Status {
    let text = String::from_utf8_lossy(&body).into_owned();
    let read = if is_protobuf {
        protobuf::status(body).ok()
    } else {
        serde_json::from_str(&text).ok()
    };
    let unread = || Status::failure(&text, code.canonical_reason().unwrap_or_default());
    Status {
        code: code.as_u16(),
        ..read.unwrap_or_else(unread)
    }
}

/// An answer's page; `None` if the cluster does not serve the kind.
fn served(
    kind: Kind,
    next: Option<&str>,
    answer: Result<Answer, Failed>,
) -> Result<Option<Answer>, Error> {
    match answer {
        Ok(page) => Ok(Some(page)),
        Err(Failed::Api(status)) if status.code == 404 => Ok(None),
        Err(Failed::Api(status)) if status.code == 410 => Err(Error::RevisionGone {
            revision: Revision::from(next.unwrap_or_default()),
        }),
        Err(error) => Err(error.unavailable(format!("list {}", kind.plural()))),
    }
}
