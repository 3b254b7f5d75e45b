#!/bin/bash
# Moves a container of runc by runc's own means: its bundle goes over while it runs and once more
# when it does not; checkpoint, rsync, restore.
#
#   runc-checkpoint.sh NAME HOST BUNDLE [redis]
#
# With `redis` its connections are carried too, and its address by the hook that phaul-runtime
# has for it. Prints what was carried, as JSON.
set -euo pipefail
name=$1 to=$2 bundle=$3 redis=${4:-}
images=/run/bench-images
tcp=${redis:+--tcp-established}

there() { ssh -S /run/bench-ssh "root@$to" "$@"; }
trap 'ssh -S /run/bench-ssh -O exit "root@$to" 2>/dev/null || true' EXIT
# Milliseconds of the clock.
ms() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); }

# A connection that the copies share.
ssh -fNM -S /run/bench-ssh "root@$to" </dev/null >/dev/null 2>&1
there mkdir -p "$(dirname "$bundle")"
rsync -aX -e 'ssh -S /run/bench-ssh' "$bundle" "root@$to:$(dirname "$bundle")"
mkdir -m 700 "$images"

begun=$(ms)
runc checkpoint $tcp --image-path "$images" --work-path "$images" "$name"
dumped=$(ms)
rsync -a --whole-file --inplace -e 'ssh -S /run/bench-ssh' "$images" "root@$to:/run"
rsync -aX --delete -e 'ssh -S /run/bench-ssh' "$bundle" "root@$to:$(dirname "$bundle")"
move=true
if [ "$redis" ]; then
    # What phaul-move-address does at either end.
    ip route del 10.77.9.50/32
    # CRIU's lock stays in the source's namespace.
    nsenter --net=/run/netns/app sh -c 'iptables -F; nft flush ruleset'
    move="ip route add 10.77.9.50/32 dev veth-app"
fi
copied=$(ms)
there "$move; runc --log /run/bench-restore.log restore -d $tcp --image-path $images \
    --work-path $images --bundle $bundle $name </dev/null >/dev/null 2>&1 || {
    tail -1 /run/bench-restore.log >&2; exit 1; }"
ended=$(ms)

pages=$(($(cat "$images"/pages-*.img | wc -c) / 4096))
bytes=$(du -sb "$images" | cut -f1)
rm -rf "$images"
cat <<END
{"pages": $pages, "final_pages": $pages, "bytes": $bytes, "steps": {"dump": $((dumped - begun)), "copy": $((copied - dumped)), "restore": $((ended - copied))}}
END
