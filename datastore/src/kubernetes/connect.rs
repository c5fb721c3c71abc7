//! Where the API server is: a kubeconfig, Calico's `K8S_*` variables, or the pod that we run in.

use std::path::PathBuf;
use std::time::Duration;

use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use super::places::Group;
use crate::error::{Cause, Error};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How to reach the API server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// A kubeconfig file, or several that are read as one, as in `PATH`.
    pub kubeconfig: Option<PathBuf>,
    /// The text of a kubeconfig, instead of a file.
    pub kubeconfig_inline: Option<String>,
    /// The context of the kubeconfig; its current one if absent.
    pub context: Option<String>,
    /// The API server's URL, where there is no kubeconfig.
    pub endpoint: Option<String>,
    /// PEM file of the authorities that sign its certificate.
    pub ca: Option<PathBuf>,
    /// PEM files of our certificate and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// File of a bearer token; read anew every minute.
    pub token_file: Option<PathBuf>,
    /// A bearer token.
    pub token: Option<String>,
    /// Whether to accept any certificate.
    pub insecure: bool,
    /// `crd.projectcalico.org/v1` or `projectcalico.org/v3`; whichever is served if absent.
    pub group: Option<String>,
}

impl Settings {
    /// Reads `KUBECONFIG` and its companions from the environment.
    pub fn from_env() -> Result<Self, Error> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// As [`Settings::from_env`], from any source of variables.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let text = |name: &str| variable(name).filter(|text| !text.trim().is_empty());
        let path = |name: &str| text(name).map(PathBuf::from);
        let settings = Self {
            kubeconfig: path("KUBECONFIG"),
            kubeconfig_inline: text("K8S_KUBECONFIG_INLINE"),
            context: text("K8S_CURRENT_CONTEXT"),
            endpoint: text("K8S_API_ENDPOINT"),
            ca: path("K8S_CA_FILE"),
            certificate: path("K8S_CERT_FILE").zip(path("K8S_KEY_FILE")),
            token_file: path("K8S_TOKEN_FILE"),
            token: text("K8S_API_TOKEN"),
            insecure: text("K8S_INSECURE_SKIP_TLS_VERIFY").is_some_and(|on| on == "true"),
            group: text("CALICO_API_GROUP"),
        };
        let in_cluster = text("KUBERNETES_SERVICE_HOST").is_some();
        let has_kubeconfig = settings.kubeconfig.is_some() || settings.kubeconfig_inline.is_some();
        if !has_kubeconfig && settings.endpoint.is_none() && !in_cluster {
            return Err(Error::Configuration {
                variable: "KUBECONFIG",
                reason: "must name a kubeconfig file (or set K8S_API_ENDPOINT); this is not a pod of a cluster".to_owned(),
            });
        }
        Ok(settings)
    }

    async fn config(&self) -> Result<Config, Error> {
        let failed = |what: String, cause: Cause| Error::unavailable(what, cause);
        if let Some((kubeconfig, what)) = self.kubeconfig()? {
            let options = KubeConfigOptions {
                context: self.context.clone(),
                ..KubeConfigOptions::default()
            };
            return Config::from_custom_kubeconfig(kubeconfig, &options)
                .await
                .map_err(|e| failed(what, e.into()));
        }
        let Some(endpoint) = &self.endpoint else {
            return Config::incluster()
                .map_err(|e| failed("read the pod's service account".to_owned(), e.into()));
        };
        let url = endpoint.parse().map_err(|error| Error::Configuration {
            variable: "K8S_API_ENDPOINT",
            reason: format!("{endpoint:?} is no URL: {error}"),
        })?;
        let mut config = Config::new(url);
        config.root_cert_file.clone_from(&self.ca);
        config.accept_invalid_certs = self.insecure;
        let name = |path: &PathBuf| Some(path.display().to_string());
        if let Some((certificate, key)) = &self.certificate {
            config.auth_info.client_certificate = name(certificate);
            config.auth_info.client_key = name(key);
        }
        config.auth_info.token_file = self.token_file.as_ref().and_then(name);
        if let Some(token) = &self.token {
            let auth: AuthInfo = serde_json::from_value(serde_json::json!({"token": token}))
                .map_err(|e| failed("take the token".to_owned(), e.into()))?;
            config.auth_info.token = auth.token;
        }
        Ok(config)
    }

    /// The kubeconfig, and in which words its faults are told.
    fn kubeconfig(&self) -> Result<Option<(Kubeconfig, String)>, Error> {
        let failed = |what: &str, cause: Cause| Error::unavailable(what, cause);
        if let Some(text) = &self.kubeconfig_inline {
            let what = "read the kubeconfig that the configuration contains".to_owned();
            let read = Kubeconfig::from_yaml(text).map_err(|e| failed(&what, e.into()))?;
            return Ok(Some((read, what)));
        }
        let Some(files) = &self.kubeconfig else {
            return Ok(None);
        };
        let what = format!("read the kubeconfig {}", files.display());
        let mut whole: Option<Kubeconfig> = None;
        for file in std::env::split_paths(files).filter(|file| !file.as_os_str().is_empty()) {
            let read = Kubeconfig::read_from(file).map_err(|e| failed(&what, e.into()))?;
            whole = Some(match whole {
                None => read,
                Some(before) => before.merge(read).map_err(|e| failed(&what, e.into()))?,
            });
        }
        Ok(whole.map(|whole| (whole, what)))
    }

    /// A client of the cluster, for what this crate does not do: logs, versions, tables.
    ///
    /// # Errors
    /// If the settings name nothing that can be read. The API server is not asked yet.
    pub async fn connect(&self) -> Result<Client, Error> {
        let mut config = self.config().await?;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        Client::try_from(config)
            .map_err(|error| Error::unavailable("set up the connection to the API server", error))
    }

    /// The group that serves Calico's kinds; `None` if the cluster serves none.
    pub(super) async fn discover(&self, client: &Client) -> Result<Option<Group>, kube::Error> {
        let groups = client.list_api_groups().await?;
        let served = |name: &str, version: &str| {
            groups.groups.iter().any(|group| {
                group.name == name && group.versions.iter().any(|v| v.version == version)
            })
        };
        Ok(Group::choose(self.group.as_deref(), served))
    }
}
