//! The DSDT: what the machine has that cannot be enumerated.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Or, Package, Path, ResourceTemplate,
    Return, Scope, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use iommu::Bdf;

use super::{AcpiConfig, OEM, REVISION, SLEEP_TYPE_S5, TABLE, bytes};
use crate::layout;

/// Interface for PCI Express host bridges in `_OSC` (PCI Firmware 3.3, 4.5.1).
const OSC_UUID: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
/// Control granted in `_OSC`: PCIe capability structures, advanced error reporting. Native hot-plug
/// and PME are not: there are no root ports.
const OSC_CONTROL: u32 = 0x18;
/// `_OSC` status: unrecognised UUID.
const OSC_BAD_UUID: u32 = 1 << 2;
/// `_STA`: present, enabled, shown, working.
const STA_ON: u8 = 0x0f;

pub(super) fn table(config: &AcpiConfig) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    let mut aml = system_bus(config);
    let (s5, zero) = (SLEEP_TYPE_S5, ZERO);
    aml.extend(bytes(&Name::new(
        "_S5_".into(),
        &Package::new(vec![&s5, &zero, &zero, &zero]),
    )));
    table.append_slice(&aml);
    table.as_slice().to_vec()
}

fn system_bus(config: &AcpiConfig) -> Vec<u8> {
    let devices = [
        host_bridge(config),
        motherboard(),
        com1(),
        panic_device(),
        power_button(),
        event_device(),
    ];
    Scope::raw("_SB_".into(), devices.concat())
}

fn host_bridge(config: &AcpiConfig) -> Vec<u8> {
    let window_32 = layout::PCI_WINDOW_32;
    let window_64 = &config.pci_window_64;
    let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let config_ports = layout::PCI_CONFIG.start;
    let osc = osc();
    let routing = routing();
    bytes(&Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_UID".into(), &ZERO),
            // Coherent with CPU caches.
            &Name::new("_CCA".into(), &1u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &AddressSpace::new_bus_number(0u16, 0xff),
                    &IO::new(config_ports, config_ports, 1, 8),
                    &AddressSpace::new_io(
                        *layout::PCI_IO_WINDOW.start(),
                        *layout::PCI_IO_WINDOW.end(),
                        None,
                    ),
                    &AddressSpace::new_memory(
                        AddressSpaceCacheable::NotCacheable,
                        true,
                        narrow(window_32.start),
                        narrow(window_32.end - 1),
                        None,
                    ),
                    &AddressSpace::new_memory(
                        AddressSpaceCacheable::NotCacheable,
                        true,
                        window_64.start,
                        window_64.end - 1,
                        None,
                    ),
                ]),
            ),
            &osc,
            &routing,
        ],
    ))
}

/// `_PRT` (6.2.13): which global interrupt each pin of each device on bus 0 is. It must say what
/// [`pci::IntxSink`] does: pin after pin, beginning one further for each device.
fn routing() -> impl acpi_tables::Aml {
    /// Function number of "all functions" in an address (table 6.2).
    const ANY_FUNCTION: u32 = 0xffff;
    let pins = (0..u32::from(Bdf::DEVICES)).flat_map(|device| (0..4).map(move |pin| (device, pin)));
    let entries: Vec<_> = pins
        .map(|(device, pin)| {
            let global = u32::from(layout::PCI_PIN) + (device + pin) % 4;
            let address = device << 16 | ANY_FUNCTION;
            Raw(bytes(&Package::new(vec![&address, &pin, &ZERO, &global])))
        })
        .collect();
    let entries = entries.iter().map(|e| e as &dyn acpi_tables::Aml).collect();
    Raw(bytes(&Name::new("_PRT".into(), &Package::new(entries))))
}

/// `_OSC`: the operating system may use the native features that exist.
fn osc() -> impl acpi_tables::Aml {
    Raw(bytes(&Method::new(
        "_OSC".into(),
        4,
        false,
        vec![
            &CreateDWordField::new(&Path::new("CDW1"), &Arg(3), &ZERO),
            &If::new(
                &Equal::new(&Arg(0), &Uuid::new(OSC_UUID)),
                vec![
                    &CreateDWordField::new(&Path::new("CDW3"), &Arg(3), &8u8),
                    &And::new(&Path::new("CDW3"), &Path::new("CDW3"), &OSC_CONTROL),
                ],
            ),
            &Else::new(vec![&Or::new(
                &Path::new("CDW1"),
                &Path::new("CDW1"),
                &OSC_BAD_UUID,
            )]),
            &Return::new(&Arg(3)),
        ],
    )))
}

/// AML that is encoded already.
struct Raw(Vec<u8>);

impl acpi_tables::Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// Resources that belong to the board: the ECAM and the ports of power management.
fn motherboard() -> Vec<u8> {
    let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let ecam = layout::ECAM;
    bytes(&Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, narrow(ecam.start), narrow(ecam.end - ecam.start)),
                    &IO::new(layout::SLEEP_CONTROL, layout::SLEEP_CONTROL, 1, 2),
                ]),
            ),
        ],
    ))
}

fn com1() -> Vec<u8> {
    let port = layout::COM1.start;
    bytes(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_STA".into(), &STA_ON),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(port, port, 8, 8),
                    &Interrupt::new(true, true, false, false, layout::COM1_PIN.into()),
                ]),
            ),
        ],
    ))
}

/// pvpanic, with the identity by which Linux' pvpanic-mmio module knows it.
fn panic_device() -> Vec<u8> {
    let port = layout::PVPANIC;
    bytes(&Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_STA".into(), &STA_ON),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(port, port, 1, 1)]),
            ),
        ],
    ))
}

fn power_button() -> Vec<u8> {
    bytes(&Device::new(
        "PWRB".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
            &Name::new("_UID".into(), &ZERO),
        ],
    ))
}

/// The Generic Event Device (5.6.9): its one interrupt is the power button.
fn event_device() -> Vec<u8> {
    bytes(&Device::new(
        "GED0".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(
                    true,
                    true,
                    false,
                    false,
                    layout::POWER_BUTTON_PIN.into(),
                )]),
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                // 0x80: the button was pressed (4.8.3.1.1).
                vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &0x80u8)],
            ),
        ],
    ))
}
