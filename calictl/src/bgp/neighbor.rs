//! `calictl bgp neighbor`.

use super::age;
use cali_control::status::{MessageCounts, PeerStatus, SessionState};
use std::fmt::Write;

fn messages(counts: &MessageCounts) -> String {
    let named = [
        (counts.open, "OPEN"),
        (counts.update, "UPDATE"),
        (counts.keepalive, "KEEPALIVE"),
        (counts.refresh, "ROUTE-REFRESH"),
        (counts.notification, "NOTIFICATION"),
    ];
    let seen: Vec<String> = named
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, name)| format!("{count} {name}"))
        .collect();
    if seen.is_empty() {
        "none".to_owned()
    } else {
        seen.join(", ")
    }
}

fn state(peer: &PeerStatus, now: u64) -> String {
    let mut text = format!("{} for {}", peer.state.as_str(), age(peer.since, now));
    if peer.state == SessionState::Established {
        let _ = write!(text, ", session {}", peer.established_count);
    } else if let Some(info) = &peer.info {
        let _ = write!(text, ": {info}");
    }
    text
}

fn protection(peer: &PeerStatus) -> Option<String> {
    let password = peer.password.then(|| "TCP MD5 password".to_owned());
    let ttl = peer
        .ttl_hops
        .map(|hops| format!("TTL security over {hops} hops"));
    let parts: Vec<String> = password.into_iter().chain(ttl).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

pub(super) fn render(peer: &PeerStatus, now: u64) -> String {
    let mut text = format!("BGP neighbor {}", peer.address);
    if let Some(name) = &peer.name {
        let _ = write!(text, " ({name})");
    }
    let _ = writeln!(text, ", {}", peer.kind.as_str());
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<17} {value}");
    };
    line("state", state(peer, now));
    let kind = if peer.remote_as == peer.local_as {
        "internal"
    } else {
        "external"
    };
    let client = if peer.reflector_client {
        ", our route reflector client"
    } else {
        ""
    };
    line(
        "AS",
        format!(
            "{}, {kind} (ours {}){client}",
            peer.remote_as, peer.local_as
        ),
    );
    let mut ends = format!("port {}", peer.port);
    if let Some(id) = peer.router_id {
        let _ = write!(ends, ", router ID {id}");
    }
    if let Some(local) = peer.local_address {
        let _ = write!(ends, ", our address {local}");
    }
    line("transport", ends);
    if let Some(protection) = protection(peer) {
        line("protection", protection);
    }
    line("hold time", format!("{} s", peer.hold_time));
    if !peer.capabilities.is_empty() {
        line("its capabilities", peer.capabilities.join(", "));
    }
    for family in &peer.families {
        line(
            &format!("{} routes", family.family),
            format!(
                "{} received, {} accepted, {} advertised",
                family.received, family.accepted, family.advertised
            ),
        );
    }
    line("received", messages(&peer.messages_in));
    line("sent", messages(&peer.messages_out));
    if let Some(restart) = &peer.restart {
        let left = restart.seconds_left;
        let left = left.map_or_else(String::new, |s| format!(" for another {s} s"));
        line(
            "graceful restart",
            format!(
                "its {} routes are kept{left}",
                restart.families.join(" and ")
            ),
        );
    }
    if let Some(bfd) = &peer.bfd {
        let reason = bfd
            .reason
            .as_ref()
            .map_or_else(String::new, |r| format!(": {r}"));
        line(
            "BFD",
            format!(
                "{}{reason}, every {} ms, down after {} ms",
                bfd.state, bfd.transmit_ms, bfd.detection_ms
            ),
        );
    }
    for (name, event) in [
        ("last down", &peer.last_down),
        ("last error", &peer.last_error),
    ] {
        if let Some(event) = event {
            line(name, format!("{} ago: {}", age(event.at, now), event.what));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;
    use cali_control::status::Event;

    #[test]
    fn a_neighbor_is_told_whole() {
        let peer = PeerStatus {
            established_count: 2,
            password: true,
            ttl_hops: Some(2),
            last_down: Some(Event {
                at: 33_000,
                what: "received cease: administrative shutdown (6/2): \"kernel upgrade\"".into(),
            }),
            last_error: Some(Event {
                at: 33_300,
                what: "Connection refused (os error 111)".into(),
            }),
            ..sample::peer()
        };
        insta::assert_snapshot!(render(&peer, 40_000));
    }

    #[test]
    fn a_neighbor_that_is_down_says_why_first() {
        let peer = PeerStatus {
            state: SessionState::Idle,
            info: Some("no password: secret \"bgp\" has no key \"tor\"".into()),
            capabilities: vec![],
            router_id: None,
            bfd: None,
            messages_in: MessageCounts::default(),
            messages_out: MessageCounts::default(),
            ..sample::peer()
        };
        insta::assert_snapshot!(render(&peer, 40_000));
    }
}
