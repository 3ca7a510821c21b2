//! The controller's registers (NVM Express Base 1.4, section 3.1) and what the host asks through
//! them. The admin worker carries it out.

use super::spec::{Aqa, CQE_SHIFT, Cap, Cc, Csts, SQE_SHIFT, VERSION_1_4, reg, shst};

/// CAP.TO: how long CSTS.RDY may take, in 500 ms. In-flight I/O of the host's storage is waited for.
const TIMEOUT: u8 = 60;
/// CAP.MPSMAX: pages of 64 KiB.
pub(super) const MPS_MAX: u8 = 4;

/// Registers and unfinished requests. One small mutex around it serves all vCPUs; no queue worker
/// takes it on the data path.
pub(super) struct Regs {
    cap: Cap,
    cc: Cc,
    csts: Csts,
    aqa: u32,
    asq: u64,
    acq: u64,
    /// CC.EN went from 1 to 0.
    reset: bool,
    /// CC.EN went from 0 to 1.
    enable: bool,
    /// CC.SHN was set.
    shutdown: bool,
}

/// What the admin worker has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Controller reset: all queues die.
    Reset,
    /// Come up with these admin queues.
    Enable(Setup),
    /// Put everything on stable storage.
    Shutdown,
}

/// The registers at the moment of CC.EN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Setup {
    pub(super) cc: Cc,
    pub(super) sq_entries: u32,
    pub(super) cq_entries: u32,
    pub(super) asq: u64,
    pub(super) acq: u64,
}

impl Setup {
    /// Bytes of a memory page.
    pub(super) fn page(&self) -> u64 {
        4096 << self.cc.mps()
    }

    /// What the controller cannot work with, if anything (sections 3.1.5, 3.1.8 to 3.1.10): the
    /// reason for CSTS.CFS.
    pub(super) fn fault(&self) -> Option<&'static str> {
        if self.cc.css() != 0 {
            Some("CC.CSS selects a command set other than NVM")
        } else if self.cc.mps() > MPS_MAX {
            Some("CC.MPS is above CAP.MPSMAX")
        } else if self.cc.ams() != 0 {
            Some("CC.AMS selects an arbitration that CAP.AMS does not offer")
        } else if self.sq_entries < 2 || self.cq_entries < 2 {
            Some("AQA has an admin queue of less than two entries")
        } else if !self.asq.is_multiple_of(self.page()) || !self.acq.is_multiple_of(self.page()) {
            Some("ASQ or ACQ is not aligned to a memory page")
        } else {
            None
        }
    }
}

impl Regs {
    /// After power-on; `entries` is the size of the largest I/O queue.
    pub(super) fn new(entries: u16) -> Regs {
        let cap = Cap::new()
            .with_mqes(entries.saturating_sub(1))
            .with_cqr(true)
            .with_to(TIMEOUT)
            .with_css(1)
            .with_mpsmax(MPS_MAX);
        Regs {
            cap,
            cc: Cc::new(),
            csts: Csts::new(),
            aqa: 0,
            asq: 0,
            acq: 0,
            reset: false,
            enable: false,
            shutdown: false,
        }
    }

    /// Function-level reset: everything as after power-on, nothing asked for.
    pub(super) fn power_on(&mut self) {
        *self = Regs::new(self.cap.mqes().saturating_add(1));
    }

    /// A dword at `offset`, a multiple of 4. INTMS and INTMC read 0: the function has neither pin
    /// nor MSI, and with MSI-X they have no meaning (section 3.1.3). Doorbells are write-only.
    pub(super) fn read(&self, offset: u64) -> u32 {
        let (low, high) = match offset & !4 {
            reg::CAP => split(self.cap.into_bits()),
            reg::VS => (VERSION_1_4, 0),
            reg::ASQ => split(self.asq),
            reg::ACQ => split(self.acq),
            _ => match offset {
                reg::CC => return self.cc.into_bits(),
                reg::CSTS => return self.csts.into_bits(),
                reg::AQA => return self.aqa,
                _ => return 0,
            },
        };
        if offset & 4 == 0 { low } else { high }
    }

