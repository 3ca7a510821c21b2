//! The invalidation completion event (sections 6.5.2.8, 11.4.9.4).

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::event::Event;
use super::spec::registers::queue::IWC;
use crate::MsiSink;

/// Invalidation Completion Status and the invalidation event registers.
pub(super) struct Completion(Mutex<State>);

struct State {
    complete: bool,
    event: Event,
}

impl Completion {
    pub(super) fn new(sink: &dyn MsiSink, upper: bool) -> io::Result<Completion> {
        Ok(Completion(Mutex::new(State {
            complete: false,
            event: Event::new(sink, upper)?,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn reset(&self) {
        let mut state = self.state();
        state.complete = false;
        state.event.reset();
    }

    /// A wait descriptor with interrupt flag has completed. While software has not cleared the status
    /// of the one before, it is not a new interrupt condition.
    pub(super) fn complete(&self) {
        let mut state = self.state();
        if !state.complete {
            state.complete = true;
            state.event.raise();
        }
    }

    /// Invalidation Completion Status.
    pub(super) fn status(&self) -> u32 {
        u32::from(self.state().complete) * IWC
    }

    /// A write to it.
    pub(super) fn clear_status(&self, value: u32) {
        if value & IWC != 0 {
            let mut state = self.state();
            state.complete = false;
            state.event.serviced();
        }
    }

    pub(super) fn read_event(&self, offset: u64) -> u32 {
        self.state().event.read(offset)
    }

    pub(super) fn write_event(&self, offset: u64, value: u32) {
        self.state().event.write(offset, value);
    }
}
