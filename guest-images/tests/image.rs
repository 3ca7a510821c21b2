//! Builds the real images, in the user's cache folder, and looks into them.

use std::collections::BTreeMap;
use std::fs;

use guest_images::apt::Freshness;
use guest_images::{CacheDir, Image, ImageName, Images, Release, progress};

#[test]
fn debian_12() {
    let image = build(Release::Debian12);
    assert!(
        image.kernel_release.starts_with("6.1."),
        "{}",
        image.kernel_release
    );
    let files = check(&image);
    // This kernel has the virtio transport as a module, and its modules are not compressed.
    assert!(has_module(&files, "virtio_pci.ko"));
    assert!(
        !has_module(&files, "ahci.ko"),
        "the README says that 6.1 has no AHCI"
    );
}

#[test]
fn debian_13() {
    let image = build(Release::Debian13);
    assert!(
        image.kernel_release.starts_with("6.12."),
        "{}",
        image.kernel_release
    );
    let files = check(&image);
    assert!(has_module(&files, "ahci.ko") && has_module(&files, "virtio-iommu.ko"));
}

/// testpmd's own drivers come with the libraries that it is bound to; the rest is as without it.
#[test]
fn dpdk() {
    for release in Release::ALL {
        let name = ImageName::parse(&format!("{release}-dpdk")).unwrap();
        let image = build(name);
        let files = read_cpio(&fs::read(&image.initramfs).unwrap());
        assert!(
            files["usr/bin/dpdk-testpmd"]
                .content
                .starts_with(b"\x7fELF")
        );
        let libraries = "usr/lib/x86_64-linux-gnu";
        let drivers: Vec<&String> = files
            .range(format!("{libraries}/dpdk/pmds-")..format!("{libraries}/dpdk/pmds."))
            .filter(|(_, file)| file.mode & 0o170_000 == 0o120_000)
            .map(|(path, file)| {
                let target = String::from_utf8(file.content.clone()).unwrap();
                let target = target.replace("../..", libraries);
                assert!(files[&target].content.starts_with(b"\x7fELF"), "{path}");
                path
            })
            .collect();
        assert!(
            drivers
                .iter()
                .any(|path| path.contains("librte_net_virtio.so")),
            "{drivers:?}"
        );
        // fio's stand-in would be in its place if the order were another.
        assert!(files[&format!("{libraries}/libibverbs.so.1")].content.len() > 50_000);
        assert!(files.contains_key("usr/bin/fio") && files.contains_key("usr/bin/vfio-nvme"));
        let size: usize = files.values().map(|file| file.content.len()).sum();
        assert!(size < 70 << 20, "{size} bytes: too much was taken");
    }
}

fn build(name: impl Into<ImageName>) -> Image {
    let images = Images::new(&CacheDir::discover().unwrap());
    let progress = progress::on_stderr();
    let image = images.build(name, Freshness::Cached, &*progress).unwrap();
    assert!(images.list().unwrap().contains(&image));
    image
}

fn check(image: &Image) -> BTreeMap<String, File> {
    let bzimage = fs::read(&image.bzimage).unwrap();
    assert_eq!(&bzimage[0x202..0x206], b"HdrS");
    let vmlinux = fs::read(&image.vmlinux).unwrap();
    assert!(has_pvh_note(&vmlinux));

    let packages: Vec<&str> = image
        .manifest
        .packages
        .iter()
        .map(|package| package.name.as_str())
        .collect();
    for name in [
        "busybox-static",
        "fio",
        "nvme-cli",
        "ethtool",
        "iproute2",
        "iperf3",
        "libc6",
    ] {
        assert!(packages.contains(&name), "{name} is not in {packages:?}");
    }
    assert!(
        image
            .manifest
            .packages
            .iter()
            .all(|package| package.sha256.len() == 64)
    );

    let files = read_cpio(&fs::read(&image.initramfs).unwrap());
    for name in [
        "bash",
        "busybox",
        "dash",
        "fio",
        "nvme",
        "ethtool",
        "ip",
        "iperf3",
        "setpci",
        "lspci",
        "tc",
        "vfio-nvme",
    ] {
        let file = &files[&format!("usr/bin/{name}")];
        assert!(
            file.mode == 0o100_755 && file.content.starts_with(b"\x7fELF"),
            "{name}"
        );
    }
    // Real programs are not replaced by busybox's, the others are there.
    assert_eq!(files["usr/bin/sh"].content, b"dash");
    assert_eq!(files["usr/bin/ping"].mode & 0o170_000, 0o120_000);
    assert_eq!(files["init"].mode, 0o100_755);
    assert_eq!(files["dev/console"].mode, 0o020_600);
    for name in [
        "virtio_net.ko",
        "vmw_vsock_virtio_transport.ko",
        "vfio-pci.ko",
        "vfio_iommu_type1.ko",
    ] {
        assert!(has_module(&files, name), "{name}");
    }
    let dir = format!("usr/lib/modules/{}", image.kernel_release);
    let text =
        |name: &str| String::from_utf8(files[&format!("{dir}/{name}")].content.clone()).unwrap();
    for line in text("modules.dep").lines() {
        for path in line.replace(':', " ").split_whitespace() {
            assert!(files.contains_key(&format!("{dir}/{path}")), "{path}");
        }
    }
    assert!(text("modules.alias").contains("alias virtio:d00000001v* virtio_net"));

    let size: usize = files.values().map(|file| file.content.len()).sum();
    assert!(size < 40 << 20, "{size} bytes: too much was taken");
    files
}

fn has_module(files: &BTreeMap<String, File>, name: &str) -> bool {
    let end = format!("/{name}");
    files
        .iter()
        .any(|(path, file)| path.ends_with(&end) && file.content.starts_with(b"\x7fELF"))
}

/// A note of Xen with the 32-bit entry point (XEN_ELFNOTE_PHYS32_ENTRY, 18).
fn has_pvh_note(vmlinux: &[u8]) -> bool {
    let mut note = Vec::new();
    for word in [4u32, 8, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    vmlinux.starts_with(b"\x7fELF\x02") && vmlinux.windows(note.len()).any(|window| window == note)
}

struct File {
    mode: u32,
    content: Vec<u8>,
}

/// A reader of its own, so that a mistake in the writer shows.
fn read_cpio(mut bytes: &[u8]) -> BTreeMap<String, File> {
    let mut files = BTreeMap::new();
    loop {
        let (header, rest) = bytes.split_at(110);
        assert_eq!(&header[..6], b"070701");
        let field = |index: usize| {
            let digits = std::str::from_utf8(&header[6 + index * 8..14 + index * 8]).unwrap();
            u32::from_str_radix(digits, 16).unwrap()
        };
        let (size, name_size) = (field(6) as usize, field(11) as usize);
        let name = std::str::from_utf8(&rest[..name_size - 1])
            .unwrap()
            .to_owned();
        assert_eq!(rest[name_size - 1], 0);
        if name == "TRAILER!!!" {
            return files;
        }
        if let Some((parent, _)) = name.rsplit_once('/') {
            assert!(files.contains_key(parent), "{parent} comes after {name}");
        }
        let start = (110 + name_size).next_multiple_of(4) - 110;
        let content = rest[start..start + size].to_vec();
        bytes = &rest[start + size.next_multiple_of(4)..];
        files.insert(
            name,
            File {
                mode: field(1),
                content,
            },
        );
    }
}
