//! Fetches real packages from the archive that this machine is configured for.

use std::fs;
use std::path::Path;

use guest_images::apt::{Apt, Freshness, Suite, unpack};
use guest_images::progress::Silent;
use guest_images::{CacheDir, Error};

#[test]
fn packages_are_fetched_checked_cached_and_unpacked() {
    let temp = tempfile::tempdir().unwrap();
    let apt = Apt::new(&CacheDir::at(temp.path()));
    let machine_before = machine_state();

    let trixie = apt.suite(Suite::Trixie);
    let debs = trixie
        .fetch(&["ethtool", "busybox-static"], Freshness::Cached, &Silent)
        .unwrap();
    let names: Vec<&str> = debs.iter().map(|deb| deb.name.as_str()).collect();
    assert_eq!(names, ["ethtool", "busybox-static"]);
    assert_eq!(debs[0].sha256.len(), 64);

    let closure = trixie
        .fetch_closure(&["ethtool"], Freshness::Cached, &Silent)
        .unwrap();
    let names: Vec<&str> = closure.iter().map(|deb| deb.name.as_str()).collect();
    assert!(
        names.contains(&"ethtool") && names.contains(&"libc6"),
        "{names:?}"
    );
    assert!(closure.iter().all(|deb| deb.path.is_file()));

    // Without sources nothing can be fetched: this answer comes from the cache.
    let sources = temp.path().join("apt/trixie/etc/private.sources");
    let hidden = temp.path().join("hidden");
    fs::rename(&sources, &hidden).unwrap();
    let again = trixie
        .fetch_closure(&["ethtool"], Freshness::Cached, &Silent)
        .unwrap();
    assert_eq!(again, closure);
    fs::rename(&hidden, &sources).unwrap();

    let error = trixie
        .fetch(
            &["ringside-has-no-such-package"],
            Freshness::Refresh,
            &Silent,
        )
        .unwrap_err();
    assert!(
        matches!(&error, Error::PackageNotFound { suite: "trixie", package } if package == "ringside-has-no-such-package"),
        "{error}"
    );

    let root = temp.path().join("root");
    unpack(&debs[1], &root).unwrap();
    assert!(root.join("bin/busybox").is_file() || root.join("usr/bin/busybox").is_file());

    assert_eq!(
        machine_state(),
        machine_before,
        "the machine's own apt state changed"
    );
}

/// Names and change times of what apt keeps for the machine itself.
fn machine_state() -> Vec<String> {
    let mut state = Vec::new();
    for dir in [
        "/var/lib/apt",
        "/var/lib/apt/lists",
        "/var/cache/apt",
        "/var/cache/apt/archives",
    ] {
        let Ok(entries) = fs::read_dir(Path::new(dir)) else {
            continue;
        };
        for entry in entries.flatten() {
            let modified = entry.metadata().and_then(|data| data.modified());
            state.push(format!("{} {modified:?}", entry.path().display()));
        }
    }
    state.sort();
    state
}
