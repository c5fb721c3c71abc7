//! Runs cases.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Revision};
use cali_netlink::NetNs;
use cali_netlink::conntrack::Conntrack;

use super::backend::Backend;
use super::case::{Case, File, NODE, ProbeText};
use super::expect::expected;
use super::lab::{Lab, Place};
use super::probe::{Answer, Listener, Probe, listen, probe};
use crate::calc::{Batch, Graph, Input};
use crate::verdict::Model;

/// More pods than any case has.
const PODS: u8 = 4;

/// What came of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Cases that were run.
    pub cases: usize,
    /// Packets that were sent.
    pub probes: usize,
    /// What did not agree, by case.
    pub failures: BTreeMap<String, Vec<String>>,
}

impl Report {
    /// Adds the report of another file.
    pub fn add(&mut self, other: Self) {
        self.cases += other.cases;
        self.probes += other.probes;
        self.failures.extend(other.failures);
    }
}

/// The files of cases in a folder, in order.
///
/// # Errors
/// The folder cannot be read.
pub fn files(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|ext| ext == "yaml" || ext == "yml")
        {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// What a graph says that gets all objects at once.
///
/// # Errors
/// It says nothing.
pub fn compile_batch(objects: &[Arc<AnyResource>]) -> Result<Batch, String> {
    let mut graph = Graph::new(NODE.into());
    let updates = objects.iter().map(|object| Update {
        key: object.key(),
        value: Some(object.clone()),
        revision: Revision::from("1"),
    });
    graph.handle(Input::Sync(SyncEvent::Updates(updates.collect())));
    graph.handle(Input::Sync(SyncEvent::Status(SyncStatus::InSync)));
    graph.flush().ok_or_else(|| "no first batch".to_owned())
}

/// Runs all cases of a file in a lab of their own, enforced by what `backend` makes for its node.
///
/// # Errors
/// The file cannot be read.
pub fn run_file(
    path: &Path,
    backend: impl FnOnce(NetNs) -> Result<Box<dyn Backend>, String>,
) -> Result<Report, String> {
    let text =
        std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let file: File =
        serde_saphyr::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?;
    let lab = Lab::new(PODS);
    let mut backend = backend(lab.node.netns().clone())?;
    let mut report = Report::default();
    for case in &file.cases {
        report.cases += 1;
        match run_case(&lab, backend.as_mut(), case) {
            Ok((probes, failures)) => {
                report.probes += probes;
                if !failures.is_empty() {
                    report.failures.insert(case.name.clone(), failures);
                }
            }
            Err(error) => {
                report.failures.insert(case.name.clone(), vec![error]);
            }
        }
    }
    Ok(report)
}

/// A probe with everything that sending it takes.
struct Shot<'a> {
    text: &'a ProbeText,
    what: Probe,
    v4: bool,
    from: &'a NetNs,
    to: IpAddr,
    said: bool,
    why: String,
    staged: bool,
}

impl Shot<'_> {
    fn send(&self) -> Answer {
        let silent = self.text.silent && !self.text.allowed;
        probe(self.from, self.to, self.what, self.text.source_port, silent)
    }
}

/// No packet of this case may find a flow of the last one.
fn forget_flows(lab: &Lab) -> Result<(), String> {
    let places = lab.pods.iter().chain([&lab.world, &lab.lan]);
    let addresses: Vec<IpAddr> = places
        .flat_map(|place| [true, false].map(|v4| place.address(v4)))
        .collect();
    let conntrack = Conntrack::open(lab.node.netns()).map_err(|error| error.to_string())?;
    let deleted = conntrack.delete_addresses(&addresses);
    deleted.map(drop).map_err(|error| error.to_string())
}

