//! Mutual TLS between server and clients, checked as Calico checks it: rustls verifies chain and time of the other end's certificate,
//! then its common name or a URI of its subject alternative names must be the configured one. Host names are
//! not looked at: a client reaches its servers by whatever address it discovers.
//!
//! Files are read again when they have changed, at the next connection; should they not fit together (a rotation that is half done)
//! the former ones serve on. Sessions are never resumed, so that every connection is verified anew.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Files in PEM and the name that the other end must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsSettings {
    /// Certificates of the authorities that the other end's certificate must descend from.
    pub ca: PathBuf,
    /// Own certificate, with intermediate ones after it.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Who may be at the other end.
    pub peer: PeerName,
}

/// Names of which the other end must have one (Calico: "either match is sufficient").
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PeerName {
    /// Common name of the certificate's subject.
    pub cn: Option<String>,
    /// A URI among the subject alternative names.
    pub uri_san: Option<String>,
}

/// Why there is no TLS connection.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or holds no certificate or key.
    #[error("cannot use {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: pem::Error,
    },
    /// The files do not make a configuration.
    #[error("certificate {}, key {} and authorities {} cannot be used together", .0.certificate.display(), .0.key.display(), .0.ca.display())]
    Files(
        Box<TlsSettings>,
        #[source] Box<dyn std::error::Error + Send + Sync>,
    ),
    /// rustls refused the other end, or the other end us.
    #[error("TLS handshake failed")]
    Handshake(#[source] std::io::Error),
    /// The certificate is genuine, and somebody else's.
    #[error("the other end's certificate is {found}, {expected} is required")]
    Name {
        /// What the certificate says.
        found: String,
        /// What was configured.
        expected: PeerName,
    },
}

impl std::fmt::Display for PeerName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.cn, &self.uri_san) {
            (Some(cn), Some(uri)) => write!(f, "CN {cn:?} or URI {uri:?}"),
            (Some(cn), None) => write!(f, "CN {cn:?}"),
            (None, Some(uri)) => write!(f, "URI {uri:?}"),
            (None, None) => f.write_str("nobody"),
        }
    }
}

impl PeerName {
    /// Looks for one of the names in the first of these (already verified) certificates.
    fn check(&self, certificates: Option<&[CertificateDer<'_>]>) -> Result<(), TlsError> {
        let refused = |found: String| TlsError::Name {
            found,
            expected: self.clone(),
        };
        let Some(end) = certificates.and_then(<[_]>::first) else {
            return Err(refused("missing".into()));
        };
        let (_, end) =
            X509Certificate::from_der(end).map_err(|e| refused(format!("unreadable ({e})")))?;
        let names = |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| {
            attribute.as_str().ok().map(str::to_owned)
        };
        let cns: Vec<String> = end.subject().iter_common_name().filter_map(names).collect();
        let uris: Vec<&str> = end
            .subject_alternative_name()
            .ok()
            .flatten()
            .iter()
            .flat_map(|san| &san.value.general_names)
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            })
            .collect();
        let cn_fits = self.cn.as_ref().is_some_and(|cn| cns.contains(cn));
        let uri_fits = self.uri_san.as_deref().is_some_and(|u| uris.contains(&u));
        if cn_fits || uri_fits {
            Ok(())
        } else {
            Err(refused(format!("CN {cns:?} with URIs {uris:?}")))
        }
    }
}

/// The client's side.
pub type ClientTls = Reloading<ClientConfig>;
/// The server's side.
pub type ServerTls = Reloading<ServerConfig>;

/// A configuration of rustls that follows its files.
#[derive(Debug)]
pub struct Reloading<C> {
    settings: TlsSettings,
    build: fn(&TlsSettings) -> Result<C, TlsError>,
    current: Mutex<Current<C>>,
}

#[derive(Debug)]
struct Current<C> {
    config: Arc<C>,
    /// The files as they were last read, well or badly.
    stamp: Stamp,
}

/// Time and length of each file.
type Stamp = [Option<(SystemTime, u64)>; 3];

impl<C> Reloading<C> {
    fn load(
        settings: TlsSettings,
        build: fn(&TlsSettings) -> Result<C, TlsError>,
    ) -> Result<Arc<Self>, TlsError> {
        let stamp = settings.stamp();
        let config = Arc::new(build(&settings)?);
        Ok(Arc::new(Self {
            settings,
            build,
            current: Mutex::new(Current { config, stamp }),
        }))
    }

