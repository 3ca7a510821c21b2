//! The driver and the workers on different cores: on one they would only take turns.

/// Puts the main thread, the driver, on core 0 and all other threads of the process, the workers that there
/// are now, on core 1. Where these cores may not be used, the scheduler decides.
pub fn apart() {
    let main = std::process::id().to_string();
    let tasks = std::fs::read_dir("/proc/self/task").expect("procfs");
    for task in tasks.filter_map(Result::ok) {
        let task = task.file_name();
        let task = task.to_str().expect("a number");
        pin(task.parse().expect("a number"), usize::from(task != main));
    }
}

fn pin(task: libc::pid_t, core: usize) {
    // SAFETY: a CPU set is plain data, for which zeroes are valid, and the core's number is in it.
    // The call reads the set, and a thread that has ended is an error that changes nothing.
    #[expect(unsafe_code, reason = "sched_setaffinity")]
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(task, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}
