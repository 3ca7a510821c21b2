//! 4 KiB random reads of one file, one queue: through the NVMe controller, and straight through
//! `io_uring` on the same file as the physical limit; and through fio, where it is installed.
//!
//! Each round measures every way once, so that a noisy neighbour hits all of them alike; what is
//! compared are medians over the rounds. Like is compared with like:
//!
//! * `sleep`: the device's worker runs with `PollPolicy::Interrupt` (the default), the bare loop
//!   and fio wait in `io_uring_enter`. The fake driver polls its completion queue in both modes.
//! * `poll`: the worker runs with `PollPolicy::Busy`, the bare loop polls its completion ring.
//!
//! The bare loop does all its work on one core, the device has another for the driver's side: with
//! `buffered` the data is in the page cache, no storage is waited for, and what is measured are
//! the cycles; with `direct` (`O_DIRECT`) it is the storage.
//!
//! `cargo bench --bench file -- [--rounds N] [--millis N] [--folder PATH]`

mod cores;

use std::alloc::Layout;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::block::{FileBackend, FileOptions};
use devices::nvme::Nvme;
use devices::nvme::spec::command::nvm;
use devices::worker::PollPolicy;
use io_uring::types::Fixed;
use io_uring::{IoUring, opcode};
use tests::Machine;
use tests::nvme::{Command, Driver, Pair, Transfer, attach, config};

/// Size of the file in bytes.
const SIZE: u64 = 256 << 20;
/// Bytes of one read.
const BLOCK: u32 = 4096;
const DEPTHS: [u16; 2] = [1, 32];
const DEEPEST: u16 = 32;

fn main() {
    let options = Options::parse();
    let folder = match &options.folder {
        Some(folder) => tempfile::tempdir_in(folder),
        None => tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")),
    };
    let folder = folder.expect("a folder for the file");
    let path = folder.path().join("disk");
    fill(&path);
    let fio = Process::new("fio").arg("--version").output().is_ok();
    if !fio {
        println!("fio is not installed: left out");
    }
    println!(
        "4 KiB random reads of a file of {} MiB, one queue; {} rounds of {} ms, interleaved",
        SIZE >> 20,
        options.rounds,
        options.time.as_millis()
    );
    for direct in [false, true] {
        for depth in DEPTHS {
            compare(&path, direct, depth, fio, &options);
        }
    }
}

struct Options {
    rounds: usize,
    time: Duration,
    folder: Option<PathBuf>,
}

impl Options {
    fn parse() -> Options {
        let mut options = Options {
            rounds: 9,
            time: Duration::from_millis(500),
            folder: None,
        };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut value = || words.next().unwrap_or_else(|| usage(&word));
            match word.as_str() {
                // Cargo's own.
                "--bench" => {}
                "--rounds" => options.rounds = value().parse().unwrap_or_else(|_| usage(&word)),
                "--millis" => {
                    let millis = value().parse().unwrap_or_else(|_| usage(&word));
                    options.time = Duration::from_millis(millis);
                }
                "--folder" => options.folder = Some(value().into()),
                _ => usage(&word),
            }
        }
        if options.rounds == 0 || options.time.is_zero() {
            usage("0");
        }
        options
    }
}

fn usage(word: &str) -> ! {
    eprintln!("{word}: use [--rounds N] [--millis N] [--folder PATH]");
    std::process::exit(2)
}

/// Writes the whole file, so that every block is on the storage, and in the page cache.
fn fill(path: &Path) {
    let mut file = File::create(path).expect("the file can be made");
    let mut random = Random::new();
    let mut block = vec![0; 1 << 20];
    for _ in 0..SIZE >> 20 {
        for word in block.chunks_exact_mut(8) {
            word.copy_from_slice(&random.next().to_le_bytes());
        }
        file.write_all(&block).expect("room for the file");
    }
    file.sync_all().expect("the file reaches the storage");
}

/// Xorshift64*: the same cheap offsets for every way.
struct Random(u64);

impl Random {
    fn new() -> Random {
        Random(0x9e37_79b9_7f4a_7c15)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Number of a 4 KiB block of the file.
    fn block(&mut self) -> u64 {
        (self.next() >> 32) % (SIZE / u64::from(BLOCK))
    }
}

/// One way to read, measured again and again.
struct Way<'a> {
    name: &'static str,
    run: Box<dyn FnMut(Duration) -> f64 + 'a>,
    iops: Vec<f64>,
}

