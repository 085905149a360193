#!/bin/sh
# Runs a command with one line that moves while it does, on a terminal: `moving.sh WHAT COMMAND…`.
what=$1
shift
[ -t 2 ] || exec "$@"
"$@" &
child=$!
trap 'kill "$child" 2>/dev/null' INT TERM
seconds=0
while kill -0 "$child" 2>/dev/null; do
  printf '\r%s: %d s ' "$what" "$seconds" >&2
  seconds=$((seconds + 1))
  sleep 1
done
printf '\n' >&2
wait "$child"
