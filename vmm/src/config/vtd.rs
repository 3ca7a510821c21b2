//! The IOMMU as a person describes it, and what of it can work: `--iommu intel,KEY=VALUE,...` and
//! `[iommu]`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::BadInput;
use super::device::{items, need, number, once, switch, unknown};
use crate::machine::{IommuSpec, LargestPage};

/// Most sets of an IOTLB.
const SETS_MAX: u16 = 4096;
/// Most ways of an IOTLB: a look-up compares them one by one.
const WAYS_MAX: u16 = 16;
/// Most fault recording registers: what fits one page of registers beside the others.
const FAULT_REGISTERS_MAX: u32 = 64;

/// Which IOMMU the machine has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IommuKind {
    /// Intel VT-d.
    #[default]
    Intel,
    /// None: devices address the guest's memory directly.
    Off,
}

/// Sets and ways of an IOTLB, written `64x4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IotlbGeometry {
    /// Sets: a power of two from 1 to 4096.
    pub sets: u16,
    /// Ways: 1 to 16.
    pub ways: u16,
}

impl FromStr for IotlbGeometry {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('x').and_then(|(sets, ways)| {
            let (sets, ways): (u16, u16) = (sets.parse().ok()?, ways.parse().ok()?);
            let possible = sets.is_power_of_two() && sets <= SETS_MAX;
            (possible && (1..=WAYS_MAX).contains(&ways)).then_some(Self { sets, ways })
        });
        parts.ok_or_else(|| {
            format!(
                "iotlb={text}: use SETSxWAYS, for example 64x4: a power of two up to {SETS_MAX} \
                 and 1 to {WAYS_MAX}"
            )
        })
    }
}

impl fmt::Display for IotlbGeometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.sets, self.ways)
    }
}

impl TryFrom<String> for IotlbGeometry {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<IotlbGeometry> for String {
    fn from(geometry: IotlbGeometry) -> Self {
        geometry.to_string()
    }
}

fn largest_page(value: &str) -> Result<LargestPage, String> {
    match value {
        "4K" => Ok(LargestPage::Kib4),
        "2M" => Ok(LargestPage::Mib2),
        "1G" => Ok(LargestPage::Gib1),
        other => Err(format!("largest-page={other}: use 4K, 2M or 1G")),
    }
}

/// The IOMMU: `[iommu]`. What is absent has its default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct IommuConfig {
    /// Which one.
    #[serde(default)]
    pub kind: IommuKind,
    /// Offer scalable mode (PASID tables) beside legacy mode. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scalable: Option<bool>,
    /// Bits of device addresses: 39, 48 or 57. Default: 48.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address_width: Option<u32>,
    /// The guest must invalidate also what becomes valid (CAP.CM). Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caching_mode: Option<bool>,
    /// The unit reads the guest's tables through the CPU's caches (ECAP.C). Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub coherent: Option<bool>,
    /// Offer interrupt remapping. Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interrupt_remapping: Option<bool>,
    /// Remapped interrupts have 32-bit destinations (EIM). Default: true if the host's KVM can.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x2apic: Option<bool>,
    /// Offer pass-through as a way to translate. Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pass_through: Option<bool>,
    /// Offer first-stage (x86) tables; they need scalable mode. Default: as scalable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_stage: Option<bool>,
    /// Offer second-stage tables. Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub second_stage: Option<bool>,
    /// Largest page of the tables: 4K, 2M or 1G. Default: 1G.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub largest_page: Option<LargestPage>,
    /// Geometry of each worker's IOTLB. Default: 64x4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iotlb: Option<IotlbGeometry>,
    /// Fault recording registers, 1 to 64. Default: 8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault_registers: Option<u32>,
    /// A file that gets each access to the unit's registers. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<PathBuf>,
}

impl IommuConfig {
    const KEYS: &str = "scalable, address-width=39|48|57, caching-mode, coherent, \
                        interrupt-remapping, x2apic, pass-through, first-stage, second-stage, \
                        largest-page=4K|2M|1G, iotlb=SETSxWAYS, fault-registers=, trace=FILE";
}