fn compare(path: &Path, direct: bool, depth: u16, fio: bool, options: &Options) {
    let device = |policy| {
        let mut device = Device::new(path, direct, policy);
        Box::new(move |time| device.run(depth, time))
    };
    let raw = |poll| {
        let mut raw = Raw::new(path, direct);
        Box::new(move |time| raw.run(depth, time, poll))
    };
    let way = |name, run| Way {
        name,
        run,
        iops: Vec::new(),
    };
    let mut ways: Vec<Way> = vec![
        way("nvme, sleep", device(PollPolicy::Interrupt)),
        way("nvme, poll", device(PollPolicy::Busy)),
        way("io_uring, sleep", raw(false)),
        way("io_uring, poll", raw(true)),
    ];
    if fio {
        ways.push(way(
            "fio, sleep",
            Box::new(move |time| run_fio(path, direct, depth, time)),
        ));
    }
    // The first round only warms up.
    for round in 0..=options.rounds {
        for way in &mut ways {
            let iops = (way.run)(options.time);
            if round > 0 {
                way.iops.push(iops);
            }
        }
    }
    let mode = if direct { "direct" } else { "buffered" };
    println!("\n{mode}, QD{depth:<4} median IOPS   lowest to highest     us/IO at QD1");
    for way in &mut ways {
        way.iops.sort_by(f64::total_cmp);
        let spread = format!("{:.0} to {:.0}", way.iops[0], way.iops[way.iops.len() - 1]);
        let each = match depth {
            1 => format!("{:.2}", 1e6 / median(&way.iops)),
            _ => String::new(),
        };
        let median = median(&way.iops);
        println!("  {:<16} {median:>10.0}   {spread:<20} {each}", way.name);
    }
    let of = |name| {
        let way = ways.iter().find(|way| way.name == name);
        way.map(|way| median(&way.iops))
    };
    for (ours, theirs) in [
        ("nvme, sleep", "io_uring, sleep"),
        ("nvme, sleep", "fio, sleep"),
        ("nvme, poll", "io_uring, poll"),
        ("nvme, poll", "fio, sleep"),
    ] {
        if let (Some(a), Some(b)) = (of(ours), of(theirs)) {
            println!("  ratio {:.2}: {ours} / {theirs}", a / b);
        }
    }
}

fn median(sorted: &[f64]) -> f64 {
    f64::midpoint(sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2])
}

fn rate(count: u32, start: Instant) -> f64 {
    f64::from(count) / start.elapsed().as_secs_f64()
}

/// The NVMe controller with the file as its disk, and a driver.
struct Device {
    nvme: Arc<Nvme>,
    policy: PollPolicy,
    pair: Pair,
    buffers: Vec<Transfer>,
    random: Random,
    _driver: Driver,
}

impl Device {
    fn new(path: &Path, direct: bool, policy: PollPolicy) -> Device {
        let machine = Machine::new();
        let options = FileOptions {
            path: path.into(),
            read_only: true,
            direct,
        };
        let disk = FileBackend::open(&options).expect("the file is a disk");
        let nvme = attach(&machine, 3, config(vec![(1, disk, BLOCK)]));
        let mut driver = Driver::bring_up(&machine, 3);
        Device {
            nvme,
            policy,
            pair: driver.create_polled_pair(1, 64),
            buffers: (0..DEEPEST)
                .map(|_| Transfer::new(&machine, BLOCK.into()))
                .collect(),
            random: Random::new(),
            _driver: driver,
        }
    }

    fn push(&mut self, slot: u16) {
        let block = self.random.block();
        let data = &self.buffers[usize::from(slot)];
        let read = Command::blocks(nvm::READ, 1, block, 1).data(data);
        self.pair.sq.push_as(read, slot);
    }

    /// Reads with `depth` commands outstanding; returns IOPS.
    fn run(&mut self, depth: u16, time: Duration) -> f64 {
        cores::apart();
        self.nvme.set_policy(self.policy);
        let start = Instant::now();
        let mut done = 0;
        let mut outstanding = 0;
        for slot in 0..depth {
            self.push(slot);
            outstanding += 1;
        }
        self.pair.sq.ring();
        let mut spins = 0u32;
        while outstanding > 0 {
            let (mut taken, mut pushed) = (false, false);
            // One look at the clock for a batch.
            let mut more = None;
            while let Some(cqe) = self.pair.cq.poll() {
                assert!(cqe.status.is_success(), "{:?}", cqe.status);
                done += 1;
                taken = true;
                if *more.get_or_insert_with(|| start.elapsed() < time) {
                    self.push(cqe.cid);
                    pushed = true;
                } else {
                    outstanding -= 1;
                }
            }
            if taken {
                self.pair.cq.ring();
                spins = 0;
            }
            if pushed {
                self.pair.sq.ring();
            }
            spins += 1;
            // The kernel may need this core for the worker or for the storage.
            if spins.is_multiple_of(256) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        let iops = rate(done, start);
        // It must not take a core from the other ways.
        self.nvme.set_policy(PollPolicy::Interrupt);
        iops
    }
}

/// `io_uring` on the file and nothing else, set up as the file back end sets it up.
struct Raw {
    ring: IoUring,
    buffers: *mut u8,
    random: Random,
    _file: File,
}

impl Raw {
    const MEMORY: Layout =
        match Layout::from_size_align(DEEPEST as usize * BLOCK as usize, BLOCK as usize) {
            Ok(layout) => layout,
            Err(_) => panic!("a valid layout"),
        };

