//! The thread that runs a task.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use super::stats::Counters;
use super::{
    Clock, Coalesce, Kick, Loop, PollPolicy, QueueTask, SOURCES, Step, SystemClock, WorkerStats,
};

/// How a worker runs. The default sleeps without work, moderates nothing and runs on any CPU.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// When it polls instead of sleeping.
    pub policy: PollPolicy,
    /// Interrupt moderation, by source.
    pub coalesce: [Coalesce; SOURCES],
    /// The host CPU that the thread is bound to.
    pub affinity: Option<usize>,
    /// Most units of work between two looks at signals and commands; at least 1.
    pub budget: u32,
}

impl Default for WorkerOptions {
    fn default() -> WorkerOptions {
        WorkerOptions {
            policy: PollPolicy::Interrupt,
            coalesce: [Coalesce::OFF; SOURCES],
            affinity: None,
            budget: 64,
        }
    }
}

enum Command<T> {
    Run(Box<dyn FnOnce(&mut T) + Send>),
    Policy(PollPolicy),
    Coalesce(usize, Coalesce),
    Stop,
}

/// A running [`QueueTask`]. Dropping it stops the thread as [`Worker::stop`] does.
///
/// [`Worker::with`], [`Worker::stop`] and dropping wait for the worker's thread: never call them on
/// that thread itself, inside a DMA section, or with a lock held that the task takes.
pub struct Worker<T> {
    kick: Kick,
    commands: mpsc::Sender<Command<T>>,
    thread: Option<JoinHandle<T>>,
    /// What was set last, for reading back.
    settings: Mutex<(PollPolicy, [Coalesce; SOURCES])>,
    counters: Arc<Counters>,
}

impl<T: QueueTask + 'static> Worker<T> {
    /// Runs `task` on a new thread called `name` (the kernel shows 15 bytes of it), woken by `kick`,
    /// which belongs to this worker alone until it is stopped.
    ///
    /// # Errors
    ///
    /// The thread cannot be created, or not be bound to the CPU that `options` asks for.
    pub fn spawn(
        name: &str,
        kick: &Kick,
        task: T,
        options: WorkerOptions,
    ) -> io::Result<Worker<T>> {
        let (commands, inbox) = mpsc::channel();
        let (ready, started) = mpsc::sync_channel(1);
        let counters = Arc::new(Counters::default());
        let settings = Mutex::new((options.policy, options.coalesce));
        let driver = Driver {
            machine: Loop::new(
                SystemClock,
                options.budget,
                options.policy,
                options.coalesce,
            ),
            kick: kick.clone(),
            inbox,
            counters: Arc::clone(&counters),
            task,
            fds: Vec::new(),
            polled_fds: Vec::new(),
        };
        let thread = Builder::new().name(name.to_owned()).spawn(move || {
            let prepared = prepare(options.affinity);
            let run = prepared.is_ok();
            // The receiver waits until it has this.
            let _ = ready.send(prepared);
            if run { driver.run() } else { driver.task }
        })?;
        match started.recv() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(error),
            Err(_) => return Err(io::Error::other("the worker's thread died at once")),
        }
        Ok(Worker {
            kick: kick.clone(),
            commands,
            thread: Some(thread),
            settings,
            counters,
        })
    }

    /// Runs `f` on the worker's thread, between polls, and returns what it returned. The task is
    /// polled afterwards, so `f` may give it work.
    ///
    /// # Panics
    ///
    /// The task, or `f`, panicked.
    pub fn with<R: Send + 'static>(&self, f: impl FnOnce(&mut T) -> R + Send + 'static) -> R {
        let (answer, wait) = mpsc::sync_channel(1);
        self.send(Command::Run(Box::new(move |task| {
            let _ = answer.send(f(task));
        })));
        match wait.recv() {
            Ok(result) => result,
            Err(_) => panic!("a queue worker has panicked"),
        }
    }

    /// Changes the policy from the worker's next step on.
    pub fn set_policy(&self, policy: PollPolicy) {
        self.settings().0 = policy;
        self.send(Command::Policy(policy));
    }

    /// Changes the moderation of `source` from the worker's next step on; events that wait are
    /// judged by the new bounds. A source that does not exist is ignored.
    pub fn set_coalesce(&self, source: usize, coalesce: Coalesce) {
        if let Some(slot) = self.settings().1.get_mut(source) {
            *slot = coalesce;
            self.send(Command::Coalesce(source, coalesce));
        }
    }

    /// Stops the worker and gives the task back, disarmed. Interrupts for events that moderation
    /// holds back are raised first, so that no event stays unsignalled; work that the task has not
    /// polled yet stays where it is.
    ///
    /// # Panics
    ///
    /// With the task's panic, if it panicked.
    pub fn stop(mut self) -> T {
        match self.join() {
            Some(Ok(task)) => task,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => unreachable!("only this and drop, which consume the worker, join"),
        }
    }
}

