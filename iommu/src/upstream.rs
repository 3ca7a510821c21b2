//! What a PCI function is built on.

use std::io;
use std::sync::Arc;

use crate::{
    DmaSpace, GuestRam, Invalidations, IotlbGeometry, MsiLine, MsiMessage, MsiSink, Remapper,
    SourceId,
};

/// What lies upstream of a function: memory, interrupts, and what remaps both on the way.
#[derive(Clone)]
pub struct Upstream {
    /// The guest's RAM.
    pub ram: GuestRam,
    /// Where interrupt messages go; with interrupt remapping, through the remapping unit.
    pub msi: Arc<dyn MsiSink>,
    /// The remapping unit that translates addresses; without one they are guest-physical.
    pub remapper: Option<Arc<dyn Remapper>>,
    /// The invalidations of that unit; without one, what Bus Master Enable needs.
    pub invalidations: Arc<Invalidations>,
    /// Size of each worker's IOTLB below the unit.
    pub iotlb: IotlbGeometry,
}

impl Upstream {
    /// Memory and interrupts with nothing in between.
    pub fn new(ram: GuestRam, msi: Arc<dyn MsiSink>) -> Upstream {
        Upstream {
            ram,
            msi,
            remapper: None,
            invalidations: Invalidations::new(),
            iotlb: IotlbGeometry::default(),
        }
    }

    /// The same below a remapping unit that publishes to `invalidations`.
    #[must_use]
    pub fn below(
        self,
        remapper: Arc<dyn Remapper>,
        invalidations: Arc<Invalidations>,
        iotlb: IotlbGeometry,
    ) -> Upstream {
        Upstream {
            remapper: Some(remapper),
            invalidations,
            iotlb,
            ..self
        }
    }

    /// Memory only: for functions without interrupts, and tests.
    pub fn memory(ram: GuestRam) -> Upstream {
        Upstream::new(ram, Arc::new(NoInterrupts))
    }
}

/// Sends no interrupt and opens no line.
struct NoInterrupts;

impl MsiSink for NoInterrupts {
    fn open(&self, _source: SourceId) -> io::Result<Arc<dyn MsiLine>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn send(&self, _source: SourceId, _message: MsiMessage) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// The only way in which a device reaches out: memory, interrupts and the id it does so under.
#[derive(Clone)]
pub struct BusMaster {
    /// Memory as the function sees it.
    pub dma: Arc<DmaSpace>,
    /// Where the function's interrupt messages go.
    pub msi: Arc<dyn MsiSink>,
    /// The requester id on both.
    pub source: SourceId,
}

impl BusMaster {
    /// The function with id `source` below `upstream`, with bus mastering off.
    pub fn new(upstream: &Upstream, source: SourceId) -> BusMaster {
        BusMaster {
            dma: DmaSpace::new(upstream, source),
            msi: Arc::clone(&upstream.msi),
            source,
        }
    }
}
