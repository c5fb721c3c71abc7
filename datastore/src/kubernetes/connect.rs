//! Where the API server is: a kubeconfig, Calico's `K8S_*` variables, or the pod that we run in.

use std::path::PathBuf;
use std::time::Duration;

use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::retry::RetryPolicy;
use kube::client::{Body, ConfigExt};
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tower::retry::RetryLayer;
use tower::{BoxError, ServiceBuilder};

use super::places::Group;
use crate::error::{Cause, Error};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// An idle connection is probed after this time, and the answer may take this long. Nothing else tells that the way to the
/// server is gone: on a watch only the server speaks.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(10));

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
    /// After which time of silence the kernel probes a connection, and how long the answer may take, in whole seconds;
    /// without: 15 s and 10 s.
    pub probes: Option<(Duration, Duration)>,
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
            probes: None,
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
        let config = self.config().await?;
        self.client(config)
            .map_err(|error| Error::unavailable("set up the connection to the API server", error))
    }

    /// As `Client::try_from`, with connections that are probed, and without its log line of level error for each failed
    /// call: callers know whether they try again.
    fn client(&self, config: Config) -> Result<Client, kube::Error> {
        if config.proxy_url.is_some() {
            return Client::try_from(config);
        }
        let (every, limit) = self.probes.unwrap_or(KEEP_ALIVE);
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        tcp.set_keepalive(Some(every));
        tcp.set_keepalive_interval(Some(limit));
        // With this option, tcp(7) ends a connection whose probe was not answered in time, however many are left.
        tcp.set_tcp_user_timeout(Some(every + limit));
        let connector = config.rustls_https_connector_with_connector(tcp)?;
        let http = HttpClient::builder(TokioExecutor::new()).build::<_, Body>(connector);
        let retries = config.default_retry.then(RetryPolicy::server_retry);
        let service = ServiceBuilder::new()
            .layer(config.base_uri_layer())
            .option_layer(retries.map(RetryLayer::new))
            .option_layer(config.auth_layer()?)
            .layer(config.extra_headers_layer()?)
            .map_err(BoxError::from)
            .service(http);
        Ok(Client::new(service, config.default_namespace))
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
