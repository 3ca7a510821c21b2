//! Drives an NVMe function from user space through vfio: an example of such a driver, and a test of
//! the IOMMU under it. The function must be bound to vfio-pci.
//!
//! ```text
//! vfio-nvme ADDRESS [--poll] identify          what the controller and its first namespace are
//! vfio-nvme ADDRESS [--poll] read LBA BLOCKS   the blocks, on standard output
//! vfio-nvme ADDRESS [--poll] bad-dma [IOVA]    let the function write where nothing is mapped
//! ```
//!
//! ADDRESS is as in `0000:00:02.0`. Completions are announced by MSI-X, or looked for with `--poll`.
//! What was done is said on standard error.
//!
//! `bad-dma` is wrong on purpose. It fills a page, takes its physical address, and has the function
//! read a block to that address without mapping it. Without an IOMMU the page would be overwritten.
//! The command succeeds if the function reports an error, the page is as it was, and reads work
//! afterwards.

#![allow(
    unsafe_code,
    reason = "the C library's functions, each with a safe face in sys.rs"
)]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "fields of registers and constants of the C interface; x86-64 only"
)]

mod nvme;
mod sys;
mod vfio;

use std::env;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

use nvme::{Controller, Status};
use sys::{PAGE, Shared};
use vfio::Function;

/// What the page is filled with that a bad access would overwrite.
const PATTERN: u64 = 0x5afe_5afe_5afe_5afe;

#[derive(Debug, PartialEq, Eq)]
enum Task {
    Identify,
    Read { lba: u64, blocks: u64 },
    BadDma { iova: Option<u64> },
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let Some((address, poll, task)) = parse(&arguments) else {
        eprintln!(
            "usage: vfio-nvme ADDRESS [--poll] {{ identify | read LBA BLOCKS | bad-dma [IOVA] }}"
        );
        return ExitCode::from(2);
    };
    match run(address, poll, &task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vfio-nvme: {address}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse<'a>(arguments: &[&'a str]) -> Option<(&'a str, bool, Task)> {
    let (address, rest) = arguments.split_first()?;
    let (poll, rest) = match rest.split_first() {
        Some((&"--poll", rest)) => (true, rest),
        _ => (false, rest),
    };
    let task = match rest {
        ["identify"] => Task::Identify,
        ["read", lba, blocks] => Task::Read {
            lba: number(lba)?,
            blocks: number(blocks)?,
        },
        ["bad-dma"] => Task::BadDma { iova: None },
        ["bad-dma", iova] => Task::BadDma {
            iova: Some(number(iova)?),
        },
        _ => return None,
    };
    Some((address, poll, task))
}

/// Decimal, or hexadecimal after `0x`.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn run(address: &str, poll: bool, task: &Task) -> io::Result<()> {
    let mut controller = Controller::start(Function::open(address)?, poll)?;
    match task {
        Task::Identify => {
            let [model, serial, firmware] = &controller.names;
            println!("model {model}\nserial {serial}\nfirmware {firmware}");
            let namespace = controller.namespace;
            println!(
                "namespace {}\nblocks {}\nblock {}",
                namespace.id, namespace.blocks, namespace.block
            );
        }
        Task::Read { lba, blocks } => {
            let data = controller.read(*lba, *blocks)?;
            io::stdout().write_all(&data)?;
        }
        Task::BadDma { iova } => bad_dma(&mut controller, *iova)?,
    }
    let [admin, io] = controller.interrupts();
    eprintln!("vfio-nvme: {address}: {admin} admin and {io} I/O interrupts");
    controller.stop()
}

fn bad_dma(controller: &mut Controller, iova: Option<u64>) -> io::Result<()> {
    let page = Shared::anonymous(PAGE)?;
    page.fill(PATTERN);
    let physical = physical_address(&page)?;
    let target = iova.unwrap_or(physical);
    if controller.is_mapped(target) {
        return Err(io::Error::other(format!("{target:#x} is mapped")));
    }
    eprintln!("vfio-nvme: the function writes to {target:#x}, which is not mapped");
    let status = controller.read_to(0, target)?;
    let changed = (0..PAGE).step_by(8).any(|at| page.read64(at) != PATTERN);
    if physical_address(&page)? != physical {
        return Err(io::Error::other("the kernel moved the page: try again"));
    }
    println!(
        "status type {:#x} code {:#04x}\npage {}",
        status.code_type(),
        status.code(),
        if changed { "changed" } else { "unchanged" }
    );
    if changed {
        return Err(io::Error::other("the bad access reached memory"));
    }
    if status == Status::SUCCESS {
        return Err(io::Error::other("the function says that the access worked"));
    }
    controller.read(0, 1).map(|_| ())
}

/// Documentation/admin-guide/mm/pagemap.rst.
fn physical_address(page: &Shared) -> io::Result<u64> {
    const FRAME: u64 = (1 << 55) - 1;
    const PRESENT: u64 = 1 << 63;
    let mut entry = [0; 8];
    let at = page.address() / PAGE as u64 * 8;
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, at)?;
    let entry = u64::from_ne_bytes(entry);
    // Who may not see frame numbers sees zero.
    match entry & FRAME {
        frame if entry & PRESENT != 0 && frame != 0 => Ok(frame * PAGE as u64),
        _ => Err(io::Error::other("the page's physical address is not known")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_understood_or_refused() {
        let parsed = parse(&["0000:00:02.0", "--poll", "read", "0x10", "8"]);
        let task = Task::Read { lba: 16, blocks: 8 };
        assert_eq!(parsed, Some(("0000:00:02.0", true, task)));
        let parsed = parse(&["a", "bad-dma", "0xfee00000"]).unwrap();
        let iova = Some(0xfee0_0000);
        assert_eq!((parsed.1, parsed.2), (false, Task::BadDma { iova }));
        for bad in [
            &[][..],
            &["a"],
            &["a", "read", "1"],
            &["a", "read", "x", "1"],
            &["a", "identify", "now"],
        ] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_page_of_ours_has_what_was_written() {
        let page = Shared::anonymous(PAGE).unwrap();
        page.fill(PATTERN);
        page.write32(8, 7);
        assert_eq!(page.read64(0), PATTERN);
        assert_eq!(page.bytes(8, 8), [7, 0, 0, 0, 0xfe, 0x5a, 0xfe, 0x5a]);
        assert!(
            std::panic::catch_unwind(|| Shared::anonymous(PAGE).unwrap().read32(PAGE)).is_err()
        );
    }
}
