//! A function's view of memory, shared by its workers.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::remap::Invalidation;
use crate::stats::DmaStats;
use crate::translate::Translator;
use crate::view::View;
use crate::{
    DmaMemory, GuestRam, Invalidations, IotlbGeometry, MsiSink, Remapper, SourceId, Upstream,
};

/// One PCI function's view of memory.
pub struct DmaSpace {
    ram: GuestRam,
    source: SourceId,
    msi: Arc<dyn MsiSink>,
    remapper: Option<Arc<dyn Remapper>>,
    iotlb: IotlbGeometry,
    bus_master: AtomicBool,
    invalidations: Arc<Invalidations>,
    views: Mutex<Vec<Weak<View>>>,
    /// What the views did that are gone.
    retired: Mutex<DmaStats>,
}

impl DmaSpace {
    /// The space of the function with id `source` below `upstream`, with bus mastering off, as after
    /// reset.
    pub fn new(upstream: &Upstream, source: SourceId) -> Arc<DmaSpace> {
        Arc::new(DmaSpace {
            ram: upstream.ram.clone(),
            source,
            msi: Arc::clone(&upstream.msi),
            remapper: upstream.remapper.clone(),
            iotlb: upstream.iotlb,
            bus_master: AtomicBool::new(false),
            invalidations: Arc::clone(&upstream.invalidations),
            views: Mutex::new(Vec::new()),
            retired: Mutex::default(),
        })
    }

    /// A private view for one worker thread.
    pub fn view(self: &Arc<Self>) -> DmaMemory {
        let view = Arc::new(View::new(self.source));
        let mut views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
        views.retain(|view| view.strong_count() > 0);
        views.push(Arc::downgrade(&view));
        drop(views);
        self.invalidations.register(Arc::clone(&view));
        let translator = Translator::new(self.remapper.clone(), self.source, self.iotlb);
        DmaMemory::new(Arc::clone(self), view, translator)
    }

    /// What the caches of this function's workers did, also of those that are gone.
    pub fn stats(&self) -> DmaStats {
        let views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
        let retired = self.retired();
        let mut stats = *retired;
        for view in views.iter().filter_map(Weak::upgrade) {
            if !view.retired.load(Ordering::Relaxed) {
                stats.add(&view.counters);
            }
        }
        stats
    }

    /// The worker of a view is gone; pins may still hold the view itself.
    pub(crate) fn retire(&self, view: &View) {
        let mut retired = self.retired();
        view.retired.store(true, Ordering::Relaxed);
        retired.add(&view.counters);
    }

    fn retired(&self) -> MutexGuard<'_, DmaStats> {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a remapping unit translates the function's addresses.
    pub fn is_remapped(&self) -> bool {
        self.remapper.is_some()
    }

    /// Whether the function may start transactions.
    pub fn bus_master(&self) -> bool {
        self.bus_master.load(Ordering::Relaxed)
    }

    /// Sets Bus Master Enable. Turning it off returns only when no section that could still use the
    /// old setting is open and nothing is pinned: after it, the function touches no memory.
    ///
    /// Must not be called inside a section, nor with a lock held that a worker takes in one.
    pub fn set_bus_master(&self, on: bool) {
        let was = self.bus_master.swap(on, Ordering::SeqCst);
        if was && !on {
            // Who enters a section now sees the number, and with it that bus mastering is off.
            let to = self.invalidations.publish(Invalidation::Nothing);
            let views: Vec<_> = {
                let views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
                views.iter().filter_map(Weak::upgrade).collect()
            };
            self.invalidations.wait_views(&views, to);
        }
    }

    pub(crate) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    pub(crate) fn msi(&self) -> &Arc<dyn MsiSink> {
        &self.msi
    }

    pub(crate) fn invalidations(&self) -> &Arc<Invalidations> {
        &self.invalidations
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;
    use std::time::Duration;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::{Access, DmaError, Iova, PinnedBuffers};

    fn space() -> Arc<DmaSpace> {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        DmaSpace::new(&Upstream::memory(ram), SourceId(0))
    }

    #[test]
    fn bus_master_gates_access() {
        let space = space();
        let mem = space.view();
        assert_eq!(mem.read_obj::<u32>(Iova(0)), Err(DmaError::BusMasterOff));
        space.set_bus_master(true);
        mem.write_obj(Iova(8), 7u32).unwrap();
        assert_eq!(mem.read_obj::<u32>(Iova(8)), Ok(7));
        space.set_bus_master(false);
        assert_eq!(mem.write_obj(Iova(8), 9u32), Err(DmaError::BusMasterOff));
    }

    #[test]
    fn turning_off_waits_for_open_sections_and_pins() {
        let space = space();
        space.set_bus_master(true);
        let mem = space.view();
        let off = Arc::new(AtomicBool::new(false));
        let section = mem.section();
        let mut buffers = PinnedBuffers::new();
        buffers
            .push(&mem, Iova(0x1000), 0x1000, Access::Write)
            .unwrap();
        let revoker = {
            let (space, off) = (Arc::clone(&space), Arc::clone(&off));
            thread::spawn(move || {
                space.set_bus_master(false);
                off.store(true, Ordering::SeqCst);
            })
        };
        while space.bus_master() {
            thread::yield_now();
        }
        drop(section);
        thread::sleep(Duration::from_millis(20));
        assert!(
            !off.load(Ordering::SeqCst),
            "returned while a buffer was pinned"
        );
        buffers.release();
        revoker.join().unwrap();
        assert!(off.load(Ordering::SeqCst));
    }

    /// A worker that writes in sections never writes after the revoker returned.
    #[test]
    fn no_write_lands_after_bus_master_off() {
        let space = space();
        let stop = Arc::new(AtomicBool::new(false));
        let worker = {
            let (space, stop) = (Arc::clone(&space), Arc::clone(&stop));
            thread::spawn(move || {
                let mem = space.view();
                let mut count = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let _section = mem.section();
                    for _ in 0..16 {
                        count += 1;
                        let _ = mem.write_obj(Iova(0), count);
                    }
                }
            })
        };
        let reader = space.ram().clone();
        use vm_memory::Bytes;
        for _ in 0..2000 {
            space.set_bus_master(true);
            thread::yield_now();
            space.set_bus_master(false);
            let before: u64 = reader.read_obj(GuestAddress(0)).unwrap();
            thread::yield_now();
            let after: u64 = reader.read_obj(GuestAddress(0)).unwrap();
            assert_eq!(before, after);
        }
        stop.store(true, Ordering::Relaxed);
        worker.join().unwrap();
    }
}
