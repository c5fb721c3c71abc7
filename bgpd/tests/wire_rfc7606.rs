//! RFC 7606, 7607, 6793: what each malformed attribute leads to, from raw octets.

use bgpd::wire::{
    Codec, Family, FamilySet, Framer, Message, Notification, PeerKind, Treatment, Update,
};
use bytes::BytesMut;

const ORIGIN: &str = "40010100";
const PATH: &str = "40020602010000fde9"; // one sequence: 65001
const NEXT_HOP: &str = "400304c0000201";
const LOCAL_PREF: &str = "40050400000064";
const NLRI: &str = "180a0000";

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    let pair = |p: &[u8]| u8::from_str_radix(std::str::from_utf8(p).expect("ASCII"), 16);
    digits
        .chunks(2)
        .map(|p| pair(p).expect("hexadecimal digits"))
        .collect()
}

fn codec(peer: PeerKind) -> Codec {
    Codec {
        peer,
        four_octet_as: true,
        extended_message: false,
        families: FamilySet::ALL,
        add_path_rx: FamilySet::EMPTY,
        add_path_tx: FamilySet::EMPTY,
        extended_next_hop: FamilySet::EMPTY,
    }
}

fn decode(
    codec: &Codec,
    withdrawn: &str,
    attributes: &str,
    nlri: &str,
) -> Result<Update, Notification> {
    let (withdrawn, attributes, nlri) = (hex(withdrawn), hex(attributes), hex(nlri));
    let mut body = Vec::new();
    body.extend((withdrawn.len() as u16).to_be_bytes());
    body.extend(withdrawn);
    body.extend((attributes.len() as u16).to_be_bytes());
    body.extend(attributes);
    body.extend(nlri);
    let mut wire = BytesMut::from(&[0xff; 16][..]);
    wire.extend_from_slice(&(19 + body.len() as u16).to_be_bytes());
    wire.extend_from_slice(&[2]);
    wire.extend_from_slice(&body);
    let frame = Framer::new().next(&mut wire)?.expect("a whole message");
    match Message::decode(&frame, codec)? {
        Message::Update(update) => Ok(*update),
        other => panic!("expected an UPDATE, got {other:?}"),
    }
}

/// Expected outcome of one attribute added to a good UPDATE.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Expect {
    Ok,
    Discard,
    Withdraw,
    Reset(u8, u8),
}
use Expect::{Discard, Ok as Fine, Reset, Withdraw};

/// The attribute takes the place of the good one with the same code.
fn outcome(peer: PeerKind, attribute: &str) -> Expect {
    let code = hex(attribute)[1];
    let good = [(1, ORIGIN), (2, PATH), (3, NEXT_HOP), (5, LOCAL_PREF)];
    let mut field: String = good
        .iter()
        .filter(|(c, _)| *c != code && (*c != 5 || peer == PeerKind::Ibgp))
        .map(|(_, a)| *a)
        .collect();
    field.push_str(attribute);
    match decode(&codec(peer), "", &field, NLRI) {
        Ok(update) => match update.treatment() {
            Treatment::Accept => Fine,
            Treatment::AttributeDiscard => Discard,
            Treatment::TreatAsWithdraw => Withdraw,
            Treatment::SessionReset => panic!("a decoded update never asks for a reset"),
        },
        Err(n) => Reset(n.code, n.subcode),
    }
}

