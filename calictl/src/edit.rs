//! `calictl label` and `calictl patch`: small changes of one stored resource.

use crate::change::change_stored;
use crate::resources::{Kinds, key, parse_kind};
use crate::{connection, output};
use anyhow::{Context, Result, bail};
use cali_api::AnyResource;
use clap::{Args, ValueEnum};
use serde_json::Value;

#[derive(Debug, Args)]
pub(crate) struct Label {
    /// Kind: `node`, `ippool`, `hep`, ...
    #[arg(value_parser = Kinds, hide_possible_values = true)]
    kind: String,
    /// Name of the resource
    name: String,
    /// `key=value`, or `key` with --remove
    label: String,
    /// Replace the value that the label has
    #[arg(long, conflicts_with = "remove")]
    overwrite: bool,
    /// Take the label away
    #[arg(long)]
    remove: bool,
    /// Namespace of namespaced kinds; `default` without
    #[arg(short, long)]
    namespace: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Patch {
    /// Kind: `node`, `ippool`, `hep`, ...
    #[arg(value_parser = Kinds, hide_possible_values = true)]
    kind: String,
    /// Name of the resource
    name: String,
    /// The patch, in JSON or YAML
    #[arg(short, long)]
    patch: String,
    /// How it is meant; `strategic` is `merge` for these kinds, as none of them has a strategy
    #[arg(short = 't', long = "type", value_enum, default_value_t = PatchType::Strategic)]
    kind_of_patch: PatchType,
    /// Namespace of namespaced kinds; `default` without
    #[arg(short, long)]
    namespace: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PatchType {
    Strategic,
    /// RFC 7386
    Merge,
    /// RFC 6902
    Json,
}

pub(crate) async fn label(label: &Label) -> Result<()> {
    let key = key(
        parse_kind(&label.kind)?,
        label.namespace.as_deref(),
        &label.name,
    );
    let (name, value) = match (label.label.split_once('='), label.remove) {
        (None, true) => (label.label.as_str(), None),
        (Some((name, value)), false) => (name, Some(value)),
        (None, false) => bail!(
            "{:?} is no label: it is KEY=VALUE, or KEY with --remove",
            label.label
        ),
        (Some(_), true) => bail!("--remove takes the key only: {:?}", label.label),
    };
    if name.is_empty() {
        bail!("{:?} has no key", label.label);
    }
    let store = connection::open().await?;
    let mut done = "";
    let object = format!("{} {}", key.kind, key.name);
    change_stored(store.as_ref(), &key, |stored| {
        let mut labelled = stored.clone();
        let labels = &mut labelled.metadata_mut().labels;
        match value {
            None => {
                labels
                    .remove(name)
                    .with_context(|| format!("failed to remove label {name} from {object}: it has no such label"))?;
                done = "removed";
            }
            Some(value) => match labels.insert(name.to_owned(), value.into()) {
                None => done = "set",
                Some(before) if *before == *value => done = "set",
                Some(_) if label.overwrite => done = "updated",
                Some(before) => bail!(
                    "failed to update label {name} on {object}: it is {before:?} already; --overwrite replaces it"
                ),
            },
        }
        Ok(labelled)
    })
    .await?;
    let on = if done == "removed" { "from" } else { "on" };
    output::line(format!("Successfully {done} label {name} {on} {object}"));
    Ok(())
}

pub(crate) async fn patch(patch: &Patch) -> Result<()> {
    let key = key(
        parse_kind(&patch.kind)?,
        patch.namespace.as_deref(),
        &patch.name,
    );
    let value: Value =
        serde_saphyr::from_str(&patch.patch).context("the patch is neither JSON nor YAML")?;
    let store = connection::open().await?;
    change_stored(store.as_ref(), &key, |stored| {
        let mut object = stored.to_json();
        apply(&mut object, &value, patch.kind_of_patch)?;
        let patched = AnyResource::from_json(object).context("the patched resource is not one")?;
        if patched.key() != key {
            bail!("a patch cannot make {key} to {}", patched.key());
        }
        Ok(patched)
    })
    .await
    .with_context(|| format!("Failed to patch '{}' resource", key.kind))?;
    output::line(format!("Successfully patched 1 '{}' resource", key.kind));
    Ok(())
}

fn apply(object: &mut Value, patch: &Value, how: PatchType) -> Result<()> {
    match how {
        PatchType::Strategic | PatchType::Merge => {
            if !patch.is_object() {
                bail!("the patch is no object: {patch}");
            }
            json_patch::merge(object, patch);
        }
        PatchType::Json => {
            let steps: json_patch::Patch = serde_json::from_value(patch.clone())
                .context("a JSON patch is a list of operations (RFC 6902)")?;
            json_patch::patch(object, &steps).context("the patch does not fit")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn patches_merge_or_follow_operations() {
        let before = json!({"spec": {"a": 1, "list": [1, 2], "gone": true}});
        let mut object = before.clone();
        let patch = json!({"spec": {"a": 2, "list": [3], "gone": null}});
        apply(&mut object, &patch, PatchType::Strategic).expect("a merge patch");
        assert_eq!(object, json!({"spec": {"a": 2, "list": [3]}}));
        let mut object = before.clone();
        let patch = json!([{"op": "replace", "path": "/spec/a", "value": 5}, {"op": "remove", "path": "/spec/gone"}]);
        apply(&mut object, &patch, PatchType::Json).expect("a JSON patch");
        assert_eq!(object, json!({"spec": {"a": 5, "list": [1, 2]}}));
        for (patch, how) in [
            (json!("x"), PatchType::Merge),
            (json!({"op": "x"}), PatchType::Json),
            (
                json!([{"op": "remove", "path": "/nothing"}]),
                PatchType::Json,
            ),
        ] {
            assert!(apply(&mut before.clone(), &patch, how).is_err(), "{patch}");
        }
    }
}
