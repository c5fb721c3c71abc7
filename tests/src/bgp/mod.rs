//! `bgpd` beside the BGP daemons that others run: each in a network namespace of its own, on one common segment.
//!
//! [`speaker`] says in words of our own what a speaker is to do and how it is asked what it knows; [`cali`] is our
//! side of it, [`bird`], [`frr`], [`gobgp`], [`openbgpd`] and [`exabgp`] are the others. What they tell about a route
//! is brought into one form ([`route`]), so that a case is written once. [`segment`] makes the namespaces, [`process`]
//! keeps the daemons, [`package`] finds them and [`watch`] notices a route that was gone for a moment.

pub mod bird;
pub mod cali;
pub mod exabgp;
pub mod frr;
pub mod gobgp;
pub mod openbgpd;
pub mod package;
pub mod pair;
pub mod process;
pub mod route;
pub mod segment;
pub mod speaker;
pub mod watch;

/// A test for each case of each daemon. A case is a function of the test's file that takes a stage and a product.
#[macro_export]
macro_rules! cases {
    ($($daemon:ident ($product:expr): $($case:ident)*;)*) => {
        $(mod $daemon {
            use super::*;
            $(#[test]
            fn $case() {
                let mut stage = $crate::bgp::speaker::Stage::new().expect("a folder");
                if let Err(error) = super::$case(&mut stage, $product) {
                    panic!("{error:#}\n{}", stage.logs());
                }
            })*
        })*
    };
}
