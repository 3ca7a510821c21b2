use super::*;

fn config(toml: &str) -> MachineConfig {
    toml::from_str(toml).unwrap()
}

fn problem(toml: &str) -> String {
    check(&config(toml)).unwrap_err().to_string()
}

#[test]
fn nothing_given_is_a_small_debian_13() {
    let spec = check(&MachineConfig::default()).unwrap();
    assert_eq!(spec.boot, BootSource::Image(Release::Debian13.into()));
    assert_eq!((spec.vcpus, spec.memory), (1, 512 << 20));
    assert_eq!(spec.name.as_str(), format!("guest-{}", std::process::id()));
    assert_eq!(
        spec.vsock,
        Some(VsockChoice {
            cid: 3,
            socket: None
        })
    );
    assert_eq!(spec.serial, SerialMode::Stdio);
}

#[test]
fn teaching_and_test_functions_are_named() {
    let spec = check(&config(
        "[[edu]]\n[[edu]]\nname = \"card\"\ndma-mask = 64\n[[dma-probe]]",
    ))
    .unwrap();
    let edu: Vec<_> = spec.edu.iter().map(|e| (&*e.name, e.dma_mask)).collect();
    assert_eq!(edu, [("edu0", 28), ("card", 64)]);
    assert_eq!(spec.dma_probe[0].name, "probe0");
}

#[test]
fn defaults_of_devices() {
    let spec = check(&config(
        "name = \"a-rather-long-name-of-a-guest\"\n[[nvme]]\n[[nvme.namespace]]\nnull = \"1G\"\n[[net]]\nloopback = true",
    ))
    .unwrap();
    let nvme = &spec.nvme[0];
    assert_eq!(nvme.queues, 64);
    assert_eq!(nvme.serial, "a-rather-long-name-0");
    assert_eq!(nvme.namespaces[0].block_size, 512);
    let net = &spec.net[0];
    assert_eq!(net.pairs, 1);
    assert_eq!(net.mac, Mac::derived(&spec.name, 0).octets());
}

/// One line each: the option, what is wrong with it and what would be right.
#[test]
fn bad_input() {
    let null = "[[nvme.namespace]]\nnull = \"1G\"\n";
    for (toml, message) in [
        ("vcpus = 0", "--vcpus: 0 is out of range: use 1 to 32"),
        ("vcpus = 33", "--vcpus: 33 is out of range: use 1 to 32"),
        ("vcpus = 300", "--vcpus: 300 is out of range: use 1 to 32"),
        (
            "[[edu]]\ndma-mask = 11",
            "--edu: dma-mask=11 is out of range: use 12 to 64",
        ),
        (
            "[[edu]]\nname = \"a b\"",
            "--edu name=a b: not a device's name: use 1 to 31 letters, digits, `.`, `_` and `-`",
        ),
        (
            "[[edu]]\nname = \"x\"\n[[dma-probe]]\nname = \"x\"",
            "--dma-probe name=x: a device of --edu has this name: give each its own",
        ),
        (
            "[[edu]]\nname = \"vsock\"",
            "--edu name=vsock: a device of --vsock has this name: give each its own",
        ),
        ("memory = 8", "--memory: 8M is out of range: use 16M to 16T"),
        (
            "memory = \"17T\"",
            "--memory: 17T is out of range: use 16M to 16T",
        ),
        ("memory = 65", "--memory: 65M is not a multiple of 2M"),
        (
            "name = \"a/b\"",
            "--name: `a/b` is not a guest's name: use 1 to 48 letters, digits, `.`, `_` or `-`, \
             starting with a letter, a digit or `_`",
        ),
        (
            "image = \"debian-11\"",
            "--image: `debian-11` is not an image: use debian-12, debian-13, debian-12-dpdk or debian-13-dpdk",
        ),
        (
            "image = \"debian-12\"\nkernel = \"k\"",
            "--image and --kernel: both say what to boot: give one of them",
        ),
        (
            "initrd = \"i\"",
            "--initrd: an image has its own: give --kernel too, or leave --initrd out",
        ),
        (
            "kernel = \"/nowhere/vmlinuz\"",
            "--kernel /nowhere/vmlinuz: no such file: give the path of a bzImage or an ELF kernel",
        ),
        (
            "kernel = \"/\"",
            "--kernel /: not a file: give the path of a bzImage or an ELF kernel",
        ),
        (
            "cmdline = \"a\\nb\"",
            "--cmdline: control characters: use one line of text",
        ),
        (
            "vsock = { cid = 2 }",
            "--vsock: cid=2 is out of range: use 3 to 4294967294",
        ),
        (
            "vsock = { enabled = false, cid = 3 }",
            "--vsock: off and settings at once: leave either out",
        ),
        (
            "control = \"/tmp/x\"\nvsock = { socket = \"/tmp/x\" }",
            "--control and --vsock socket: the same path: give each its own",
        ),
        (
            "control = \"/nowhere/x\"",
            "--control /nowhere/x: its folder does not exist: make it first",
        ),
        (
            "serial = \"file:/nowhere/x\"",
            "--serial file:/nowhere/x: its folder does not exist: make it first",
        ),
        (
            "serial = \"file:/\"",
            "--serial file:/: a folder: give the path of a file",
        ),
        ("[[nvme]]", "--nvme 0: 0 namespaces: give 1 to 64"),
        (
            "[[nvme]]\n[[nvme.namespace]]",
            "--nvme: say where the bytes are kept: exactly one of path=FILE, memory=SIZE and null=SIZE",
        ),
        (
            "[[nvme]]\n[[nvme.namespace]]\npath = \"a\"\nmemory = 1",
            "--nvme: say where the bytes are kept: exactly one of path=FILE, memory=SIZE and null=SIZE",
        ),
        (
            "[[nvme]]\n[[nvme.namespace]]\npath = \"/nowhere/a.img\"",
            "--nvme path=/nowhere/a.img: no such file: make one with `truncate -s 1G /nowhere/a.img`",
        ),
        (
            "[[nvme]]\n[[nvme.namespace]]\npath = \"/dev/null\"",
            "--nvme path=/dev/null: not a disk: give the path of a raw disk image or a block device",
        ),
        (
            "[[nvme]]\n[[nvme.namespace]]\nnull = 1\nlba = 1024",
            "--nvme lba=1024: not a block size: use 512 or 4096",
        ),
        (
            "[[nvme]]\n[[nvme.namespace]]\nnull = \"5K\"\nlba = 4096",
            "--nvme null=5K: not a capacity: use a multiple of 4096 bytes from 1M to 1048576T",
        ),
        (
            "[[nvme]]\n[[nvme.namespace]]\nnull = 1\ndirect = true",
            "--nvme direct: is for path=FILE only",
        ),
        (
            "[[net]]",
            "--net: say what it is attached to: exactly one of tap=NAME and loopback",
        ),
        (
            "[[net]]\ntap = \"a-name-that-is-too-long\"",
            "--net tap=a-name-that-is-too-long: not an interface's name: use 1 to 15 characters \
             without `/`, `:`, `%` and space",
        ),
        (
            "[[net]]\ntap = \"rs-none0\"",
            "--net tap=rs-none0: no such interface: make it with `ip tuntap add rs-none0 mode tap \
             multi_queue user $USER`",
        ),
        (
            "[[net]]\ntap = \"lo\"",
            "--net tap=lo: not a tap interface: give the name of one",
        ),
        (
            "[[net]]\nloopback = true\npairs = 17",
            "--net: pairs=17 is out of range: use 1 to 16",
        ),
        (
            "[[net]]\nloopback = true\nmac = \"01:00:00:00:00:00\"",
            "--net mac: `01:00:00:00:00:00` is not the address of one station: the first octet must \
             be even and not all may be 0",
        ),
        (
            "[[net]]\nloopback = true\nmac = \"02:00:00:00:00:01\"\n[[net]]\nloopback = true\nmac = \"02:00:00:00:00:01\"",
            "--net mac=02:00:00:00:00:01: devices 0 and 1 have it: give each its own",
        ),
        (
            "[[net]]\ntap = \"t0\"\n[[net]]\ntap = \"t0\"",
            "--net tap=t0: devices 0 and 1 have it: give each its own",
        ),
    ] {
        assert_eq!(problem(toml), message, "{toml}");
    }
    for (keys, message) in [
        (
            "queues = 0",
            "--nvme: queues=0 is out of range: use 1 to 64",
        ),
        (
            "queues = 65",
            "--nvme: queues=65 is out of range: use 1 to 64",
        ),
        (
            "serial = \"more-than-twenty-characters\"",
            "--nvme serial=more-than-twenty-characters: not a serial number: use 1 to 20 printable \
             ASCII characters",
        ),
    ] {
        assert_eq!(
            problem(&format!("[[nvme]]\n{keys}\n{null}")),
            message,
            "{keys}"
        );
    }
    let twins = format!("[[nvme]]\nserial = \"A\"\n{null}[[nvme]]\nserial = \"A\"\n{null}");
    assert_eq!(
        problem(&twins),
        "--nvme serial=A: controllers 0 and 1 have it: give each its own"
    );
}

