//! Which descriptions make a function.

use iommu::{Bdf, GuestRam, Upstream};
use pci::{BarIndex, BarKind, BuildError, ClassCode, FunctionBuilder, Identity};

const WIDE: BarKind = BarKind::Memory64 {
    prefetchable: false,
};

fn function() -> FunctionBuilder {
    FunctionBuilder::new(Identity {
        vendor: 1,
        device: 2,
        class: ClassCode {
            base: 3,
            sub: 4,
            interface: 5,
        },
        revision: 6,
        subsystem_vendor: 7,
        subsystem: 8,
    })
}

fn build(builder: FunctionBuilder) -> Result<u16, BuildError> {
    let bdf = Bdf::new(0, 1, 0).unwrap();
    let endpoint = builder.build(bdf, &Upstream::memory(GuestRam::new()))?;
    assert_eq!(endpoint.bdf(), bdf);
    assert_eq!(endpoint.bus_master().source, bdf.source_id());
    Ok(endpoint.msix().vectors())
}

#[test]
fn bars_must_fit_their_registers() {
    let bar = |index, size, kind| build(function().bar(BarIndex(index), size, kind));
    for index in 0..6 {
        assert_eq!(bar(index, 128, BarKind::Memory32), Ok(0));
    }
    assert_eq!(bar(4, 1 << 51, WIDE), Ok(0));
    assert_eq!(bar(5, 128, WIDE), Err(BuildError::NoSuchBar(5)));
    assert_eq!(
        bar(6, 128, BarKind::Memory32),
        Err(BuildError::NoSuchBar(6))
    );
    assert_eq!(bar(255, 128, WIDE), Err(BuildError::NoSuchBar(255)));
    for size in [0, 1, 64, 129, 3 << 12, 1 << 32] {
        let error = bar(0, size, BarKind::Memory32).unwrap_err();
        assert!(
            matches!(error, BuildError::BarSize { bar: 0, .. }),
            "{size}"
        );
    }
    assert!(bar(0, 1 << 52, WIDE).is_err());

    let twice = function()
        .bar(BarIndex(0), 4096, WIDE)
        .bar(BarIndex(1), 4096, BarKind::Memory32);
    assert_eq!(build(twice), Err(BuildError::BarTaken(1)));
    let twice = function()
        .bar(BarIndex(1), 4096, BarKind::Memory32)
        .bar(BarIndex(0), 4096, WIDE);
    assert_eq!(build(twice), Err(BuildError::BarTaken(0)));
}

#[test]
fn msix_structures_must_fit_their_bar() {
    let msix = |vectors, table, pba| {
        let builder =
            function()
                .bar(BarIndex(0), 0x1_0000, WIDE)
                .bar(BarIndex(2), 0x1000, BarKind::Memory32);
        build(builder.msix(vectors, table, pba))
    };
    let (a, b) = (BarIndex(0), BarIndex(2));
    assert_eq!(msix(2048, (a, 0), (a, 0x8000)), Ok(2048));
    assert_eq!(msix(2048, (a, 0x8000), (b, 0xf00)), Ok(2048));
    assert_eq!(msix(1, (b, 0xff0), (b, 0)), Ok(1));
    for vectors in [0, 2049] {
        let error = msix(vectors, (a, 0), (b, 0));
        assert_eq!(error, Err(BuildError::Vectors(vectors)));
    }
    assert_eq!(msix(2, (a, 0), (a, 24)), Err(BuildError::MsixOverlap));
    assert_eq!(msix(2, (a, 8), (a, 0)), Ok(2));
    let places = [
        (a, 0xffe8),
        (b, 0xff8),
        (b, 4),
        (BarIndex(1), 0),
        (BarIndex(9), 0),
        (a, u64::MAX - 7),
    ];
    for place in places {
        let error = msix(2, place, (a, 0x100)).unwrap_err();
        assert!(
            matches!(error, BuildError::MsixPlace { name: "table", .. }),
            "{place:?}"
        );
    }
    let error = msix(65, (a, 0), (b, 0xff8)).unwrap_err();
    assert!(matches!(
        error,
        BuildError::MsixPlace {
            name: "PBA",
            len: 16,
            ..
        }
    ));
}

#[test]
fn capabilities_must_fit_their_space() {
    let vendor =
        |builder: FunctionBuilder, len| builder.vendor_capability(vec![0; len], vec![0; len]);
    let bare = || function().power_management(false).express(false);
    assert_eq!(build(vendor(bare(), 189)), Ok(0));
    assert_eq!(
        build(vendor(bare(), 190)),
        Err(BuildError::CapabilitiesTooLong(196))
    );
    assert_eq!(
        build(vendor(vendor(function(), 60), 65)),
        Err(BuildError::CapabilitiesTooLong(8 + 60 + 64 + 68))
    );
    assert_eq!(
        build(vendor(bare(), 253)),
        Err(BuildError::VendorCapability(0))
    );
    let uneven = vendor(function(), 4).vendor_capability(vec![0; 4], vec![0; 5]);
    assert_eq!(build(uneven), Err(BuildError::VendorCapability(1)));
}
