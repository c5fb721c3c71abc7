//! Which crate may use which: the arrows of `docs/architecture.md`, compared with what cargo says.

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use std::collections::BTreeSet;
    use std::process::Command;

    /// Package, and the packages of this workspace that it may use (besides those that these use).
    const ARROWS: &[(&str, &[&str])] = &[
        ("cali-api", &[]),
        ("cali-netlink", &[]),
        ("cali-datastore", &["cali-api"]),
        ("cali-control", &["cali-api"]),
        ("cali-telemetry", &[]),
        ("cali-ipam", &["cali-api", "cali-datastore"]),
        ("typha", &["cali-api", "cali-datastore", "cali-telemetry"]),
        ("ipip-vxlan", &["cali-api", "cali-netlink"]),
        ("cali-routes", &["cali-api", "cali-netlink", "ipip-vxlan"]),
        (
            "felix",
            &[
                "cali-api",
                "typha",
                "cali-control",
                "cali-telemetry",
                "cali-netlink",
                "cali-routes",
                "ipip-vxlan",
            ],
        ),
        (
            "bgpd",
            &[
                "cali-api",
                "typha",
                "cali-control",
                "cali-telemetry",
                "cali-netlink",
                "cali-routes",
            ],
        ),
        (
            "cali-cni",
            &[
                "cali-api",
                "cali-control",
                "cali-datastore",
                "cali-ipam",
                "cali-netlink",
            ],
        ),
        (
            "cali-controllers",
            &["cali-api", "cali-datastore", "cali-ipam", "cali-telemetry"],
        ),
        ("cali-lab", &["cali-netlink"]),
    ];
    /// Packages at the top, which may use everything below them.
    const TOP: &[&str] = &[
        "cali-node",
        "cali-controllers",
        "calictl",
        "cali-image",
        "cali-tests",
        "cali-bench",
    ];

    #[test]
    fn crates_use_only_what_lies_below_them() {
        let output = Command::new(env!("CARGO"))
            .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .unwrap();
        let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
        let packages = metadata["packages"].as_array().unwrap();
        let names: BTreeSet<&str> = packages
            .iter()
            .map(|package| package["name"].as_str().unwrap())
            .collect();
        let mut wrong = Vec::new();
        for package in packages {
            let name = package["name"].as_str().unwrap();
            let used = package["dependencies"].as_array().unwrap();
            // Tests may use more; what is built and shipped may not.
            let used = used
                .iter()
                .filter(|dependency| dependency["kind"].is_null())
                .map(|dependency| dependency["name"].as_str().unwrap());
            let allowed = ARROWS
                .iter()
                .find(|(package, _)| *package == name)
                .map(|(_, allowed)| *allowed);
            for other in used.filter(|other| names.contains(other)) {
                let fine = match allowed {
                    Some(allowed) => allowed.contains(&other),
                    None => TOP.contains(&name) && !["cali-tests", "cali-bench"].contains(&other),
                };
                if !fine {
                    wrong.push(format!("{name} -> {other}"));
                }
            }
        }
        assert!(
            wrong.is_empty(),
            "arrows that docs/architecture.md does not have: {wrong:?}"
        );
    }
}
