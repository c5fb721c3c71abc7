//! Properties of the codec: what we write we read, and nothing that arrives makes it panic.

use std::net::{Ipv4Addr, Ipv6Addr};

use bgpd::wire::{
    AddPathMode, Aggregator, AsPath, Attributes, Capability, Codec, Community, ErrorCode,
    ExtendedCommunity, Family, FamilySet, Framer, GracefulRestart, GracefulRestartFamily,
    LargeCommunity, LongLivedFamily, Message, MpReach, MpUnreach, NextHop, Nlri, NlriBlock,
    Notification, Open, Origin, Packer, PeerKind, Prefix, RefreshKind, RouteRefresh, Treatment,
    UnknownAttribute, Update,
};
use bytes::{Bytes, BytesMut};
use proptest::collection::vec;
use proptest::prelude::*;

fn family() -> impl Strategy<Value = Family> {
    prop_oneof![Just(Family::IPV4_UNICAST), Just(Family::IPV6_UNICAST)]
}

fn families() -> impl Strategy<Value = FamilySet> {
    vec(family(), 0..3).prop_map(FamilySet::from_iter)
}

fn codec() -> impl Strategy<Value = Codec> {
    (any::<[bool; 3]>(), families(), any::<bool>()).prop_map(|(flags, add_path, extended)| Codec {
        peer: if flags[0] {
            PeerKind::Ibgp
        } else {
            PeerKind::Ebgp
        },
        four_octet_as: flags[1],
        extended_message: flags[2],
        families: FamilySet::ALL,
        add_path_rx: add_path,
        add_path_tx: add_path,
        extended_next_hop: if extended {
            FamilySet::IPV4
        } else {
            FamilySet::EMPTY
        },
    })
}

fn asn() -> impl Strategy<Value = u32> {
    prop_oneof![1u32..65535, 65536u32..=u32::MAX]
}

fn nlri(family: Family, add_path: bool) -> impl Strategy<Value = Nlri> {
    (any::<u128>(), 0..=family.max_prefix_len(), any::<u32>()).prop_map(move |(bits, len, id)| {
        let prefix = match family.afi {
            1 => Prefix::v4(bits as u32, len),
            _ => Prefix::v6(bits, len),
        };
        Nlri {
            prefix,
            path_id: if add_path { id } else { 0 },
        }
    })
}

fn block(family: Family, codec: Codec, min: usize) -> impl Strategy<Value = NlriBlock> {
    let add_path = codec.add_path_tx.contains(family);
    vec(nlri(family, add_path), min..20)
        .prop_map(move |routes| NlriBlock::from_routes(family, add_path, &routes))
}

fn next_hop_v6() -> impl Strategy<Value = NextHop> {
    (any::<u64>(), any::<bool>()).prop_map(|(low, pair)| {
        let global = Ipv6Addr::from((0x2001_0db8u128 << 96) | u128::from(low));
        let link_local = Ipv6Addr::from((0xfe80u128 << 112) | u128::from(low));
        if pair {
            NextHop::V6Pair { global, link_local }
        } else {
            NextHop::V6(global)
        }
    })
}

fn sorted<T: Ord>(mut list: Vec<T>) -> Box<[T]> {
    list.sort();
    list.dedup();
    list.into_boxed_slice()
}

fn attributes(peer: PeerKind) -> impl Strategy<Value = Attributes> {
    let path = vec(asn(), 0..300).prop_map(|asns| AsPath::from_sequence(&asns));
    let lists = (
        vec(any::<u32>().prop_map(Community), 0..8),
        vec(any::<[u8; 8]>().prop_map(ExtendedCommunity), 0..4),
        vec(any::<(u32, u32, u32)>(), 0..4),
        vec(any::<u32>().prop_map(Ipv4Addr::from), 0..4),
    );
    let scalars = (
        prop_oneof![
            Just(Origin::Igp),
            Just(Origin::Egp),
            Just(Origin::Incomplete)
        ],
        any::<Option<u32>>(),
        any::<Option<u32>>(),
        any::<bool>(),
        proptest::option::of((asn(), any::<u32>())),
        any::<Option<u32>>(),
    );
    let unknown = vec((33u8..=255, vec(any::<u8>(), 0..300)), 0..3);
    (path, scalars, lists, unknown).prop_map(move |(as_path, scalars, lists, unknown)| {
        let internal = peer == PeerKind::Ibgp;
        let mut unknown: Vec<_> = unknown
            .into_iter()
            .map(|(code, value)| UnknownAttribute {
                flags: 0xe0,
                code,
                value: value.into(),
            })
            .collect();
        unknown.sort_by_key(|u| u.code);
        unknown.dedup_by_key(|u| u.code);
        let large = lists
            .2
            .into_iter()
            .map(|(global, local1, local2)| LargeCommunity {
                global,
                local1,
                local2,
            });
        Attributes {
            origin: scalars.0,
            as_path,
            med: scalars.1,
            local_pref: scalars.2.filter(|_| internal),
            atomic_aggregate: scalars.3,
            aggregator: scalars.4.map(|(asn, id)| Aggregator {
                asn,
                router_id: Ipv4Addr::from(id),
            }),
            originator_id: scalars.5.filter(|_| internal).map(Ipv4Addr::from),
            cluster_list: if internal {
                lists.3.into()
            } else {
                Box::default()
            },
            communities: sorted(lists.0),
            ext_communities: sorted(lists.1),
            large_communities: sorted(large.collect()),
            unknown: unknown.into(),
        }
    })
}

