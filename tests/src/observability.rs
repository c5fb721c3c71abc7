//! Dashboards and alerts ask only for metrics that there are.

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use crate::lab::repository;
    use crate::sources::{METRICS, files};

    /// What Prometheus adds to the name of a histogram.
    const OF_HISTOGRAMS: [&str; 3] = ["_bucket", "_count", "_sum"];
    /// Folders of packages whose programs serve metrics.
    const SERVING: [&str; 5] = ["node", "felix", "bgpd", "typha", "controllers"];

    fn metrics_in(text: &str) -> BTreeSet<String> {
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        text.split(|c| !word(c))
            .filter(|word| METRICS.iter().any(|prefix| word.starts_with(prefix)))
            .map(|word| {
                let plain = OF_HISTOGRAMS.iter().find_map(|s| word.strip_suffix(s));
                plain.unwrap_or(word).to_owned()
            })
            .collect()
    }

    #[test]
    fn dashboards_and_alerts_ask_for_metrics_that_are_served() {
        let root = repository();
        let served: String = SERVING
            .iter()
            .flat_map(|folder| files(&root.join(folder).join("src"), "rs"))
            .map(|file| std::fs::read_to_string(file).unwrap())
            .collect();
        let mut asking = files(&root.join("deploy/grafana"), "json");
        asking.push(root.join("deploy/prometheus/alerts.yaml"));
        assert_eq!(asking.len(), 4, "{asking:?}");
        for file in asking {
            let text = std::fs::read_to_string(&file).unwrap();
            if file.extension().is_some_and(|e| e == "json") {
                let board: serde_json::Value = serde_json::from_str(&text).unwrap();
                assert!(
                    board["uid"]
                        .as_str()
                        .is_some_and(|uid| uid.starts_with("cali-"))
                );
            }
            let asked = metrics_in(&text);
            assert!(asked.len() > 5, "{}: {asked:?}", file.display());
            for metric in asked {
                assert!(
                    served.contains(&format!("\"{metric}\"")),
                    "{} asks for {metric}, which nothing serves",
                    file.display()
                );
            }
        }
    }
}
