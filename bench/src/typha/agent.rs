//! One node's agent as far as it follows the cluster: the client's state machine and felix' graph, in a process of its own.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::BytesMut;
use felix::calc::{Graph, Input};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use typha::client::{Conn, Held, Identity, Output};
use typha::interest::Wanted;

use super::KINDS;

/// The process' main function. It follows the server at `port` as `node`, says how long it took until its graph had its first batch, how many
/// bytes that were, how many objects and sets there are, and for each line that it reads the bytes so far.
///
/// # Errors
/// The connection breaks.
pub async fn agent(port: u16, node: &str, scoped: bool) -> Result<()> {
    let started = Instant::now();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let identity = Identity {
        hostname: node.to_owned(),
        info: "bench".into(),
        kinds: KINDS.to_vec(),
        node: scoped.then(|| node.to_owned()),
    };
    let mut held = Held::default();
    let mut graph = if scoped {
        Graph::asking(node.into())
    } else {
        Graph::new(node.into())
    };
    let mut conn = Conn::new(Instant::now(), &identity, &held);
    let mut input = BytesMut::with_capacity(64 * 1024);
    let (mut bytes, mut begun) = (0u64, false);
    let (lines, mut asked) = tokio::sync::mpsc::channel(4);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if lines.blocking_send(line).is_err() {
                return;
            }
        }
    });
    loop {
        while let Some(output) = conn.poll_output(&mut held)? {
            match output {
                Output::Send(frame) => stream.write_all(&frame).await?,
                Output::Event(event) => graph.handle(Input::Sync(event)),
                Output::Undecodable { object, reason } => bail!("{object}: {reason}"),
            }
        }
        let batch = graph.flush();
        if let Some((number, selectors)) = graph.take_wanted() {
            let selectors = Arc::new(selectors);
            conn.on_wanted(Wanted { number, selectors }, &mut held);
            continue;
        }
        if batch.is_some() && !begun {
            begun = true;
            let [endpoints, _, _, sets] = graph.sizes();
            println!(
                "{} {bytes} {} {endpoints} {sets}",
                started.elapsed().as_secs_f64(),
                held.len()
            );
            std::io::stdout().flush()?;
        }
        tokio::select! {
            read = stream.read_buf(&mut input) => {
                let read = read?;
                if read == 0 {
                    bail!("closed by the server");
                }
                bytes += read as u64;
                conn.on_bytes(Instant::now(), &input);
                input.clear();
            }
            line = asked.recv() => {
                line.context("nobody asks any more")?;
                println!("{bytes}");
                std::io::stdout().flush()?;
            }
            () = tokio::time::sleep(Duration::from_secs(300)) => bail!("nothing happens"),
        }
    }
}