fn with_disk(path: &Path, keys: &str) -> Result<Checked> {
    let path = path.display();
    check(&config(&format!(
        "[[nvme]]\n[[nvme.namespace]]\npath = \"{path}\"\n{keys}"
    )))
}

#[test]
fn a_disk_is_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk.img");
    fs::write(&disk, [0; 1024]).unwrap();
    let spec = with_disk(&disk, "direct = true").unwrap();
    let storage = Storage::File {
        path: disk.clone(),
        direct: true,
        read_only: false,
    };
    assert_eq!(spec.nvme[0].namespaces[0].storage, storage);
    let error = with_disk(&disk, "lba = 4096").unwrap_err();
    assert_eq!(
        error.problem,
        "its size, 1024 bytes, is not a multiple of lba=4096"
    );
    fs::write(&disk, "").unwrap();
    let error = with_disk(&disk, "").unwrap_err();
    assert!(
        error.problem.starts_with("an empty disk: enlarge it with"),
        "{error}"
    );
    assert!(
        with_disk(folder.path(), "")
            .unwrap_err()
            .problem
            .starts_with("not a disk")
    );
}

#[test]
fn one_file_has_one_writer() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk.img");
    let other = folder.path().join("./disk.img");
    fs::write(&disk, [0; 1024]).unwrap();
    let two = |first: &str, second: &str| {
        let (disk, other) = (disk.display(), other.display());
        check(&config(&format!(
            "[[nvme]]\n[[nvme.namespace]]\npath = \"{disk}\"\nreadonly = {first}\n\
             [[nvme.namespace]]\npath = \"{other}\"\nreadonly = {second}"
        )))
    };
    assert!(two("true", "true").is_ok());
    for (first, second) in [("false", "false"), ("true", "false"), ("false", "true")] {
        let error = two(first, second).unwrap_err();
        assert!(
            error.problem.starts_with("used twice"),
            "{first} {second}: {error}"
        );
    }
}

#[test]
fn a_socket_in_use_is_refused_and_a_stale_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let toml = format!("control = \"{}\"", path.display());
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    assert!(problem(&toml).ends_with("another program listens on it: give a path that is free"));
    drop(listener);
    check(&config(&toml)).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "x").unwrap();
    assert!(problem(&toml).ends_with("exists and is not a socket: give a path that is free"));
}
