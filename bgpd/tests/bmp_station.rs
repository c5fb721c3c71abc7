//! What a monitoring station is told (RFC 7854), read with a decoder of the test's own: speakers in one process, the
//! station behind real TCP on loopback.
#![allow(clippy::unwrap_used)]

mod in_memory;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bgpd::bmp::{Stage, Station, Stations};
use bgpd::policy::{Action, Condition, Edit, PolicyBuilder};
use bgpd::speaker::settings::Settings;
use bgpd::transport::memory::Network;
use bgpd::wire::{Codec, FamilySet, Framer, Message, PeerKind, Prefix, Update};
use bytes::{Buf, BytesMut};
use cali_control::status::BgpRequest;
use in_memory::{Running, addr, prefix, settings};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A decoded message; what belongs to a peer is named by its address.
#[derive(Debug, Clone, PartialEq)]
enum Seen {
    Initiation {
        description: String,
        name: String,
    },
    Up {
        peer: IpAddr,
        asn: u32,
        local: IpAddr,
        opens: [u32; 2],
    },
    Down {
        peer: IpAddr,
        reason: u8,
        code: Option<u8>,
    },
    Announced {
        stage: Stage,
        peer: IpAddr,
        routes: Vec<Prefix>,
        med: Option<u32>,
    },
    Withdrawn {
        stage: Stage,
        peer: IpAddr,
        routes: Vec<Prefix>,
    },
    EndOfRib {
        stage: Stage,
        peer: IpAddr,
    },
    Statistics {
        peer: IpAddr,
        numbers: Vec<(u16, u64)>,
    },
    Termination,
}

struct Connection {
    stream: TcpStream,
    buffer: BytesMut,
}

/// Common header (§4.1), per-peer header (§4.2).
fn decode(kind: u8, mut body: BytesMut) -> Seen {
    if kind == 4 {
        let mut texts = Vec::new();
        while body.has_remaining() {
            let tlv = body.get_u16();
            let length = body.get_u16().into();
            texts.push((
                tlv,
                String::from_utf8(body.split_to(length).to_vec()).unwrap(),
            ));
        }
        let text = |kind| texts.iter().find(|(k, _)| *k == kind).unwrap().1.clone();
        return Seen::Initiation {
            description: text(1),
            name: text(2),
        };
    }
    if kind == 5 {
        return Seen::Termination;
    }
    assert_eq!(body.get_u8(), 0, "a global instance peer");
    let flags = body.get_u8();
    let stage = if flags & 0x40 == 0 {
        Stage::Before
    } else {
        Stage::After
    };
    assert_eq!(body.get_u64(), 0, "no distinguisher");
    assert_eq!(flags & 0x80, 0, "the peers here have IPv4 addresses");
    let address = |body: &mut BytesMut| {
        body.advance(12);
        IpAddr::V4(Ipv4Addr::from(body.get_u32()))
    };
    let peer = address(&mut body);
    let asn = body.get_u32();
    body.advance(4 + 8);
    let codec = Codec {
        four_octet_as: true,
        families: FamilySet::ALL,
        ..Codec::basic(PeerKind::Ebgp)
    };
    let pdu = |body: &mut BytesMut| {
        let frame = Framer::new().next(body).unwrap().unwrap();
        Message::decode(&frame, &codec).unwrap()
    };
    match kind {
        0 => {
            let Message::Update(update) = pdu(&mut body) else {
                panic!("no UPDATE")
            };
            assert!(body.is_empty(), "one UPDATE only");
            routes(stage, peer, &update)
        }
        1 => {
            let count = body.get_u32();
            let number = |body: &mut BytesMut| {
                let kind = body.get_u16();
                (
                    kind,
                    match body.get_u16() {
                        4 => body.get_u32().into(),
                        8 => body.get_u64(),
                        other => panic!("a number of {other} octets"),
                    },
                )
            };
            Seen::Statistics {
                peer,
                numbers: (0..count).map(|_| number(&mut body)).collect(),
            }
        }
        2 => {
            let reason = body.get_u8();
            let code = matches!(reason, 1 | 3).then(|| match pdu(&mut body) {
                Message::Notification(n) => n.code,
                other => panic!("{other:?}"),
            });
            Seen::Down { peer, reason, code }
        }
        3 => {
            let local = address(&mut body);
            body.advance(4);
            let open = |body: &mut BytesMut| match pdu(body) {
                Message::Open(open) => open.asn,
                other => panic!("{other:?}"),
            };
            let opens = [open(&mut body), open(&mut body)];
            Seen::Up {
                peer,
                asn,
                local,
                opens,
            }
        }
        other => panic!("a message of type {other}"),
    }
}

