//! The paths to neighbours, watched by BFD ([`crate::bfd`]), and what their loss means for sessions.

use std::collections::BTreeMap;
use std::net::IpAddr;

use cali_control::status::BfdStatus;
use tokio::sync::mpsc;
use tracing::{error, warn};

use super::State;
use crate::bfd::monitor::{Monitor, Report, Target};
use crate::bfd::{self, session::Change};
use crate::gr::HelperEvent;
use crate::session::Command;
use crate::wire::{ErrorCode, Notification, cease};

/// Where a running monitor is reached.
pub(super) type Watch = (Monitor, mpsc::Receiver<Report>);

/// The next report; never, while nothing is watched.
pub(super) async fn next_report(watch: &mut Option<Watch>) -> Option<Report> {
    match watch {
        Some((_, reports)) => reports.recv().await,
        None => std::future::pending().await,
    }
}

impl State {
    /// Watches the paths that the settings name. The thread starts with the first of them.
    pub(super) async fn watch_paths(&mut self) {
        let target = |peer: &IpAddr, neighbour: &super::settings::Neighbour| {
            let session = &neighbour.session;
            let settings = session.bfd.filter(|_| session.blocked.is_none())?;
            let target = Target {
                settings,
                source: session.source,
                scope: 0,
            };
            Some((*peer, target))
        };
        let neighbours = self.settings.neighbours.iter();
        let targets: BTreeMap<_, _> = neighbours.filter_map(|(p, n)| target(p, n)).collect();
        if self.paths.is_none() && !targets.is_empty() {
            match self
                .environment
                .transport
                .watch_paths(self.environment.seed)
            {
                Ok(started) => self.paths = started,
                Err(error) => error!(%error, "cannot start BFD: no path is watched"),
            }
        }
        if let Some((monitor, _)) = &self.paths {
            monitor.watch(targets).await;
        }
    }

    /// Says AdminDown to everybody, so that nobody takes our silence for a broken path.
    pub(super) async fn leave_paths(&mut self) {
        if let Some((monitor, _)) = &self.paths {
            monitor.leave().await;
        }
    }

    /// RFC 5882 §4.3: what shares fate with the control plane may just restart, so its routes are kept as for a
    /// restart; what does not has lost its forwarding plane.
    pub(super) fn on_path(&mut self, report: Report) {
        let Change {
            from,
            on_purpose,
            independent,
            diagnostic,
            ..
        } = report.change;
        if from != bfd::State::Up || on_purpose {
            return;
        }
        let Some(running) = self.neighbours.get_mut(&report.peer) else {
            return;
        };
        warn!(peer = %report.peer, reason = diagnostic.as_str(), independent, "the path to a neighbour is lost");
        if !independent {
            self.command(&self.neighbours[&report.peer], Command::PathLost);
            return;
        }
        if running.live.is_some() {
            let notify = Notification::new(ErrorCode::Cease, cease::BFD_DOWN);
            self.command(&self.neighbours[&report.peer], Command::Reset(notify));
        } else if !running.helper.stale().is_empty() {
            let actions = running.helper.handle(HelperEvent::Down { keep: false });
            self.help(report.peer, actions);
        }
    }

    pub(super) fn path_status(&self, peer: &IpAddr) -> Option<BfdStatus> {
        let configured = self.settings.neighbours.get(peer)?.session.bfd.is_some();
        let seen = self
            .paths
            .as_ref()
            .and_then(|(monitor, _)| monitor.seen(peer));
        let Some(seen) = seen else {
            return configured.then(|| BfdStatus {
                state: format!("{:?}", bfd::State::Down),
                reason: Some("it does not run".to_owned()),
                transmit_ms: 0,
                detection_ms: 0,
            });
        };
        let down = seen.state != bfd::State::Up && seen.diagnostic != bfd::Diagnostic::None;
        let reason = seen
            .problem
            .or_else(|| down.then(|| seen.diagnostic.as_str().to_owned()));
        let milliseconds =
            |d: std::time::Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        Some(BfdStatus {
            state: format!("{:?}", seen.state),
            reason,
            transmit_ms: milliseconds(seen.transmit),
            detection_ms: milliseconds(seen.detection),
        })
    }
}
