//! The server as a client sees it, over a real socket.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Instant;

use cali_telemetry::{Endpoint, Expectation, Health, Registry, Serving};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

async fn ask(server: &Serving, request_line: &str) -> String {
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let request = format!("{request_line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn metrics_health_and_pages_are_served_and_anything_else_is_explained() {
    let registry = Registry::new();
    let counter = prometheus::IntCounter::new("cali_example_total", "an example").unwrap();
    registry.register(Box::new(counter.clone())).unwrap();
    counter.inc_by(3);
    let health = Health::default();
    let part = health.part(
        "dataplane",
        Expectation {
            decides_readiness: true,
            ..Expectation::default()
        },
        Instant::now(),
    );
    let server = Endpoint::default()
        .metrics(registry)
        .health(health)
        .page(
            "/",
            "text/html; charset=utf-8",
            Arc::new(|| "<p>all well</p>".to_owned()),
        )
        .serve("127.0.0.1:0".parse().unwrap())
        .await
        .unwrap();

    let answer = ask(&server, "GET /metrics").await;
    assert!(answer.contains("cali_example_total 3"), "{answer}");
    let answer = ask(&server, "GET /readiness").await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(answer.contains("\"reason\": \"starting\""), "{answer}");
    part.ready(Instant::now(), "in sync");
    assert!(
        ask(&server, "GET /readiness")
            .await
            .starts_with("HTTP/1.1 200")
    );
    assert!(
        ask(&server, "GET /liveness")
            .await
            .starts_with("HTTP/1.1 200")
    );
    assert!(ask(&server, "GET /").await.ends_with("<p>all well</p>"));
    let answer = ask(&server, "GET /nowhere").await;
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    assert!(
        answer.contains("here are: / /metrics /liveness /readiness"),
        "{answer}"
    );
    assert!(
        ask(&server, "POST /metrics")
            .await
            .starts_with("HTTP/1.1 405")
    );
}

#[tokio::test]
async fn clients_that_say_nothing_do_not_keep_others_out_for_good() {
    let server = Endpoint::default()
        .health(Health::default())
        .serve("127.0.0.1:0".parse().unwrap())
        .await
        .unwrap();
    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(TcpStream::connect(server.address()).await.unwrap());
    }
    let answer = tokio::time::timeout(
        std::time::Duration::from_secs(60),
        ask(&server, "GET /liveness"),
    )
    .await
    .expect("the silent clients are sent away after some seconds");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}
