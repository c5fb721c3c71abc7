//! The documentation held against the programs: links, the table of contents, variables and metrics.

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::{Path, PathBuf};

    use crate::lab::repository;
    use crate::sources::{METRICS, files};

    /// Folders of packages whose programs read variables.
    const READING: [&str; 7] = [
        "node",
        "felix",
        "bgpd",
        "typha",
        "controllers",
        "datastore",
        "control",
    ];
    const VARIABLES: [&str; 9] = [
        "FELIX_", "TYPHA_", "CALI_", "CALICO_", "CNI_", "ETCD_", "IP_", "IP6_", "BGP_",
    ];

    fn read(path: &Path) -> String {
        std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// The book's pages and those at the top of the repository.
    fn pages() -> Vec<PathBuf> {
        let root = repository();
        let mut pages = vec![root.join("README.md"), root.join("README.zh-CN.md")];
        pages.extend(files(&root.join("docs"), "md"));
        pages
    }

    /// The lines of a page outside of fenced blocks.
    fn prose(text: &str) -> String {
        let mut fenced = false;
        let mut out = String::new();
        for line in text.lines() {
            if line.trim_start().starts_with("```") {
                fenced = !fenced;
            } else if !fenced {
                out.push_str(line);
                out.push('\n');
            }
        }
        out
    }

    /// The anchor that a heading gets.
    fn anchor(heading: &str) -> String {
        let text = heading.trim_start_matches('#').trim().to_lowercase();
        text.chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
            .map(|c| if c == ' ' { '-' } else { c })
            .collect()
    }

    #[test]
    fn every_link_leads_somewhere() {
        let mut wrong = Vec::new();
        let mut followed = 0;
        for page in pages() {
            let text = prose(&read(&page));
            let ends = text.split("](").skip(1);
            for to in ends.filter_map(|rest| Some(rest.split_once(')')?.0)) {
                if to.contains("://") {
                    continue;
                }
                followed += 1;
                let (path, wanted) = to.split_once('#').unwrap_or((to, ""));
                let target = if path.is_empty() {
                    page.clone()
                } else {
                    page.with_file_name(path)
                };
                let has = |text: String| {
                    let mut headings = text.lines().filter(|line| line.starts_with('#'));
                    headings.any(|line| anchor(line) == wanted)
                };
                if !target.exists() || !wanted.is_empty() && !has(prose(&read(&target))) {
                    wrong.push(format!("{}: {to}", page.display()));
                }
            }
        }
        assert!(followed > 50, "{followed}");
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn the_book_has_every_page_once() {
        let docs = repository().join("docs");
        let summary = read(&docs.join("SUMMARY.md"));
        for page in files(&docs, "md") {
            let name = page.strip_prefix(&docs).unwrap().display().to_string();
            let times = summary.matches(&format!("]({name})")).count();
            let wanted = usize::from(name != "SUMMARY.md");
            assert_eq!(times, wanted, "{name} in SUMMARY.md");
        }
    }

    /// Words that begin with one of these, exactly between two marks.
    fn between(text: &str, mark: char, beginnings: &[&str]) -> BTreeSet<String> {
        let is_name = |piece: &&str| {
            let rest = beginnings.iter().find_map(|b| piece.strip_prefix(b));
            rest.is_some_and(|rest| !rest.is_empty())
                && piece.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        };
        text.split(mark)
            .filter(is_name)
            .map(str::to_owned)
            .collect()
    }

    /// What stands between quotes in the code of these packages, their tests left out.
    fn quoted(folders: &[&str], only: Option<&str>, beginnings: &[&str]) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for folder in folders {
            let sources = files(&repository().join(folder).join("src"), "rs");
            for source in sources
                .iter()
                .filter(|s| only.is_none_or(|o| s.ends_with(o)))
            {
                let text = read(source);
                let code = text.split("#[cfg(test)]").next().unwrap_or_default();
                found.extend(between(code, '"', beginnings));
            }
        }
        found
    }

    #[test]
    fn every_variable_that_a_program_reads_is_described_and_no_other() {
        let programs = quoted(&READING, None, &VARIABLES);
        assert!(programs.len() > 80, "{programs:?}");
        let page = read(&repository().join("docs/settings.md"));
        let described = between(&page, '`', &VARIABLES);
        let missing: Vec<_> = programs.difference(&described).collect();
        assert!(missing.is_empty(), "docs/settings.md misses {missing:?}");
        let unread: Vec<_> = described.difference(&programs).collect();
        assert!(unread.is_empty(), "nothing reads {unread:?}");
    }

    #[test]
    fn every_metric_that_is_served_is_described_and_no_other() {
        let served = quoted(&READING, Some("metrics.rs"), &METRICS);
        assert!(served.len() > 30, "{served:?}");
        let mut described = BTreeSet::new();
        for page in ["metrics-node.md", "metrics-bgp.md", "metrics-typha.md"] {
            let text = read(&repository().join("docs").join(page));
            described.extend(between(&text, '`', &METRICS));
        }
        assert_eq!(served, described);
    }
}