fn update(codec: Codec) -> impl Strategy<Value = Update> {
    let (v4, v6) = (Family::IPV4_UNICAST, Family::IPV6_UNICAST);
    (
        block(v4, codec, 0),
        proptest::option::of(block(v6, codec, 0)),
        proptest::option::of((next_hop_v6(), block(v6, codec, 1))),
        block(v4, codec, 0),
        attributes(codec.peer),
    )
        .prop_map(|(withdrawn, unreach, reach, nlri, attributes)| {
            let announces = !nlri.is_empty() || reach.is_some();
            Update {
                withdrawn,
                mp_unreach: unreach.map(|nlri| MpUnreach { nlri }),
                mp_reach: reach.map(|(next_hop, nlri)| MpReach { next_hop, nlri }),
                next_hop: (!nlri.is_empty()).then(|| NextHop::V4(Ipv4Addr::new(192, 0, 2, 7))),
                attributes: if announces {
                    attributes
                } else {
                    Attributes::default()
                },
                nlri,
                ..Update::empty()
            }
        })
}

fn capability() -> impl Strategy<Value = Capability> {
    let flags = || any::<(bool, bool)>();
    prop_oneof![
        family().prop_map(Capability::Multiprotocol),
        Just(Capability::RouteRefresh),
        Just(Capability::ExtendedMessage),
        Just(Capability::EnhancedRouteRefresh),
        vec(family().prop_map(|f| (f, 2u16)), 1..3).prop_map(Capability::ExtendedNextHop),
        (flags(), 0u16..4096, vec((family(), any::<bool>()), 0..3)).prop_map(|(f, time, list)| {
            Capability::GracefulRestart(GracefulRestart {
                restarting: f.0,
                notification: f.1,
                restart_time: time,
                families: list
                    .into_iter()
                    .map(|(family, forwarding_preserved)| GracefulRestartFamily {
                        family,
                        forwarding_preserved,
                    })
                    .collect(),
            })
        }),
        vec((family(), any::<bool>()), 1..3).prop_map(|list| {
            let mode = |send: bool| AddPathMode {
                receive: !send,
                send,
            };
            Capability::AddPath(list.into_iter().map(|(f, send)| (f, mode(send))).collect())
        }),
        vec((family(), any::<bool>(), 0u32..1 << 24), 1..3).prop_map(|list| {
            Capability::LongLivedGracefulRestart(
                list.into_iter()
                    .map(
                        |(family, forwarding_preserved, stale_time)| LongLivedFamily {
                            family,
                            forwarding_preserved,
                            stale_time,
                        },
                    )
                    .collect(),
            )
        }),
        (128u8..=255, vec(any::<u8>(), 0..100)).prop_map(|(code, value)| Capability::Unknown {
            code,
            value: value.into()
        }),
    ]
}

fn message(codec: Codec) -> impl Strategy<Value = Message> {
    let open = (
        asn(),
        any::<u16>(),
        1u32..,
        vec(capability(), 0..12),
        any::<bool>(),
    );
    let refresh = prop_oneof![
        Just(RefreshKind::Request),
        Just(RefreshKind::Begin),
        Just(RefreshKind::End),
        (3u8..).prop_map(RefreshKind::Unknown)
    ];
    prop_oneof![
        open.prop_map(
            |(asn, hold_time, id, capabilities, four)| Message::Open(Open {
                asn: if four { asn } else { asn % 65535 + 1 },
                hold_time,
                router_id: Ipv4Addr::from(id),
                capabilities,
                four_octet_as: four,
            })
        ),
        update(codec).prop_map(|u| Message::Update(Box::new(u))),
        (any::<u8>(), any::<u8>(), vec(any::<u8>(), 0..100)).prop_map(|(code, subcode, data)| {
            Message::Notification(Notification {
                code,
                subcode,
                data: data.into(),
            })
        }),
        Just(Message::Keepalive),
        (family(), refresh)
            .prop_map(|(family, kind)| Message::RouteRefresh(RouteRefresh { family, kind })),
    ]
}

