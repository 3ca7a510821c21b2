#![no_main]
//! See `tests::fuzz::pci_msi`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::pci_msi(data));