impl<T> Worker<T> {
    /// Makes the worker poll; see [`Kick::kick`].
    pub fn kick(&self) {
        self.kick.kick();
    }

    /// A handle for others that have work for it.
    pub fn kick_handle(&self) -> Kick {
        self.kick.clone()
    }

    /// The policy set last.
    pub fn policy(&self) -> PollPolicy {
        self.settings().0
    }

    /// The moderation set last, by source.
    pub fn coalesce(&self) -> [Coalesce; SOURCES] {
        self.settings().1
    }

    /// What it has done so far. The numbers are read one by one while the worker runs.
    pub fn stats(&self) -> WorkerStats {
        let (kicks, wakes) = self.kick.counts();
        WorkerStats {
            polls: self.counters.polls.get(),
            work: self.counters.work.get(),
            interrupts: self.counters.interrupts.get(),
            sleeps: self.counters.sleeps.get(),
            spin_hits: self.counters.spin_hits.get(),
            kicks,
            wakes,
        }
    }

    fn settings(&self) -> std::sync::MutexGuard<'_, (PollPolicy, [Coalesce; SOURCES])> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The worker looks at its inbox whenever it was kicked. A dead worker takes no command.
    fn send(&self, command: Command<T>) {
        let _ = self.commands.send(command);
        self.kick.kick();
    }

    fn join(&mut self) -> Option<std::thread::Result<T>> {
        let thread = self.thread.take()?;
        self.send(Command::Stop);
        Some(thread.join())
    }
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        if let Some(Err(_)) = self.join() {
            tracing::error!("a queue worker had panicked");
        }
    }
}

/// What must be done on the thread itself.
fn prepare(affinity: Option<usize>) -> io::Result<()> {
    // The default slack of 50 us would be added to every moderation delay.
    rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1))?;
    let Some(cpu) = affinity else {
        return Ok(());
    };
    let refuse = |why: &str| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("cannot bind a worker to CPU {cpu}: {why}"),
        )
    };
    if cpu >= rustix::thread::CpuSet::MAX_CPU {
        return Err(refuse("no such CPU"));
    }
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set)
        .map_err(|_| refuse("it is offline or not allowed to this process"))
}

/// The worker's thread.
struct Driver<T, C> {
    machine: Loop<C>,
    kick: Kick,
    inbox: mpsc::Receiver<Command<T>>,
    counters: Arc<Counters>,
    task: T,
    fds: Vec<RawFd>,
    polled_fds: Vec<libc::pollfd>,
}

impl<T: QueueTask, C: Clock> Driver<T, C> {
    fn run(mut self) -> T {
        loop {
            if self.kick.take() {
                if !self.obey() {
                    return self.finish();
                }
                self.machine.woken();
            }
            match self.machine.step() {
                Step::Poll(budget) => {
                    let polled = self.task.poll(budget);
                    self.counters.polls.add(1);
                    self.counters.work.add(u64::from(polled.work));
                    if self.machine.polled(polled) {
                        self.counters.spin_hits.add(1);
                    }
                    if polled.work == 0 {
                        std::hint::spin_loop();
                    }
                }
                Step::Signal(source) => self.signal(source),
                Step::Sleep(until) => {
                    self.sleep(until);
                    self.machine.woken();
                }
            }
        }
    }

    /// Carries out what was sent; false to stop.
    fn obey(&mut self) -> bool {
        while let Ok(command) = self.inbox.try_recv() {
            match command {
                Command::Run(f) => f(&mut self.task),
                Command::Policy(policy) => self.machine.set_policy(policy),
                Command::Coalesce(source, coalesce) => self.machine.set_coalesce(source, coalesce),
                Command::Stop => return false,
            }
        }
        true
    }

