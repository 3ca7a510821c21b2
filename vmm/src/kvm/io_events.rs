//! Stores that KVM turns into eventfd signals without leaving to user space.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_bindings::{
    KVMIO, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign,
};
use kvm_ioctls::VmFd;
use pci::{IoEvent, IoEventHub, IoLength};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);

/// KVM's ioeventfds. The kvm-ioctls wrapper cannot say "this length, any value", which doorbells
/// need, so the ioctl is made here.
pub struct KvmIoEvents {
    vm: Arc<VmFd>,
}

impl KvmIoEvents {
    /// On this VM.
    pub fn new(vm: Arc<VmFd>) -> KvmIoEvents {
        KvmIoEvents { vm }
    }

    #[expect(unsafe_code, reason = "an ioctl")]
    fn call(&self, address: u64, event: &IoEvent, extra: u32) -> io::Result<()> {
        let len = match event.length {
            IoLength::Any => 0,
            IoLength::U16 => 2,
            IoLength::U32 => 4,
            IoLength::U64 => 8,
        };
        let matching = match (event.value, event.length) {
            (Some(_), IoLength::Any) => {
                return Err(io::Error::from(io::ErrorKind::InvalidInput));
            }
            (Some(_), _) => 1 << kvm_ioeventfd_flag_nr_datamatch,
            (None, _) => 0,
        };
        let request = kvm_ioeventfd {
            datamatch: event.value.unwrap_or(0),
            addr: address,
            len,
            fd: event.event.as_raw_fd(),
            flags: matching | extra,
            ..Default::default()
        };
        // SAFETY: the descriptor is a VM, and the kernel only reads the structure.
        match unsafe { ioctl_with_ref(&*self.vm, KVM_IOEVENTFD(), &request) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl IoEventHub for KvmIoEvents {
    fn add(&self, address: u64, event: &IoEvent) -> io::Result<()> {
        self.call(address, event, 0)
    }

    fn remove(&self, address: u64, event: &IoEvent) {
        if let Err(error) = self.call(address, event, 1 << kvm_ioeventfd_flag_nr_deassign) {
            tracing::warn!(%error, "cannot remove the ioeventfd at {address:#x}");
        }
    }
}
