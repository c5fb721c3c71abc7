//! Configuration from the environment, with Calico's names: `TYPHA_*` for the server, `FELIX_TYPHA*` for clients.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::server::{DEFAULT_PORT, ServerConfig};

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

    /// Plain text where encryption was asked for would be worse than not starting.
    fn refuse_tls(&self, variables: &[&'static str]) -> Result<(), ConfigError> {
        match variables
            .iter()
            .find_map(|variable| Some((*variable, self.get(variable)?)))
        {
            Some((variable, value)) => Err(ConfigError {
                variable,
                value: value.to_owned(),
                reason: "this build has no TLS for Typha connections; unset it to use plain TCP"
                    .into(),
            }),
            None => Ok(()),
        }
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
    env.refuse_tls(&[
        "TYPHA_CAFILE",
        "TYPHA_SERVERCERTFILE",
        "TYPHA_SERVERKEYFILE",
        "TYPHA_CLIENTCN",
        "TYPHA_CLIENTURISAN",
    ])?;
    let mut config = ServerConfig::default();
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
    config.limits.backlog_bytes = env.parse("TYPHA_BACKLOGBYTES", config.limits.backlog_bytes)?;
    Ok(config)
}

/// The servers that a client is to use, as `host:port`; empty when it is to read the datastore itself.
pub fn server_addresses(env: &Env) -> Result<Vec<String>, ConfigError> {
    const VARIABLE: &str = "FELIX_TYPHAADDR";
    let Some(list) = env.get(VARIABLE) else {
        return Ok(Vec::new());
    };
    env.refuse_tls(&[
        "FELIX_TYPHACAFILE",
        "FELIX_TYPHACERTFILE",
        "FELIX_TYPHAKEYFILE",
        "FELIX_TYPHACN",
        "FELIX_TYPHAURISAN",
    ])?;
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
    fn tls_settings_are_refused_and_not_ignored() {
        let error = server(&Env::from_iter([("TYPHA_CAFILE", "/ca.pem")])).unwrap_err();
        assert_eq!(error.variable, "TYPHA_CAFILE");
        let env = Env::from_iter([
            ("FELIX_TYPHAADDR", "t:5473"),
            ("FELIX_TYPHACERTFILE", "/cert.pem"),
        ]);
        assert_eq!(
            server_addresses(&env).unwrap_err().variable,
            "FELIX_TYPHACERTFILE"
        );
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