/// `--iommu off`, `--iommu intel` or `--iommu intel,scalable=on`.
impl FromStr for IommuConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut items = items(text);
        let kind = match items.next() {
            Some((kind, None)) if kind == "intel" => IommuKind::Intel,
            Some((kind, None)) if kind == "off" => IommuKind::Off,
            _ => return Err("say which first: intel or off".into()),
        };
        let mut config = IommuConfig {
            kind,
            ..IommuConfig::default()
        };
        for (key, value) in items {
            let name = key.as_str();
            let slot = match name {
                "scalable" => &mut config.scalable,
                "caching-mode" => &mut config.caching_mode,
                "coherent" => &mut config.coherent,
                "interrupt-remapping" => &mut config.interrupt_remapping,
                "x2apic" => &mut config.x2apic,
                "pass-through" => &mut config.pass_through,
                "first-stage" => &mut config.first_stage,
                "second-stage" => &mut config.second_stage,
                "address-width" => {
                    once(&mut config.address_width, name, number(name, value, "48")?)?;
                    continue;
                }
                "largest-page" => {
                    let page = largest_page(&need(name, value, "2M")?)?;
                    once(&mut config.largest_page, name, page)?;
                    continue;
                }
                "iotlb" => {
                    let geometry = need(name, value, "64x4")?.parse()?;
                    once(&mut config.iotlb, name, geometry)?;
                    continue;
                }
                "fault-registers" => {
                    let registers = number(name, value, "8")?;
                    once(&mut config.fault_registers, name, registers)?;
                    continue;
                }
                "trace" => {
                    let file = need(name, value, "vtd.trace")?.into();
                    once(&mut config.trace, name, file)?;
                    continue;
                }
                _ => return Err(unknown(name, IommuConfig::KEYS)),
            };
            once(slot, name, switch(name, value)?)?;
        }
        Ok(config)
    }
}

