//! Who is let in, and who is told why not: server and client over TCP with certificates made here.
#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use cali_api::Kind;
use cali_api::update::{SyncEvent, SyncStatus};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair,
    SanType,
};
use tokio::sync::mpsc;
use tokio::time::timeout;
use typha::client::{self, ClientConfig, Servers};
use typha::server::{Patience, Server, ServerConfig};
use typha::tls::{ClientTls, PeerName, TlsError, TlsSettings};

const PATIENCE: Duration = Duration::from_secs(30);
const NODE: &str = "calico-node";
const TYPHA: &str = "calico-typha";
const URI: &str = "spiffe://cluster/typha";

/// What is logged while it is the subscriber of this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn start() -> (Self, tracing::subscriber::DefaultGuard) {
        let log = Self::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    /// Waits for a line with all of these.
    async fn line_with(&self, parts: &[&str]) {
        let found = async {
            loop {
                let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
                if text
                    .lines()
                    .any(|line| parts.iter().all(|part| line.contains(part)))
                {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(PATIENCE, found).await.is_err() {
            let text = String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned();
            panic!("no line with {parts:?} in\n{text}");
        }
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Authority {
    folder: tempfile::TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

fn new_issuer() -> CertifiedIssuer<'static, KeyPair> {
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap()
}

impl Authority {
    fn new() -> Self {
        let new = Self {
            folder: tempfile::tempdir().unwrap(),
            issuer: new_issuer(),
        };
        new.publish();
        new
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn publish(&self) {
        self.write("ca.pem", &self.issuer.pem());
    }

    /// Writes a certificate and its key.
    fn issue(&self, cn: &str, uri: Option<&str>, expires: SystemTime) {
        let mut leaf = CertificateParams::default();
        leaf.distinguished_name = DistinguishedName::new();
        leaf.distinguished_name.push(DnType::CommonName, cn);
        leaf.subject_alt_names
            .push(SanType::DnsName(cn.try_into().unwrap()));
        leaf.subject_alt_names
            .extend(uri.map(|uri| SanType::URI(uri.try_into().unwrap())));
        leaf.not_after = expires.into();
        let key = KeyPair::generate().unwrap();
        let leaf = leaf.signed_by(&key, &self.issuer).unwrap();
        self.write(&format!("{cn}.pem"), &leaf.pem());
        self.write(&format!("{cn}.key"), &key.serialize_pem());
    }

    fn settings(&self, own: &str, peer: PeerName) -> TlsSettings {
        let path = |name: &str| Path::new(self.folder.path()).join(name);
        TlsSettings {
            ca: path("ca.pem"),
            certificate: path(&format!("{own}.pem")),
            key: path(&format!("{own}.key")),
            peer,
        }
    }
}

fn later() -> SystemTime {
    SystemTime::now() + Duration::from_secs(24 * 3600)
}

fn cn(name: &str) -> PeerName {
    PeerName {
        cn: Some(name.to_owned()),
        uri_san: None,
    }
}

/// A server in sync that takes clients with the common name [`NODE`]; dropping the sender ends it.
async fn serve(authority: &Authority) -> (SocketAddr, mpsc::Sender<SyncEvent>) {
    authority.issue(TYPHA, Some(URI), later());
    let server = Server::bind(ServerConfig {
        listen: ([127, 0, 0, 1], 0).into(),
        tls: Some(authority.settings(TYPHA, cn(NODE))),
        patience: Patience::default(),
        ..ServerConfig::default()
    });
    let server = server.unwrap();
    let address = server.local_addr().unwrap();
    let (source, events) = mpsc::channel(4);
    tokio::spawn(server.run(events, std::future::pending()));
    source
        .send(SyncEvent::Status(SyncStatus::InSync))
        .await
        .unwrap();
    (address, source)
}

fn connect(address: SocketAddr, tls: Option<TlsSettings>) -> mpsc::Receiver<SyncEvent> {
    client::start(ClientConfig {
        servers: Servers::Fixed(vec![address.to_string()]),
        hostname: "node1".into(),
        info: "test".into(),
        kinds: vec![Kind::GlobalNetworkSet],
        tls: tls.map(|settings| ClientTls::client(settings).unwrap()),
        keep: None,
        interest: None,
    })
}

async fn until_in_sync(events: &mut mpsc::Receiver<SyncEvent>) {
    let in_sync =
        async { while events.recv().await.unwrap() != SyncEvent::Status(SyncStatus::InSync) {} };
    timeout(PATIENCE, in_sync).await.unwrap();
}

#[tokio::test]
async fn either_name_opens_the_connection() {
    let authority = Authority::new();
    let (address, _source) = serve(&authority).await;
    authority.issue(NODE, None, later());
    for peer in [
        cn(TYPHA),
        PeerName {
            cn: Some("other".into()),
            uri_san: Some(URI.into()),
        },
        PeerName {
            cn: None,
            uri_san: Some(URI.into()),
        },
    ] {
        let mut events = connect(address, Some(authority.settings(NODE, peer)));
        until_in_sync(&mut events).await;
    }
}

#[tokio::test]
async fn client_with_another_name_is_refused_and_both_sides_say_why() {
    let (log, _guard) = Log::start();
    let authority = Authority::new();
    let (address, _source) = serve(&authority).await;
    authority.issue("stranger", Some("spiffe://cluster/stranger"), later());
    let _events = connect(address, Some(authority.settings("stranger", cn(TYPHA))));
    log.line_with(&[
        "WARN typha::server",
        "client refused",
        "peer=127.0.0.1",
        "stranger",
        "calico-node",
        "is required",
    ])
    .await;
    log.line_with(&["typha::client", "closed by the server: refused", "stranger"])
        .await;
}

#[tokio::test]
async fn expired_certificate_is_refused_with_the_reason() {
    let (log, _guard) = Log::start();
    let authority = Authority::new();
    let (address, _source) = serve(&authority).await;
    authority.issue(NODE, None, SystemTime::now() - Duration::from_secs(3600));
    let _events = connect(address, Some(authority.settings(NODE, cn(TYPHA))));
    log.line_with(&[
        "WARN typha::server",
        "client refused",
        "peer=127.0.0.1",
        "certificate expired",
    ])
    .await;
}

#[tokio::test]
async fn client_without_certificate_is_refused_with_the_reason() {
    let (log, _guard) = Log::start();
    let authority = Authority::new();
    let (address, _source) = serve(&authority).await;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.issuer.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from(TYPHA).unwrap();
    // With TLS 1.3 the client's handshake ends before the server has asked for the certificate in vain.
    let _ = tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await;
    let _events = connect(address, None);
    log.line_with(&[
        "WARN typha::server",
        "client refused",
        "peer=127.0.0.1",
        "no certificates",
    ])
    .await;
    log.line_with(&[
        "WARN typha::server",
        "client refused",
        "peer=127.0.0.1",
        "InvalidContentType",
    ])
    .await;
}

#[tokio::test]
async fn server_with_another_name_is_refused() {
    let (log, _guard) = Log::start();
    let authority = Authority::new();
    let (address, _source) = serve(&authority).await;
    authority.issue(NODE, None, later());
    let _events = connect(
        address,
        Some(authority.settings(NODE, cn("the-other-typha"))),
    );
    log.line_with(&["typha::client", TYPHA, "the-other-typha", "is required"])
        .await;
}

#[tokio::test]
async fn changed_files_count_from_the_next_connection_on_and_broken_ones_do_not() {
    let (log, _guard) = Log::start();
    let mut authority = Authority::new();
    let (address, _source) = serve(&authority).await;
    authority.issue(NODE, None, later());
    let mut old = connect(address, Some(authority.settings(NODE, cn(TYPHA))));
    until_in_sync(&mut old).await;

    authority.write("ca.pem", "half a file");
    // Holds what it has read.
    let loaded = {
        authority.publish();
        let loaded = authority.settings(NODE, cn(TYPHA));
        let client = ClientTls::client(loaded).unwrap();
        authority.write("ca.pem", "half a file");
        client
    };
    let mut other = client::start(ClientConfig {
        servers: Servers::Fixed(vec![address.to_string()]),
        hostname: "node2".into(),
        info: "test".into(),
        kinds: vec![Kind::GlobalNetworkSet],
        tls: Some(loaded),
        keep: None,
        interest: None,
    });
    until_in_sync(&mut other).await;
    log.line_with(&["changed certificates cannot be used", "ca.pem"])
        .await;

    // Another authority: what the old one signed is no longer served.
    let copy = Authority {
        folder: tempfile::tempdir().unwrap(),
        issuer: std::mem::replace(&mut authority.issuer, new_issuer()),
    };
    copy.publish();
    copy.issue(NODE, None, later());
    copy.issue(TYPHA, Some(URI), later());
    authority.publish();
    authority.issue(TYPHA, Some(URI), later());
    authority.issue(NODE, None, later());
    let mut new = connect(address, Some(authority.settings(NODE, cn(TYPHA))));
    until_in_sync(&mut new).await;
    log.line_with(&["certificates read again"]).await;
    let mut outdated = copy.settings(NODE, cn(TYPHA));
    outdated.ca = authority.folder.path().join("ca.pem");
    let _refused = connect(address, Some(outdated));
    log.line_with(&[
        "WARN typha::server",
        "client refused",
        "invalid peer certificate",
    ])
    .await;
}

#[tokio::test]
async fn files_that_cannot_be_used_are_named_before_anything_listens() {
    let authority = Authority::new();
    let settings = authority.settings("nobody", cn(NODE));
    let error = Server::bind(ServerConfig {
        listen: ([127, 0, 0, 1], 0).into(),
        tls: Some(settings.clone()),
        ..ServerConfig::default()
    })
    .unwrap_err();
    let text = format!("{:#}", anyhow::Error::from(error));
    assert!(
        text.contains("nobody.key") && text.contains("No such file"),
        "{text}"
    );
    assert!(matches!(
        ClientTls::client(settings),
        Err(TlsError::File { .. })
    ));
}
