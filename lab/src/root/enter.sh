# Runs a program with the private root as its file system. Started as
#   unshare --mount [--user --map-root-user] sh -c SCRIPT enter.sh ROOT FOLDER PROGRAM [ARGUMENT...]
# in a mount namespace of its own, so that nothing here is seen, or left, outside it.
# FOLDER appears as /lab, and the program dies with whoever started it.
set -eu
root=$1
folder=$2
shift 2

# A /dev of harmless devices. The empty file makes QEMU look for udmabuf here; the preloaded
# shim answers what QEMU asks of it.
mount -t tmpfs -o mode=755 dev "$root/dev"
for node in null zero full random urandom tty; do
    : >"$root/dev/$node"
    mount --bind "/dev/$node" "$root/dev/$node"
done
mkdir "$root/dev/shm"
: >"$root/dev/udmabuf"

# QEMU's 9p server sets the mode of a file that the guest makes through /proc/self/fd.
mount --rbind /proc "$root/proc"
mount -t tmpfs tmp "$root/tmp"
# Compilers' tools look at themselves there.
mount --rbind /proc "$root/proc"
mount --bind "$folder" "$root/lab"
exec setpriv --pdeathsig KILL chroot "$root" "$@"
