//! The HTTP server: `/metrics`, `/liveness`, `/readiness` (and their short names), and pages.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::{Encoder, Registry, TextEncoder};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tracing::{debug, info};

use crate::health::{Answer, Health};

/// Connections at once; a further client waits in the listen backlog.
const CONNECTIONS: usize = 32;
/// Time for a client to send its request's head.
const HEAD_LIMIT: Duration = Duration::from_secs(5);
/// Time for a whole connection, requests of a keep-alive client included.
const CONNECTION_LIMIT: Duration = Duration::from_secs(300);

/// Makes the body of a page when it is asked for.
pub type Page = Arc<dyn Fn() -> String + Send + Sync>;

/// What an address serves.
#[derive(Clone, Default)]
pub struct Endpoint {
    registry: Option<Registry>,
    health: Option<Health>,
    pages: Vec<(&'static str, &'static str, Page)>,
}

/// A running server. Dropping it ends it, connections included.
#[derive(Debug)]
pub struct Serving {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Serving {
    /// The address that it listens on, with the port that the kernel chose where none was given.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Endpoint {
    /// Serves this registry under `/metrics`.
    #[must_use]
    pub fn metrics(mut self, registry: Registry) -> Self {
        self.registry = Some(registry);
        self
    }

    /// Serves `/liveness` and `/readiness`: 200 or 503, with the parts as JSON.
    #[must_use]
    pub fn health(mut self, health: Health) -> Self {
        self.health = Some(health);
        self
    }

    /// Serves a page; `content_type` for example `text/html; charset=utf-8`.
    #[must_use]
    pub fn page(mut self, path: &'static str, content_type: &'static str, page: Page) -> Self {
        self.pages.push((path, content_type, page));
        self
    }

    /// Listens and serves until the returned value is dropped.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub async fn serve(self, address: SocketAddr) -> std::io::Result<Serving> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        info!(%address, "serving health and metrics");
        let task = tokio::spawn(accept(listener, Arc::new(self)));
        Ok(Serving { address, task })
    }

    fn answer(&self, method: &Method, path: &str, now: Instant) -> Response<Full<Bytes>> {
        if method != Method::GET && method != Method::HEAD {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET is served here\n");
            response
                .headers_mut()
                .insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match (path, &self.registry, &self.health) {
            ("/metrics", Some(registry), _) => metrics(registry),
            ("/liveness" | "/livez" | "/healthz", _, Some(health)) => {
                verdict(&health.liveness(now))
            }
            ("/readiness" | "/readyz", _, Some(health)) => verdict(&health.readiness(now)),
            _ => match self.pages.iter().find(|(at, ..)| *at == path) {
                Some((_, content_type, page)) => {
                    body(StatusCode::OK, content_type, page().into_bytes())
                }
                None => self.not_found(path),
            },
        }
    }

    fn not_found(&self, path: &str) -> Response<Full<Bytes>> {
        let mut known: Vec<&str> = self.pages.iter().map(|(at, ..)| *at).collect();
        if self.registry.is_some() {
            known.push("/metrics");
        }
        if self.health.is_some() {
            known.extend(["/liveness", "/readiness"]);
        }
        text(
            StatusCode::NOT_FOUND,
            &format!("nothing at {path}; here are: {}\n", known.join(" ")),
        )
    }
}

async fn accept(listener: TcpListener, endpoint: Arc<Endpoint>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, or a client that left at once: neither ends the server.
                debug!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let endpoint = Arc::clone(&endpoint);
        connections.spawn(async move {
            let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                let response =
                    endpoint.answer(request.method(), request.uri().path(), Instant::now());
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_LIMIT)
                .serve_connection(TokioIo::new(stream), service);
            if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_LIMIT, connection).await {
                debug!(%error, "a client of the health port went wrong");
            }
            drop(place);
        });
    }
}

fn metrics(registry: &Registry) -> Response<Full<Bytes>> {
    let encoder = TextEncoder::new();
    let mut out = Vec::new();
    match encoder.encode(&registry.gather(), &mut out) {
        Ok(()) => body(StatusCode::OK, encoder.format_type(), out),
        Err(error) => text(
            StatusCode::INTERNAL_SERVER_ERROR,
            &format!("cannot encode the metrics: {error}\n"),
        ),
    }
}

fn verdict(answer: &Answer) -> Response<Full<Bytes>> {
    let status = if answer.ok {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let mut out = serde_json::to_vec_pretty(answer).unwrap_or_default();
    out.push(b'\n');
    body(status, "application/json", out)
}

fn text(status: StatusCode, content: &str) -> Response<Full<Bytes>> {
    body(
        status,
        "text/plain; charset=utf-8",
        content.as_bytes().to_vec(),
    )
}

fn body(status: StatusCode, content_type: &str, content: Vec<u8>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(content)));
    *response.status_mut() = status;
    if let Ok(value) = content_type.parse() {
        response.headers_mut().insert(CONTENT_TYPE, value);
    }
    response
}
