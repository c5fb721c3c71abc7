//! Requests of many callers, carried out together.
//!
//! For work whose cost hardly depends on how much of it there is: the kernel waits for all processors when a device goes, and
//! walks a large table when flows are looked for, once for one and once for a hundred. An idle worker begins at once; what
//! comes while it works is its next round.

use tokio::sync::{mpsc, oneshot};

use crate::error::{Error, Result};

/// Requests that may wait; more callers wait for room.
const QUEUE: usize = 1024;

/// Access to the worker, which has a thread of its own; it ends with the last access.
#[derive(Debug)]
pub struct Together<T, R> {
    name: &'static str,
    requests: mpsc::Sender<(T, oneshot::Sender<R>)>,
}

impl<T, R> Clone for Together<T, R> {
    fn clone(&self) -> Self {
        Self {
            name: self.name,
            requests: self.requests.clone(),
        }
    }
}

impl<T: Send + 'static, R: Send + 'static> Together<T, R> {
    /// Starts a worker. `work` gets requests in the order in which they came, and returns one result for each.
    ///
    /// # Errors
    /// There can be no further thread.
    pub fn start(
        name: &'static str,
        mut work: impl FnMut(Vec<T>) -> Vec<R> + Send + 'static,
    ) -> Result<Self> {
        let (requests, mut inbox) = mpsc::channel::<(T, oneshot::Sender<R>)>(QUEUE);
        let thread = std::thread::Builder::new().name(name.to_owned());
        thread
            .spawn(move || {
                while let Some(first) = inbox.blocking_recv() {
                    let (mut round, mut askers) = (vec![first.0], vec![first.1]);
                    while let Ok((request, asker)) = inbox.try_recv() {
                        round.push(request);
                        askers.push(asker);
                    }
                    for (asker, result) in askers.into_iter().zip(work(round)) {
                        // Whoever asked may have gone.
                        let _ = asker.send(result);
                    }
                }
            })
            .map_err(|error| Error::io("start", format!("thread {name}"), &error))?;
        Ok(Self { name, requests })
    }

    /// The result of a request.
    ///
    /// # Errors
    /// The worker has ended badly.
    pub async fn ask(&self, request: T) -> Result<R> {
        let (asker, answer) = oneshot::channel();
        let ended = || Error::invalid("ask", format!("worker {}", self.name), "it has ended badly");
        let sent = self.requests.send((request, asker)).await;
        sent.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc as blocking;

    use super::*;

    #[tokio::test]
    async fn what_comes_while_the_worker_works_is_one_round() {
        let (started, starts) = blocking::channel();
        let (go, goes) = blocking::channel::<()>();
        let together = Together::start("test", move |round: Vec<u32>| {
            started.send(round.clone()).unwrap();
            goes.recv().unwrap();
            round.into_iter().map(|number| number * 10).collect()
        })
        .unwrap();
        let first = tokio::spawn({
            let together = together.clone();
            async move { together.ask(1).await }
        });
        let begun = tokio::task::spawn_blocking(move || (starts.recv().unwrap(), starts));
        let (round, starts) = begun.await.unwrap();
        assert_eq!(round, [1], "an idle worker begins at once");
        let others = tokio::spawn({
            let together = together.clone();
            async move { tokio::join!(together.ask(2), together.ask(3)) }
        });
        while together.requests.capacity() > QUEUE - 2 {
            tokio::task::yield_now().await;
        }
        go.send(()).unwrap();
        go.send(()).unwrap();
        assert_eq!(first.await.unwrap().unwrap(), 10);
        let (second, third) = others.await.unwrap();
        assert_eq!((second.unwrap(), third.unwrap()), (20, 30));
        assert_eq!(starts.recv().unwrap(), [2, 3]);
    }

    #[tokio::test]
    async fn a_worker_that_ended_badly_is_told_and_hangs_nobody() {
        let together =
            Together::start("test", |_: Vec<()>| -> Vec<()> { panic!("on purpose") }).unwrap();
        for _ in 0..2 {
            let error = together.ask(()).await.unwrap_err();
            assert!(error.to_string().contains("worker test"), "{error}");
        }
    }
}
