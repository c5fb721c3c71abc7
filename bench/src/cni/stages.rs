//! The stages of calls, as the node's log tells of them (`cali_cni::server::stages`).

use std::collections::HashMap;

use crate::namespace::percentiles;

/// The stages of all calls of this kind in a log, in their order: name and median in milliseconds.
#[must_use]
pub fn medians(log: &str, command: &str) -> Vec<(String, f64)> {
    let mark = format!("command=\"{command}\" stages=");
    let mut order: Vec<String> = Vec::new();
    let mut spent: HashMap<String, Vec<f64>> = HashMap::new();
    let calls = log.lines().filter_map(|line| line.split_once(&mark));
    for (name, took) in calls.flat_map(|(_, stages)| {
        let stages = stages.split_whitespace();
        stages.filter_map(|stage| stage.split_once('='))
    }) {
        let Ok(microseconds) = took.parse::<f64>() else {
            continue;
        };
        if !spent.contains_key(name) {
            order.push(name.to_owned());
        }
        let all = spent.entry(name.to_owned()).or_default();
        all.push(microseconds / 1e3);
    }
    let median = |name: String| {
        let all = spent.remove(&name).unwrap_or_default();
        let [median, _] = percentiles(all);
        (name, median)
    };
    order.into_iter().map(median).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_of_the_calls_that_are_asked_for() {
        let log = "t DEBUG cali_cni::stages: command=\"ADD\" stages=address=100 interface=3000\n\
            t INFO something else\n\
            t DEBUG cali_cni::stages: command=\"DEL\" stages=interface=90000\n\
            t DEBUG cali_cni::stages: command=\"ADD\" stages=address=300 interface=1000\n\
            t DEBUG cali_cni::stages: command=\"ADD\" stages=address=200 interface=2000\n";
        let expected = [("address".to_owned(), 0.2), ("interface".to_owned(), 2.0)];
        assert_eq!(medians(log, "ADD"), expected);
        assert_eq!(medians(log, "CHECK"), []);
    }
}
