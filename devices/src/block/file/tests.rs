use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use super::*;
use crate::block::BlockOp;
use crate::block::suite::{self, Keeps, User, pattern};

/// A file system to test on: the build directory's, and a memory one (which cannot zero ranges).
fn places() -> Vec<tempfile::TempDir> {
    let build = std::env::current_exe().unwrap();
    let mut places = vec![tempfile::tempdir_in(build.parent().unwrap()).unwrap()];
    if Path::new("/dev/shm").is_dir() {
        places.push(tempfile::tempdir_in("/dev/shm").unwrap());
    }
    places
}

fn image(dir: &tempfile::TempDir, len: u64) -> FileOptions {
    let file = tempfile::NamedTempFile::new_in(dir).unwrap();
    file.as_file().set_len(len).unwrap();
    let (_, path) = file.keep().unwrap();
    FileOptions::new(path)
}

fn refused(options: &FileOptions) -> OpenError {
    FileBackend::open(options).expect_err("opened")
}

#[test]
fn passes_the_suite() {
    for dir in places() {
        for direct in [false, true] {
            let open = || {
                let mut options = image(&dir, suite::CAPACITY);
                options.direct = direct;
                FileBackend::open(&options).unwrap()
            };
            suite::run(&open, Keeps::Data);
        }
    }
}

#[test]
fn read_only_passes_the_suite() {
    for dir in places() {
        for direct in [false, true] {
            let mut options = image(&dir, suite::CAPACITY);
            options.direct = direct;
            options.read_only = true;
            let data = pattern(5, 1 << 20);
            let file = File::options().write(true).open(&options.path).unwrap();
            file.write_all_at(&data, 4096).unwrap();
            suite::run_read_only(&|| FileBackend::open(&options).unwrap());
            let mut user = User::new(FileBackend::open(&options).unwrap());
            assert!(user.read(4096, data.len()).unwrap() == data);
        }
    }
}

#[test]
fn data_reaches_the_file_and_holes_are_punched() {
    for dir in places() {
        let options = image(&dir, 4 << 20);
        let backend = FileBackend::open(&options).unwrap();
        let mut user = User::new(backend.clone());
        let data = pattern(1, 2 << 20);
        user.write(1 << 20, &data).unwrap();
        user.op(BlockOp::Flush).unwrap();
        let file = File::open(&options.path).unwrap();
        let mut back = vec![0; data.len()];
        file.read_exact_at(&mut back, 1 << 20).unwrap();
        assert!(back == data);
        let full = file.metadata().unwrap().blocks();
        assert!(full * 512 >= 2 << 20);
        assert!(backend.info().discard);
        user.op(BlockOp::Discard {
            offset: 1 << 20,
            len: 1 << 20,
        })
        .unwrap();
        let punched = file.metadata().unwrap().blocks();
        assert!((full - punched) * 512 >= 1 << 20, "{full} {punched}");
        user.op(BlockOp::WriteZeroes {
            offset: 2 << 20,
            len: 1 << 20,
            unmap: true,
            fua: true,
        })
        .unwrap();
        assert!(file.metadata().unwrap().blocks() < punched);
        assert_eq!(file.metadata().unwrap().len(), 4 << 20);
        assert_eq!(backend.bounced(), 0);
    }
}

