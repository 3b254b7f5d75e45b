#!/bin/sh
# A move within one host at native speed, on this machine's own kernel: the image's root file
# system under a throw-away overlay, in mount and pid namespaces of its own.
#
#   native.sh ROOT PAYLOAD_TAR      prints the migration's JSON lines, then piggie's numbers
set -eu
if [ "${NATIVE_INSIDE:-}" = "" ]; then
    NATIVE_INSIDE=1 exec unshare --mount --propagation private --pid --fork --kill-child "$0" "$@"
fi
work=$(mktemp -d)
mount -t tmpfs tmpfs "$work"
mkdir "$work/upper" "$work/work" "$work/root"
mount -t overlay -o "lowerdir=$1,upperdir=$work/upper,workdir=$work/work" overlay "$work/root"
root=$work/root
tar -C "$root" -xf "$2"
echo /opt/phaul-runtime/phaul > "$(echo "$root"/opt/phaul-runtime/lib/python3*/site-packages)/phaul.pth"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mkdir "$root/run/old"
cd "$root"
pivot_root . run/old
umount -l /run/old
rmdir "$work" 2>/dev/null || true
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
pid=$(piggie /tmp/count 20)
sleep 0.5
code=0
phaul-runtime migrate "$pid" --to local: --output json || code=$?
sleep 0.5
echo numbers
cut -d' ' -f1 /tmp/count
exit "$code"
