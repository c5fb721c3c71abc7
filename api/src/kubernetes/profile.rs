//! Namespaces and service accounts become profiles.

use super::{
    LABEL_NAME, NAMESPACE_LABEL_PREFIX, NAMESPACE_PROFILE_PREFIX, Namespace,
    SERVICE_ACCOUNT_LABEL_PREFIX, SERVICE_ACCOUNT_PROFILE_PREFIX, ServiceAccount, derived_metadata,
};
use crate::v3::{Action, Profile, ProfileSpec, Rule};
use crate::{ObjectMeta, Resource, StringMap};

/// Name of the built-in profile of automatic host endpoints.
pub const DEFAULT_ALLOW_PROFILE: &str = "projectcalico-default-allow";

fn passed_on(metadata: &ObjectMeta, prefix: &str) -> StringMap {
    let mut labels: StringMap = metadata
        .labels
        .iter()
        .map(|(label, value)| (format!("{prefix}{label}"), value.clone()))
        .collect();
    labels.insert(format!("{prefix}{LABEL_NAME}"), metadata.name.clone());
    labels
}

/// The profile of a namespace's endpoints: without any policy, everything is allowed.
#[must_use]
pub fn namespace_profile(namespace: &Namespace) -> Profile {
    let name = format!("{NAMESPACE_PROFILE_PREFIX}{}", namespace.metadata.name);
    Resource::new(
        derived_metadata(&namespace.metadata, name),
        ProfileSpec {
            ingress: vec![Rule::new(Action::Allow)],
            egress: vec![Rule::new(Action::Allow)],
            labels_to_apply: passed_on(&namespace.metadata, NAMESPACE_LABEL_PREFIX),
        },
    )
}

/// The profile of a service account's endpoints: labels only.
#[must_use]
pub fn service_account_profile(account: &ServiceAccount) -> Profile {
    let metadata = &account.metadata;
    let namespace = metadata.namespace.as_deref().unwrap_or_default();
    let name = format!(
        "{SERVICE_ACCOUNT_PROFILE_PREFIX}{namespace}.{}",
        metadata.name
    );
    Resource::new(
        derived_metadata(metadata, name),
        ProfileSpec {
            labels_to_apply: passed_on(metadata, SERVICE_ACCOUNT_LABEL_PREFIX),
            ..ProfileSpec::default()
        },
    )
}

/// The built-in profile of automatic host endpoints, which every datastore has.
#[must_use]
pub fn default_allow_profile() -> Profile {
    Resource::named(
        DEFAULT_ALLOW_PROFILE,
        ProfileSpec {
            ingress: vec![Rule::new(Action::Allow)],
            egress: vec![Rule::new(Action::Allow)],
            ..ProfileSpec::default()
        },
    )
}