#[test]
fn direct_io_bounces_only_what_is_not_aligned() {
    let dir = &places()[0];
    let mut options = image(dir, 4 << 20);
    options.direct = true;
    let backend = FileBackend::open(&options).unwrap();
    let mut user = User::new(backend.clone());
    let data = pattern(2, 1 << 20);
    user.write(0, &data).unwrap();
    assert_eq!(backend.bounced(), 0);
    let skewed = suite::Layout::Pieces {
        len: 300_000,
        skew: backend.align.memory as u64 / 2,
    };
    // More requests at once than there are bounce buffers.
    let back = user.read_as(skewed, 0, data.len()).unwrap();
    assert!(back == data);
    assert_eq!(backend.bounced(), 1);
    let pinned: Vec<_> = (0..32u64)
        .map(|tag| {
            let mut buffers = iommu::PinnedBuffers::new();
            let at = iommu::Iova(tag * 8192 + 2);
            user.mem.write(at, &pattern(tag, 4096)).unwrap();
            buffers
                .push(&user.mem, at, 4096, iommu::Access::Read)
                .unwrap();
            (tag, buffers)
        })
        .collect();
    for (tag, buffers) in pinned {
        let offset = tag * 4096;
        user.queue.push(crate::block::BlockRequest {
            op: BlockOp::Write { offset, fua: false },
            buffers,
            tag,
        });
    }
    user.queue.submit();
    for _ in 0..32 {
        user.wait().result.unwrap();
    }
    assert_eq!(backend.bounced(), 33);
    for tag in 0..32 {
        assert!(user.read(tag * 4096, 4096).unwrap() == pattern(tag, 4096));
    }
}

#[test]
fn one_writer_or_many_readers() {
    let dir = &places()[0];
    let options = image(dir, 1 << 20);
    let reader = FileOptions {
        read_only: true,
        ..options.clone()
    };
    let writer = FileBackend::open(&options).unwrap();
    assert!(matches!(refused(&options), OpenError::Locked { .. }));
    let text = refused(&reader).to_string();
    assert!(
        text.contains(&*options.path.to_string_lossy())
            && text.contains("writer")
            && text.contains("readonly"),
        "{text}"
    );
    // A queue keeps the lock.
    let queue = writer.clone().open_queue(1).unwrap();
    drop(writer);
    assert!(matches!(refused(&options), OpenError::Locked { .. }));
    drop(queue);
    let first = FileBackend::open(&reader).unwrap();
    let second = FileBackend::open(&reader).unwrap();
    assert!(matches!(refused(&options), OpenError::Locked { .. }));
    drop((first, second));
    FileBackend::open(&options).unwrap();
}

/// Run by the next test in a process of its own.
#[test]
#[ignore = "the other process of another_process_is_refused"]
fn lock_from_another_process() {
    let path = std::env::var_os("RINGSIDE_TEST_IMAGE").expect("run by another test");
    assert!(matches!(
        refused(&FileOptions::new(path)),
        OpenError::Locked { .. }
    ));
}