fn routes(stage: Stage, peer: IpAddr, update: &Update) -> Seen {
    if update.as_end_of_rib().is_some() {
        return Seen::EndOfRib { stage, peer };
    }
    let announced: Vec<Prefix> = update
        .announcements()
        .flat_map(|(_, routes)| routes.iter().map(|n| n.prefix))
        .collect();
    if announced.is_empty() {
        let routes = update.withdrawals().map(|n| n.prefix).collect();
        return Seen::Withdrawn {
            stage,
            peer,
            routes,
        };
    }
    Seen::Announced {
        stage,
        peer,
        routes: announced,
        med: update.attributes.med,
    }
}

impl Connection {
    /// The next message; `None` at the end of the stream.
    async fn next(&mut self) -> Option<Seen> {
        let read = async {
            loop {
                if self.buffer.len() >= 6 {
                    let length = u32::from_be_bytes(self.buffer[1..5].try_into().unwrap()) as usize;
                    if self.buffer.len() >= length {
                        let mut message = self.buffer.split_to(length);
                        assert_eq!(message.get_u8(), 3, "version");
                        message.advance(4);
                        let kind = message.get_u8();
                        return Some(decode(kind, message));
                    }
                }
                if self.stream.read_buf(&mut self.buffer).await.unwrap() == 0 {
                    return None;
                }
            }
        };
        tokio::time::timeout(LIMIT, read)
            .await
            .expect("the station is told nothing more")
    }

    /// Reads up to the message that is looked for; all that came until then.
    async fn until(&mut self, wanted: impl Fn(&Seen) -> bool) -> Vec<Seen> {
        let mut all = Vec::new();
        loop {
            let seen = self.next().await;
            let Some(seen) = seen else {
                panic!("the connection ended after {all:?}")
            };
            let found = wanted(&seen);
            all.push(seen);
            if found {
                return all;
            }
        }
    }
}

async fn accept(listener: &TcpListener) -> Connection {
    let accept = tokio::time::timeout(LIMIT, listener.accept());
    let (stream, _) = accept.await.expect("nobody dials the station").unwrap();
    Connection {
        stream,
        buffer: BytesMut::new(),
    }
}

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Speaker 1 refuses 10.2.9.0/26 of speaker 2, and gives what it takes the MED 7.
fn monitored() -> Settings {
    let mut one = settings(1, 64512, &[(2, 64513)], &[]);
    let refused = Condition::OneOf([prefix("10.2.9.0/26")].into_iter().collect());
    let import = PolicyBuilder::default()
        .rule("refused", vec![refused], Vec::new(), Action::Reject)
        .rule("taken", Vec::new(), vec![Edit::SetMed(7)], Action::Accept);
    one.neighbours.get_mut(&addr(2)).unwrap().exchange.import = Arc::new(import.build(false));
    one
}

fn of_two(routes: &[&str]) -> Settings {
    settings(2, 64513, &[(1, 64512)], routes)
}

/// The routes of one stage that a station believes in after these messages, with their MED.
fn believed(messages: &[Seen], wanted: Stage) -> BTreeMap<Prefix, Option<u32>> {
    let mut out = BTreeMap::new();
    for message in messages {
        match message {
            Seen::Announced {
                stage, routes, med, ..
            } if *stage == wanted => {
                out.extend(routes.iter().map(|p| (*p, *med)));
            }
            Seen::Withdrawn { stage, routes, .. } if *stage == wanted => {
                out.retain(|prefix, _| !routes.contains(prefix));
            }
            Seen::Down { .. } => out.clear(),
            _ => {}
        }
    }
    out
}

/// Reads until the station believes in exactly these routes of both stages.
async fn until_believed(
    connection: &mut Connection,
    all: &mut Vec<Seen>,
    before: &[(&str, Option<u32>)],
    after: &[(&str, Option<u32>)],
) {
    let expected = |routes: &[(&str, Option<u32>)]| -> BTreeMap<Prefix, Option<u32>> {
        routes
            .iter()
            .map(|(text, med)| (prefix(text), *med))
            .collect()
    };
    loop {
        let seen = [Stage::Before, Stage::After].map(|stage| believed(all, stage));
        if seen == [expected(before), expected(after)] {
            return;
        }
        match connection.next().await {
            Some(message) => all.push(message),
            None => panic!("expected {before:?} and {after:?}; seen {all:#?}"),
        }
    }
}