    fn config(&self) -> Arc<C> {
        // Both fields are whole at any time.
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let stamp = self.settings.stamp();
        if stamp != current.stamp {
            current.stamp = stamp;
            match (self.build)(&self.settings) {
                Ok(config) => {
                    tracing::info!(certificate = %self.settings.certificate.display(), "certificates read again");
                    current.config = Arc::new(config);
                }
                Err(error) => {
                    tracing::error!(reason = %crate::Chain(&error), "changed certificates cannot be used, the former ones stay");
                }
            }
        }
        Arc::clone(&current.config)
    }
}

impl ServerTls {
    /// Reads the files.
    pub fn server(settings: TlsSettings) -> Result<Arc<Self>, TlsError> {
        Self::load(settings, server_config)
    }

    /// Takes a client's connection. A client of another name gets its connection, so that it can be told; the second value says
    /// that it is to be closed.
    pub async fn accept(
        &self,
        stream: TcpStream,
    ) -> Result<(server::TlsStream<TcpStream>, Result<(), TlsError>), TlsError> {
        let accepted = TlsAcceptor::from(self.config()).accept(stream).await;
        let stream = accepted.map_err(TlsError::Handshake)?;
        let verdict = self
            .settings
            .peer
            .check(stream.get_ref().1.peer_certificates());
        Ok((stream, verdict))
    }
}

impl ClientTls {
    /// Reads the files.
    pub fn client(settings: TlsSettings) -> Result<Arc<Self>, TlsError> {
        Self::load(settings, client_config)
    }

    /// Makes a connection to a server.
    pub async fn connect(
        &self,
        stream: TcpStream,
    ) -> Result<client::TlsStream<TcpStream>, TlsError> {
        let peer = stream.peer_addr().map_err(TlsError::Handshake)?;
        let connected = TlsConnector::from(self.config())
            .connect(ServerName::from(peer.ip()), stream)
            .await;
        let stream = connected.map_err(TlsError::Handshake)?;
        self.settings
            .peer
            .check(stream.get_ref().1.peer_certificates())?;
        Ok(stream)
    }
}

impl TlsSettings {
    fn stamp(&self) -> Stamp {
        [&self.ca, &self.certificate, &self.key].map(|path| {
            let data = std::fs::metadata(path).ok()?;
            Some((data.modified().ok()?, data.len()))
        })
    }

    fn refuse<E: Into<Box<dyn std::error::Error + Send + Sync>>>(&self, error: E) -> TlsError {
        TlsError::Files(Box::new(self.clone()), error.into())
    }

    fn roots(&self) -> Result<RootCertStore, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.ca)? {
            roots.add(certificate).map_err(|e| self.refuse(e))?;
        }
        Ok(roots)
    }

    fn identity(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(in_file(&self.key))?;
        Ok((certificates(&self.certificate)?, key))
    }
}

fn in_file(path: &Path) -> impl Fn(pem::Error) -> TlsError {
    move |source| TlsError::File {
        path: path.to_owned(),
        source,
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .map_err(in_file(path))?
        .collect();
    let found = found.map_err(in_file(path))?;
    if found.is_empty() {
        return Err(in_file(path)(pem::Error::NoItemsFound));
    }
    Ok(found)
}

fn server_config(settings: &TlsSettings) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(
        Arc::new(settings.roots()?),
        Arc::clone(&provider),
    )
    .build()
    .map_err(|e| settings.refuse(e))?;
    let (chain, key) = settings.identity()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| settings.refuse(e))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|e| settings.refuse(e))?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn client_config(settings: &TlsSettings) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let roots = Arc::new(settings.roots()?);
    let signatures =
        WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|e| settings.refuse(e))?;
    let (chain, key) = settings.identity()?;
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| settings.refuse(e))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyHost {
            roots,
            provider,
            signatures,
        }))
        .with_client_auth_cert(chain, key)
        .map_err(|e| settings.refuse(e))?;
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// rustls' verification of chain, time and purpose, without that of the host's name.
#[derive(Debug)]
struct AnyHost {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    signatures: Arc<WebPkiServerVerifier>,
}

impl ServerCertVerifier for AnyHost {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signatures
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signatures
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signatures.supported_verify_schemes()
    }
}
