#!/bin/busybox sh
# The first program of the guest. It loads the modules, mounts the private root of the host as
# the guest's userland and hands over to the agent there.
export PATH=/bin

/bin/busybox mkdir -p /proc /sys /userland
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null

load() {
    while read -r module parameters; do
        # Parameters are words: no quotes.
        insmod "/modules/$module" $parameters || echo "init: cannot load $module"
    done <"/modules/$1"
}
load first
load rest &

# Devices behind an IOMMU whose driver is a module appear a little after it.
9p() {
    for attempt in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$3" "$1" "$2" 2>/dev/null && return
        sleep 0.1
    done
    echo "init: cannot mount $1"
    poweroff -f
}
if grep -q peervram.busybox /proc/cmdline; then
    # The private root is another architecture's: busybox is all that there is.
    mkdir -p /userland/proc /userland/sys /userland/dev /userland/tmp /userland/run /userland/lab
    cp -a /bin /userland/bin
else
    9p root /userland ro,cache=loose
fi
mount -t proc proc /userland/proc
mount -t sysfs sysfs /userland/sys
mount -t debugfs debugfs /userland/sys/kernel/debug
mount -t devtmpfs devtmpfs /userland/dev
mkdir -p /userland/dev/shm /userland/dev/pts
mount -t tmpfs shm /userland/dev/shm
mount -t devpts devpts /userland/dev/pts
mount -t tmpfs tmp /userland/tmp
mount -t tmpfs run /userland/run
9p share /userland/lab cache=none
wait

export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp XDG_RUNTIME_DIR=/run LC_ALL=C.UTF-8
# Of all the Vulkan drivers in the root only the one for CPUs can work here, and Venus on a GPU with 3D.
export VK_DRIVER_FILES=/usr/share/vulkan/icd.d/lvp_icd.json
if grep -q peervram.venus /proc/cmdline; then
    VK_DRIVER_FILES=$VK_DRIVER_FILES:/usr/share/vulkan/icd.d/virtio_icd.json
fi

if grep -q peervram.shell /proc/cmdline; then
    echo "The programs of this run are in /lab; the machine ends with this shell."
    shell=/bin/bash
    [ -e "/userland$shell" ] || shell=/bin/sh
    setsid cttyhack chroot /userland "$shell" -i
else
    port=/dev/ttyS1
    [ -e "$port" ] || port=/dev/ttyAMA1
    stty -F "$port" raw -echo
    # From memory: each test is a process of its own, and pages of a shared file are not kept.
    cp /userland/lab/agent /userland/run/agent
    chroot /userland /run/agent agent "$port"
    echo "init: the agent ended with code $?"
fi
poweroff -f
