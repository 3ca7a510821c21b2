//! The `ringside` program as its users see it, as far as no guest has to run.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

/// The program in an empty world: own working, runtime and cache folders.
struct World {
    folder: TempDir,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["run", "work"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn ringside(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_ringside"))
            .args(args)
            .current_dir(self.path("work"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("RINGSIDE_CACHE", self.path("cache"))
            .env_remove("RINGSIDE_LOG")
            .output()
            .unwrap()
    }

    /// Everything in the world, to see that nothing was created.
    fn contents(&self) -> Vec<String> {
        fn walk(folder: &Path, found: &mut Vec<String>) {
            for entry in fs::read_dir(folder).unwrap().flatten() {
                found.push(entry.path().display().to_string());
                if entry.path().is_dir() {
                    walk(&entry.path(), found);
                }
            }
        }
        let mut found = Vec::new();
        walk(self.folder.path(), &mut found);
        found.sort();
        found
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn every_command_has_help() {
    let world = World::new();
    let help = world.ringside(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    let help = text(&help.stdout);
    let commands = [
        "run", "exec", "cp", "list", "stats", "stop", "demo", "image", "doctor",
    ];
    for command in commands {
        assert!(
            help.contains(&format!("\n  {command} ")),
            "{command}: {help}"
        );
        let output = world.ringside(&[command, "--help"]);
        assert_eq!(output.status.code(), Some(0), "{command}");
        assert!(
            text(&output.stdout).contains("Usage: ringside"),
            "{command}"
        );
    }
    for command in ["build", "list", "path", "rm"] {
        let output = world.ringside(&["image", command, "--help"]);
        assert_eq!(output.status.code(), Some(0), "image {command}");
    }
    assert!(help.contains("Exit codes: 0 the guest"));
    assert!(!help.contains("lab-relay"));
}

/// One line that names the option and what would be right, exit code 2, nothing created or changed.
#[test]
fn bad_input() {
    let world = World::new();
    let work = world.path("work");
    fs::write(work.join("bad.toml"), "vcpus = 2\nmemory = \"lots\"\n").unwrap();
    fs::write(work.join("unknown.toml"), "\n[[nvme]]\nqueue = 4\n").unwrap();
    fs::write(work.join("broken.toml"), "name = \"x\nvcpus = 1\n").unwrap();
    fs::write(
        work.join("two.toml"),
        "[[net]]\nloopback = true\ntap = \"t\"\n",
    )
    .unwrap();
    fs::write(work.join("short.img"), [0; 100]).unwrap();
    let before = world.contents();
    for (args, message) in [
        (
            &["run", "--kernel", "none"][..],
            "--kernel none: no such file: give the path of a bzImage or an ELF kernel",
        ),
        (
            &["run", "--iommu", "amd"],
            "invalid value 'amd' for '--iommu <off|intel[,KEY=VALUE...]>': say which first: intel \
             or off",
        ),
        (
            &["run", "--iommu", "intel,x2apic=on,interrupt-remapping=off"],
            "--iommu x2apic=on: needs interrupt-remapping=on: only remapped interrupts have 32-bit \
             destinations",
        ),
        (
            &["run", "--iommu", "intel,trace=none/trace"],
            "--iommu trace=none/trace: its folder does not exist: make it first",
        ),
        (
            &["run", "--kernel", "bad.toml", "--initrd", "none"],
            "--initrd none: no such file: give the path of an initial RAM file system",
        ),
        (
            &["run", "--image", "debian-11"],
            "--image: `debian-11` is not an image: use debian-12, debian-13, debian-12-dpdk or debian-13-dpdk",
        ),
        (
            &["run", "--nvme", "none.img"],
            "--nvme path=none.img: no such file: make one with `truncate -s 1G none.img`",
        ),
        (
            &["run", "--nvme", "short.img"],
            "--nvme path=short.img: its size, 100 bytes, is not a multiple of lba=512",
        ),
        (
            &["run", "--nvme", "null=1G,queues=65"],
            "--nvme: queues=65 is out of range: use 1 to 64",
        ),
        (
            &["run", "--nvme", "null=1G,queues=many"],
            "invalid value 'null=1G,queues=many' for '--nvme <FILE|KEY=VALUE,...>': queues=many: \
             not a whole number, use for example queues=4",
        ),
        (
            &[
                "run",
                "--nvme",
                "null=1G,serial=A",
                "--nvme",
                "null=2G,serial=A",
            ],
            "--nvme serial=A: controllers 0 and 1 have it: give each its own",
        ),
        (
            &["run", "--net", "tap=rs-none0"],
            "--net tap=rs-none0: no such interface: make it with `ip tuntap add rs-none0 mode tap \
             multi_queue user $USER`",
        ),
        (
            &["run", "--net", "loopback,pairs=17"],
            "--net: pairs=17 is out of range: use 1 to 16",
        ),
        (
            &["run", "--memory", "8M"],
            "--memory: 8M is out of range: use 16M to 16T",
        ),
        (
            &["run", "--memory", "8X"],
            "invalid value '8X' for '--memory <SIZE>': `8X` is not a size: use a whole number of \
             MiB, or one with the suffix K, M, G or T",
        ),
        (
            &["run", "--vcpus", "33"],
            "--vcpus: 33 is out of range: use 1 to 32",
        ),
        (
            &["run", "--name", "a/b"],
            "--name: `a/b` is not a guest's name: use 1 to 48 letters, digits, `.`, `_` or `-`, \
             starting with a letter, a digit or `_`",
        ),
        (
            &["run", "--control", "/nowhere/x"],
            "--control /nowhere/x: its folder does not exist: make it first",
        ),
        (
            &["run", "--config", "none.toml"],
            "--config none.toml: no such file: give the path of a TOML file",
        ),
        (
            &["run", "--config", "bad.toml"],
            "--config bad.toml: line 2: `lots` is not a size: use a whole number of MiB, or one \
             with the suffix K, M, G or T",
        ),
        (
            &["run", "--config", "unknown.toml"],
            "--config unknown.toml: line 3: unknown field `queue`, expected one of `serial`, \
             `queues`, `namespace`",
        ),
        (
            &["run", "--config", "two.toml"],
            "--net: say what it is attached to: exactly one of tap=NAME and loopback",
        ),
        (
            &["run", "--namespace", "nvme=0,null=1G"],
            "--namespace nvme=0: there is no NVMe controller: add one with --nvme",
        ),
        (
            &["exec", "nobody", "--", "true"],
            "nobody: no such guest: none runs, start one with `ringside run --name`",
        ),
        (
            &["stop", "nobody"],
            "nobody: no such guest: none runs, start one with `ringside run --name`",
        ),
        (
            &["stats", "nobody"],
            "nobody: no such guest: none runs, start one with `ringside run --name`",
        ),
        (
            &["cp", "a", "b"],
            "a b: neither path is in a guest: write one of them as NAME:PATH",
        ),
        (
            &["image", "path", "debian-11"],
            "debian-11: `debian-11` is not an image: use debian-12, debian-13, debian-12-dpdk or debian-13-dpdk",
        ),
        (
            &["demo", "--size", "100K"],
            "--size: 100K is not possible: use whole MiB from 1M to 16G",
        ),
        (
            &["run", "--memroy", "1G"],
            "unexpected argument '--memroy' found; tip: a similar argument exists: '--memory'",
        ),
    ] {
        let output = world.ringside(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert_eq!(
            text(&output.stderr),
            format!("ringside: {message}\n"),
            "{args:?}"
        );
        assert!(output.stdout.is_empty(), "{args:?}");
        assert_eq!(world.contents(), before, "{args:?} left something behind");
    }
    let broken = world.ringside(&["run", "--config", "broken.toml"]);
    assert_eq!(broken.status.code(), Some(2));
    let message = text(&broken.stderr);
    assert!(
        message.starts_with("ringside: --config broken.toml: line 1: "),
        "{message}"
    );
    assert_eq!(message.lines().count(), 1);
}

#[test]
fn a_tap_interface_is_not_to_be_had_in_a_nested_host() {
    let world = World::new();
    let before = world.contents();
    let output = world.ringside(&["run", "--accel", "nested", "--net", "tap=tap0"]);
    assert_eq!(output.status.code(), Some(2));
    let message = text(&output.stderr);
    assert!(message.starts_with("ringside: --net tap=tap0: the guest would run in a nested host"));
    assert!(message.contains("use --net loopback"), "{message}");
    assert_eq!(world.contents(), before);
}

#[test]
fn the_printed_configuration_loads_as_the_same() {
    let world = World::new();
    let args = [
        "run",
        "--name",
        "lab",
        "--kernel",
        "k",
        "--initrd",
        "i",
        "--cmdline",
        "-x a=\"b\"",
        "--vcpus",
        "4",
        "--memory",
        "3G",
        "--accel",
        "nested",
        "--on-reboot",
        "restart",
        "--serial",
        "file:s.log",
        "--control",
        "c",
        "--vsock",
        "cid=9,socket=v",
        "--iommu",
        "intel,scalable=on,iotlb=128x2",
        "--trace-boot",
        "--nvme",
        "a,,b.img,direct,serial=S,queues=2",
        "--namespace",
        "nvme=0,memory=64M",
        "--nvme",
        "null=1T,lba=4096",
        "--net",
        "tap=t0,pairs=2,mac=52:54:00:00:00:01",
        "--net",
        "loopback",
        "--print-config",
    ];
    let first = world.ringside(&args);
    assert_eq!(first.status.code(), Some(0), "{}", text(&first.stderr));
    fs::write(world.path("work/lab.toml"), &first.stdout).unwrap();
    let second = world.ringside(&["run", "--config", "lab.toml", "--print-config"]);
    assert_eq!(text(&first.stdout), text(&second.stdout));
    let toml = text(&first.stdout);
    for line in [
        "name = \"lab\"",
        "memory = \"3G\"",
        "path = \"a,b.img\"",
        "lba = 4096",
        "on-reboot = \"restart\"",
        "serial = \"file:s.log\"",
        "trace-boot = true",
        "cid = 9",
        "kind = \"intel\"",
        "iotlb = \"128x2\"",
    ] {
        assert!(toml.contains(line), "{line} is not in\n{toml}");
    }
    let flag = world.ringside(&[
        "run",
        "--config",
        "lab.toml",
        "--memory",
        "1G",
        "--print-config",
    ]);
    assert_eq!(text(&flag.stdout), toml.replace("\"3G\"", "\"1G\""));
}

#[test]
fn the_doctor_says_what_auto_takes_and_why() {
    let world = World::new();
    let output = world.ringside(&["doctor"]);
    assert_eq!(output.status.code(), Some(0));
    let report = text(&output.stdout);
    let json = world.ringside(&["doctor", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    match json["accel-auto"].as_str() {
        Some("kvm") => {
            assert!(
                report.contains("This host's KVM can run a Linux kernel."),
                "{report}"
            );
            assert!(report.contains("--accel auto takes kvm."), "{report}");
        }
        Some("nested") => {
            assert_ne!(json["kvm"]["verdict"]["reason"].as_str(), None);
            assert!(report.contains("--accel auto takes nested"), "{report}");
            assert!(report.contains("for correctness, not speed"), "{report}");
        }
        other => panic!("{other:?}"),
    }
    assert!(report.contains("io_uring"), "{report}");
}

#[test]
fn no_guests_are_no_error() {
    let world = World::new();
    let output = world.ringside(&["list"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stdout.is_empty());
    let output = world.ringside(&["list", "--json"]);
    assert_eq!(text(&output.stdout), "[]\n");
    let output = world.ringside(&["image", "list"]);
    assert_eq!(
        (output.status.code(), text(&output.stdout)),
        (Some(0), String::new())
    );
}
