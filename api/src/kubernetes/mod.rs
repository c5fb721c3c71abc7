//! Kubernetes' own objects.

mod native;

pub use native::*;
