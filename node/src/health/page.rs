//! The page at `/`: one look at the node. Pure: a snapshot in, HTML out. No script, nothing loaded from elsewhere.

use std::fmt::Write;

use cali_control::status::{BgpStatus, EndpointStatus, NodeStatus, SessionState};

use super::Snapshot;

/// Endpoints that are listed; the page says how many more there are.
const LISTED: usize = 200;

const STYLE: &str = "
:root{color-scheme:light dark;--fg:#1c2430;--dim:#667085;--bg:#f6f7f9;--card:#fff;--line:#e3e6eb;--good:#17803d;--bad:#c0281c;--warn:#9a6700}
@media(prefers-color-scheme:dark){:root{--fg:#e6e9ef;--dim:#98a2b3;--bg:#14171c;--card:#1d2128;--line:#2f3540;--good:#4ac26b;--bad:#ff7b72;--warn:#d9a50b}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif}
main{max-width:64rem;margin:0 auto;padding:2rem 1.25rem}h1{font-size:1.5rem;margin:0}h2{font-size:1rem;margin:2rem 0 .6rem}
.sub{color:var(--dim);margin:.2rem 0 0}.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(13rem,1fr));gap:.75rem;margin-top:1.25rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.7rem .9rem}.card b{display:block;font-size:1.45rem;font-weight:600}
.card span{color:var(--dim);font-size:.85rem}table{width:100%;border-collapse:collapse;background:var(--card);border:1px solid var(--line);border-radius:.6rem;overflow:hidden}
th,td{text-align:left;padding:.45rem .8rem;border-top:1px solid var(--line);vertical-align:top}thead th{border-top:0;color:var(--dim);font-weight:500;font-size:.85rem}
td.n{text-align:right;font-variant-numeric:tabular-nums}code{font:13px ui-monospace,monospace}.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}
.scroll{overflow-x:auto}footer{color:var(--dim);margin-top:2rem;font-size:.85rem}a{color:inherit}
";

/// The page of a snapshot; `None` while there is none yet.
pub(super) fn render(snapshot: Option<&Snapshot>) -> String {
    let mut out = String::with_capacity(8 << 10);
    let title = snapshot.map_or("starting", |snapshot| snapshot.node.node.as_str());
    let _ = write!(
        out,
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content=\"width=device-width,initial-scale=1\">\
         <meta http-equiv=refresh content=5><title>Cali · {}</title><style>{STYLE}</style></head><body><main>",
        escape(title)
    );
    match snapshot {
        None => out.push_str(
            "<h1>Starting</h1><p class=sub>The first look at the parts has not ended yet.</p>",
        ),
        Some(snapshot) => body(&mut out, snapshot),
    }
    out.push_str("<footer><a href=/readiness>readiness</a> · <a href=/liveness>liveness</a> · read anew every 5 s · more with <code>calictl node status</code></footer></main></body></html>\n");
    out
}

fn body(out: &mut String, snapshot: &Snapshot) {
    let node = &snapshot.node;
    let addresses: Vec<&str> = [&node.ipv4, &node.ipv6]
        .into_iter()
        .filter_map(|address| address.as_deref())
        .collect();
    let _ = write!(
        out,
        "<h1>{}</h1><p class=sub>{} · cali {} · up {}</p>",
        escape(&node.node),
        escape(&addresses.join(" · ")),
        escape(&node.version),
        age(snapshot.now.saturating_sub(node.started_at)),
    );
    cards(out, snapshot);
    readiness(out, node);
    if let Some(bgp) = &snapshot.bgp {
        sessions(out, bgp, snapshot.now);
    }
    troubles(out, node);
    endpoints(out, &snapshot.endpoints);
}

