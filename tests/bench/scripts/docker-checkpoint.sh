#!/bin/bash
# Moves a container of docker by docker's own means, as a careful operator would: what can be done
# before the freeze is done before it, and nothing is written twice.
#
#   docker-checkpoint.sh NAME HOST CREATE-ARGUMENT...
#
# The image is on the other host. Prints what was carried, as JSON.
set -euo pipefail
name=$1 to=$2
shift 2
work=$(mktemp -d /run/docker-checkpoint.XXXXXX)

there() { ssh -S "$work/ssh" "root@$to" "$@"; }
leave() {
    ssh -S "$work/ssh" -O exit "root@$to" 2>/dev/null || true
    rm -rf "$work"
}
trap leave EXIT
# Milliseconds of the clock.
ms() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); }

# A connection that the copies share.
ssh -fNM -S "$work/ssh" "root@$to" </dev/null >/dev/null 2>&1
id=$(there docker create --name "$name" "$@")
upper="docker inspect -f '{{.GraphDriver.Data.UpperDir}}' $name"
layer=$(eval "$upper")
layer_there=$(there "$upper")
# Docker starts from no other directory than this one.
checkpoints=/var/lib/docker/containers/$id/checkpoints
there mkdir -p "$checkpoints"

begun=$(ms)
docker checkpoint create --checkpoint-dir "$work" "$name" moved >/dev/null
dumped=$(ms)
tar --xattrs --xattrs-include='*' -C "$layer" -c . |
    there "tar --xattrs --xattrs-include='*' -C $layer_there -x"
tar -C "$work" -c moved |
    there "tar -C $checkpoints -x && docker start --checkpoint moved $name >/dev/null"
ended=$(ms)

pages=$(($(cat "$work"/moved/pages-*.img | wc -c) / 4096))
bytes=$(du -sbc "$work/moved" "$layer" | tail -1 | cut -f1)
docker rm "$name" >/dev/null
# What docker itself leaves at each start from a checkpoint, too.
there "rm -rf $checkpoints/moved /tmp/ctrd-checkpoint*"
cat <<END
{"pages": $pages, "final_pages": $pages, "bytes": $bytes, "steps": {"checkpoint": $((dumped - begun)), "copy and start": $((ended - dumped))}}
END