#[test]
fn every_attribute_has_its_own_consequence() {
    // (attribute, from an external peer, from an internal peer, what it is)
    let cases = [
        ("40010100", Fine, Fine, "origin"),
        ("40010103", Withdraw, Withdraw, "origin value 3"),
        ("4001020000", Withdraw, Withdraw, "origin of 2 octets"),
        ("400100", Withdraw, Withdraw, "empty origin"),
        ("c0010100", Withdraw, Withdraw, "origin marked optional"),
        ("60010100", Withdraw, Withdraw, "origin marked partial"),
        ("40020602010000fde9", Fine, Fine, "path"),
        ("400200", Fine, Fine, "empty path"),
        (
            "40020605010000fde9",
            Withdraw,
            Withdraw,
            "unknown segment kind",
        ),
        ("4002020200", Withdraw, Withdraw, "empty segment"),
        (
            "40020602020000fde9",
            Withdraw,
            Withdraw,
            "segment longer than the attribute",
        ),
        ("4002060201 00000000", Withdraw, Withdraw, "AS 0 (RFC 7607)"),
        (
            "40020702010000fde900",
            Withdraw,
            Withdraw,
            "octet left over",
        ),
        ("40030400000000", Withdraw, Withdraw, "next hop 0.0.0.0"),
        ("4003047f000001", Withdraw, Withdraw, "next hop 127.0.0.1"),
        ("400304e0000001", Withdraw, Withdraw, "multicast next hop"),
        ("400303c00002", Withdraw, Withdraw, "next hop of 3 octets"),
        ("80040400000001", Fine, Fine, "MED"),
        ("800403000001", Withdraw, Withdraw, "MED of 3 octets"),
        (
            "c0040400000001",
            Withdraw,
            Withdraw,
            "MED marked transitive",
        ),
        ("40050400000064", Discard, Fine, "local pref"),
        ("400503000064", Discard, Withdraw, "local pref of 3 octets"),
        ("400600", Fine, Fine, "atomic aggregate"),
        (
            "40060100",
            Discard,
            Discard,
            "atomic aggregate with a value",
        ),
        ("c00708 0000fde9 0a000001", Fine, Fine, "aggregator"),
        (
            "c00706 fde9 0a000001",
            Discard,
            Discard,
            "two-octet aggregator in a four-octet session",
        ),
        (
            "c00708 00000000 0a000001",
            Discard,
            Discard,
            "aggregator AS 0",
        ),
        ("c0080400010002", Fine, Fine, "community"),
        ("e0080400010002", Fine, Fine, "community marked partial"),
        ("c00800", Withdraw, Withdraw, "empty communities"),
        (
            "c0080500010002ff",
            Withdraw,
            Withdraw,
            "communities of 5 octets",
        ),
        (
            "80080400010002",
            Withdraw,
            Withdraw,
            "communities not transitive",
        ),
        ("8009040a000001", Discard, Fine, "originator"),
        ("8009030a0000", Discard, Withdraw, "originator of 3 octets"),
        ("800a040a000001", Discard, Fine, "cluster list"),
        ("800a00", Discard, Withdraw, "empty cluster list"),
        ("c01008 0002000100000001", Fine, Fine, "extended community"),
        (
            "c01007 00020001000000",
            Withdraw,
            Withdraw,
            "extended communities of 7 octets",
        ),
        (
            "c011060201 0000fde9",
            Fine,
            Fine,
            "AS4_PATH in a four-octet session",
        ),
        (
            "c01208 0000fde9 0a000001",
            Fine,
            Fine,
            "AS4_AGGREGATOR in a four-octet session",
        ),
        (
            "c01207 0000fde9 0a0000",
            Discard,
            Discard,
            "AS4_AGGREGATOR of 7 octets",
        ),
        (
            "c0200c 000000010000000200000003",
            Fine,
            Fine,
            "large community",
        ),
        (
            "c0200b 0000000100000002000000",
            Withdraw,
            Withdraw,
            "large communities of 11 octets",
        ),
        ("c02000", Withdraw, Withdraw, "empty large communities"),
        ("c063020102", Fine, Fine, "unknown transitive"),
        ("8063020102", Fine, Fine, "unknown non-transitive"),
        ("4063020102", Reset(3, 2), Reset(3, 2), "unknown well-known"),
        (
            "800e03000101",
            Reset(3, 9),
            Reset(3, 9),
            "MP_REACH too short",
        ),
        (
            "800e0900010105c0000201aa",
            Reset(3, 9),
            Reset(3, 9),
            "MP_REACH next hop of 5 octets",
        ),
        (
            "c00e03000101",
            Reset(3, 4),
            Reset(3, 4),
            "MP_REACH marked transitive",
        ),
        (
            "800f020001",
            Reset(3, 9),
            Reset(3, 9),
            "MP_UNREACH too short",
        ),
        (
            "800f0500020181ff",
            Reset(3, 9),
            Reset(3, 9),
            "MP_UNREACH with a bad prefix length",
        ),
    ];
    let mut wrong = Vec::new();
    for (attribute, external, internal, what) in cases {
        let seen = (
            outcome(PeerKind::Ebgp, attribute),
            outcome(PeerKind::Ibgp, attribute),
        );
        if seen != (external, internal) {
            wrong.push(format!(
                "{what}: expected {:?}, saw {seen:?}",
                (external, internal)
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn missing_mandatory_attributes_withdraw_the_routes() {
    for left_out in [ORIGIN, PATH, NEXT_HOP] {
        let field: String = [ORIGIN, PATH, NEXT_HOP]
            .into_iter()
            .filter(|a| *a != left_out)
            .collect();
        let update = decode(&codec(PeerKind::Ebgp), "", &field, NLRI).expect("no reset");
        assert_eq!(update.treatment(), Treatment::TreatAsWithdraw, "{left_out}");
        assert_eq!(update.announcements().count(), 0);
        let withdrawn: Vec<String> = update.withdrawals().map(|r| r.prefix.to_string()).collect();
        assert_eq!(withdrawn, ["10.0.0.0/24"]);
    }
}

#[test]
fn treat_as_withdraw_keeps_the_withdrawals_of_the_message() {
    let update = decode(&codec(PeerKind::Ebgp), "180b0000", "40010103", NLRI).expect("no reset");
    let withdrawn: Vec<String> = update.withdrawals().map(|r| r.prefix.to_string()).collect();
    assert_eq!(withdrawn, ["11.0.0.0/24", "10.0.0.0/24"]);
}

#[test]
fn an_attribute_that_overruns_the_field_withdraws_the_routes() {
    let field = format!("{ORIGIN}{PATH}{NEXT_HOP}c008ff00010002");
    let update = decode(&codec(PeerKind::Ebgp), "", &field, NLRI).expect("no reset");
    assert_eq!(update.treatment(), Treatment::TreatAsWithdraw);
}

#[test]
fn the_first_of_two_equal_attributes_counts() {
    let field = format!("{ORIGIN}{PATH}{NEXT_HOP}8004040000000180040400000002");
    let update = decode(&codec(PeerKind::Ebgp), "", &field, NLRI).expect("no reset");
    assert_eq!(update.treatment(), Treatment::AttributeDiscard);
    assert_eq!(update.attributes.med, Some(1));
}

#[test]
fn two_mp_attributes_of_one_kind_end_the_session() {
    let field = "800f03000201800f03000201";
    let n = decode(&codec(PeerKind::Ebgp), "", field, "").expect_err("a reset");
    assert_eq!((n.code, n.subcode), (3, 1));
}

#[test]
fn unreadable_routes_end_the_session() {
    for nlri in ["210a000000", "180a00", "18"] {
        let field = format!("{ORIGIN}{PATH}{NEXT_HOP}");
        let n = decode(&codec(PeerKind::Ebgp), "", &field, nlri).expect_err("a reset");
        assert_eq!((n.code, n.subcode), (3, 10), "{nlri}");
    }
}

#[test]
fn end_of_rib_is_seen_in_both_forms() {
    let v4 = decode(&codec(PeerKind::Ebgp), "", "", "").expect("no reset");
    assert_eq!(v4.as_end_of_rib(), Some(Family::IPV4_UNICAST));
    let v6 = decode(&codec(PeerKind::Ebgp), "", "800f03000201", "").expect("no reset");
    assert_eq!(v6.as_end_of_rib(), Some(Family::IPV6_UNICAST));
    let not = decode(&codec(PeerKind::Ebgp), NLRI, "", "").expect("no reset");
    assert_eq!(not.as_end_of_rib(), None);
}

#[test]
fn as4_path_replaces_the_tail_of_a_two_octet_path() {
    let old = Codec {
        four_octet_as: false,
        ..codec(PeerKind::Ebgp)
    };
    // AS_PATH 100 23456 23456, AS4_PATH 70000 80000.
    let path = "40020802030064 5ba0 5ba0";
    let as4 = "c0110a0202 00011170 00013880";
    let show = |extra: &str, as4: &str| {
        let field = format!("{ORIGIN}{path}{NEXT_HOP}{extra}{as4}");
        decode(&old, "", &field, NLRI)
            .expect("no reset")
            .attributes
            .as_path
            .to_string()
    };
    assert_eq!(show("", as4), "100 70000 80000");
    // An aggregator that speaks two octets has the last word: AS4_* are ignored.
    let fresh = "c00706 0065 0a000001";
    assert_eq!(
        show(fresh, &format!("{as4}c01208 00011170 0a000002")),
        "100 23456 23456"
    );
    // A longer AS4_PATH is ignored.
    assert_eq!(
        show("", "c011120204 00000001 00000002 00000003 00000004"),
        "100 23456 23456"
    );
    // A malformed one as well.
    assert_eq!(show("", "c01103020100"), "100 23456 23456");
}

#[test]
fn ipv4_routes_may_have_an_ipv6_next_hop_when_negotiated() {
    let hop = "20010db8000000000000000000000001";
    let field = format!("800e1900010110{hop}00{NLRI}{ORIGIN}{PATH}");
    let with = Codec {
        extended_next_hop: FamilySet::IPV4,
        ..codec(PeerKind::Ebgp)
    };
    let update = decode(&with, "", &field, "").expect("no reset");
    let (next_hop, block) = update.announcements().next().expect("a block");
    assert_eq!(next_hop.gateway().to_string(), "2001:db8::1");
    assert_eq!(
        block.iter().next().expect("a route").prefix.to_string(),
        "10.0.0.0/24"
    );
    let n = decode(&codec(PeerKind::Ebgp), "", &field, "").expect_err("not negotiated");
    assert_eq!((n.code, n.subcode), (3, 9));
}

#[test]
fn lengths_of_the_header_are_checked_before_the_body_arrives() {
    let head = |len: u16, kind: u8| {
        let mut wire = BytesMut::from(&[0xff; 16][..]);
        wire.extend_from_slice(&len.to_be_bytes());
        wire.extend_from_slice(&[kind]);
        wire
    };
    for (len, kind) in [
        (18, 4),
        (20, 4),
        (28, 1),
        (4097, 2),
        (4097, 1),
        (20, 3),
        (22, 5),
    ] {
        let n = Framer::new()
            .next(&mut head(len, kind))
            .expect_err("bad length");
        assert_eq!(
            (n.code, n.subcode, &n.data[..]),
            (1, 2, &len.to_be_bytes()[..]),
            "{len} {kind}"
        );
    }
    let n = Framer::new().next(&mut head(19, 9)).expect_err("bad type");
    assert_eq!((n.code, n.subcode, &n.data[..]), (1, 3, &[9][..]));
    let mut extended = Framer::new();
    extended.set_extended(true);
    assert_eq!(extended.next(&mut head(65535, 2)), Ok(None));
    assert!(
        extended.next(&mut head(4097, 1)).is_err(),
        "OPEN stays at 4096"
    );
    let n = Framer::new()
        .next(&mut BytesMut::from(&b"GET / HTTP"[..]))
        .expect_err("no marker");
    assert_eq!((n.code, n.subcode), (1, 1));
}
