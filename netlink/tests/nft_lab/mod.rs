//! A namespace with a table of ours in the making.

use std::sync::Arc;

use cali_netlink::Nft;
use cali_netlink::nft::{Family, TableName, Transaction};
use cali_netlink::testing::TestNs;

pub(crate) fn table() -> TableName {
    TableName::new(Family::Inet, "calico")
}

pub(crate) fn name(text: &str) -> Arc<str> {
    text.into()
}

pub(crate) fn open(label: &str) -> (TestNs, Nft) {
    let ns = TestNs::new(label);
    let nft = Nft::open(ns.netns()).unwrap();
    (ns, nft)
}

pub(crate) fn begin() -> Transaction {
    let mut tx = Transaction::new(table());
    tx.add_table();
    tx
}
