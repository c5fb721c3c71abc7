//! Where etcd is and how it is spoken to: Calico's `ETCD_*` variables.

use std::path::PathBuf;
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};

use crate::error::{Cause, Error};

/// Calico's client probes an idle connection this often, and waits this long for the answer.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How to reach etcd.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// `http://` or `https://` addresses of the members.
    pub endpoints: Vec<String>,
    /// User and password.
    pub user: Option<(String, String)>,
    /// PEM file of the authorities that sign the servers' certificates.
    pub ca: Option<PathBuf>,
    /// PEM files of our certificate and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// How often a connection is probed, and how long the answer may take; without: as Calico's client, 30 s and 10 s.
    pub probes: Option<(Duration, Duration)>,
}

impl Settings {
    /// Reads `ETCD_ENDPOINTS` and its companions from the environment.
    pub fn from_env() -> Result<Self, Error> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// As [`Settings::from_env`], from any source of variables.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let text = |name: &str| variable(name).filter(|text| !text.trim().is_empty());
        let wrong = |variable, reason: &str| {
            Err(Error::Configuration {
                variable,
                reason: reason.to_owned(),
            })
        };
        let Some(endpoints) = text("ETCD_ENDPOINTS") else {
            if text("ETCD_DISCOVERY_SRV").is_some() {
                return wrong(
                    "ETCD_DISCOVERY_SRV",
                    "discovery by DNS is not supported; list the members in ETCD_ENDPOINTS",
                );
            }
            return wrong(
                "ETCD_ENDPOINTS",
                "must list etcd's members, such as https://10.0.0.1:2379,https://10.0.0.2:2379",
            );
        };
        let endpoints: Vec<String> = endpoints
            .split(',')
            .map(|one| one.trim().trim_end_matches('/').to_owned())
            .filter(|one| !one.is_empty())
            .collect();
        if let Some(bad) = endpoints
            .iter()
            .find(|one| !one.starts_with("http://") && !one.starts_with("https://"))
        {
            return wrong(
                "ETCD_ENDPOINTS",
                &format!("{bad:?} must begin with http:// or https://"),
            );
        }
        let certificate = match (text("ETCD_CERT_FILE"), text("ETCD_KEY_FILE")) {
            (Some(certificate), Some(key)) => Some((certificate.into(), key.into())),
            (None, None) => None,
            (Some(_), None) => return wrong("ETCD_KEY_FILE", "is needed with ETCD_CERT_FILE"),
            (None, Some(_)) => return wrong("ETCD_CERT_FILE", "is needed with ETCD_KEY_FILE"),
        };
        let user = match (text("ETCD_USERNAME"), variable("ETCD_PASSWORD")) {
            (Some(user), password) => Some((user, password.unwrap_or_default())),
            (None, _) => None,
        };
        Ok(Self {
            endpoints,
            user,
            ca: text("ETCD_CA_CERT_FILE").map(Into::into),
            certificate,
            probes: None,
        })
    }

    /// Connects, and reads the certificate files anew.
    pub(super) async fn connect(&self) -> Result<Client, Error> {
        let (every, limit) = self.probes.unwrap_or(KEEP_ALIVE);
        let mut options = ConnectOptions::new()
            .with_keep_alive(every, limit)
            .with_keep_alive_while_idle(true)
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_auto_token_refresh(true);
        if let Some((user, password)) = &self.user {
            options = options.with_user(user, password);
        }
        if self.endpoints.iter().any(|one| one.starts_with("https://")) {
            options = options.with_tls(self.tls()?);
        }
        let failed = |cause: Cause| {
            Error::unavailable(
                format!("connect to etcd at {}", self.endpoints.join(", ")),
                cause,
            )
        };
        match tokio::time::timeout(
            CONNECT_TIMEOUT,
            Client::connect(&self.endpoints, Some(options)),
        )
        .await
        {
            Ok(Ok(client)) => Ok(client),
            Ok(Err(error)) => Err(failed(error.into())),
            Err(late) => Err(failed(late.into())),
        }
    }

    fn tls(&self) -> Result<TlsOptions, Error> {
        let read = |path: &PathBuf| {
            std::fs::read(path)
                .map_err(|error| Error::unavailable(format!("read {}", path.display()), error))
        };
        let mut tls = TlsOptions::new();
        if let Some(ca) = &self.ca {
            tls = tls.ca_certificate(Certificate::from_pem(read(ca)?));
        }
        if let Some((certificate, key)) = &self.certificate {
            tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
        }
        Ok(tls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings, String> {
        Settings::from_variables(|name| {
            let found = variables.iter().find(|(known, _)| *known == name)?;
            Some(found.1.to_owned())
        })
        .map_err(|error| error.to_string())
    }

    #[test]
    fn calicos_variables_are_understood() {
        let read = settings(&[
            (
                "ETCD_ENDPOINTS",
                "https://10.0.0.1:2379/, https://10.0.0.2:2379",
            ),
            ("ETCD_USERNAME", "calico"),
            ("ETCD_PASSWORD", "secret"),
            ("ETCD_CA_CERT_FILE", "/ca"),
            ("ETCD_CERT_FILE", "/cert"),
            ("ETCD_KEY_FILE", "/key"),
        ])
        .unwrap();
        assert_eq!(
            read.endpoints,
            ["https://10.0.0.1:2379", "https://10.0.0.2:2379"]
        );
        assert_eq!(read.user, Some(("calico".into(), "secret".into())));
        assert_eq!(read.certificate, Some(("/cert".into(), "/key".into())));
    }

    #[test]
    fn what_is_missing_is_named() {
        for (given, named) in [
            (&[][..], "ETCD_ENDPOINTS"),
            (&[("ETCD_ENDPOINTS", "10.0.0.1:2379")], "ETCD_ENDPOINTS"),
            (
                &[("ETCD_DISCOVERY_SRV", "example.org")],
                "ETCD_DISCOVERY_SRV",
            ),
            (
                &[("ETCD_ENDPOINTS", "http://a:1"), ("ETCD_CERT_FILE", "/c")],
                "ETCD_KEY_FILE",
            ),
        ] {
            let error = settings(given).unwrap_err();
            assert!(error.starts_with(named), "{error}");
        }
    }
}
