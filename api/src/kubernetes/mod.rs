//! Kubernetes' own objects.

mod names;
mod native;

pub use names::*;
pub use native::*;