/// Runs a case: how many packets were sent, and what did not agree.
///
/// # Errors
/// The case cannot be run.
pub fn run_case(
    lab: &Lab,
    backend: &mut dyn Backend,
    case: &Case,
) -> Result<(usize, Vec<String>), String> {
    let objects = case.objects(lab)?;
    let interfaces = lab.interfaces();
    backend.enforce(&compile_batch(&objects)?, &interfaces)?;
    forget_flows(lab)?;
    let model: Model = objects.iter().cloned().collect();
    let mut wanted: BTreeSet<(&str, Probe)> = BTreeSet::new();
    for text in &case.probes {
        wanted.insert((text.to.as_str(), text.what()?));
    }
    let mut listeners: Vec<Listener> = Vec::new();
    for (to, what) in wanted {
        let place = case.place(lab, to)?;
        let ns = place.map_or(lab.node.netns(), |place| place.ns.netns());
        listeners.push(listen(ns, what));
    }
    let shots = shots(lab, case, &model)?;
    let answers = send_all(&shots);
    let mut failures = Vec::new();
    for (number, shot) in shots.iter().enumerate() {
        let text = shot.text;
        let kernel = match answers.get(&number) {
            Some(answer) => answer.verdict(text.silent),
            None => Err("the probe panicked".to_owned()),
        };
        let staged = text.staged.is_none_or(|wanted| wanted == shot.staged);
        if kernel != Ok(text.allowed) || shot.said != text.allowed || !staged {
            failures.push(format!(
                "{} -> {} {} over IPv{}: expected {}, model says {} ({}), {} says {kernel:?}{}",
                text.from,
                text.to,
                text.what,
                if shot.v4 { 4 } else { 6 },
                text.allowed,
                shot.said,
                shot.why,
                backend.name(),
                if staged {
                    ""
                } else {
                    "; staged policies say otherwise"
                },
            ));
        }
    }
    Ok((shots.len(), failures))
}

/// Sends all probes, most of them at once; their answers by number.
fn send_all(shots: &[Shot<'_>]) -> BTreeMap<usize, Answer> {
    // A raw socket hears of every refusal of its protocol between two addresses: probes of that kind go one after another.
    let by_hand = |(_, shot): &(usize, &Shot<'_>)| {
        matches!(shot.what, Probe::Sctp(_) | Probe::Ping | Probe::Timestamp)
    };
    let (alone, together): (Vec<_>, Vec<_>) = shots.iter().enumerate().partition(by_hand);
    thread::scope(|scope| {
        let mut threads: Vec<_> = together
            .into_iter()
            .map(|(number, shot)| scope.spawn(move || vec![(number, shot.send())]))
            .collect();
        threads.push(scope.spawn(move || {
            let sent = alone.into_iter();
            sent.map(|(number, shot)| (number, shot.send())).collect()
        }));
        let threads = threads.into_iter();
        threads
            .filter_map(|thread| thread.join().ok())
            .flatten()
            .collect()
    })
}

fn shots<'a>(lab: &'a Lab, case: &'a Case, model: &Model) -> Result<Vec<Shot<'a>>, String> {
    let interfaces = lab.interfaces();
    let committed = model.has_staged().then(|| model.committed());
    let mut shots = Vec::new();
    for text in &case.probes {
        let (from, to) = (case.place(lab, &text.from)?, case.place(lab, &text.to)?);
        let what = text.what()?;
        for v4 in [true, false] {
            if text.ip_version.is_some_and(|only| (only == 4) != v4) || !what.exists(v4) {
                continue;
            }
            // A pod reaches the host by the address towards the world.
            let address = |place: Option<&Place>, other: Option<&Place>| match place {
                Some(place) => place.address(v4),
                None => lab.host_address(other.unwrap_or(&lab.world), v4),
            };
            let (source, destination) = (address(from, to), address(to, from));
            let packet = what.packet(source, destination, text.source_port);
            let ends = [from, to].map(|place| place.map(|place| place.interface.as_str()));
            let said = expected(model, &packet, ends, &interfaces);
            let staged = committed.as_ref().map_or(said.allowed, |committed| {
                expected(committed, &packet, ends, &interfaces).allowed
            });
            shots.push(Shot {
                text,
                what,
                v4,
                from: from.map_or(lab.node.netns(), |place| place.ns.netns()),
                to: destination,
                said: said.allowed,
                why: said.reasons.join(", "),
                staged,
            });
        }
    }
    Ok(shots)
}
