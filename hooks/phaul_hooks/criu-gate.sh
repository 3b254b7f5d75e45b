#!/bin/sh
# CRIU's action script: asks phaul-runtime at the moments that decide which copy lives.
#
# It is called by a link to it, in a directory with two FIFOs: events, to which this script writes a
# line, and verdict, from which it reads one. It exits with 0, on which CRIU goes on, only if it reads
# "yes" for its own action; nobody at the other end, an end without an answer, and none within the
# seconds that the file of that name says, are a no. It may be called more than once for an action
# (CRIU does where its configuration is read twice) and asks each time. Before a restore it asks only
# if there is a file "early".
action=$CRTOOLS_SCRIPT_ACTION
gate=${0%/*}
case $action in
    pre-dump | post-dump | post-restore) ;;
    # CRIU would serve pages itself, to whoever asks: after a dump that was called off, too.
    status-ready) exit 1 ;;
    pre-restore) [ -e "$gate/early" ] || exit 0 ;;
    post-resume)
        # Only told: everything runs already. Opened for both, a FIFO does not block.
        [ ! -p "$gate/events" ] || echo "$action ${CRTOOLS_INIT_PID:-0}" 1<>"$gate/events"
        exit 0
        ;;
    *) exit 0 ;;
esac
[ -p "$gate/verdict" ] && [ -p "$gate/events" ] && read -r seconds <"$gate/seconds" || exit 1
# Opened for both first, so that opening for reading does not wait for a writer; closed again, what
# remains open is phaul-runtime's end alone: its death ends the reading.
exec 3<>"$gate/verdict" 4<"$gate/verdict" 3>&-
echo "$action ${CRTOOLS_INIT_PID:-0}" 1<>"$gate/events"
answer=$(timeout "$seconds" head -n 1 <&4)
[ "$answer" = "yes $action" ]