fn read(bytes: &Bytes, codec: &Codec) -> Result<Message, Notification> {
    let mut framer = Framer::new();
    framer.set_extended(codec.extended_message);
    let mut buffer = BytesMut::from(&bytes[..]);
    let frame = framer.next(&mut buffer)?.expect("a whole message");
    assert!(buffer.is_empty());
    Message::decode(&frame, codec)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_message_reads_back_as_written(
        (codec, message) in codec().prop_flat_map(|c| (Just(c), message(c)))
    ) {
        // Some are longer than the session's messages may be; the encoder says so.
        if let Ok(bytes) = message.encode(&codec) {
            prop_assert!(bytes.len() <= codec.max_message());
            prop_assert_eq!(read(&bytes, &codec), Ok(message));
        } else {
            let long = matches!(message, Message::Update(_) | Message::Open(_));
            prop_assert!(long && !codec.extended_message);
        }
    }

    #[test]
    fn arbitrary_bodies_never_panic_and_allocate_no_more_routes_than_octets(
        codec in codec(), kind in 1u8..=5, body in vec(any::<u8>(), 0..200)
    ) {
        let mut wire = BytesMut::from(&[0xff; 16][..]);
        wire.extend_from_slice(&(19 + body.len() as u16).to_be_bytes());
        wire.extend_from_slice(&[kind]);
        wire.extend_from_slice(&body);
        if let Ok(Some(frame)) = Framer::new().next(&mut wire)
            && let Ok(Message::Update(update)) = Message::decode(&frame, &codec)
        {
            let announced = update.announcements().map(|(_, b)| b.len()).sum::<usize>();
            prop_assert!(announced + update.withdrawals().count() <= 2 * body.len());
        }
    }

    #[test]
    fn a_damaged_message_never_panics(
        (codec, message) in codec().prop_flat_map(|c| (Just(c), message(c))),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)
    ) {
        if let Ok(bytes) = message.encode(&codec) {
            let mut wire = BytesMut::from(&bytes[..]);
            for (at, value) in damage {
                let at = 19 + at.index(wire.len().saturating_sub(19).max(1));
                if at < wire.len() {
                    wire[at] = value;
                }
            }
            let mut framer = Framer::new();
            framer.set_extended(true);
            if let Ok(Some(frame)) = framer.next(&mut wire) {
                let _verdict = Message::decode(&frame, &codec).is_ok();
            }
        }
    }

    #[test]
    fn arbitrary_streams_never_panic(chunks in vec(vec(any::<u8>(), 0..60), 0..6)) {
        let mut buffer = BytesMut::new();
        for chunk in chunks {
            buffer.extend_from_slice(&chunk);
            if Framer::new().next(&mut buffer).is_err() {
                break;
            }
        }
    }

    #[test]
    fn packing_loses_no_route_and_stays_within_the_message_size(
        (codec, attributes, family, routes) in (codec(), family()).prop_flat_map(|(c, f)| {
            let add_path = c.add_path_tx.contains(f);
            (Just(c), attributes(c.peer), Just(f), vec(nlri(f, add_path), 0..3000))
        })
    ) {
        let next_hop = match family.afi {
            1 => NextHop::V4(Ipv4Addr::new(192, 0, 2, 1)),
            _ => NextHop::V6("2001:db8::1".parse().expect("an address")),
        };
        let mut messages = Vec::new();
        let done = Packer::new(codec).announce(family, &attributes, &next_hop, &routes, &mut messages);
        prop_assert!(done == routes.len() || done == 0);
        let mut seen = Vec::new();
        for bytes in &messages {
            prop_assert!(bytes.len() <= codec.max_message());
            let Ok(Message::Update(update)) = read(bytes, &codec) else {
                return Err(TestCaseError::fail("not an update"));
            };
            prop_assert_eq!(update.treatment(), Treatment::Accept);
            prop_assert_eq!(&update.attributes, &attributes);
            for (hop, block) in update.announcements() {
                prop_assert_eq!(hop, next_hop);
                seen.extend(block.iter());
            }
        }
        prop_assert_eq!(&seen[..], &routes[..done]);
        messages.clear();
        Packer::new(codec).withdraw(family, &routes, &mut messages);
        let mut seen = Vec::new();
        for bytes in &messages {
            let Ok(Message::Update(update)) = read(bytes, &codec) else {
                return Err(TestCaseError::fail("not an update"));
            };
            seen.extend(update.withdrawals());
        }
        prop_assert_eq!(seen, routes);
    }
}

#[test]
fn shutdown_text_is_cut_at_a_character() {
    let text = "ä".repeat(200);
    let n = Notification::cease_with_text(2, &text);
    assert_eq!(n.data.len(), 1 + 254);
    assert_eq!(n.shutdown_text(), Some("ä".repeat(127)));
    assert_eq!(n.kind(), Some(ErrorCode::Cease));
}
