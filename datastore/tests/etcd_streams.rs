//! etcd fails, compacts, and asks who one is.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cali_api::Kind;
use cali_datastore::etcd::{Etcd, Settings};
use cali_datastore::testing::{self, Tls};
use cali_datastore::{Datastore, conformance};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

fn settings(server: &testing::Etcd) -> Settings {
    Settings {
        endpoints: vec![server.endpoint()],
        ..Settings::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_stream_survives_restarts_and_compaction() {
    let mut server = testing::Etcd::start();
    let store: Arc<dyn Datastore> = Arc::new(Etcd::new(settings(&server)));
    conformance::stream_survives(store, 4, async |round| {
        if round % 2 == 1 {
            // While the watches are away, the changes that they have not seen are forgotten.
            server.restart();
            server.compact().await;
        } else {
            server.restart();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compacted_revision_is_gone() {
    let server = testing::Etcd::start();
    let store = Etcd::new(settings(&server));
    let first = store
        .list(Kind::NetworkSet, None)
        .await
        .expect("list")
        .revision;
    for number in 0..3 {
        let set = conformance::network_set("a", &format!("n{number}"), "10.0.0.0/8");
        store.create(set).await.expect("create");
    }
    server.compact().await;
    let mut told = match store.watch(&[Kind::NetworkSet], &first).await {
        Err(error) => error,
        Ok(mut watch) => watch
            .next()
            .await
            .expect("an answer")
            .expect_err("an error"),
    };
    if let cali_datastore::Error::Unavailable { .. } = told {
        told = store
            .watch(&[Kind::NetworkSet], &first)
            .await
            .expect_err("an error");
    }
    assert!(
        matches!(told, cali_datastore::Error::RevisionGone { .. }),
        "{told:?}"
    );
}

/// A way to etcd that can go silent: connections stay open, but nothing passes any more in either direction.
struct Way {
    endpoint: String,
    /// Connections that were made before the number of this moment are silent.
    silent: watch::Sender<usize>,
}

impl Way {
    async fn to(server: &testing::Etcd) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let etcd = server.endpoint().replace("http://", "");
        let (silent, told) = watch::channel(0);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(&etcd).await else {
                    continue;
                };
                let moment = *told.borrow();
                let mut told = told.clone();
                tokio::spawn(async move {
                    let (mut near, mut far) = (near, far);
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = async { told.wait_for(|now| *now > moment).await.map(drop) } => {
                            // Both sockets stay, and are read no more.
                            std::future::pending::<()>().await;
                        }
                    }
                });
            }
        });
        Self {
            endpoint: format!("http://{address}"),
            silent,
        }
    }
}

/// No reset tells that the other end is gone: the probes find out, and the stream goes on over a new connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_stream_survives_connections_that_go_silent() {
    let server = testing::Etcd::start();
    let way = Way::to(&server).await;
    let store: Arc<dyn Datastore> = Arc::new(Etcd::new(Settings {
        endpoints: vec![way.endpoint.clone()],
        probes: Some((Duration::from_secs(1), Duration::from_secs(1))),
        ..Settings::default()
    }));
    let silence = &way.silent;
    conformance::stream_survives(store, 2, async |_| {
        silence.send_modify(|moment| *moment += 1);
    })
    .await;
}

/// Pages are made by the size of the objects so far: the large ones that come behind hundreds of small ones would be more than
/// an answer may be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_objects_come_behind_small_ones() {
    let server = testing::Etcd::start();
    let store = Etcd::new(settings(&server));
    let large = "a".repeat(1_400_000);
    for number in 0..600 {
        let mut set = conformance::network_set("a", &format!("n{number:03}"), "10.0.0.0/8");
        if number >= 530 {
            let annotations = &mut set.metadata_mut().annotations;
            annotations.insert("text".into(), large.as_str().into());
        }
        store.create(set).await.expect("create");
    }
    let whole = store.list(Kind::NetworkSet, None).await.expect("list");
    assert_eq!(whole.items.len(), 600);
    assert!(whole.undecodable.is_empty(), "{:?}", whole.undecodable);
    let (mut after, mut count) = (None, 0);
    loop {
        let page = store
            .list_page(Kind::NetworkSet, None, after.as_ref(), 10_000)
            .await
            .expect("a page");
        count += page.items.len();
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(count, 600);
}

fn write(folder: &Path, name: &str, text: &str) -> std::path::PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, text).expect("a file");
    path
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_needed_and_used() {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    let folder = tempfile::tempdir().expect("a folder");
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().expect("a key"))
        .expect("an authority");
    let leaf = |name: &str, host: &str| {
        let key = KeyPair::generate().expect("a key");
        let leaf = CertificateParams::new([host.to_owned()])
            .expect("a name")
            .signed_by(&key, &authority)
            .expect("a certificate");
        (
            write(folder.path(), &format!("{name}.crt"), &leaf.pem()),
            write(folder.path(), &format!("{name}.key"), &key.serialize_pem()),
        )
    };
    let ca = write(folder.path(), "ca.crt", &authority.pem());
    let (certificate, key) = leaf("server", "127.0.0.1");
    let server = testing::Etcd::start_with(Some(Tls {
        ca: ca.clone(),
        certificate,
        key,
    }));
    let mut with = settings(&server);
    with.ca = Some(ca);
    let without = with.clone();
    with.certificate = Some(leaf("client", "calico"));
    let store = Etcd::new(with);
    store
        .create(conformance::pool("p", "10.0.0.0/16"))
        .await
        .expect("create");
    let refused = Etcd::new(without).list(Kind::IPPool, None).await;
    assert!(
        refused.is_err(),
        "a client without a certificate: {refused:?}"
    );
}