/// The unit that was described; `None` if there is to be none.
///
/// # Errors
/// The first thing that cannot work.
pub(super) fn check(config: Option<&IommuConfig>) -> Result<Option<IommuSpec>, BadInput> {
    let Some(config) = config else {
        return Ok(None);
    };
    if config.kind == IommuKind::Off {
        let off = IommuConfig {
            kind: IommuKind::Off,
            ..IommuConfig::default()
        };
        return if *config == off {
            Ok(None)
        } else {
            Err(BadInput::new(
                "--iommu",
                "off and settings at once: leave either out",
            ))
        };
    }
    let bad = |key: &str, problem: &str| Err(BadInput::new(format!("--iommu {key}"), problem));
    let scalable = config.scalable.unwrap_or(false);
    let first_stage = config.first_stage.unwrap_or(scalable);
    let second_stage = config.second_stage.unwrap_or(true);
    let interrupt_remapping = config.interrupt_remapping.unwrap_or(true);
    if first_stage && !scalable {
        return bad(
            "first-stage=on",
            "needs scalable=on: legacy mode has only second-stage tables",
        );
    }
    if !second_stage && !scalable {
        return bad(
            "second-stage=off",
            "needs scalable=on: legacy mode has only second-stage tables",
        );
    }
    if !second_stage && !first_stage {
        return bad(
            "first-stage=off,second-stage=off",
            "leaves nothing to translate with: switch one of them on",
        );
    }
    if config.x2apic == Some(true) && !interrupt_remapping {
        return bad(
            "x2apic=on",
            "needs interrupt-remapping=on: only remapped interrupts have 32-bit destinations",
        );
    }
    let address_width = match config.address_width.unwrap_or(48) {
        39 => 39,
        48 => 48,
        57 => 57,
        other => {
            return bad(
                &format!("address-width={other}"),
                "is not possible: use 39, 48 or 57 bits",
            );
        }
    };
    if first_stage && address_width == 39 {
        return bad(
            "address-width=39",
            "has no first-stage form: use 48 or 57, or first-stage=off",
        );
    }
    let fault_registers = config.fault_registers.unwrap_or(8);
    let fault_registers = match u8::try_from(fault_registers) {
        Ok(number) if (1..=FAULT_REGISTERS_MAX).contains(&fault_registers) => number,
        _ => {
            return bad(
                &format!("fault-registers={fault_registers}"),
                &format!("is out of range: use 1 to {FAULT_REGISTERS_MAX}"),
            );
        }
    };
    let iotlb = config.iotlb.unwrap_or(IotlbGeometry { sets: 64, ways: 4 });
    Ok(Some(IommuSpec {
        scalable,
        address_width,
        caching_mode: config.caching_mode.unwrap_or(false),
        coherent: config.coherent.unwrap_or(true),
        interrupt_remapping,
        x2apic: if interrupt_remapping {
            config.x2apic
        } else {
            Some(false)
        },
        pass_through: config.pass_through.unwrap_or(true),
        first_stage,
        second_stage,
        largest_page: config.largest_page.unwrap_or_default(),
        iotlb_sets: iotlb.sets,
        iotlb_ways: iotlb.ways,
        fault_registers,
        trace: config.trace.clone(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> IommuConfig {
        text.parse().unwrap()
    }

    fn problem(text: &str) -> String {
        check(Some(&parse(text))).unwrap_err().to_string()
    }

    #[test]
    fn nothing_but_intel_is_legacy_mode_with_everything_else() {
        assert_eq!(check(None), Ok(None));
        assert_eq!(check(Some(&parse("off"))), Ok(None));
        let spec = check(Some(&parse("intel"))).unwrap().unwrap();
        assert_eq!(
            (spec.scalable, spec.first_stage, spec.second_stage),
            (false, false, true)
        );
        assert_eq!((spec.address_width, spec.fault_registers), (48, 8));
        assert_eq!(
            (spec.caching_mode, spec.coherent, spec.pass_through),
            (false, true, true)
        );
        assert_eq!((spec.interrupt_remapping, spec.x2apic), (true, None));
        let scalable = check(Some(&parse("intel,scalable"))).unwrap().unwrap();
        assert!(scalable.first_stage && scalable.second_stage);
    }

    #[test]
    fn every_key_survives_a_round_trip() {
        let config = parse(
            "intel,scalable=on,address-width=57,caching-mode=on,coherent=off,\
             interrupt-remapping=on,x2apic=off,pass-through=off,first-stage=on,second-stage=off,\
             largest-page=2M,iotlb=128x8,fault-registers=3,trace=a.trace",
        );
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<IommuConfig>(&text).unwrap(), config);
        for key in [
            "kind = \"intel\"",
            "iotlb = \"128x8\"",
            "largest-page = \"2M\"",
        ] {
            assert!(text.contains(key), "{text}");
        }
        assert!(check(Some(&config)).is_ok());
    }

    #[test]
    fn what_cannot_work_is_refused() {
        for (text, message) in [
            (
                "off,scalable=on",
                "--iommu: off and settings at once: leave either out",
            ),
            (
                "intel,x2apic=on,interrupt-remapping=off",
                "--iommu x2apic=on: needs interrupt-remapping=on: only remapped interrupts have \
                 32-bit destinations",
            ),
            (
                "intel,first-stage=on",
                "--iommu first-stage=on: needs scalable=on: legacy mode has only second-stage \
                 tables",
            ),
            (
                "intel,second-stage=off",
                "--iommu second-stage=off: needs scalable=on: legacy mode has only second-stage \
                 tables",
            ),
            (
                "intel,scalable,first-stage=off,second-stage=off",
                "--iommu first-stage=off,second-stage=off: leaves nothing to translate with: \
                 switch one of them on",
            ),
            (
                "intel,address-width=64",
                "--iommu address-width=64: is not possible: use 39, 48 or 57 bits",
            ),
            (
                "intel,scalable,address-width=39",
                "--iommu address-width=39: has no first-stage form: use 48 or 57, or \
                 first-stage=off",
            ),
            (
                "intel,fault-registers=0",
                "--iommu fault-registers=0: is out of range: use 1 to 64",
            ),
            (
                "intel,fault-registers=257",
                "--iommu fault-registers=257: is out of range: use 1 to 64",
            ),
        ] {
            assert_eq!(problem(text), message);
        }
    }

    #[test]
    fn mistakes_are_explained() {
        let mistake = |text: &str| text.parse::<IommuConfig>().unwrap_err();
        for text in ["", "scalable=on", "amd", "intel=on"] {
            assert_eq!(mistake(text), "say which first: intel or off", "{text}");
        }
        assert_eq!(
            mistake("intel,scalable=on,scalable"),
            "`scalable` is given twice"
        );
        assert_eq!(
            mistake("intel,largest-page=4M"),
            "largest-page=4M: use 4K, 2M or 1G"
        );
        assert!(mistake("intel,cm=on").starts_with("unknown key `cm`: the keys are scalable"));
        for geometry in [
            "64", "0x4", "3x4", "8192x4", "64x0", "64x17", "x", "99999x1",
        ] {
            assert_eq!(
                mistake(&format!("intel,iotlb={geometry}")),
                format!(
                    "iotlb={geometry}: use SETSxWAYS, for example 64x4: a power of two up to 4096 \
                     and 1 to 16"
                )
            );
        }
    }
}
