//! `calictl trace`: one flow, explained: who decides, whether the kernel agrees, and the way it takes.

use std::fmt::Write;
use std::process::ExitCode;

use anyhow::{Result, bail};
use cali_control::paths::run_dir;
use cali_control::status::{NodeRequest, NodeResponse};
use cali_netlink::NetNs;
use cali_netlink::nft::{Expr, Family, Nft, TableName};
use clap::Args;

use super::explain::{Explanation, Judgement, explain};
use super::query::{Destination, End};
use super::world::{Party, World};
use crate::output::{self, Style};
use crate::sockets;

/// What is asked.
#[derive(Debug, Args)]
pub(crate) struct Trace {
    /// Who sends: a pod (namespace/name) or an address
    source: String,
    /// Who receives, and what: a pod or an address, with :PORT and /PROTO (tcp, udp, sctp, icmp)
    destination: String,
    /// Use the pods' IPv6 addresses
    #[arg(short = '6', long)]
    ipv6: bool,
    /// Show every policy that is asked, also where one has decided
    #[arg(short, long)]
    verbose: bool,
}

/// Runs it. The exit code is 1 where the flow is denied.
pub(crate) async fn trace(arguments: &Trace) -> Result<ExitCode> {
    let source: End = arguments.source.parse()?;
    let Destination { end, service } = arguments.destination.parse()?;
    let v6 = arguments.ipv6
        || [&source, &end]
            .into_iter()
            .any(|end| matches!(end, End::Address(address) if address.is_ipv6()));
    let world = World::read().await?;
    let (source, destination) = (world.find(&source, v6)?, world.find(&end, v6)?);
    if source.address.is_ipv6() != destination.address.is_ipv6() {
        bail!(
            "{} and {} are of different families",
            source.address,
            destination.address
        );
    }
    let explanation = explain(&world, source, destination, service);
    let kernel = kernel(&explanation).await;
    output::write(render(&explanation, &kernel, arguments.verbose));
    Ok(if explanation.allowed() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What the node says that this command runs on, where a node runs.
async fn kernel(explanation: &Explanation) -> Vec<String> {
    let mut lines = Vec::new();
    let run_dir = run_dir();
    let ends = [
        (&explanation.source, &explanation.egress),
        (&explanation.destination, &explanation.ingress),
    ];
    let Ok(NodeResponse::Endpoints(endpoints)) =
        sockets::node(&run_dir, NodeRequest::Endpoints).await
    else {
        return lines;
    };
    let mut local = false;
    for (party, judgement) in ends {
        let found = endpoints
            .iter()
            .find(|endpoint| endpoint.addresses.contains(&party.address));
        let Some(endpoint) = found else { continue };
        local = true;
        lines.push(match &endpoint.problem {
            None => format!("{}: policy and routes are in the kernel", party.name),
            Some(problem) => format!("{}: NOT as it should be: {problem}", party.name),
        });
        lines.extend(judgement.iter().filter_map(counted));
    }
    if local
        && let Ok(NodeResponse::Status(status)) = sockets::node(&run_dir, NodeRequest::Status).await
    {
        for refused in &status.quarantined {
            lines.push(format!("refused: {}: {}", refused.object, refused.reason));
        }
        let drops = |notice: &&String| notice.contains("drop");
        lines.extend(status.notices.iter().filter(drops).cloned());
    }
    lines
}

/// How often the kernel's rules of the deciding policy have matched. Needs root; without it there is no line.
fn counted(judgement: &Judgement) -> Option<String> {
    let policy = judgement.policy.as_ref()?;
    let nft = Nft::open(&NetNs::current().ok()?).ok()?;
    let table = TableName::new(Family::Inet, "calico");
    let prefix = format!(
        "{} {} ",
        felix::compile::policy_text(policy),
        judgement.direction
    );
    let mut rules = 0_u64;
    let mut packets = 0_u64;
    for listed in nft.rules(&table, None).ok()? {
        let comment = listed.rule.comment.as_deref().unwrap_or_default();
        if !comment.starts_with(&prefix) {
            continue;
        }
        rules += 1;
        for expr in &listed.rule.exprs {
            if let Expr::Counter { packets: seen, .. } = expr {
                packets += seen;
            }
        }
    }
    (rules > 0).then(|| {
        format!(
            "the {} rules of {} have decided on {packets} flows so far",
            judgement.direction,
            felix::compile::policy_text(policy)
        )
    })
}

fn who(party: &Party) -> String {
    if party.endpoint.is_some() {
        format!("{} ({})", party.name, party.address)
    } else {
        party.name.clone()
    }
}

fn render(explanation: &Explanation, kernel: &[String], verbose: bool) -> String {
    let mut text = String::new();
    let Explanation {
        source,
        destination,
        service,
        ..
    } = explanation;
    let verdict = if explanation.allowed() {
        Style::GOOD.paint("allowed")
    } else {
        Style::BAD.paint("denied")
    };
    let _ = writeln!(
        text,
        "{} to {}, {}: {verdict}\n",
        who(source),
        who(destination),
        service.describe()
    );
    let ends = [
        ("egress", &source.name, &explanation.egress),
        ("ingress", &destination.name, &explanation.ingress),
    ];
    for (direction, name, judgement) in ends {
        match judgement {
            Some(judgement) => policy(&mut text, name, judgement, verbose),
            None => {
                let _ = writeln!(text, "{direction:<9}no policy of ours: {name} is no pod");
            }
        }
    }
    for judgement in &explanation.staged {
        let _ = writeln!(
            text,
            "{:<9}{} would be {}: {}",
            "staged",
            judgement.direction,
            outcome(judgement),
            judgement.because
        );
    }
    lines(&mut text, "path", &explanation.path);
    lines(&mut text, "kernel", kernel);
    text
}

fn outcome(judgement: &Judgement) -> String {
    if judgement.allowed {
        Style::GOOD.paint("allowed")
    } else {
        Style::BAD.paint("denied")
    }
}

fn policy(text: &mut String, name: &str, judgement: &Judgement, verbose: bool) {
    let direction = judgement.direction.to_string();
    let _ = writeln!(
        text,
        "{direction:<9}{} by {}",
        outcome(judgement),
        judgement.because
    );
    if let Some(rule) = &judgement.rule {
        let _ = writeln!(text, "{:<11}{}", "", Style::DIM.paint(rule));
    }
    for rule in &judgement.logged {
        let _ = writeln!(text, "{:<11}logged by {rule}", "");
    }
    if judgement.rule.is_some() && !verbose {
        return;
    }
    for (tier, policies) in &judgement.asked {
        let _ = writeln!(
            text,
            "{:<11}tier {tier} asks for {name}: {}",
            "",
            policies.join(", ")
        );
    }
}

fn lines(text: &mut String, title: &str, lines: &[String]) {
    for (number, line) in lines.iter().enumerate() {
        let title = if number == 0 { title } else { "" };
        let _ = writeln!(text, "{title:<9}{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::super::world_of;
    use super::*;

    fn traced(manifests: &str, source: &str, destination: &str) -> String {
        let world = world_of(manifests);
        let Destination { end, service } = destination.parse().expect("a destination");
        let source = world.find(&source.parse().expect("a source"), false);
        let (source, end) = (source.expect("a source"), world.find(&end, false));
        let explanation = explain(&world, source, end.expect("a destination"), service);
        render(&explanation, &[], false)
    }

    #[test]
    fn a_denied_flow_names_what_denies_it() {
        insta::assert_snapshot!(traced(super::super::SHOP, "shop/client", "shop/db:5432"));
    }

    #[test]
    fn an_allowed_flow_names_the_rules_and_the_tunnel() {
        insta::assert_snapshot!(traced(super::super::SHOP, "shop/web", "shop/db:5432/tcp"));
    }

    #[test]
    fn a_flow_to_the_outside_leaves_with_the_nodes_address() {
        insta::assert_snapshot!(traced(super::super::SHOP, "shop/client", "192.0.2.1:443"));
    }
}
