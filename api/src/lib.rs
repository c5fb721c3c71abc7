//! Calico's resources as Rust types: what a user may write, what it means, and how it is written
//! back.
//!
//! Reading a file: [`manifest::parse`], then [`defaults`], then [`validate`]. Selector expressions
//! are parsed and evaluated in [`selector`]. This crate holds the `projectcalico.org/v3` kinds ([`v3`]), the native Kubernetes kinds from
//! which some of them are made ([`kubernetes`]), and the stream of changes that the rest of the
//! system is driven by ([`update`]). It is pure: no I/O, no clock, no randomness.

mod any;
mod cidr;
mod decode;
mod defaults;
mod kind;
pub mod kubernetes;
pub mod manifest;
mod metadata;
mod names;
mod resource;
pub mod schema;
pub mod selector;
mod text;
pub mod update;
pub mod v3;
mod validate;

pub use any::AnyResource;
pub use cidr::{Cidr, CidrError, Net};
pub use decode::DecodeError;
pub use defaults::defaults;
pub use kind::{CALICO_API_VERSION, Key, Kind, UnknownKind};
pub use metadata::{ObjectMeta, OwnerReference, StringMap};
pub use names::{Asn, AsnError, MacAddr, MacAddrError, NodeName, Revision};
pub use resource::{NoStatus, Resource, Spec};
pub use text::UnknownValue;
pub use validate::{FieldError, validate};
