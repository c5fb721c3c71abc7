//! A stream of octets from a peer into a speaker that has another one.
#![no_main]

#[allow(dead_code)]
mod targets;

libfuzzer_sys::fuzz_target!(|octets: &[u8]| targets::session(octets));
