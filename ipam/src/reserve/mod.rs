//! The node's reserve: addresses claimed ahead in the datastore, handed to pods without asking it.
//!
//! 1. The node claims a few addresses of each pool that it uses, under its own handle (compare-and-swap).
//! 2. A pod gets one of them: the change is journalled and synced to disk ([`journal`]), then answered.
//! 3. Afterwards the datastore is rewritten to show the pod as the holder. Until then it shows the node: nobody else
//!    can take the address.
//! 4. A pod that goes gives its address back to the reserve, at its end.
//!
//! A node out of contact with the datastore hands out its reserve and nothing beyond it.

pub mod journal;
mod keeper;
pub mod state;
mod upkeep;

pub use keeper::{Ask, Keeper, Settings};
pub use state::{Attachment, Held};
