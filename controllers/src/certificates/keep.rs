//! Reads the Secrets, and takes one step after another until nothing is left to do.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cali_datastore::{Datastore, SecretObject};

use super::plan::{carry_out, decide, secret_of};
use super::{AUTHORITY, End, Lifetimes, State};
use crate::error::Error;

/// Steps of one pass at most: a first authority with both certificates takes three, the end of a rotation five.
const STEPS: usize = 12;

/// Where the Secrets are, and how long what is in them holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificates {
    /// Namespace of the daemons.
    pub namespace: String,
    /// Namespace of the authority.
    pub authority_namespace: String,
    /// How long things hold.
    pub lifetimes: Lifetimes,
}

/// What a pass did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Done {
    /// Steps that were taken.
    pub steps: usize,
    /// What is not looked after, and why.
    pub notes: BTreeSet<String>,
}

impl Certificates {
    /// Time between looks: often enough to go on with a rotation when things have settled.
    #[must_use]
    pub fn pause(&self) -> Duration {
        (self.lifetimes.settle / 4).clamp(Duration::from_millis(250), Duration::from_secs(60))
    }

    fn place(&self, secret: &str) -> &str {
        if secret == AUTHORITY {
            &self.authority_namespace
        } else {
            &self.namespace
        }
    }

    async fn read(&self, store: &dyn Datastore, name: &str) -> Result<Option<SecretObject>, Error> {
        let namespace = self.place(name);
        let read = store.secret_object(namespace, name).await;
        read.map_err(Error::datastore(format!("read Secret {namespace}/{name}")))
    }

    /// Brings everything to order.
    ///
    /// # Errors
    /// A Secret could not be read, made or written; what was done before stands.
    pub async fn pass(&self, store: &Arc<dyn Datastore>) -> Result<Done, Error> {
        let mut done = Done::default();
        for _ in 0..STEPS {
            let state = State {
                authority: self.read(store.as_ref(), AUTHORITY).await?,
                typha: self.read(store.as_ref(), End::Typha.secret()).await?,
                node: self.read(store.as_ref(), End::Node.secret()).await?,
            };
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            let now = now.map_or(0, |now| i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
            let decision = decide(&state, &self.lifetimes, now);
            done.notes = decision.notes.into_iter().collect();
            let Some(step) = decision.step else { break };
            let name = secret_of(step);
            let namespace = self.place(name);
            let new = carry_out(step, &state, &self.lifetimes, now);
            let new = new.map_err(|reason| Error::Certificate {
                secret: format!("{namespace}/{name}"),
                reason,
            })?;
            let written = store.replace_secret(namespace, name, &new).await;
            let written =
                written.map_err(Error::datastore(format!("write Secret {namespace}/{name}")))?;
            if written {
                done.steps += 1;
                tracing::info!(secret = %format_args!("{namespace}/{name}"), ?step, "certificates");
            }
        }
        Ok(done)
    }
}
