//! A stream of octets through the framer and the decoder.
#![no_main]

#[allow(dead_code)]
mod targets;

libfuzzer_sys::fuzz_target!(|octets: &[u8]| targets::message(octets));
