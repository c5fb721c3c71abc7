//! Configuration from the environment, with Calico's names: `TYPHA_*` for the server, `FELIX_TYPHA*` for clients.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::server::{DEFAULT_PORT, Rebalancing, ServerConfig};
use crate::tls::{PeerName, TlsSettings};

/// Calico's namespace where nothing else is said.
const NAMESPACE: &str = "kube-system";

/// A setting that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{variable}={value:?}: {reason}")]
pub struct ConfigError {
    /// Name in the environment.
    pub variable: &'static str,
    /// What it holds.
    pub value: String,
    /// What is wrong with it.
    pub reason: String,
}

/// The environment, as a value, so that reading it can be tested.
#[derive(Debug, Clone, Default)]
pub struct Env(HashMap<String, String>);

impl Env {
    /// The process' environment. Values that are not UTF-8 are left out.
    pub fn of_process() -> Self {
        Self(
            std::env::vars_os()
                .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
                .collect(),
        )
    }

    /// The trimmed value; `None` when unset or empty.
    pub fn get(&self, variable: &'static str) -> Option<&str> {
        self.0
            .get(variable)
            .map(|value| value.trim())
            .filter(|value| !value.is_empty())
    }

    /// The value as a `T`, or the default when unset or empty.
    pub fn parse<T>(&self, variable: &'static str, default: T) -> Result<T, ConfigError>
    where
        T: std::str::FromStr<Err: std::fmt::Display>,
    {
        self.get(variable).map_or(Ok(default), |value| {
            value.parse().map_err(|e: T::Err| ConfigError {
                variable,
                value: value.to_owned(),
                reason: e.to_string(),
            })
        })
    }

    fn seconds(&self, variable: &'static str, default: Duration) -> Result<Duration, ConfigError> {
        let seconds: f64 = self.parse(variable, default.as_secs_f64())?;
        Duration::try_from_secs_f64(seconds)
            .ok()
            .filter(|d| !d.is_zero())
            .ok_or_else(|| ConfigError {
                variable,
                value: seconds.to_string(),
                reason: "must be a positive number of seconds".into(),
            })
    }

    /// Where to serve something over HTTP: an address when `switch` is true, made of a host and a port with their defaults.
    pub fn serving(
        &self,
        switch: &'static str,
        (host_variable, host): (&'static str, IpAddr),
        (port_variable, port): (&'static str, u16),
    ) -> Result<Option<SocketAddr>, ConfigError> {
        let on = self.get(switch).map(str::to_lowercase);
        match on.as_deref() {
            Some("true" | "1" | "yes") => {}
            None | Some("false" | "0" | "no") => return Ok(None),
            Some(other) => {
                return Err(ConfigError {
                    variable: switch,
                    value: other.to_owned(),
                    reason: "must be true or false".to_owned(),
                });
            }
        }
        let host = match self.get(host_variable) {
            Some("localhost") => IpAddr::V4(Ipv4Addr::LOCALHOST),
            _ => self.parse(host_variable, host)?,
        };
        let port = self.parse(port_variable, port)?;
        Ok(Some(SocketAddr::new(host, port)))
    }

    /// TLS settings from the variables for authorities, certificate, key, common name and URI. All or none, as in Calico; of the
    /// names one suffices.
    fn tls(&self, variables: [&'static str; 5]) -> Result<Option<TlsSettings>, ConfigError> {
        let values = variables.map(|variable| self.get(variable));
        let Some(given) = values.iter().position(Option::is_some) else {
            return Ok(None);
        };
        let missing = |variable| ConfigError {
            variable,
            value: String::new(),
            reason: format!(
                "{} is set, so this must be set too (or none of them, for plain TCP)",
                variables[given]
            ),
        };
        let file = |at: usize| {
            values[at]
                .map(PathBuf::from)
                .ok_or_else(|| missing(variables[at]))
        };
        let settings = TlsSettings {
            ca: file(0)?,
            certificate: file(1)?,
            key: file(2)?,
            peer: PeerName {
                cn: values[3].map(str::to_owned),
                uri_san: values[4].map(str::to_owned),
            },
        };
        if settings.peer == PeerName::default() {
            return Err(ConfigError {
                variable: variables[3],
                value: String::new(),
                reason: format!(
                    "with TLS this or {} must name who may be at the other end",
                    variables[4]
                ),
            });
        }
        Ok(Some(settings))
    }
}

impl<K: Into<String>, V: Into<String>> FromIterator<(K, V)> for Env {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Self {
        Self(
            pairs
                .into_iter()
                .map(|(k, v)| (k.into(), v.into()))
                .collect(),
        )
    }
}

/// The server's configuration.
pub fn server(env: &Env) -> Result<ServerConfig, ConfigError> {
    let mut config = ServerConfig {
        tls: env.tls([
            "TYPHA_CAFILE",
            "TYPHA_SERVERCERTFILE",
            "TYPHA_SERVERKEYFILE",
            "TYPHA_CLIENTCN",
            "TYPHA_CLIENTURISAN",
        ])?,
        ..ServerConfig::default()
    };
    // Calico writes 0 for "the default port".
    let port = match env.parse("TYPHA_SERVERPORT", 0)? {
        0 => DEFAULT_PORT,
        port => port,
    };
    config.listen = SocketAddr::new(env.parse("TYPHA_SERVERHOST", config.listen.ip())?, port);
    config.max_connections = env.parse("TYPHA_MAXCONNECTIONSUPPERLIMIT", config.max_connections)?;
    config.patience.handshake = env.seconds(
        "TYPHA_SERVERHANDSHAKETIMEOUTSECS",
        config.patience.handshake,
    )?;
    config.patience.ping = env.seconds("TYPHA_SERVERPINGINTERVALSECS", config.patience.ping)?;
    config.patience.progress =
        env.seconds("TYPHA_SERVERPONGTIMEOUTSECS", config.patience.progress)?;
    config.rebalancing = rebalancing(env)?;
    config.drop_interval = env.seconds("TYPHA_CONNECTIONDROPINTERVALSECS", config.drop_interval)?;
    config.leave.limit = env.seconds("TYPHA_SHUTDOWNTIMEOUTSECS", config.leave.limit)?;
    config.leave.interval = env.seconds(
        "TYPHA_SHUTDOWNCONNECTIONDROPINTERVALMAXSECS",
        config.leave.interval,
    )?;
    config.limits.backlog_bytes = env.parse("TYPHA_BACKLOGBYTES", config.limits.backlog_bytes)?;
    Ok(config)
}

/// Where health and where metrics are served.
pub fn telemetry(env: &Env) -> Result<[Option<SocketAddr>; 2], ConfigError> {
    Ok([
        env.serving(
            "TYPHA_HEALTHENABLED",
            ("TYPHA_HEALTHHOST", IpAddr::V4(Ipv4Addr::LOCALHOST)),
            ("TYPHA_HEALTHPORT", 9098),
        )?,
        env.serving(
            "TYPHA_PROMETHEUSMETRICSENABLED",
            (
                "TYPHA_PROMETHEUSMETRICSHOST",
                IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            ),
            ("TYPHA_PROMETHEUSMETRICSPORT", 9093),
        )?,
    ])
}

/// The lowest severity that is logged, from Calico's name for it (`Warning`, `Fatal`).
pub fn log_level(calico: &str) -> &'static str {
    match calico.to_lowercase().as_str() {
        "trace" => "trace",
        "debug" => "debug",
        "warning" | "warn" => "warn",
        "error" | "fatal" | "panic" => "error",
        "none" | "off" => "off",
        _ => "info",
    }
}

/// The servers that a client is to use, as `host:port`; empty when it is to read the datastore itself.
pub fn server_addresses(env: &Env) -> Result<Vec<String>, ConfigError> {
    const VARIABLE: &str = "FELIX_TYPHAADDR";
    let Some(list) = env.get(VARIABLE) else {
        return Ok(Vec::new());
    };
    list.split(',')
        .map(str::trim)
        .filter(|address| !address.is_empty())
        .map(|address| {
            with_port(address).ok_or_else(|| ConfigError {
                variable: VARIABLE,
                value: address.to_owned(),
                reason: "expected host:port, e.g. 10.0.0.1:5473 or [fd00::1]:5473".into(),
            })
        })
        .collect()
}

/// TLS settings of a client.
pub fn client_tls(env: &Env) -> Result<Option<TlsSettings>, ConfigError> {
    env.tls([
        "FELIX_TYPHACAFILE",
        "FELIX_TYPHACERTFILE",
        "FELIX_TYPHAKEYFILE",
        "FELIX_TYPHACN",
        "FELIX_TYPHAURISAN",
    ])
}

/// Whether a node asks for a part of the workload endpoints (`CALI_TYPHA_INTEREST`: `node`, the default, or `cluster`).
pub fn is_scoped(env: &Env) -> Result<bool, ConfigError> {
    const VARIABLE: &str = "CALI_TYPHA_INTEREST";
    match env.get(VARIABLE) {
        None | Some("node") => Ok(true),
        Some("cluster") => Ok(false),
        Some(other) => Err(ConfigError {
            variable: VARIABLE,
            value: other.to_owned(),
            reason: "must be node or cluster".to_owned(),
        }),
    }
}

/// The service behind which the servers are: namespace and name.
pub fn server_service(env: &Env) -> Option<(String, String)> {
    let name = env.get("FELIX_TYPHAK8SSERVICENAME")?;
    let namespace = env.get("FELIX_TYPHAK8SNAMESPACE").unwrap_or(NAMESPACE);
    Some((namespace.to_owned(), name.to_owned()))
}

/// `address:port`, with brackets where they are needed.
pub(crate) fn socket_address(address: &str, port: u16) -> String {
    match address.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, port).to_string(),
        Err(_) => format!("{address}:{port}"),
    }
}

/// Calico's `ConnectionRebalancingMode`: `none`, or `kubernetes` with the service of this server.
fn rebalancing(env: &Env) -> Result<Option<Rebalancing>, ConfigError> {
    const MODE: &str = "TYPHA_CONNECTIONREBALANCINGMODE";
    match env.get(MODE).map(str::to_lowercase).as_deref() {
        None | Some("none") => Ok(None),
        Some("kubernetes") => Ok(Some(Rebalancing {
            namespace: env.get("TYPHA_K8SNAMESPACE").unwrap_or(NAMESPACE).into(),
            service: env
                .get("TYPHA_K8SSERVICENAME")
                .unwrap_or("calico-typha")
                .into(),
            lower: env.parse("TYPHA_MAXCONNECTIONSLOWERLIMIT", 400)?,
        })),
        Some(other) => Err(ConfigError {
            variable: MODE,
            value: other.to_owned(),
            reason: "must be none or kubernetes".to_owned(),
        }),
    }
}

fn with_port(address: &str) -> Option<String> {
    if let Ok(ip) = address.parse::<IpAddr>() {
        return Some(SocketAddr::new(ip, DEFAULT_PORT).to_string());
    }
    match address.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
            Some(address.to_owned())
        }
        Some(_) => None,
        None => Some(format!("{address}:{DEFAULT_PORT}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_calicos() {
        let config = server(&Env::default()).unwrap();
        assert_eq!(config.listen, "0.0.0.0:5473".parse().unwrap());
        assert_eq!(config.patience.progress, Duration::from_secs(60));
    }

    #[test]
    fn a_bad_value_names_its_variable() {
        let error =
            server(&Env::from_iter([("TYPHA_SERVERPINGINTERVALSECS", "soon")])).unwrap_err();
        assert_eq!(error.variable, "TYPHA_SERVERPINGINTERVALSECS");
        let error = server(&Env::from_iter([("TYPHA_SERVERPINGINTERVALSECS", "-1")])).unwrap_err();
        assert!(error.to_string().contains("positive"), "{error}");
    }

    #[test]
    fn partial_tls_names_what_is_missing() {
        const ALL: [(&str, &str); 5] = [
            ("TYPHA_CAFILE", "/ca.pem"),
            ("TYPHA_SERVERCERTFILE", "/cert.pem"),
            ("TYPHA_SERVERKEYFILE", "/key.pem"),
            ("TYPHA_CLIENTCN", "node"),
            ("TYPHA_CLIENTURISAN", "spiffe://node"),
        ];
        let without = |left_out: &[usize]| {
            let given = (0..5).filter(|n| !left_out.contains(n)).map(|n| ALL[n]);
            server(&Env::from_iter(given))
        };
        for (file, (variable, _)) in ALL.iter().enumerate().take(3) {
            let error = without(&[file]).unwrap_err();
            assert_eq!(error.variable, *variable, "{error}");
        }
        let error = without(&[3, 4]).unwrap_err();
        assert_eq!(error.variable, "TYPHA_CLIENTCN");
        assert!(error.to_string().contains("TYPHA_CLIENTURISAN"), "{error}");
        let peer = without(&[3]).unwrap().tls.unwrap().peer;
        assert_eq!(
            (peer.cn, peer.uri_san.as_deref()),
            (None, Some("spiffe://node"))
        );
        assert!(without(&[0, 1, 2, 3, 4]).unwrap().tls.is_none());
        let error = client_tls(&Env::from_iter([("FELIX_TYPHACN", "typha")])).unwrap_err();
        assert_eq!(error.variable, "FELIX_TYPHACAFILE");
    }

    #[test]
    fn a_node_asks_for_its_part_unless_it_is_told_otherwise() {
        let scoped = |value: &str| is_scoped(&Env::from_iter([("CALI_TYPHA_INTEREST", value)]));
        assert_eq!(scoped(""), Ok(true));
        assert_eq!(scoped("node"), Ok(true));
        assert_eq!(scoped("cluster"), Ok(false));
        assert!(scoped("all").is_err());
    }

    #[test]
    fn addresses_are_split_and_completed() {
        let addresses = |text: &str| server_addresses(&Env::from_iter([("FELIX_TYPHAADDR", text)]));
        assert_eq!(
            addresses("10.0.0.1:1, typha,fd00::1").unwrap(),
            ["10.0.0.1:1", "typha:5473", "[fd00::1]:5473"]
        );
        assert_eq!(addresses("").unwrap(), Vec::<String>::new());
        assert!(addresses("host:port").is_err());
    }
}
