//! How quick the command line is; see `docs/benchmarks.md`, section "The command line".
//!
//! `calictl-speed` measures the `calictl` beside it, on SQLite, on a real etcd and on a real API server, which it starts itself.

use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cali_api::schema::{Group, defined, definition};
use cali_api::{AnyResource, Key, Kind};
use cali_bench::bgp::cost::{machine, of_process};
use cali_datastore::Datastore;
use cali_datastore::testing::{ApiServer, Etcd};
use clap::{Parser, ValueEnum};
use futures::stream::{self, StreamExt, TryStreamExt};
use http::HeaderValue;
use http::header::ACCEPT;
use http_body_util::BodyExt;
use kube::Client;
use kube::client::Body;
use kube::core::Request;
use kube::core::params::{ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

/// How quick the command line is
#[derive(Debug, Parser)]
struct Arguments {
    /// Where the endpoints are
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "sqlite,etcd,kubernetes"
    )]
    datastores: Vec<Place>,
    /// Workload endpoints in the datastore
    #[arg(long, default_value_t = 100_000)]
    endpoints: u32,
    /// How often each command is run; the median counts
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How many changes are watched
    #[arg(long, default_value_t = 100)]
    changes: usize,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Place {
    Sqlite,
    Etcd,
    Kubernetes,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    println!("{}\n", machine());
    println!("| `calictl` | seen | aim |\n|---|---|---|");
    let own = std::env::current_exe()?;
    let calictl = own.with_file_name("calictl");
    start(&calictl, arguments.rounds * 10)?;
    for place in &arguments.datastores {
        let store = Store::open(*place).await?;
        store.fill(arguments.endpoints).await?;
        let bench = Bench {
            calictl: calictl.clone(),
            store,
        };
        bench.measure(&arguments).await?;
    }
    Ok(())
}

fn object(value: Value) -> Result<AnyResource> {
    AnyResource::from_json(value).context("the benchmark's own object")
}

/// Objects that are written at a time.
const AT_A_TIME: usize = 32;

/// A datastore of the benchmark's own, which goes with it.
enum Store {
    Sqlite(tempfile::TempDir),
    Etcd(Etcd),
    Kubernetes(ApiServer),
}

impl Store {
    async fn open(place: Place) -> Result<Self> {
        Ok(match place {
            Place::Sqlite => {
                // In memory where that can be had: to fill a store that reaches the disk with every object takes minutes.
                let shared = Path::new("/dev/shm");
                Self::Sqlite(match shared.is_dir() {
                    true => tempfile::tempdir_in(shared)?,
                    false => tempfile::tempdir()?,
                })
            }
            Place::Etcd => Self::Etcd(Etcd::start()),
            Place::Kubernetes => {
                let server = ApiServer::start().await;
                let all: Vec<Value> = defined().map(|kind| definition(kind, Group::V3)).collect();
                server.define(&all).await;
                Self::Kubernetes(server)
            }
        })
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Sqlite(_) => "SQLite",
            Self::Etcd(_) => "etcd",
            Self::Kubernetes(_) => "Kubernetes",
        }
    }

    /// What `calictl` finds it by.
    fn variables(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Sqlite(folder) => vec![(
                "CALI_SQLITE_PATH",
                folder.path().join("cali.db").display().to_string(),
            )],
            Self::Etcd(server) => vec![
                ("DATASTORE_TYPE", "etcdv3".to_owned()),
                ("ETCD_ENDPOINTS", server.endpoint()),
            ],
            Self::Kubernetes(server) => vec![
                ("DATASTORE_TYPE", "kubernetes".to_owned()),
                ("KUBECONFIG", server.kubeconfig().display().to_string()),
            ],
        }
    }

    fn datastore(&self) -> Result<Arc<dyn Datastore>> {
        let all = self.variables();
        let value = |name: &str| {
            all.iter()
                .find(|(known, _)| *known == name)
                .map(|(_, value)| value.clone())
        };
        Ok(cali_datastore::open_with(value)?)
    }

    async fn fill(&self, count: u32) -> Result<()> {
        let store = self.datastore()?;
        match self {
            Self::Kubernetes(server) => {
                for team in 0..100 {
                    server.namespace(&format!("team-{team}")).await;
                }
                let client = server.client().await;
                all_at_once(count, |number| pod(&client, number)).await?;
            }
            Self::Sqlite(_) | Self::Etcd(_) => {
                all_at_once(count, |number| {
                    let store = Arc::clone(&store);
                    async move {
                        store.create(object(endpoint(number))?).await?;
                        Ok(())
                    }
                })
                .await?;
            }
        }
        let pool = json!({
            "apiVersion": "projectcalico.org/v3", "kind": "IPPool",
            "metadata": {"name": "watched"}, "spec": {"cidr": "10.0.0.0/8"},
        });
        store.create(object(pool)?).await?;
        Ok(())
    }
}

