//! A stream of octets from a client to a server that has another one.
#![no_main]

#[allow(dead_code)]
mod targets;

libfuzzer_sys::fuzz_target!(|octets: &[u8]| targets::to_server(octets));
