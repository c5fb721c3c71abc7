//! The topologies of `deploy/containerlab` are such as containerlab takes: they keep to the schema that it publishes. Helm checks a file of
//! values against a chart's schema, whatever that is about.

use std::path::Path;
use std::process::{Command, Output};

use cali_tests::lab::{found_by, repository};

fn checked(helm: &Path, chart: &Path, topology: &Path) -> Output {
    let mut command = Command::new(helm);
    command
        .args(["template", "topology"])
        .arg(chart)
        .arg("--values")
        .arg(topology);
    command.output().expect("helm")
}

#[test]
fn topologies_keep_to_containerlabs_schema() {
    let (helm, schema) = (found_by("helm"), found_by("containerlab"));
    let chart = tempfile::tempdir().expect("a folder");
    let write =
        |name: &str, text: &[u8]| std::fs::write(chart.path().join(name), text).expect("a file");
    write(
        "Chart.yaml",
        b"{apiVersion: v2, name: topology, version: 0.0.0}",
    );
    write(
        "values.schema.json",
        &std::fs::read(schema).expect("the schema"),
    );
    let folder = repository().join("deploy/containerlab");
    let files = std::fs::read_dir(folder).expect("the folder");
    let paths = files.map(|file| file.expect("a file").path());
    let topologies: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|it| it == "yml"))
        .collect();
    assert!(topologies.len() >= 6, "{topologies:?}");
    for topology in &topologies {
        let seen = checked(&helm, chart.path(), topology);
        let errors = String::from_utf8_lossy(&seen.stderr);
        assert!(seen.status.success(), "{}: {errors}", topology.display());
    }
    // The schema has a say.
    let text = std::fs::read_to_string(&topologies[0]).expect("a topology");
    write(
        "bad.yml",
        text.replacen("kind: linux", "kind: nothing", 1).as_bytes(),
    );
    let seen = checked(&helm, chart.path(), &chart.path().join("bad.yml"));
    let errors = String::from_utf8_lossy(&seen.stderr);
    assert!(
        !seen.status.success() && errors.contains("/kind"),
        "{errors}"
    );
}