async fn all_at_once<F: Future<Output = Result<()>>>(
    count: u32,
    write: impl Fn(u32) -> F,
) -> Result<()> {
    stream::iter(0..count)
        .map(write)
        .buffer_unordered(AT_A_TIME)
        .try_collect::<()>()
        .await
}

fn address(number: u32) -> std::net::Ipv4Addr {
    (0x0a00_0000 + number).into()
}

fn endpoint(number: u32) -> Value {
    let (node, pod) = (format!("node-{}", number % 1000), format!("pod-{number}"));
    json!({
        "apiVersion": "projectcalico.org/v3", "kind": "WorkloadEndpoint",
        "metadata": {
            "name": format!("{}-k8s-{}-eth0", node.replace('-', "--"), pod.replace('-', "--")),
            "namespace": format!("team-{}", number % 100),
            "labels": {
                "app": format!("app-{}", number % 500), "projectcalico.org/orchestrator": "k8s",
                "projectcalico.org/namespace": format!("team-{}", number % 100),
                "projectcalico.org/serviceaccount": "default",
            },
        },
        "spec": {
            "orchestrator": "k8s", "node": node, "pod": pod, "endpoint": "eth0", "containerID": format!("{number:064x}"),
            "interfaceName": format!("cali{number:011x}"), "ipNetworks": [format!("{}/32", address(number))],
            "profiles": [format!("kns.team-{}", number % 100), format!("ksa.team-{}.default", number % 100)],
            "serviceAccountName": "default",
        },
    })
}

/// A pod that runs, as small as a Deployment's is without volumes.
async fn pod(client: &Client, number: u32) -> Result<()> {
    let namespace = format!("team-{}", number % 100);
    let name = format!("pod-{number}");
    let pods = Request::new(format!("/api/v1/namespaces/{namespace}/pods"));
    let body = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": format!("app-{}", number % 500)}},
        "spec": {
            "nodeName": format!("node-{}", number % 1000), "serviceAccountName": "default", "automountServiceAccountToken": false,
            "containers": [{
                "name": "web", "image": "registry.example/web:1", "ports": [{"name": "http", "containerPort": 8080}],
                "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
            }],
        },
    });
    let request = pods.create(&PostParams::default(), serde_json::to_vec(&body)?)?;
    client.request::<Value>(request).await?;
    let address = address(number);
    let status = json!({"status": {
        "phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
        "conditions": [{"type": "Ready", "status": "True"}],
    }});
    let request = pods.patch_subresource(
        "status",
        &name,
        &PatchParams::default(),
        &Patch::Merge(status),
    )?;
    client.request::<Value>(request).await?;
    Ok(())
}

/// What a command cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    time: Duration,
    /// Octets, at most.
    memory: u64,
    output: u64,
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let megabytes = |octets: u64| octets as f64 / 1e6;
        write!(
            f,
            "{:.2} s, {:.1} MB of memory at most, {:.1} MB of output",
            self.time.as_secs_f64(),
            megabytes(self.memory),
            megabytes(self.output)
        )
    }
}

/// What the server itself needs to say everything at once in its shortest form: octets and time.
async fn bare(server: &ApiServer) -> Result<(usize, Duration)> {
    let client = server.client().await;
    let mut request = Request::new("/api/v1/pods").list(&ListParams::default())?;
    let form = HeaderValue::from_static("application/vnd.kubernetes.protobuf");
    request.headers_mut().insert(ACCEPT, form);
    let start = Instant::now();
    let answer = client.send(request.map(Body::from)).await?;
    ensure!(answer.status().is_success(), "{}", answer.status());
    let mut body = answer.into_body();
    let mut bytes = 0;
    while let Some(frame) = body.frame().await {
        bytes += frame?.data_ref().map_or(0, |data| data.len());
    }
    Ok((bytes, start.elapsed()))
}

/// Runs a command to its end.
fn once(command: &mut Command) -> Result<Cost> {
    let start = Instant::now();
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let (mut output, mut bytes) = (child.stdout.take().context("no output")?, 0);
    let mut buffer = vec![0; 1 << 16];
    let mut peak = 0;
    loop {
        // What a process had most of is known until it ends: asked for with every piece of its output.
        peak = of_process(child.id()).peak.max(peak);
        match output.read(&mut buffer)? {
            0 => break,
            count => bytes += count as u64,
        }
    }
    let status = child.wait()?;
    let time = start.elapsed();
    ensure!(status.success(), "{command:?}: {status}");
    Ok(Cost {
        time,
        memory: peak,
        output: bytes,
    })
}

