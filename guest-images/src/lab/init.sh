#!/bin/busybox sh
# First process of the nested host: loads modules, makes the machine's own root (read-only over
# virtio-9p, under a tmpfs) the root, and hands over to the relay.
b=/bin/busybox

fail() {
    echo "ringside init: $*" > /dev/console
    $b sync
    exit 1
}

load() {
    for module in "/modules/$1"/*.ko; do
        $b insmod "$module" || return 1
    done
}

$b mount -t devtmpfs dev /dev || fail "no devtmpfs"
$b mount -t proc proc /proc || fail "no procfs"
$b mount -t sysfs sys /sys || fail "no sysfs"
load root || fail "a module for the root cannot be loaded"
load later > /dev/console 2>&1 &
LAB_MODULES_PID=$!
export LAB_MODULES_PID

$b mount -t 9p -o "ro,cache=loose,NINE_P_OPTIONS" root /lower || fail "the machine's root cannot be mounted"
$b mount -t tmpfs -o size=75% tmpfs /upper || fail "no tmpfs"
$b mkdir /upper/files /upper/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work root /root ||
    fail "no overlay"
for folder in proc sys dev; do
    $b mkdir -p "/root/$folder"
    $b mount -o move "/$folder" "/root/$folder" || fail "cannot move /$folder"
done
cd /root || fail "no root"
$b mkdir -p dev/pts dev/shm dev/mqueue
$b mount -t devpts -o ptmxmode=0666,mode=0620,gid=5 devpts dev/pts || fail "no devpts"
$b mount -t tmpfs -o mode=1777 tmpfs dev/shm || fail "no /dev/shm"
$b mount -t mqueue mqueue dev/mqueue || fail "no mqueue"
$b mount -t cgroup2 cgroup2 sys/fs/cgroup || fail "no cgroup2"
$b mount -t debugfs debugfs sys/kernel/debug || fail "no debugfs"
$b mount -t tracefs tracefs sys/kernel/tracing || fail "no tracefs"
for link in fd:/proc/self/fd stdin:/proc/self/fd/0 stdout:/proc/self/fd/1 stderr:/proc/self/fd/2; do
    $b ln -s "${link#*:}" "dev/${link%%:*}"
done
$b ip link set lo up || fail "no loopback interface"
echo 0 > proc/sys/kernel/io_uring_disabled

# Sets the relay's command line as the positional parameters.
. /relay.sh
exec $b chroot . "$@"
fail "the relay cannot be started"