    /// A store of a dword at `offset`, a multiple of 4. True if the admin worker has work now.
    pub(super) fn write(&mut self, offset: u64, value: u32) -> bool {
        match offset {
            reg::CC => return self.write_cc(Cc::from_bits(value)),
            reg::AQA => {
                let aqa = Aqa::from_bits(value);
                self.aqa = Aqa::new()
                    .with_asqs(aqa.asqs())
                    .with_acqs(aqa.acqs())
                    .into_bits();
            }
            reg::ASQ | reg::ACQ => {
                // Bits 11:0 are reserved.
                let base = self.base(offset);
                *base = *base >> 32 << 32 | u64::from(value & !0xfff);
            }
            ASQ_HIGH | ACQ_HIGH => {
                let base = self.base(offset - 4);
                *base = u64::from(value) << 32 | *base & 0xffff_ffff;
            }
            // Read-only, without meaning (INTMS, INTMC), not supported (NSSR: CAP.NSSRS is 0) or
            // reserved.
            _ => {}
        }
        false
    }

    fn base(&mut self, offset: u64) -> &mut u64 {
        if offset == reg::ASQ {
            &mut self.asq
        } else {
            &mut self.acq
        }
    }

    fn write_cc(&mut self, new: Cc) -> bool {
        let old = self.cc;
        // Reserved bits stay 0.
        self.cc = Cc::new()
            .with_en(new.en())
            .with_css(new.css())
            .with_mps(new.mps())
            .with_ams(new.ams())
            .with_shn(new.shn())
            .with_iosqes(new.iosqes())
            .with_iocqes(new.iocqes());
        match (old.en(), new.en()) {
            (true, false) => {
                self.reset = true;
                self.enable = false;
                self.shutdown = false;
            }
            (false, true) => self.enable = true,
            _ => {}
        }
        if matches!(new.shn(), 1 | 2) && self.csts.shst() == shst::NORMAL && !self.shutdown {
            self.shutdown = true;
            self.csts.set_shst(shst::OCCURRING);
        }
        self.reset || self.enable || self.shutdown
    }

    /// Takes the next request.
    pub(super) fn request(&mut self) -> Option<Request> {
        if std::mem::take(&mut self.reset) {
            return Some(Request::Reset);
        }
        if std::mem::take(&mut self.enable) {
            let aqa = Aqa::from_bits(self.aqa);
            return Some(Request::Enable(Setup {
                cc: self.cc,
                sq_entries: u32::from(aqa.asqs()) + 1,
                cq_entries: u32::from(aqa.acqs()) + 1,
                asq: self.asq,
                acq: self.acq,
            }));
        }
        std::mem::take(&mut self.shutdown).then_some(Request::Shutdown)
    }

    /// The queues are gone (CC.EN cleared): status back to 0. A shutdown asked for since then goes
    /// on.
    pub(super) fn was_reset(&mut self) {
        let shst = if self.shutdown {
            shst::OCCURRING
        } else {
            shst::NORMAL
        };
        self.csts = Csts::new().with_shst(shst);
    }

    /// The controller takes commands.
    pub(super) fn set_ready(&mut self) {
        self.csts.set_rdy(true);
    }

    /// Controller Fatal Status, until the next reset.
    pub(super) fn set_fatal(&mut self) {
        self.csts.set_cfs(true);
    }

    /// Shutdown has completed, unless a reset has ended it already.
    pub(super) fn shutdown_complete(&mut self) {
        if self.csts.shst() == shst::OCCURRING {
            self.csts.set_shst(shst::COMPLETE);
        }
    }

    /// Whether I/O queue entry sizes were set as they must be before an I/O queue is made:
    /// submission and completion.
    pub(super) fn entry_sizes(&self) -> (bool, bool) {
        (self.cc.iosqes() == SQE_SHIFT, self.cc.iocqes() == CQE_SHIFT)
    }

    /// CSTS.
    #[cfg(test)]
    pub(super) fn csts(&self) -> Csts {
        self.csts
    }
}

const ASQ_HIGH: u64 = reg::ASQ + 4;
const ACQ_HIGH: u64 = reg::ACQ + 4;

