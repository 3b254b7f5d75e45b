#!/bin/sh
# The demonstration: a process with 128 MiB, rewriting some of it, moves from host a to host b.
set -eu
lab=$(dirname "$0")/lab
status=/var/tmp/demo.status
terminal=
[ -t 1 ] && terminal=-t

# Both hosts as before the last demonstration: its process ends.
for host in a b; do
    $lab exec $host -- sh -c "
        pid=\$(sed -n 's/.*\"pid\": \([0-9]*\),.*/\1/p' $status 2>/dev/null) || true
        [ \"\$(cat /proc/\$pid/comm 2>/dev/null)\" != piggie-dirty ] || kill \"\$pid\"
        rm -f $status"
done

echo "== host a: piggie-dirty, 128 MiB, 4 MiB of them rewritten all the time"
pid=$($lab exec a -- piggie-dirty --status $status --mib 128 --hot-mib 4 --writes 500 \
    --verifies 8000 --detach)
echo "pid $pid"
echo "== host a: phaul-runtime migrate --engine process $pid --to ssh://root@b --files copy"
$lab exec $terminal a -- phaul-runtime migrate --engine process "$pid" --to ssh://root@b --files copy

echo "== host a: is it gone?"
if $lab exec a -- kill -0 "$pid" 2>/dev/null; then
    echo "pid $pid still exists on a"
    exit 1
fi
echo "pid $pid no longer exists"
echo "== host b: all pages verified since the move?"
field() {
    $lab exec b -- sed -n "s/.*\"$1\": \([0-9]*\),.*/\1/p" $status
}
target=$(($(field passes) + 2))
tries=0
while [ "$(field passes)" -lt $target ]; do
    tries=$((tries + 1))
    if [ $tries -gt 300 ]; then
        echo "no complete pass over the pages; see $status on host b"
        exit 1
    fi
    sleep 0.5
done
wrong=$(field wrong)
echo "pid $(field pid) on b: $(field pages) pages, each verified again; $(field verified)" \
    "verifications in all; wrong pages: $wrong"
[ "$wrong" = 0 ]
