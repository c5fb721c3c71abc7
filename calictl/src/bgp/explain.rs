//! `calictl bgp explain`.

use super::routes::{self, View};
use cali_control::status::{Explanation, ToldStatus};
use std::fmt::Write;

fn who(told: &ToldStatus) -> String {
    match &told.name {
        Some(name) => format!("{} ({name})", told.peer),
        None => told.peer.to_string(),
    }
}

pub(super) fn render(asked: &str, explanation: &Explanation) -> String {
    let Some(prefix) = explanation.prefix else {
        return format!("{asked}: BGP has no route around it.\n");
    };
    let mut text = format!("{asked}: the longest prefix with a route is {prefix}\n\nPaths\n");
    text.push_str(&routes::render(&explanation.paths, View::Table));
    let _ = writeln!(text, "\nKernel\n  {}", explanation.kernel);
    if explanation.peers.is_empty() {
        return text;
    }
    let (not, told): (Vec<_>, Vec<_>) = explanation
        .peers
        .iter()
        .partition(|told| told.withheld.is_some());
    text.push_str("\nAdvertised\n");
    for told in told {
        let _ = writeln!(text, "  to {}", who(told));
    }
    for told in not {
        let reason = told.withheld.as_deref().unwrap_or_default();
        let _ = writeln!(text, "  not to {}: {reason}", who(told));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;

    #[test]
    fn an_explanation_reads_from_paths_to_kernel_to_neighbors() {
        let told = |n: u8, withheld: Option<&str>| ToldStatus {
            peer: [10, 0, 0, n].into(),
            name: (n < 9).then(|| format!("node{n}")),
            withheld: withheld.map(str::to_owned),
        };
        let explanation = Explanation {
            prefix: Some("10.0.1.0/26".parse().unwrap()),
            paths: vec![sample::route("10.0.1.0/26")],
            kernel: "via 10.0.0.2".into(),
            peers: vec![
                told(2, Some("it came from this neighbor")),
                told(
                    3,
                    Some("it came from an internal neighbor, and neither is a client of ours"),
                ),
                told(9, None),
            ],
        };
        insta::assert_snapshot!(render("10.0.1.5", &explanation));
    }

    #[test]
    fn nothing_is_said_to_be_nothing() {
        let nothing = Explanation {
            prefix: None,
            paths: vec![],
            kernel: String::new(),
            peers: vec![],
        };
        assert_eq!(
            render("10.0.1.5", &nothing),
            "10.0.1.5: BGP has no route around it.\n"
        );
    }
}
