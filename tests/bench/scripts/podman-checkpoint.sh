#!/bin/bash
# Moves a container of podman by podman's own means, as a careful operator would: export, copy,
# import; with --pre-checkpoint its memory goes over once while it runs.
#
#   podman-checkpoint.sh [--pre-checkpoint] NAME HOST
#
# The image is on the other host. Prints what was carried, as JSON.
set -euo pipefail
pre=
if [ "$1" = --pre-checkpoint ]; then
    pre=pre.tar
    shift
fi
name=$1 to=$2
work=$(mktemp -d /run/podman-checkpoint.XXXXXX)

there() { ssh -S "$work/ssh" "root@$to" "$@"; }
leave() {
    there rm -rf "$work" || true
    ssh -S "$work/ssh" -O exit "root@$to" 2>/dev/null || true
    rm -rf "$work"
}
trap leave EXIT
# Milliseconds of the clock.
ms() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); }
pages() { tar -tvf "$1" | awk '/pages-[0-9]+\.img$/ { sum += $3 } END { print sum / 4096 }'; }

# A connection that the copies share. What is exported is not compressed: that takes longer here.
ssh -fNM -S "$work/ssh" "root@$to" </dev/null >/dev/null 2>&1
there mkdir -p "$work"
first=final.tar
if [ "$pre" ]; then
    first=$pre
    podman container checkpoint --pre-checkpoint -c none -e "$work/$pre" "$name" >/dev/null
    there "cat > $work/$pre" <"$work/$pre"
fi

begun=$(ms)
podman container checkpoint ${pre:+--with-previous} -c none -e "$work/final.tar" "$name" >/dev/null
dumped=$(ms)
there "cd $work && cat > final.tar && podman container restore ${pre:+--import-previous $pre} \
    --import final.tar </dev/null >log 2>&1 || { cat log >&2; exit 1; }" <"$work/final.tar"
ended=$(ms)

podman rm "$name" >/dev/null
bytes=$(cat "$work"/*.tar | wc -c)
cat <<END
{"pages": $(pages "$work/$first"), "final_pages": $(pages "$work/final.tar"), "bytes": $bytes, "steps": {"checkpoint": $((dumped - begun)), "copy and restore": $((ended - dumped))}}
END
