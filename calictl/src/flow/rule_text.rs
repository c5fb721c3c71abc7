//! A policy rule as one line for people.

use cali_api::v3::{EntityRule, Rule};

/// For example `Allow tcp from app == 'client' to port 80`.
pub(crate) fn rule_text(rule: &Rule) -> String {
    let mut words = vec![format!("{:?}", rule.action)];
    if let Some(version) = rule.ip_version {
        words.push(format!("IPv{version}"));
    }
    if let Some(protocol) = &rule.protocol {
        words.push(protocol.to_string().to_lowercase());
    }
    if let Some(protocol) = &rule.not_protocol {
        words.push(format!("not {}", protocol.to_string().to_lowercase()));
    }
    for (icmp, prefix) in [(&rule.icmp, ""), (&rule.not_icmp, "not ")] {
        if let Some(icmp) = icmp {
            let number = |value: Option<u8>| value.map_or("any".to_owned(), |n| n.to_string());
            words.push(format!(
                "{prefix}type {} code {}",
                number(icmp.type_),
                number(icmp.code)
            ));
        }
    }
    for (preposition, side) in [("from", &rule.source), ("to", &rule.destination)] {
        let text = side_text(side);
        if !text.is_empty() {
            words.push(preposition.to_owned());
            words.push(text);
        }
    }
    words.join(" ")
}

fn side_text(side: &EntityRule) -> String {
    let mut parts = Vec::new();
    let mut add = |prefix: &str, text: String| {
        if !text.is_empty() {
            parts.push(format!("{prefix}{text}"));
        }
    };
    add("", side.selector.clone());
    add("not ", side.not_selector.clone());
    if !side.namespace_selector.is_empty() {
        add("namespaces ", side.namespace_selector.clone());
    }
    if let Some(accounts) = &side.service_accounts {
        add("service accounts ", accounts.names.join(", "));
        add("service accounts ", accounts.selector.clone());
    }
    if let Some(service) = &side.services {
        add("service ", service.name.clone());
    }
    add("", list(&side.nets));
    add("not ", list(&side.not_nets));
    add(plural(side.ports.len()), list(&side.ports));
    add("not ports ", list(&side.not_ports));
    parts.join(" and ")
}

const fn plural(count: usize) -> &'static str {
    if count == 1 { "port " } else { "ports " }
}

fn list<T: std::fmt::Display>(items: &[T]) -> String {
    items
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}
