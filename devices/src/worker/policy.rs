//! What a worker does next: the decisions of the loop, without the thread.

use std::time::{Duration, Instant};

use super::{Polled, SOURCES};

/// When a worker polls instead of sleeping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PollPolicy {
    /// Sleeps as soon as there is no work.
    #[default]
    Interrupt,
    /// Polls for `spin` after the last work, then sleeps.
    Adaptive {
        /// How long.
        spin: Duration,
    },
    /// Never sleeps.
    Busy,
}

/// Interrupt moderation of one source: an interrupt is raised when either bound is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coalesce {
    /// Events gathered; 0 or 1 is no moderation.
    pub max_events: u32,
    /// Age of the oldest event not yet signalled; zero is no moderation.
    pub max_delay: Duration,
}

impl Coalesce {
    /// Every event is signalled at the end of its batch.
    pub const OFF: Coalesce = Coalesce {
        max_events: 1,
        max_delay: Duration::ZERO,
    };

    /// Whether events may wait at all.
    pub fn is_off(&self) -> bool {
        self.max_events <= 1 || self.max_delay.is_zero()
    }
}

impl Default for Coalesce {
    fn default() -> Coalesce {
        Coalesce::OFF
    }
}

/// Where the loop reads the time. It is read only when a policy or a bound needs it.
pub trait Clock {
    /// The time now; never goes back.
    fn now(&self) -> Instant;
}

/// The host's monotonic clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Poll the task with this budget, then report to [`Loop::polled`].
    Poll(u32),
    /// Raise the interrupt of this source.
    Signal(usize),
    /// Arm and sleep, at the longest until then, then call [`Loop::woken`]. The same if the sleep
    /// did not happen because there was work.
    Sleep(Option<Instant>),
}

/// Events of one source that the guest has not been interrupted for.
#[derive(Clone, Copy, Debug, Default)]
struct Pending {
    events: u32,
    /// When the oldest became visible; set only while the source is moderated.
    since: Option<Instant>,
}

/// The state machine of a worker: decides, does nothing.
#[derive(Debug)]
pub struct Loop<C> {
    clock: C,
    budget: u32,
    policy: PollPolicy,
    coalesce: [Coalesce; SOURCES],
    pending: [Pending; SOURCES],
    /// The last poll found nothing.
    idle: bool,
    /// Empty polls since the last work or sleep: the next work is a spin hit.
    spun: bool,
    /// End of the spinning that the last work has earned.
    spin_until: Option<Instant>,
}

impl<C: Clock> Loop<C> {
    /// A loop that gives each poll at most `budget` (at least 1) units of work.
    pub fn new(
        clock: C,
        budget: u32,
        policy: PollPolicy,
        coalesce: [Coalesce; SOURCES],
    ) -> Loop<C> {
        Loop {
            clock,
            budget: budget.max(1),
            policy,
            coalesce,
            pending: [Pending::default(); SOURCES],
            idle: false,
            spun: false,
            spin_until: None,
        }
    }

    /// Changes the policy.
    pub fn set_policy(&mut self, policy: PollPolicy) {
        self.policy = policy;
        self.spin_until = None;
    }

    /// Changes the moderation of `source`; events that wait already are judged by the new bounds,
    /// with their age. A source that does not exist is ignored.
    pub fn set_coalesce(&mut self, source: usize, coalesce: Coalesce) {
        if let Some(slot) = self.coalesce.get_mut(source) {
            *slot = coalesce;
        }
    }

    /// The next step. Signals come first, so that a task with endless work cannot starve them.
    pub fn step(&mut self) -> Step {
        let mut deadline: Option<Instant> = None;
        let mut now = None;
        for source in 0..SOURCES {
            let (pending, coalesce) = (&mut self.pending[source], &self.coalesce[source]);
            if pending.events == 0 {
                continue;
            }
            let due = if coalesce.is_off() || pending.events >= coalesce.max_events {
                None
            } else {
                let now = *now.get_or_insert_with(|| self.clock.now());
                // A delay past the end of time never ends.
                let Some(due) = pending
                    .since
                    .get_or_insert(now)
                    .checked_add(coalesce.max_delay)
                else {
                    continue;
                };
                (due > now).then_some(due)
            };
            match due {
                None => {
                    *pending = Pending::default();
                    return Step::Signal(source);
                }
                Some(due) => deadline = Some(deadline.map_or(due, |other| other.min(due))),
            }
        }
        let spin = self.idle
            && match self.policy {
                PollPolicy::Interrupt => false,
                PollPolicy::Busy => true,
                PollPolicy::Adaptive { .. } => self
                    .spin_until
                    .is_some_and(|until| now.unwrap_or_else(|| self.clock.now()) < until),
            };
        if spin {
            self.spun = true;
        }
        if spin || !self.idle {
            Step::Poll(self.room())
        } else {
            Step::Sleep(deadline)
        }
    }

