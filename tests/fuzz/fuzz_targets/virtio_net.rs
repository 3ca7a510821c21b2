#![no_main]
//! See `tests::fuzz::virtio_net`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::virtio_net(data));
