//! What the rest of the machine knows of one worker's view.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use crate::SourceId;
use crate::drain::{Pin, Pins, Section};
use crate::stats::ViewCounters;

/// A view's section, pins and counters. On cache lines of its own: each belongs to another worker.
#[repr(align(128))]
pub(crate) struct View {
    /// The function's requester id.
    pub(crate) source: SourceId,
    pub(crate) section: Section,
    pub(crate) counters: ViewCounters,
    /// The counters have been added to those of the space.
    pub(crate) retired: AtomicBool,
    pins: Arc<PinList>,
}

/// Places for pins, as many as are needed at once. Places are never freed.
struct PinList {
    pins: Pins,
    next: OnceLock<Arc<PinList>>,
}

impl PinList {
    fn new() -> Arc<PinList> {
        Arc::new(PinList {
            pins: Pins::new(),
            next: OnceLock::new(),
        })
    }
}

/// The place for one pin, owned until it is dropped.
pub(crate) struct PinPlace {
    list: Arc<PinList>,
    place: usize,
}

impl PinPlace {
    pub(crate) fn set(&self, pin: Pin) {
        self.list.pins.set(self.place, pin);
    }

    pub(crate) fn release(&self) {
        self.list.pins.release(self.place);
    }
}

impl Drop for PinPlace {
    fn drop(&mut self) {
        self.list.pins.release(self.place);
        self.list.pins.unclaim(self.place);
    }
}

impl View {
    pub(crate) fn new(source: SourceId) -> View {
        View {
            source,
            section: Section::new(),
            counters: ViewCounters::default(),
            retired: AtomicBool::new(false),
            pins: PinList::new(),
        }
    }

    /// A place for one pin. Allocates when all there are have owners.
    pub(crate) fn place(&self) -> PinPlace {
        let mut list = &self.pins;
        loop {
            if let Some(place) = list.pins.claim() {
                let list = Arc::clone(list);
                return PinPlace { list, place };
            }
            list = list.next.get_or_init(PinList::new);
        }
    }

    /// Whether `matches` is true for some pin. To be asked after the section (`drain.rs`, ordering 2).
    pub(crate) fn any_pin(&self, mut matches: impl FnMut(Pin) -> bool) -> bool {
        let mut list = Some(&self.pins);
        while let Some(here) = list {
            if here.pins.any(&mut matches) {
                return true;
            }
            list = here.next.get();
        }
        false
    }
}
