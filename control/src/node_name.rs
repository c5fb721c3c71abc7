//! By which name this node goes, for every program that has to know it.

/// Chooses as Calico does: what `NODENAME` says, the name that was remembered at the first start, what `HOSTNAME` says,
/// the host's own name; the last two in lower case, as Kubernetes names its nodes. `None` if all of them are empty.
#[must_use]
pub fn node_name(
    nodename: Option<&str>,
    remembered: Option<&str>,
    hostname: Option<&str>,
    host: Option<&str>,
) -> Option<String> {
    let known = |name: Option<&str>| {
        let name = name.unwrap_or_default().trim();
        Some(name.to_owned()).filter(|name| !name.is_empty())
    };
    known(nodename)
        .or_else(|| known(remembered))
        .or_else(|| Some(known(hostname)?.to_lowercase()))
        .or_else(|| Some(known(host)?.to_lowercase()))
}

#[cfg(test)]
mod tests {
    use super::node_name;

    #[test]
    fn the_first_that_says_something_counts() {
        let name = |nodename, remembered, hostname, host| {
            node_name(Some(nodename), Some(remembered), Some(hostname), Some(host))
        };
        assert_eq!(name("A", "b\n", "C", "D").as_deref(), Some("A"));
        assert_eq!(name("", "b\n", "C", "D").as_deref(), Some("b"));
        assert_eq!(name("", " ", "C", "D").as_deref(), Some("c"));
        assert_eq!(name("", "", "", "D\n").as_deref(), Some("d"));
        assert_eq!(name("", "", "", ""), None);
        assert_eq!(node_name(None, None, None, None), None);
    }
}
