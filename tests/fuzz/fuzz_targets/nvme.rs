#![no_main]
//! See `tests::fuzz::nvme`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::nvme(data));
