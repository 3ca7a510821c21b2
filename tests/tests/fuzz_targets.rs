//! The fuzz targets as ordinary tests: over their seed corpora, and over random bytes. A failing
//! input that should stay goes into the corpus, see `tests/fuzz/README.md`.

use std::fs;
use std::path::Path;

use proptest::collection::vec;
use proptest::prelude::*;
use tests::fuzz;

fn corpus(target: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut inputs = 0;
    for entry in fs::read_dir(&folder).expect("a corpus") {
        let path = entry.expect("entry").path();
        println!("{}", path.display());
        run(&fs::read(&path).expect("input"));
        inputs += 1;
    }
    assert!(inputs > 0, "{} is empty", folder.display());
}

#[test]
fn pci_bus_corpus() {
    corpus("pci_bus", fuzz::pci_bus);
}

#[test]
fn pci_msi_corpus() {
    corpus("pci_msi", fuzz::pci_msi);
}

#[test]
fn pci_msix_corpus() {
    corpus("pci_msix", fuzz::pci_msix);
}

#[test]
fn nvme_corpus() {
    corpus("nvme", fuzz::nvme);
}

#[test]
fn virtio_net_corpus() {
    corpus("virtio_net", fuzz::virtio_net);
}

#[test]
fn vtd_unit_corpus() {
    corpus("vtd_unit", fuzz::vtd_unit);
}

#[test]
fn vtd_walk_corpus() {
    corpus("vtd_walk", fuzz::vtd_walk);
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases)
    }
}

proptest! {
    #![proptest_config(config(100))]

    #[test]
    fn pci_bus(data in vec(any::<u8>(), 0..1500)) {
        fuzz::pci_bus(&data);
    }

    #[test]
    fn pci_msi(data in vec(any::<u8>(), 0..1200)) {
        fuzz::pci_msi(&data);
    }

    #[test]
    fn vtd_unit(data in vec(any::<u8>(), 0..1500)) {
        fuzz::vtd_unit(&data);
    }

    #[test]
    fn pci_msix(data in vec(any::<u8>(), 0..800)) {
        fuzz::pci_msix(&data);
    }

    #[test]
    fn vtd_walk(data in vec(any::<u8>(), 0..1200)) {
        fuzz::vtd_walk(&data);
    }
}

proptest! {
    #![proptest_config(config(30))]

    #[test]
    fn nvme(data in vec(any::<u8>(), 0..1500)) {
        fuzz::nvme(&data);
    }

    #[test]
    fn virtio_net(data in vec(any::<u8>(), 0..1500)) {
        fuzz::virtio_net(&data);
    }
}