    fn new(path: &Path, direct: bool) -> Raw {
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let mut options = OpenOptions::new();
        let file = options.read(true).custom_flags(flags).open(path);
        let file = file.expect("the file");
        let ring = IoUring::builder()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .build(DEEPEST.into())
            .expect("io_uring");
        let registered = ring.submitter().register_files(&[file.as_raw_fd()]);
        registered.expect("the file is registered");
        // SAFETY: the layout is not empty.
        #[expect(unsafe_code, reason = "memory that the kernel writes to")]
        let buffers = unsafe { std::alloc::alloc_zeroed(Raw::MEMORY) };
        assert!(!buffers.is_null(), "memory");
        Raw {
            ring,
            buffers,
            random: Random::new(),
            _file: file,
        }
    }

    fn push(&mut self, slot: u16) {
        let buffer = self
            .buffers
            .wrapping_add(usize::from(slot) * usize::try_from(BLOCK).expect("a short block"));
        let read = opcode::Read::new(Fixed(0), buffer, BLOCK)
            .offset(self.random.block() * u64::from(BLOCK))
            .build()
            .user_data(slot.into());
        // SAFETY: the slot's part of the buffers, which nothing else uses, lives until the ring is
        // gone and all its reads have ended (`run` ends with none outstanding).
        #[expect(unsafe_code, reason = "memory shared with the kernel")]
        let pushed = unsafe { self.ring.submission().push(&read) };
        pushed.expect("an entry for each slot");
    }

    /// Reads with `depth` requests outstanding; returns IOPS. With `poll` it looks for completions
    /// without sleeping.
    fn run(&mut self, depth: u16, time: Duration, poll: bool) -> f64 {
        let start = Instant::now();
        let mut done = 0;
        let mut outstanding = 0;
        for slot in 0..depth {
            self.push(slot);
            outstanding += 1;
        }
        let mut pushed = true;
        while outstanding > 0 {
            let wait = usize::from(!poll);
            if pushed || !poll || self.ring.submission().taskrun() {
                self.ring.submit_and_wait(wait).expect("io_uring_enter");
            }
            pushed = false;
            let mut more = None;
            loop {
                let entry = self.ring.completion().next();
                let Some(entry) = entry else { break };
                assert_eq!(u32::try_from(entry.result()), Ok(BLOCK), "a whole block");
                done += 1;
                if *more.get_or_insert_with(|| start.elapsed() < time) {
                    self.push(u16::try_from(entry.user_data()).expect("a slot"));
                    pushed = true;
                } else {
                    outstanding -= 1;
                }
            }
            std::hint::spin_loop();
        }
        rate(done, start)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout; no read is outstanding (see `push`).
        #[expect(unsafe_code, reason = "memory that the kernel wrote to")]
        unsafe {
            std::alloc::dealloc(self.buffers, Raw::MEMORY);
        }
    }
}

/// One fio job; its IOPS.
fn run_fio(path: &Path, direct: bool, depth: u16, time: Duration) -> f64 {
    let output = Process::new("fio")
        .args(["--name=read", "--ioengine=io_uring", "--rw=randread"])
        .args(["--bs=4k", "--time_based", "--thread", "--readonly"])
        // The page cache stays, and each run reads other blocks, as the other ways do.
        .args(["--invalidate=0", "--randrepeat=0", "--norandommap"])
        .args(["--registerfiles", "--output-format=terse"])
        .arg(format!("--filename={}", path.display()))
        .arg(format!("--direct={}", u8::from(direct)))
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--runtime={}ms", time.as_millis()))
        .stdin(Stdio::null())
        .output()
        .expect("fio runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find(|line| line.starts_with("3;"));
    // Terse version 3: the eighth field is the IOPS of reads.
    let iops = line.and_then(|line| line.split(';').nth(7)?.parse().ok());
    iops.unwrap_or_else(|| panic!("fio: {text}{}", String::from_utf8_lossy(&output.stderr)))
}