    /// The budget: no more than the events that still fit under a moderated source's bound, so that
    /// its interrupt comes with the event that reaches it and not at the end of a large batch.
    fn room(&self) -> u32 {
        let left = self.coalesce.iter().zip(&self.pending);
        left.filter(|(coalesce, _)| !coalesce.is_off())
            .map(|(coalesce, pending)| coalesce.max_events.saturating_sub(pending.events))
            .fold(self.budget, u32::min)
            .max(1)
    }

    /// What the poll did; returns whether spinning found the work.
    pub fn polled(&mut self, polled: Polled) -> bool {
        let mut now = None;
        for source in 0..SOURCES {
            let events = polled.events[source];
            if events == 0 {
                continue;
            }
            let pending = &mut self.pending[source];
            pending.events = pending.events.saturating_add(events);
            if pending.since.is_none() && !self.coalesce[source].is_off() {
                pending.since = Some(*now.get_or_insert_with(|| self.clock.now()));
            }
        }
        self.idle = polled.work == 0;
        if self.idle {
            return false;
        }
        if let PollPolicy::Adaptive { spin } = self.policy {
            let now = now.unwrap_or_else(|| self.clock.now());
            self.spin_until = now.checked_add(spin);
        }
        std::mem::take(&mut self.spun)
    }

    /// The sleep is over, or there is new work from elsewhere: poll at least once before the next.
    pub fn woken(&mut self) {
        self.idle = false;
        self.spun = false;
    }

    /// Takes the events of `source` that wait for an interrupt, at the end of the worker's life.
    pub fn take_pending(&mut self, source: usize) -> u32 {
        let pending = self.pending.get_mut(source).map(std::mem::take);
        pending.map_or(0, |pending| pending.events)
    }

