#!/bin/sh
# Builds phaul-go, static, with Go and the library as Debian 13 has them, in a root of their own:
# nothing is installed on this machine, and an older Debian's package lacks phaul.
#
#   build.sh OUTPUT
set -eu
here=$(dirname "$0")
work=$(mktemp -d "${TMPDIR:-/var/tmp}/phaul-go.XXXXXX")
trap 'rm -rf "$work"' EXIT
mmdebstrap -q --variant=minbase \
    --include=golang-go,golang-github-checkpoint-restore-go-criu-dev,golang-golang-x-sys-dev,golang-google-protobuf-dev \
    trixie "$work/root"
mkdir -p "$work/root/driver" "$work/root/root/.config/go/telemetry"
echo off >"$work/root/root/.config/go/telemetry/mode"
cp "$here/main.go" "$work/root/driver"
chroot "$work/root" env GOROOT=/usr/lib/go GO111MODULE=off GOPATH=/usr/share/gocode CGO_ENABLED=0 GOCACHE=/tmp/cache \
    HOME=/root go build -o /driver/phaul-go /driver/main.go
mkdir -p "$(dirname "$1")"
cp "$work/root/driver/phaul-go" "$1"