fn cards(out: &mut String, snapshot: &Snapshot) {
    out.push_str("<div class=cards>");
    let mut card = |value: String, what: &str| {
        let _ = write!(
            out,
            "<div class=card><b>{}</b><span>{what}</span></div>",
            escape(&value)
        );
    };
    let programmed = snapshot
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.programmed)
        .count();
    card(
        format!("{programmed}/{}", snapshot.endpoints.len()),
        "endpoints programmed",
    );
    card(snapshot.routes.to_string(), "routes");
    if let Some(bgp) = &snapshot.bgp {
        let up = bgp
            .peers
            .iter()
            .filter(|peer| peer.state == SessionState::Established)
            .count();
        card(format!("{up}/{}", bgp.peers.len()), "BGP sessions up");
        card(
            (bgp.prefixes_v4 + bgp.prefixes_v6).to_string(),
            "BGP prefixes",
        );
    }
    card(snapshot.tunnel_endpoints.to_string(), "tunnel endpoints");
    card(
        snapshot.policy_changes.to_string(),
        "policy changes enforced",
    );
    if let Some([median, most]) = snapshot.policy_latency_ms {
        card(
            format!("≤ {} / {} ms", milliseconds(median), milliseconds(most)),
            "until one is enforced: half / 99&nbsp;%",
        );
    }
    card(
        snapshot.node.quarantined.len().to_string(),
        "objects in quarantine",
    );
    out.push_str("</div>");
}

/// What is ready in one line, what is not in a table with its reasons.
fn readiness(out: &mut String, node: &NodeStatus) {
    let (ready, others): (Vec<_>, Vec<_>) = node.readiness.iter().partition(|part| part.ready);
    out.push_str("<h2>Parts</h2>");
    if !ready.is_empty() {
        let names: Vec<String> = ready.iter().map(|part| escape(&part.part)).collect();
        let _ = write!(
            out,
            "<p class=sub><span class=good>ready</span> {}</p>",
            names.join(" · ")
        );
    }
    if others.is_empty() {
        return;
    }
    out.push_str("<div class=scroll><table><thead><tr><th>part<th>state<th>reason</thead>");
    for part in others {
        let _ = write!(
            out,
            "<tr><td>{}<td class=warn>not ready<td>{}",
            escape(&part.part),
            escape(part.reason.as_deref().unwrap_or(""))
        );
    }
    out.push_str("</table></div>");
}

fn sessions(out: &mut String, bgp: &BgpStatus, now: u64) {
    let _ = write!(
        out,
        "<h2>BGP · AS {} · router id {}</h2><div class=scroll><table><thead><tr><th>peer<th>AS<th>kind<th>state<th>since<th>received<th>accepted<th>sent<th>info</thead>",
        bgp.local_as, bgp.router_id
    );
    for peer in &bgp.peers {
        let up = peer.state == SessionState::Established;
        let name = peer.name.as_deref().map_or_else(String::new, |name| {
            format!(" <small>{}</small>", escape(name))
        });
        let _ = write!(
            out,
            "<tr><td><code>{}</code>{name}<td>{}<td>{}<td class={}>{}<td>{}<td class=n>{}<td class=n>{}<td class=n>{}<td>{}",
            peer.address,
            peer.remote_as,
            peer.kind.as_str(),
            if up { "good" } else { "bad" },
            peer.state.as_str(),
            age(now.saturating_sub(peer.since)),
            peer.received,
            peer.accepted,
            peer.advertised,
            escape(peer.info.as_deref().unwrap_or(""))
        );
    }
    if bgp.peers.is_empty() {
        out.push_str("<tr><td colspan=9>no peers are configured");
    }
    out.push_str("</table></div>");
}

fn troubles(out: &mut String, node: &NodeStatus) {
    if !node.quarantined.is_empty() {
        out.push_str("<h2>In quarantine</h2><div class=scroll><table><thead><tr><th>object<th>reason<th>because of</thead>");
        for object in &node.quarantined {
            let _ = write!(
                out,
                "<tr><td><code>{}</code><td class=bad>{}<td>{}",
                escape(&object.object),
                escape(&object.reason),
                escape(&object.caused_by.join(", "))
            );
        }
        out.push_str("</table></div>");
    }
    if !node.notices.is_empty() {
        out.push_str("<h2>Worth knowing</h2><div class=scroll><table>");
        for notice in &node.notices {
            let _ = write!(out, "<tr><td>{}", escape(notice));
        }
        out.push_str("</table></div>");
    }
}