    /// The clock.
    pub fn clock(&self) -> &C {
        &self.clock
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    struct FakeClock {
        now: Cell<Instant>,
        reads: Cell<u32>,
    }

    impl Clock for &FakeClock {
        fn now(&self) -> Instant {
            self.reads.set(self.reads.get() + 1);
            self.now.get()
        }
    }

    impl FakeClock {
        fn new() -> FakeClock {
            FakeClock {
                now: Cell::new(Instant::now()),
                reads: Cell::new(0),
            }
        }

        fn advance(&self, micros: u64) -> Instant {
            self.now.set(self.now.get() + us(micros));
            self.now.get()
        }
    }

    fn us(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    fn work(work: u32, rx: u32, tx: u32) -> Polled {
        let events = [rx, tx];
        Polled { work, events }
    }

    const NOTHING: Polled = Polled {
        work: 0,
        events: [0, 0],
    };

    fn bounds(max_events: u32, micros: u64) -> Coalesce {
        Coalesce {
            max_events,
            max_delay: us(micros),
        }
    }

    #[test]
    fn off_signals_each_batch_and_never_reads_the_clock() {
        let clock = FakeClock::new();
        let mut machine = Loop::new(&clock, 64, PollPolicy::Interrupt, [Coalesce::OFF; 2]);
        assert_eq!(machine.step(), Step::Poll(64));
        machine.polled(work(5, 3, 2));
        assert_eq!(machine.step(), Step::Signal(0));
        assert_eq!(machine.step(), Step::Signal(1));
        assert_eq!(machine.step(), Step::Poll(64), "work: poll again");
        machine.polled(NOTHING);
        assert_eq!(machine.step(), Step::Sleep(None));
        machine.woken();
        assert_eq!(machine.step(), Step::Poll(64));
        assert_eq!(clock.reads.get(), 0);
    }

    #[test]
    fn the_events_bound_signals_exactly_and_caps_the_budget() {
        let clock = FakeClock::new();
        let coalesce = [bounds(8, 1000), Coalesce::OFF];
        let mut machine = Loop::new(&clock, 64, PollPolicy::Interrupt, coalesce);
        assert_eq!(machine.step(), Step::Poll(8));
        machine.polled(work(5, 5, 1));
        assert_eq!(machine.step(), Step::Signal(1), "the other source is off");
        assert_eq!(machine.step(), Step::Poll(3));
        machine.polled(work(3, 3, 0));
        assert_eq!(machine.step(), Step::Signal(0));
        assert_eq!(machine.step(), Step::Poll(8));
    }

    #[test]
    fn the_delay_bound_wakes_and_counts_from_the_oldest_event() {
        let clock = FakeClock::new();
        let coalesce = [bounds(8, 100), bounds(8, 50)];
        let mut machine = Loop::new(&clock, 64, PollPolicy::Interrupt, coalesce);
        machine.polled(work(1, 1, 0));
        let first = clock.now.get();
        clock.advance(30);
        machine.polled(work(1, 1, 1));
        let second = clock.now.get();
        machine.polled(NOTHING);
        // The second source's event is younger but its delay is shorter.
        assert_eq!(machine.step(), Step::Sleep(Some(second + us(50))));
        clock.advance(50);
        machine.woken();
        assert_eq!(machine.step(), Step::Signal(1));
        machine.polled(NOTHING);
        assert_eq!(machine.step(), Step::Sleep(Some(first + us(100))));
        clock.advance(20);
        assert_eq!(machine.step(), Step::Signal(0));
        assert_eq!(machine.step(), Step::Sleep(None));
    }

    #[test]
    fn the_delay_restarts_after_a_signal() {
        let clock = FakeClock::new();
        let mut machine = Loop::new(
            &clock,
            64,
            PollPolicy::Interrupt,
            [bounds(2, 100), Coalesce::OFF],
        );
        machine.polled(work(2, 2, 0));
        assert_eq!(machine.step(), Step::Signal(0));
        let later = clock.advance(90);
        machine.polled(work(1, 1, 0));
        machine.polled(NOTHING);
        assert_eq!(machine.step(), Step::Sleep(Some(later + us(100))));
    }

    #[test]
    fn bounds_changed_live_judge_what_waits() {
        let clock = FakeClock::new();
        let mut machine = Loop::new(
            &clock,
            64,
            PollPolicy::Interrupt,
            [bounds(8, 1000), Coalesce::OFF],
        );
        machine.polled(work(3, 3, 3));
        assert_eq!(machine.step(), Step::Signal(1));
        machine.set_coalesce(0, bounds(3, 1000));
        assert_eq!(machine.step(), Step::Signal(0));
        machine.polled(work(1, 1, 0));
        machine.set_coalesce(0, Coalesce::OFF);
        assert_eq!(machine.step(), Step::Signal(0));
        machine.set_coalesce(SOURCES, Coalesce::OFF);
        // Moderation turned on while an event that came unmoderated waits.
        machine.polled(work(1, 0, 1));
        machine.set_coalesce(1, bounds(8, 10));
        machine.polled(NOTHING);
        let Step::Sleep(Some(_)) = machine.step() else {
            panic!("the event has no deadline");
        };
        clock.advance(10);
        assert_eq!(machine.step(), Step::Signal(1));
    }

    #[test]
    fn endless_delays_do_not_overflow() {
        let clock = FakeClock::new();
        let endless = Coalesce {
            max_events: 4,
            max_delay: Duration::MAX,
        };
        let mut machine = Loop::new(&clock, 64, PollPolicy::Interrupt, [endless, Coalesce::OFF]);
        machine.polled(work(1, 1, 0));
        machine.polled(NOTHING);
        assert_eq!(machine.step(), Step::Sleep(None));
        assert_eq!(machine.take_pending(0), 1);
        assert_eq!(machine.take_pending(0), 0);
    }

    #[test]
    fn adaptive_spins_after_work_only() {
        let clock = FakeClock::new();
        let policy = PollPolicy::Adaptive { spin: us(20) };
        let mut machine = Loop::new(&clock, 64, policy, [Coalesce::OFF; 2]);
        machine.polled(NOTHING);
        assert_eq!(machine.step(), Step::Sleep(None), "no work yet, no spin");
        machine.woken();
        assert!(!machine.polled(work(1, 0, 0)), "woken, not spun");
        machine.polled(NOTHING);
        clock.advance(19);
        assert_eq!(machine.step(), Step::Poll(64));
        assert!(machine.polled(work(1, 0, 0)), "a spin hit");
        assert!(!machine.polled(work(1, 0, 0)), "counted once");
        clock.advance(19);
        machine.polled(NOTHING);
        assert_eq!(machine.step(), Step::Poll(64), "the window restarted");
        machine.polled(NOTHING);
        clock.advance(1);
        assert_eq!(machine.step(), Step::Sleep(None));
        machine.woken();
        machine.polled(NOTHING);
        assert_eq!(machine.step(), Step::Sleep(None), "a wake earns no spin");
        machine.set_policy(PollPolicy::Busy);
        for _ in 0..3 {
            assert_eq!(machine.step(), Step::Poll(64));
            machine.polled(NOTHING);
        }
    }

    /// A task with endless work is interrupted every batch: fairness between polls and signals.
    #[test]
    fn endless_work_does_not_starve_signals() {
        let clock = FakeClock::new();
        let mut machine = Loop::new(&clock, 4, PollPolicy::Busy, [Coalesce::OFF; 2]);
        for _ in 0..10 {
            assert_eq!(machine.step(), Step::Poll(4));
            machine.polled(work(4, 2, 2));
            assert_eq!(machine.step(), Step::Signal(0));
            assert_eq!(machine.step(), Step::Signal(1));
        }
    }
}
