#![no_main]
//! See `tests::fuzz::pci_bus`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::pci_bus(data));
