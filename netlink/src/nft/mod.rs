//! nf_tables: model, encoder, decoder, transactions and dumps.
//!
//! One [`Transaction`] is one atomic batch: the kernel applies all of it or nothing, and every error is mapped back to
//! the object that caused it. The names of chains and sets are the caller's; `nft` cannot print some words as names
//! (`fwd`, `set`), so owners use a prefix.

mod event;
mod expr;
mod expr_wire;
pub mod foreign;
mod handle;
pub mod matching;
mod message;
mod model;
mod quiet;
mod set;
mod transaction;

pub use event::{Changed, NftEvent};

pub use expr::{
    Base, CmpOp, Ct, DynsetOp, Expr, FibResult, Meta, NatKind, Reg, Reject, Rt, ct_state,
    ct_status, fib_flag, nat_flag,
};
pub use handle::{Generation, Nft};
pub use model::{
    BaseHook, Chain, ChainType, Family, Hook, ListedChain, ListedRule, Policy, Rule, Table,
    TableName, Verdict,
};
pub(crate) use quiet::Listener;
pub use set::{Data, DataType, Elem, Key, KeyType, ListedSet, MapData, Set};
pub use transaction::{Committed, Failure, Object, Position, Rejected, Transaction};