fn endpoints(out: &mut String, all: &[EndpointStatus]) {
    out.push_str("<h2>Endpoints</h2><div class=scroll><table><thead><tr><th>endpoint<th>interface<th>addresses<th>policies<th>state</thead>");
    // What needs attention first.
    let (bad, good): (Vec<_>, Vec<_>) = all.iter().partition(|endpoint| !endpoint.programmed);
    for endpoint in bad.iter().chain(&good).take(LISTED) {
        let addresses: Vec<String> = endpoint.addresses.iter().map(ToString::to_string).collect();
        let state = endpoint.problem.as_deref().unwrap_or("programmed");
        let _ = write!(
            out,
            "<tr><td>{}<td><code>{}</code><td><code>{}</code><td>{}<td class={}>{}",
            escape(&endpoint.endpoint),
            escape(&endpoint.interface),
            escape(&addresses.join(" ")),
            escape(&endpoint.policies.join(", ")),
            if endpoint.programmed { "good" } else { "bad" },
            escape(state)
        );
    }
    if all.len() > LISTED {
        let _ = write!(out, "<tr><td colspan=5>and {} more", all.len() - LISTED);
    }
    if all.is_empty() {
        out.push_str("<tr><td colspan=5>none on this node");
    }
    out.push_str("</table></div>");
}

/// The bounds of the histogram's buckets: two digits say it all.
fn milliseconds(value: f64) -> String {
    if value < 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} days", seconds / 86_400),
    }
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use cali_control::status::{Quarantined, Readiness};

    #[test]
    fn what_is_wrong_stands_on_the_page_and_names_cannot_break_it() {
        let snapshot = Snapshot {
            node: NodeStatus {
                node: "n1".into(),
                version: "0.1.0".into(),
                pid: 1,
                started_at: 100,
                ipv4: Some("10.0.0.1/24".into()),
                ipv6: None,
                readiness: vec![Readiness {
                    part: "policy".into(),
                    ready: false,
                    reason: Some("waits for <the datastore>".into()),
                }],
                quarantined: vec![Quarantined {
                    object: "route 10.0.0.0/26".into(),
                    reason: "EINVAL".into(),
                    caused_by: vec!["BlockAffinity b".into()],
                }],
                notices: vec!["a notice".into()],
                bgpd_pid: None,
            },
            bgp: None,
            endpoints: (0..LISTED + 5)
                .map(|number| EndpointStatus {
                    endpoint: format!("shop/<b>{number}"),
                    interface: "cali1".into(),
                    addresses: vec![],
                    policies: vec![],
                    programmed: number != LISTED + 4,
                    problem: (number == LISTED + 4).then(|| "no route".to_owned()),
                })
                .collect(),
            routes: 3,
            waiting: 0,
            tunnel_endpoints: 2,
            policy_changes: 12,
            policy_latency_ms: Some([2.5, 50.0]),
            now: 4000,
        };
        let page = render(Some(&snapshot));
        assert!(page.contains("waits for &lt;the datastore&gt;"), "{page}");
        assert!(page.contains("route 10.0.0.0/26"), "{page}");
        assert!(page.contains("up 1 h 5 min"), "{page}");
        assert!(page.contains("and 5 more"), "{page}");
        assert!(page.contains("<b>≤ 2.5 / 50 ms</b>"), "{page}");
        assert!(!page.contains("shop/<b>"), "{page}");
        let first = page.find("no route").expect("the bad endpoint is listed");
        assert!(first < page.find("&lt;b&gt;0<").unwrap(), "{page}");
        assert!(render(None).contains("Starting"));
    }
}