#[tokio::test]
async fn a_station_follows_peers_and_routes_before_and_after_policy() {
    let net = Network::default();
    let one = Running::start(&net, 1, monitored());
    let two = Running::start(&net, 2, of_two(&["10.2.0.0/26", "10.2.9.0/26"]));
    one.has("10.2.0.0/26").await;

    // A station that comes late is told what there is.
    let (listener, address) = listen().await;
    let mut station = Station::new(address);
    station.stages = vec![Stage::Before, Stage::After];
    station.statistics = Duration::from_secs(1);
    let mut stations = Stations::new(one.speaker.clone());
    stations.follow(std::slice::from_ref(&station));
    let mut connection = accept(&listener).await;
    let mut all = vec![
        connection.next().await.unwrap(),
        connection.next().await.unwrap(),
    ];
    let Seen::Initiation { description, name } = &all[0] else {
        panic!("the first message is {:?}", all[0]);
    };
    assert!(description.starts_with("cali bgpd "), "{description}");
    assert_eq!(name, "10.0.0.1");
    let up = Seen::Up {
        peer: addr(2),
        asn: 64513,
        local: addr(1),
        opens: [64512, 64513],
    };
    assert_eq!(all[1], up);
    until_believed(
        &mut connection,
        &mut all,
        &[("10.2.0.0/26", None), ("10.2.9.0/26", None)],
        &[("10.2.0.0/26", Some(7))],
    )
    .await;

    // What changes.
    two.speaker
        .configure(of_two(&["10.2.1.0/26", "10.2.9.0/26"]))
        .await
        .unwrap();
    until_believed(
        &mut connection,
        &mut all,
        &[("10.2.1.0/26", None), ("10.2.9.0/26", None)],
        &[("10.2.1.0/26", Some(7))],
    )
    .await;
    for stage in [Stage::Before, Stage::After] {
        let end = Seen::EndOfRib {
            stage,
            peer: addr(2),
        };
        assert!(all.contains(&end), "{stage:?}: {all:#?}");
    }
    let numbers = connection
        .until(|seen| {
            let now = vec![(0, 1), (7, 2), (8, 1)];
            *seen
                == Seen::Statistics {
                    peer: addr(2),
                    numbers: now,
                }
        })
        .await;
    all.extend(numbers);

    // How a session ends, and that it comes back.
    one.speaker
        .ask(BgpRequest::Drain { message: None })
        .await
        .unwrap();
    let end = connection
        .until(|seen| matches!(seen, Seen::Down { .. }))
        .await;
    let down = Seen::Down {
        peer: addr(2),
        reason: 1,
        code: Some(6),
    };
    assert_eq!(end.last(), Some(&down));
    connection.until(|seen| *seen == Seen::Termination).await;
    assert_eq!(
        connection.next().await,
        None,
        "the last message was not the last"
    );
    stations.end().await;
}

#[tokio::test]
async fn a_station_comes_and_goes_without_harm_to_sessions() {
    let net = Network::default();
    let one = Running::start(&net, 1, monitored());
    let two = Running::start(&net, 2, of_two(&["10.2.0.0/26"]));
    one.has("10.2.0.0/26").await;
    let (first, first_address) = listen().await;
    let (second, second_address) = listen().await;
    let (kept, leaving) = (Station::new(first_address), Station::new(second_address));
    let mut stations = Stations::new(one.speaker.clone());
    stations.follow(&[kept.clone(), leaving]);
    let mut connection = accept(&first).await;
    let mut other = accept(&second).await;
    for connection in [&mut connection, &mut other] {
        connection
            .until(|seen| matches!(seen, Seen::Announced { .. }))
            .await;
    }
    // One is no longer wanted: it is told so, and the other goes on.
    stations.follow(std::slice::from_ref(&kept));
    other.until(|seen| *seen == Seen::Termination).await;
    two.speaker
        .configure(of_two(&["10.2.0.0/26", "10.2.1.0/26"]))
        .await
        .unwrap();
    let news = |seen: &Seen| matches!(seen, Seen::Announced { routes, .. } if routes.contains(&prefix("10.2.1.0/26")));
    connection.until(news).await;
    // One that closes its connection is dialled again, and told everything again.
    drop(connection);
    let mut connection = accept(&first).await;
    assert!(matches!(
        connection.next().await,
        Some(Seen::Initiation { .. })
    ));
    connection.until(news).await;
    // The peer goes: its silence is told as that of the other side.
    two.crash().await;
    let end = connection
        .until(|seen| matches!(seen, Seen::Down { .. }))
        .await;
    assert_eq!(
        end.last(),
        Some(&Seen::Down {
            peer: addr(2),
            reason: 4,
            code: None
        })
    );
    assert_eq!(one.status().await.peers[0].established_count, 1);
}
