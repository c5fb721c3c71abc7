//! The objects that every cluster has. Pure: [`default_objects`] says which; the start creates what is missing.

use cali_api::AnyResource;
use cali_api::v3::{
    BGPConfiguration, BGPConfigurationSpec, ClusterInformation, ClusterInformationSpec,
    FelixConfiguration, FelixConfigurationSpec, IPAMConfiguration, IPAMConfigurationSpec, Order,
    Tier, TierAction, TierSpec,
};

use super::settings::Settings;

/// The objects with Calico's names and values. `guid` becomes the identity of a new cluster.
pub fn default_objects(settings: &Settings, guid: String) -> Vec<AnyResource> {
    let tier = |name: &str, order: f64, end: TierAction| {
        let spec = TierSpec {
            order: Some(Order(order)),
            default_action: Some(end),
        };
        AnyResource::from(Tier::named(name, spec))
    };
    vec![
        ClusterInformation::named(
            "default",
            ClusterInformationSpec {
                cluster_guid: guid,
                cluster_type: settings.cluster_type.clone(),
                calico_version: env!("CARGO_PKG_VERSION").to_owned(),
                datastore_ready: Some(true),
                ..Default::default()
            },
        )
        .into(),
        FelixConfiguration::named("default", FelixConfigurationSpec::default()).into(),
        BGPConfiguration::named("default", BGPConfigurationSpec::default()).into(),
        IPAMConfiguration::named(
            "default",
            IPAMConfigurationSpec {
                auto_allocate_blocks: Some(true),
                ..Default::default()
            },
        )
        .into(),
        tier("default", 1_000_000.0, TierAction::Deny),
        tier("kube-admin", 1_000.0, TierAction::Pass),
        tier("kube-baseline", 10_000_000.0, TierAction::Pass),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::startup::settings::HostNames;

    #[test]
    fn every_default_object_can_be_written_and_read_back() {
        let names = HostNames {
            remembered: None,
            hostname: "h".into(),
        };
        let settings =
            Settings::read(&Default::default(), &names, std::path::Path::new("/s")).unwrap();
        for object in default_objects(&settings, "0123".into()) {
            assert_eq!(
                AnyResource::from_json(object.to_json()).as_ref(),
                Ok(&object)
            );
        }
    }
}