fn split(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    )
}

/// Whether `offset` is the beginning of a 64-bit register.
pub(super) fn is_64_bit(offset: u64) -> bool {
    matches!(offset, reg::CAP | reg::ASQ | reg::ACQ)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_and_version() {
        let regs = Regs::new(1024);
        let cap = Cap::from_bits(u64::from(regs.read(4)) << 32 | u64::from(regs.read(0)));
        assert_eq!(
            (cap.mqes(), cap.cqr(), cap.css(), cap.nssrs()),
            (1023, true, 1, false)
        );
        assert_eq!((cap.dstrd(), cap.mpsmin(), cap.mpsmax()), (0, 0, MPS_MAX));
        assert_eq!(regs.read(reg::VS), 0x1_0400);
    }

    #[test]
    fn admin_queue_registers_drop_reserved_bits() {
        let mut regs = Regs::new(64);
        regs.write(reg::AQA, u32::MAX);
        assert_eq!(regs.read(reg::AQA), 0x0fff_0fff);
        regs.write(reg::ASQ, 0x1234_5678);
        regs.write(reg::ASQ + 4, 0x9);
        assert_eq!(
            (regs.read(reg::ASQ), regs.read(reg::ASQ + 4)),
            (0x1234_5000, 9)
        );
        assert_eq!(regs.read(reg::ACQ), 0);
        regs.write(reg::CAP, 0);
        assert_ne!(regs.read(reg::CAP), 0);
    }

    #[test]
    fn a_quick_disable_and_enable_is_a_reset_first() {
        let mut regs = Regs::new(64);
        regs.write(reg::AQA, 0x001f_000f);
        let on = Cc::new().with_en(true).into_bits();
        assert!(regs.write(reg::CC, on));
        assert!(matches!(regs.request(), Some(Request::Enable(_))));
        assert_eq!(regs.request(), None);
        regs.write(reg::CC, 0);
        regs.write(reg::CC, on);
        assert_eq!(regs.request(), Some(Request::Reset));
        let Some(Request::Enable(setup)) = regs.request() else {
            panic!("not enabled again");
        };
        assert_eq!((setup.sq_entries, setup.cq_entries), (16, 32));
        assert_eq!(setup.fault(), None);
    }

    #[test]
    fn shutdown_status_walks_and_reset_clears_it() {
        let mut regs = Regs::new(64);
        let cc = Cc::new().with_en(true);
        regs.write(reg::CC, cc.into_bits());
        regs.request();
        regs.set_ready();
        assert!(regs.write(reg::CC, cc.with_shn(1).into_bits()));
        assert_eq!(regs.csts().shst(), shst::OCCURRING);
        assert_eq!(regs.request(), Some(Request::Shutdown));
        regs.shutdown_complete();
        assert_eq!(regs.csts().shst(), shst::COMPLETE);
        assert!(
            !regs.write(reg::CC, cc.with_shn(2).into_bits()),
            "asked once"
        );
        regs.write(reg::CC, 0);
        assert_eq!(regs.request(), Some(Request::Reset));
        regs.was_reset();
        assert_eq!(regs.csts().into_bits(), 0);
    }

    #[test]
    fn what_cannot_work_is_named() {
        let good = Setup {
            cc: Cc::new().with_en(true),
            sq_entries: 2,
            cq_entries: 2,
            asq: 0x1_0000,
            acq: 0x2_0000,
        };
        assert_eq!(good.fault(), None);
        let cc = |cc| Setup { cc, ..good }.fault();
        assert!(cc(good.cc.with_css(1)).is_some());
        assert!(cc(good.cc.with_ams(1)).is_some());
        assert!(cc(good.cc.with_mps(MPS_MAX + 1)).is_some());
        assert!(cc(good.cc.with_mps(MPS_MAX)).is_none());
        assert!(
            Setup {
                sq_entries: 1,
                ..good
            }
            .fault()
            .is_some()
        );
        assert!(
            Setup {
                acq: 0x1000,
                cc: good.cc.with_mps(1),
                ..good
            }
            .fault()
            .is_some()
        );
    }
}
