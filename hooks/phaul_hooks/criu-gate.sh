#!/bin/sh
# CRIU's action script: asks phaul-runtime at the moments that decide which copy lives.
#
# PHAUL_GATE is a directory with two FIFOs: events, to which this script writes a line, and verdict,
# from which it reads one. It exits with 0, on which CRIU goes on, only if it reads "yes" for its own
# action; nobody at the other end, an end without an answer, and PHAUL_GATE_SECONDS without one are a
# no. It may be
# called more than once for an action (CRIU does where its configuration is read twice) and asks
# each time.
action=$CRTOOLS_SCRIPT_ACTION
case $action in
    pre-dump | post-dump | post-restore) ;;
    post-resume)
        # Only told: everything runs already. Opened for both, a FIFO does not block.
        [ ! -p "$PHAUL_GATE/events" ] || echo "$action ${CRTOOLS_INIT_PID:-0}" 1<>"$PHAUL_GATE/events"
        exit 0
        ;;
    *) exit 0 ;;
esac
[ -p "$PHAUL_GATE/verdict" ] && [ -p "$PHAUL_GATE/events" ] || exit 1
# Opened for both first, so that opening for reading does not wait for a writer; closed again, what
# remains open is phaul-runtime's end alone: its death ends the reading.
exec 3<>"$PHAUL_GATE/verdict" 4<"$PHAUL_GATE/verdict" 3>&-
echo "$action ${CRTOOLS_INIT_PID:-0}" 1<>"$PHAUL_GATE/events"
answer=$(timeout "$PHAUL_GATE_SECONDS" head -n 1 <&4)
[ "$answer" = "yes $action" ]