    fn signal(&mut self, source: usize) {
        self.counters.interrupts.add(1);
        self.task.interrupt(source);
    }

    fn finish(mut self) -> T {
        for source in 0..SOURCES {
            if self.machine.take_pending(source) > 0 {
                self.signal(source);
            }
        }
        self.task
    }

    /// Arm, re-check, wait. New work can come from two kinds of producers, and a sleep must not
    /// begin after either has decided that no notification is needed:
    ///
    /// - The guest and others that share memory with us put work there, then look whether we asked
    ///   for notifications. We ask (`arm`), then look for work (`has_work`). Each side stores first
    ///   and loads second, and a store may be delayed past a later load, so both sides need a full
    ///   barrier between the two, or both could miss the other. Ours is the one below; the guest's
    ///   is in its driver.
    /// - Threads of our own that call `kick`: see [`Kick::try_sleep`].
    ///
    /// Descriptors need no care: they stay readable until somebody reads them, so one that became
    /// so before the wait ends it at once.
    fn sleep(&mut self, until: Option<Instant>) {
        self.task.arm();
        fence(Ordering::SeqCst);
        if !self.task.has_work() && self.kick.try_sleep() {
            self.counters.sleeps.add(1);
            let kicked = self.wait(until);
            self.kick.end_sleep(kicked);
        }
        self.task.disarm();
    }

    /// Returns whether the kick's descriptor is readable.
    fn wait(&mut self, until: Option<Instant>) -> bool {
        let timeout = until.map(|until| {
            let left = until.saturating_duration_since(self.machine.clock().now());
            timespec(left)
        });
        let pollfd = |events| {
            move |&fd: &RawFd| libc::pollfd {
                fd,
                events,
                revents: 0,
            }
        };
        self.polled_fds.clear();
        self.polled_fds.push(pollfd(libc::POLLIN)(&self.kick.fd()));
        self.fds.clear();
        self.task.fds(&mut self.fds);
        self.polled_fds
            .extend(self.fds.iter().map(pollfd(libc::POLLIN)));
        self.fds.clear();
        self.task.write_fds(&mut self.fds);
        self.polled_fds
            .extend(self.fds.iter().map(pollfd(libc::POLLOUT)));
        let timeout = timeout.as_ref().map_or(std::ptr::null(), |timeout| timeout);
        let count = libc::nfds_t::try_from(self.polled_fds.len()).unwrap_or(libc::nfds_t::MAX);
        // SAFETY: the array holds `count` entries and lives through the call; the timeout is null or
        // points to a timespec that does; no signal mask is changed. An error (EINTR, ENOMEM) is a
        // wake-up for nothing, after which the loop looks for work and comes back.
        #[expect(unsafe_code, reason = "ppoll with a sub-millisecond timeout")]
        unsafe {
            libc::ppoll(
                self.polled_fds.as_mut_ptr(),
                count,
                timeout,
                std::ptr::null(),
            );
        }
        self.polled_fds
            .first()
            .is_some_and(|kick| kick.revents != 0)
    }
}

