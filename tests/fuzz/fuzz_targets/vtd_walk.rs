#![no_main]
//! See `tests::fuzz::vtd_walk`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::vtd_walk(data));
