//! The bus and MSI-X against plain models, over random bytes. A failure that should stay goes to the seed
//! corpus, see `tests/fuzz/`.

use proptest::collection::vec;
use proptest::prelude::*;
use tests::fuzz;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(100) })]

    #[test]
    fn bus(data in vec(any::<u8>(), 0..1500)) {
        fuzz::pci_bus(&data);
    }

    #[test]
    fn msix(data in vec(any::<u8>(), 0..800)) {
        fuzz::pci_msix(&data);
    }
}