fn timespec(duration: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: libc::time_t::try_from(duration.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::from(duration.subsec_nanos()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::sync::atomic::{AtomicBool, AtomicU64};

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::worker::Polled;

    const LONG: Duration = Duration::from_secs(20);

    /// What a fake guest and a fake task share.
    struct Shared {
        /// Units of work offered: a doorbell.
        offered: AtomicU64,
        /// The task wants the eventfd written: an event index.
        armed: AtomicBool,
        event: EventFd,
    }

    struct FakeTask {
        shared: Arc<Shared>,
        taken: u64,
        endless: bool,
        /// Told after each poll that found work, and of each interrupt as `u64::MAX`.
        done: mpsc::Sender<u64>,
        fd: Option<RawFd>,
        write_fd: Option<RawFd>,
    }

    impl QueueTask for FakeTask {
        fn poll(&mut self, budget: u32) -> Polled {
            let offered = self.shared.offered.load(Ordering::Acquire);
            let work = if self.endless {
                budget
            } else {
                u32::try_from(offered - self.taken).unwrap().min(budget)
            };
            self.taken += u64::from(work);
            if work > 0 && !self.endless {
                self.done.send(self.taken).unwrap();
            }
            Polled {
                work,
                events: [work, 0],
            }
        }

        fn arm(&mut self) {
            self.shared.armed.store(true, Ordering::Relaxed);
        }

        fn has_work(&mut self) -> bool {
            self.shared.offered.load(Ordering::Relaxed) != self.taken
        }

        fn disarm(&mut self) {
            self.shared.armed.store(false, Ordering::Relaxed);
            let _ = self.shared.event.read();
        }

        fn interrupt(&mut self, source: usize) {
            assert_eq!(source, 0);
            if !self.endless {
                self.done.send(u64::MAX).unwrap();
            }
        }

        fn fds(&self, fds: &mut Vec<RawFd>) {
            fds.extend(self.fd);
        }

        fn write_fds(&self, fds: &mut Vec<RawFd>) {
            fds.extend(self.write_fd);
        }
    }

    fn fake() -> (FakeTask, Arc<Shared>, mpsc::Receiver<u64>) {
        let shared = Arc::new(Shared {
            offered: AtomicU64::new(0),
            armed: AtomicBool::new(false),
            event: EventFd::new(EFD_NONBLOCK).unwrap(),
        });
        let (done, results) = mpsc::channel();
        let task = FakeTask {
            shared: Arc::clone(&shared),
            taken: 0,
            endless: false,
            done,
            fd: Some(shared.event.as_raw_fd()),
            write_fd: None,
        };
        (task, shared, results)
    }

    fn spawn(task: FakeTask, options: WorkerOptions) -> Worker<FakeTask> {
        Worker::spawn("fake", &Kick::new().unwrap(), task, options).unwrap()
    }

    /// Waits for `value`, skipping interrupts.
    fn expect(results: &mpsc::Receiver<u64>, value: u64) {
        while results.recv_timeout(LONG).expect("a wake-up was lost") != value {}
    }

    #[test]
    fn no_kick_is_lost() {
        for policy in [
            PollPolicy::Interrupt,
            PollPolicy::Adaptive {
                spin: Duration::from_micros(5),
            },
        ] {
            let (task, shared, results) = fake();
            let worker = spawn(
                task,
                WorkerOptions {
                    policy,
                    ..WorkerOptions::default()
                },
            );
            let kick = worker.kick_handle();
            for round in 1..=10_000 {
                shared.offered.store(round, Ordering::Release);
                kick.kick();
                expect(&results, round);
            }
            // The last poll has been counted once it is over.
            worker.with(|_| ());
            let stats = worker.stats();
            assert_eq!((stats.work, stats.kicks), (10_000, 10_001));
            assert!(stats.wakes <= stats.sleeps, "{stats:?}");
            assert_eq!(worker.stop().taken, 10_000);
        }
    }

    /// One wake-up for nothing is harmless; a worker that never sleeps again is not.
    #[test]
    fn a_late_wake_up_does_not_keep_the_worker_awake() {
        let (task, _, _results) = fake();
        let worker = spawn(task, WorkerOptions::default());
        worker.kick_handle().write_late();
        // Each command is a kick, which would hide it: look from outside.
        let mut sleeps = worker.stats().sleeps;
        let quiet = (0..200).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            std::mem::replace(&mut sleeps, worker.stats().sleeps) == sleeps
        });
        assert!(quiet, "the worker spins");
    }

    /// The guest's way: store, full barrier, look whether the device wants to be notified.
    #[test]
    fn no_guest_notification_is_lost() {
        let (task, shared, results) = fake();
        let worker = spawn(task, WorkerOptions::default());
        for round in 1..=10_000 {
            shared.offered.store(round, Ordering::Release);
            fence(Ordering::SeqCst);
            if shared.armed.load(Ordering::Relaxed) {
                shared.event.write(1).unwrap();
            }
            expect(&results, round);
        }
        assert_eq!(worker.stats().kicks, 0);
    }

    #[test]
    fn closures_run_and_the_task_is_polled_after_them() {
        let (task, _, results) = fake();
        let worker = spawn(task, WorkerOptions::default());
        let name = worker.with(|task| {
            task.shared.offered.store(3, Ordering::Relaxed);
            std::thread::current().name().map(str::to_owned)
        });
        assert_eq!(name.as_deref(), Some("fake"));
        expect(&results, 3);
    }

    #[test]
    fn endless_work_starves_neither_commands_nor_interrupts() {
        let (mut task, _, _results) = fake();
        task.endless = true;
        let worker = spawn(task, WorkerOptions::default());
        let before = worker.with(|task| task.taken);
        while worker.with(|task| task.taken) < before + 1000 {}
        let stats = worker.stats();
        assert!(stats.interrupts > 0 && stats.polls > 0, "{stats:?}");
        assert!(worker.stop().taken >= before + 1000);
    }

    #[test]
    fn moderated_interrupts_come_after_the_delay_or_at_stop() {
        let (task, shared, results) = fake();
        let delay = Duration::from_micros(500);
        let mut options = WorkerOptions::default();
        options.coalesce[0] = Coalesce {
            max_events: 100,
            max_delay: delay,
        };
        let worker = spawn(task, options);
        let start = Instant::now();
        shared.offered.store(1, Ordering::Release);
        worker.kick();
        assert_eq!(results.recv_timeout(LONG), Ok(1));
        assert_eq!(
            results.recv_timeout(LONG),
            Ok(u64::MAX),
            "no interrupt at the deadline"
        );
        assert!(start.elapsed() >= delay);
        let endless = Coalesce {
            max_events: 100,
            max_delay: Duration::MAX,
        };
        worker.set_coalesce(0, endless);
        assert_eq!(worker.coalesce(), [endless, Coalesce::OFF]);
        shared.offered.store(2, Ordering::Release);
        worker.kick();
        assert_eq!(results.recv_timeout(LONG), Ok(2));
        assert!(
            results.try_recv().is_err(),
            "an interrupt that should be held back"
        );
        let task = worker.stop();
        assert_eq!(results.try_recv(), Ok(u64::MAX));
        assert!(!task.shared.armed.load(Ordering::Relaxed));
    }

    #[test]
    fn policies_change_live() {
        let (task, shared, results) = fake();
        let worker = spawn(task, WorkerOptions::default());
        worker.set_policy(PollPolicy::Busy);
        assert_eq!(worker.policy(), PollPolicy::Busy);
        worker.with(|_| ());
        let before = worker.stats();
        // Nobody notifies it: only a polling worker finds this.
        shared.offered.store(1, Ordering::Release);
        expect(&results, 1);
        let stats = worker.stats();
        assert_eq!(
            (stats.kicks, stats.sleeps),
            (before.kicks, before.sleeps),
            "slept"
        );
        worker.set_policy(PollPolicy::Interrupt);
        worker.with(|_| ());
        while worker.stats().sleeps == stats.sleeps {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_writable_descriptor_ends_a_sleep() {
        use std::io::{Read, Write};
        let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        while (&theirs).write(&[0; 4096]).is_ok() {}
        let (mut task, shared, results) = fake();
        task.write_fd = Some(theirs.as_raw_fd());
        let worker = spawn(task, WorkerOptions::default());
        while worker.stats().sleeps == 0 {
            std::thread::yield_now();
        }
        shared.offered.store(1, Ordering::Release);
        let mut buffer = [0; 4096];
        while results.try_recv().is_err() {
            ours.set_nonblocking(true).unwrap();
            let _ = ours.read(&mut buffer);
        }
        assert_eq!(worker.stats().kicks, 0);
    }

    #[test]
    fn a_bad_cpu_is_refused_with_its_number() {
        for cpu in [1023, usize::MAX] {
            let (task, ..) = fake();
            let options = WorkerOptions {
                affinity: Some(cpu),
                ..WorkerOptions::default()
            };
            let kick = Kick::new().unwrap();
            let error = Worker::spawn("fake", &kick, task, options).err().unwrap();
            assert!(error.to_string().contains(&cpu.to_string()), "{error}");
        }
        let (task, ..) = fake();
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        let cpu = (0..1024).find(|&cpu| allowed.is_set(cpu)).unwrap();
        let worker = spawn(
            task,
            WorkerOptions {
                affinity: Some(cpu),
                ..WorkerOptions::default()
            },
        );
        let set = worker.with(|_| rustix::thread::sched_getaffinity(None).unwrap());
        assert!(set.is_set(cpu) && set.count() == 1);
    }

    #[test]
    fn a_dead_task_is_reported_and_can_be_dropped() {
        let (task, ..) = fake();
        let worker = spawn(task, WorkerOptions::default());
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            worker.with(|_| panic!("a fault for the test"));
        }));
        assert!(result.is_err());
        drop(worker);
    }
}