/// The median by time, and the highest memory of all rounds.
fn of(rounds: usize, command: &mut Command) -> Result<Cost> {
    let mut all = (0..rounds.max(1))
        .map(|_| once(command))
        .collect::<Result<Vec<Cost>>>()?;
    all.sort_unstable();
    let highest = all.iter().map(|cost| cost.memory).max();
    Ok(Cost {
        memory: highest.unwrap_or_default(),
        ..all[all.len() / 2]
    })
}

/// The program, and the store that it looks at.
struct Bench {
    calictl: PathBuf,
    store: Store,
}

impl Bench {
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.calictl);
        command.args(words).env_clear().envs(self.store.variables());
        command
    }

    /// From the moment at which a change is committed to the line that a watch in another process prints of it.
    async fn watched(&self, changes: usize) -> Result<Vec<Duration>> {
        let mut watch = self
            .command(&["get", "ippool", "--watch", "-o", "json"])
            .stdout(Stdio::piped())
            .spawn()?;
        let output = watch.stdout.take().context("no output")?;
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send((Instant::now(), line)).is_err() {
                    return;
                }
            }
        });
        let next = || lines.recv_timeout(Duration::from_secs(10));
        let seen = self.change_and_look(changes, next).await;
        watch.kill()?;
        watch.wait()?;
        seen
    }

    async fn change_and_look(
        &self,
        changes: usize,
        next: impl Fn() -> Result<(Instant, String), mpsc::RecvTimeoutError>,
    ) -> Result<Vec<Duration>> {
        next().context("the watch does not begin")?;
        let store = self.store.datastore()?;
        let key = Key::cluster(Kind::IPPool, "watched");
        let mut all = Vec::with_capacity(changes);
        for number in 0..changes {
            // Not in step with anything that looks at the file at regular times.
            tokio::time::sleep(Duration::from_micros(7_300 + 977 * (number as u64 % 13))).await;
            let mut pool = store.get(&key).await?.object.as_ref().clone();
            let mark = format!("change-{number}");
            let labels = &mut pool.metadata_mut().labels;
            labels.insert("mark".into(), mark.as_str().into());
            store.update(pool).await?;
            let committed = Instant::now();
            loop {
                let (at, line) = next().context("a change is not shown")?;
                if line.contains(&format!("\"{mark}\"")) {
                    all.push(at.saturating_duration_since(committed));
                    break;
                }
            }
        }
        all.sort_unstable();
        Ok(all)
    }
}

fn row(what: &str, seen: &str, aim: &str) {
    println!("| {what} | {seen} | {aim} |");
}

fn start(calictl: &Path, rounds: usize) -> Result<()> {
    let mut command = Command::new(calictl);
    command.args(["version", "--client"]).env_clear();
    let cost = of(rounds, &mut command)?;
    let seen = format!("{:.1} ms", cost.time.as_secs_f64() * 1e3);
    row("`version --client`", &seen, "10 ms");
    Ok(())
}

impl Bench {
    async fn measure(&self, arguments: &Arguments) -> Result<()> {
        let place = self.store.name();
        for (format, aim) in [
            ("ps", "2 s, 150 MB"),
            ("wide", ""),
            ("custom-columns=NAME,NODE", ""),
            ("name", ""),
            ("json", ""),
            ("yaml", ""),
        ] {
            let words = ["get", "workloadendpoints", "-A", "-o", format];
            let cost = of(arguments.rounds, &mut self.command(&words))?;
            let what = format!(
                "{place}: `get workloadendpoints -A -o {format}`, {} of them",
                arguments.endpoints
            );
            row(&what, &cost.to_string(), aim);
        }
        if let Store::Kubernetes(server) = &self.store {
            let count = arguments.endpoints;
            let cost = of(1, &mut server.kubectl(&["get", "pods", "-A"]))?;
            row(
                &format!("beside it: `kubectl get pods -A`, {count} of them"),
                &cost.to_string(),
                "",
            );
            let (bytes, time) = bare(server).await?;
            let seen = format!("{:.2} s, {:.1} MB", time.as_secs_f64(), bytes as f64 / 1e6);
            let what = format!("beside it: the server's answer with all {count}, read by nobody");
            row(&what, &seen, "");
        }
        let changes = self.watched(arguments.changes).await?;
        let at = |share: f64| {
            let index = (changes.len() as f64 * share) as usize;
            changes.get(index.min(changes.len().saturating_sub(1)))
        };
        let [median, last] = [0.5, 1.0].map(|share| at(share).copied().unwrap_or_default());
        let seen = format!(
            "median {:.1} ms, last {:.1} ms",
            median.as_secs_f64() * 1e3,
            last.as_secs_f64() * 1e3
        );
        let what = format!("{place}: `get --watch`: a change by another process is shown");
        row(&what, &seen, "100 ms");
        Ok(())
    }
}
