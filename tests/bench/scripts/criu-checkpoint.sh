#!/bin/bash
# Moves a process by CRIU's own means: dump, rsync, restore; nothing of it goes over beforehand.
#
#   criu-checkpoint.sh PID HOST DIRECTORY FILE
#
# FILE is the one that it writes to. Prints what was carried, as JSON.
set -euo pipefail
pid=$1 to=$2 images=$3 file=$4

there() { ssh -S /run/bench-ssh "root@$to" "$@"; }
trap 'ssh -S /run/bench-ssh -O exit "root@$to" 2>/dev/null || true' EXIT
# Milliseconds of the clock.
ms() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); }

# A connection that the copies share.
ssh -fNM -S /run/bench-ssh "root@$to" </dev/null >/dev/null 2>&1
mkdir -m 700 "$images"

begun=$(ms)
criu dump -t "$pid" -D "$images" -o dump.log </dev/null
dumped=$(ms)
rsync -a --whole-file --inplace -e 'ssh -S /run/bench-ssh' "$images" "root@$to:$(dirname "$images")"
rsync -a -e 'ssh -S /run/bench-ssh' "$file" "root@$to:$file"
copied=$(ms)
there "criu restore -d -D $images -o restore.log </dev/null >/dev/null 2>&1 || {
    grep Error $images/restore.log >&2; exit 1; }"
ended=$(ms)

pages=$(($(cat "$images"/pages-*.img | wc -c) / 4096))
bytes=$(du -sb "$images" | cut -f1)
rm -rf "$images"
cat <<END
{"pages": $pages, "final_pages": $pages, "bytes": $bytes, "steps": {"dump": $((dumped - begun)), "copy": $((copied - dumped)), "restore": $((ended - copied))}}
END
