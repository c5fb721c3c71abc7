//! What listeners are told of nf_tables by the real kernel. Run as root.

#![allow(clippy::unwrap_used)]

mod nft_lab;

use std::time::Duration;

use cali_netlink::nft::{
    Chain, Changed, DataType, Elem, Family, Key, KeyType, NftEvent, Set, TableName, Transaction,
};
use cali_netlink::{Event, Nft};
use nft_lab::{begin, name, open, table};

#[tokio::test]
async fn foreign_changes_are_told_apart_from_our_own() {
    let (ns, nft) = open("events");
    let mut events = Nft::events(ns.netns()).unwrap();
    let mut tx = begin();
    tx.add_chain(&Chain::regular("cali-x"));
    nft.commit(tx).unwrap();
    ns.run("nft", &["add rule inet calico cali-x drop"]);
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    let mut generation = None;
    let limit = Duration::from_secs(10);
    while generation.is_none() {
        let Event::Nft(event) = tokio::time::timeout(limit, events.next())
            .await
            .expect("events")
            .unwrap()
        else {
            panic!("only nf_tables events come here")
        };
        let own = event.port() == nft.port();
        match event {
            NftEvent::Change {
                object,
                gone,
                table: changed,
                ..
            } => {
                assert_eq!((changed, gone), (table(), false));
                if own {
                    ours.push(object)
                } else {
                    theirs.push(object)
                }
            }
            NftEvent::Commit {
                generation: new, ..
            } if !own => generation = Some(new),
            NftEvent::Commit { .. } => {}
        }
    }
    assert_eq!(ours, [Changed::Table, Changed::Chain(name("cali-x"))]);
    assert!(
        matches!(theirs.as_slice(), [Changed::Rule(chain, _)] if **chain == *"cali-x"),
        "{theirs:?}"
    );
    assert_eq!(
        generation.as_ref().map(|new| new.process.as_str()),
        Some("nft")
    );
    assert_eq!(nft.generation(), Ok(generation.unwrap().id));
}

/// Listeners of the process are not told of its large transactions, and miss nothing of what others do meanwhile.
#[tokio::test]
async fn large_transactions_are_not_told_of_and_hide_nothing() {
    let (ns, nft) = open("quiet");
    let mut events = Nft::events(ns.netns()).unwrap();
    let limit = Duration::from_secs(10);
    let set = Set::exact("cali-x", KeyType::one(DataType::Ipv4Addr));
    let element = |number: u32| Elem::new(Key::ip(std::net::Ipv4Addr::from(number).into()));
    let mut tx = begin();
    tx.add_set(&set);
    tx.add_elements(&set, &(0..1000).map(element).collect::<Vec<_>>());
    nft.commit(tx).unwrap();
    let mut tx = begin();
    tx.add_chain(&Chain::regular("cali-y"));
    nft.commit(tx).unwrap();
    let first = tokio::time::timeout(limit, events.next()).await.unwrap();
    let Event::Nft(NftEvent::Change { object, .. }) = first.unwrap() else {
        panic!("the small one is told of")
    };
    assert_eq!(object, Changed::Chain(name("cali-y")));

    // Somebody else, all the while.
    let other = Nft::open(ns.netns()).unwrap();
    let theirs = std::thread::spawn(move || {
        let table = TableName::new(Family::Inet, "theirs");
        let mut tx = Transaction::new(table.clone());
        tx.add_table();
        other.commit(tx).unwrap();
        for number in 0..200 {
            let mut tx = Transaction::new(table.clone());
            tx.add_chain(&Chain::regular(format!("c{number}").as_str()));
            other.commit(tx).unwrap();
            std::thread::yield_now();
        }
        let mut tx = Transaction::new(table);
        tx.add_chain(&Chain::regular("last"));
        move || other.commit(tx).map(|_| ())
    });
    let mut written = 1000;
    while !theirs.is_finished() {
        let mut tx = begin();
        tx.add_elements(
            &set,
            &(written..written + 200).map(element).collect::<Vec<_>>(),
        );
        nft.commit(tx).unwrap();
        written += 200;
    }
    let last = theirs.join().unwrap();
    last().unwrap();
    let (mut told, mut lost) = (0, 0);
    loop {
        let event = tokio::time::timeout(limit, events.next()).await.unwrap();
        match event.unwrap() {
            Event::Overflow => (told, lost) = (0, lost + 1),
            Event::Nft(NftEvent::Change {
                object: Changed::Chain(chain),
                ..
            }) if *chain == *"last" => break,
            Event::Nft(NftEvent::Change {
                object: Changed::Chain(chain),
                ..
            }) if chain.starts_with('c') => told += 1,
            Event::Nft(NftEvent::Change {
                table: changed,
                object,
                ..
            }) => {
                let ours = changed == table() && object == Changed::Elements(name("cali-x"));
                assert!(!ours, "told of a large transaction");
            }
            _ => {}
        }
    }
    eprintln!("{told} of 200 told since the last of {lost} gaps");
    assert!(
        lost > 0 || told == 200,
        "{told} of 200 changes and no word that some are missing"
    );
}