#[test]
fn another_process_is_refused() {
    let dir = &places()[0];
    let options = image(dir, 1 << 20);
    let _writer = FileBackend::open(&options).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact"])
        .arg("block::file::tests::lock_from_another_process")
        .env("RINGSIDE_TEST_IMAGE", &options.path)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

#[test]
fn bad_images_are_refused_with_their_name() {
    let dir = &places()[0];
    let missing = FileOptions::new(dir.path().join("missing.img"));
    let cases = [
        (missing.clone(), "no such disk image"),
        (FileOptions::new(dir.path()), "neither a regular file"),
        (FileOptions::new("/dev/null"), "neither a regular file"),
        (image(dir, 511), "too small"),
        (image(dir, 0), "too small"),
    ];
    for (options, part) in cases {
        let text = refused(&options).to_string();
        assert!(
            text.contains(part) && text.contains(&*options.path.to_string_lossy()),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1);
    }
    assert!(!missing.path.exists());
    let refuses_direct = FileOptions {
        read_only: true,
        direct: true,
        ..FileOptions::new("/proc/version")
    };
    assert!(matches!(refused(&refuses_direct), OpenError::NoDirect(_)));
}

#[test]
fn odd_sizes_are_rounded_down() {
    let dir = &places()[0];
    let options = image(dir, (1 << 20) + 700);
    let backend = FileBackend::open(&options).unwrap();
    assert_eq!(backend.info().capacity, (1 << 20) + 512);
    let mut user = User::new(backend);
    user.read(1 << 20, 512).unwrap();
    assert!(user.read(1 << 20, 1024).is_err());
    let length = File::open(&options.path).unwrap().metadata().unwrap().len();
    assert_eq!(length, (1 << 20) + 700);
}

#[test]
fn a_file_cut_short_is_an_error_and_not_a_hang() {
    let dir = &places()[0];
    let options = image(dir, 1 << 20);
    let mut user = User::new(FileBackend::open(&options).unwrap());
    let file = File::options().write(true).open(&options.path).unwrap();
    file.set_len(4096).unwrap();
    let error = user.read(0, 8192).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    user.read(0, 4096).unwrap();
}

/// Errors of the host come back as they are, and the queue goes on.
#[test]
fn a_full_file_system_is_reported() {
    // The mount is seen by the thread alone.
    std::thread::spawn(full_file_system).join().unwrap();
}

fn full_file_system() {
    let mount = tempfile::tempdir().unwrap();
    if let Err(error) = mount_tmpfs(mount.path(), "size=256k") {
        eprintln!("skipped: cannot mount a small file system: {error}");
        return;
    }
    let mut options = image(&mount, 4 << 20);
    let mut user = User::new(FileBackend::open(&options).unwrap());
    let data = pattern(1, 64 << 10);
    user.write(0, &data).unwrap();
    let error = user.write(1 << 20, &pattern(2, 1 << 20)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    // Zeroes must be written here (no zero ranges), which also needs space.
    let zeroes = BlockOp::WriteZeroes {
        offset: 2 << 20,
        len: 1 << 20,
        unmap: false,
        fua: true,
    };
    let error = user.op(zeroes).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert!(user.read(0, data.len()).unwrap() == data);
    drop(user);
    options.read_only = true;
    FileBackend::open(&options).unwrap();
}

/// Mounts in a namespace of this thread's own, which disappears with it.
fn mount_tmpfs(at: &Path, options: &str) -> io::Result<()> {
    use rustix::mount::{MountFlags, MountPropagationFlags};
    // SAFETY: only this test's thread leaves the shared mount namespace; it opens no descriptor
    // through another thread's view of the file system.
    #[expect(unsafe_code, reason = "unshare")]
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return Err(io::Error::last_os_error());
    }
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    let options = std::ffi::CString::new(options).unwrap();
    rustix::mount::mount("tmpfs", at, "tmpfs", MountFlags::empty(), &*options)?;
    Ok(())
}

#[test]
fn a_queue_may_move_between_threads_with_requests_in_flight() {
    let dir = &places()[0];
    let options = image(dir, suite::CAPACITY);
    let mut user = User::new(FileBackend::open(&options).unwrap());
    let data = pattern(1, 1 << 20);
    // Submitted on a thread that ends at once.
    let data_there = data.clone();
    user = std::thread::spawn(move || {
        user.push(
            BlockOp::Write {
                offset: 0,
                fua: true,
            },
            &data_there,
            1,
        );
        user.push(BlockOp::Flush, &[], 2);
        user
    })
    .join()
    .unwrap();
    for _ in 0..2 {
        user.wait().result.unwrap();
    }
    assert!(user.read(0, data.len()).unwrap() == data);
}

#[test]
fn loop_devices_work() {
    let dir = &places()[0];
    let options = image(dir, suite::CAPACITY);
    let output = Command::new("losetup")
        .args(["--find", "--show"])
        .arg(&options.path)
        .output();
    let device = match output {
        Ok(output) if output.status.success() => {
            String::from_utf8(output.stdout).unwrap().trim().to_owned()
        }
        other => {
            eprintln!("skipped: no loop device: {other:?}");
            return;
        }
    };
    for direct in [false, true] {
        let result = std::panic::catch_unwind(|| {
            let options = FileOptions {
                direct,
                ..FileOptions::new(&device)
            };
            let file = File::options().write(true).open(&device).unwrap();
            let open = || {
                let zeroes = vec![0; usize::try_from(suite::CAPACITY).unwrap()];
                file.write_all_at(&zeroes, 0).unwrap();
                file.sync_all().unwrap();
                FileBackend::open(&options).unwrap()
            };
            suite::run(&open, Keeps::Data);
        });
        if result.is_err() {
            let _ = Command::new("losetup").args(["-d", &device]).status();
        }
        result.unwrap();
    }
    let _ = Command::new("losetup").args(["-d", &device]).status();
}
