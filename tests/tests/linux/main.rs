//! Real Linux guests, on this host's KVM or in one nested host that all these tests share.

mod boot;
mod edu;
mod harness;
mod iommu;
mod net;
mod nvme;
mod vfio;
