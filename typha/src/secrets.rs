//! Secrets of Kubernetes for the daemon that needs them. They are read straight from the API server, by name and only
//! those that are asked for: the fan-out to all nodes never carries them.
//!
//! What was read stays when it cannot be read again; only an answer that there is no such secret takes it away.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use cali_datastore::{Datastore, Error, Secret};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::warn;

use crate::source::SourceError;

/// How often secrets are read again.
const AGAIN: Duration = Duration::from_secs(30);
/// How soon one is read again that could not be read.
const RETRY: Duration = Duration::from_secs(2);
/// Where a pod finds the name of its namespace.
const NAMESPACE_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";
/// Calico's namespace where nothing else is said.
const NAMESPACE: &str = "kube-system";

/// What is known, by name; `None` is a secret that is not there.
pub type Found = BTreeMap<String, Option<Arc<Secret>>>;

/// A reader of secrets. Dropping it ends the reading.
#[derive(Debug)]
pub struct Secrets {
    wanted: watch::Sender<BTreeSet<String>>,
    found: watch::Receiver<Found>,
    task: JoinHandle<()>,
}

impl Drop for Secrets {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// `NAMESPACE`, or that of this pod.
fn namespace() -> String {
    let named = std::env::var("NAMESPACE").ok();
    let of_pod = || std::fs::read_to_string(NAMESPACE_FILE).ok();
    let found = named.or_else(of_pod).map(|name| name.trim().to_owned());
    found
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| NAMESPACE.to_owned())
}

impl Secrets {
    /// Reads the secrets of our namespace; `None` where the datastore keeps none. Must be called inside a Tokio
    /// runtime.
    pub fn from_env() -> Result<Option<Self>, SourceError> {
        if std::env::var("DATASTORE_TYPE").as_deref() != Ok("kubernetes") {
            return Ok(None);
        }
        let store = cali_datastore::open_from_env()?;
        Ok(Some(Self::of(store, namespace(), AGAIN)))
    }

    /// Reads the secrets of one namespace, again and again after this time.
    #[must_use]
    pub fn of(store: Arc<dyn Datastore>, namespace: String, again: Duration) -> Self {
        let namespace: Arc<str> = namespace.into();
        Self::read_by(again, move |name| {
            let (store, namespace) = (Arc::clone(&store), Arc::clone(&namespace));
            async move { store.secret(&namespace, &name).await }
        })
    }

    /// Reads by a function of the secret's name, again and again after this time.
    #[must_use]
    pub fn read_by<F, R>(again: Duration, read: F) -> Self
    where
        F: Fn(String) -> R + Send + Sync + 'static,
        R: Future<Output = Result<Option<Secret>, Error>> + Send + 'static,
    {
        let (wanted, asked) = watch::channel(BTreeSet::new());
        let (answer, found) = watch::channel(Found::new());
        let task = tokio::spawn(follow(read, again, asked, answer));
        Self {
            wanted,
            found,
            task,
        }
    }

    /// From now on these, and no others.
    pub fn want(&self, names: BTreeSet<String>) {
        self.wanted.send_if_modified(|wanted| {
            let news = *wanted != names;
            *wanted = names;
            news
        });
    }

    /// What is known now.
    #[must_use]
    pub fn found(&self) -> Found {
        self.found.borrow().clone()
    }

    /// Whether each wanted secret has been read, or is known not to be there.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        let found = self.found.borrow();
        self.wanted
            .borrow()
            .iter()
            .all(|name| found.contains_key(name))
    }

    /// A view of what is known that says when it changes.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Found> {
        self.found.clone()
    }
}

async fn follow<F, R>(
    read: F,
    again: Duration,
    mut asked: watch::Receiver<BTreeSet<String>>,
    answer: watch::Sender<Found>,
) where
    F: Fn(String) -> R,
    R: Future<Output = Result<Option<Secret>, Error>>,
{
    let mut failing = BTreeSet::new();
    loop {
        let wanted = asked.borrow_and_update().clone();
        let known = answer.borrow().clone();
        let mut next = Found::new();
        let mut wait = again;
        for name in wanted {
            match read(name.clone()).await {
                Ok(secret) => {
                    failing.remove(&name);
                    next.insert(name, secret.map(Arc::new));
                }
                Err(error) => {
                    wait = RETRY;
                    if let Some(old) = known.get(&name) {
                        next.insert(name.clone(), old.clone());
                    }
                    if failing.insert(name.clone()) {
                        warn!(
                            secret = name,
                            error = format!("{:#}", anyhow::Error::from(error)),
                            "cannot read a secret; what was known of it stays"
                        );
                    }
                }
            }
        }
        answer.send_if_modified(|found| {
            let news = *found != next;
            *found = next;
            news
        });
        tokio::select! {
            changed = asked.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(wait) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    type Cluster = Arc<Mutex<Option<BTreeMap<String, Secret>>>>;

    fn reader(cluster: &Cluster) -> Secrets {
        let cluster = Arc::clone(cluster);
        Secrets::read_by(AGAIN, move |name| {
            let answer = match &*cluster.lock().unwrap() {
                Some(secrets) => Ok(secrets.get(&name).cloned()),
                None => Err(Error::Configuration {
                    variable: "KUBECONFIG",
                    reason: "the server is away".to_owned(),
                }),
            };
            std::future::ready(answer)
        })
    }

    fn secret(value: &str) -> Secret {
        [("key".to_owned(), value.as_bytes().to_vec())].into()
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_wanted_is_followed_and_survives_an_outage() {
        let cluster: Cluster = Arc::new(Mutex::new(Some(
            [
                ("a".to_owned(), secret("one")),
                ("other".to_owned(), secret("no")),
            ]
            .into(),
        )));
        let secrets = reader(&cluster);
        let mut watch = secrets.watch();
        secrets.want(["a".to_owned(), "b".to_owned()].into());
        assert!(!secrets.is_answered());
        watch.changed().await.unwrap();
        assert!(secrets.is_answered());
        let one: Found = [
            ("a".to_owned(), Some(Arc::new(secret("one")))),
            ("b".to_owned(), None),
        ]
        .into();
        assert_eq!(secrets.found(), one);
        // Neither an outage nor a second reading is a change.
        *cluster.lock().unwrap() = None;
        tokio::time::sleep(AGAIN * 3).await;
        assert_eq!(secrets.found(), one);
        assert!(!watch.has_changed().unwrap());
        *cluster.lock().unwrap() = Some([("b".to_owned(), secret("two"))].into());
        watch.changed().await.unwrap();
        let two: Found = [
            ("a".to_owned(), None),
            ("b".to_owned(), Some(Arc::new(secret("two")))),
        ]
        .into();
        assert_eq!(secrets.found(), two);
        // What nobody wants any more is forgotten.
        secrets.want(["a".to_owned()].into());
        watch.changed().await.unwrap();
        assert_eq!(secrets.found(), [("a".to_owned(), None)].into());
    }
}
