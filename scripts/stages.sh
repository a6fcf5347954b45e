#!/usr/bin/env bash
# Resumable stages for the examples; sourced. The caller sets `run`, the folder of the run.
#
#   stage NAME COMMAND...   runs the command once, with its output in $run/logs/NAME.log and its seconds in
#                           $run/stages/NAME; a later call with the same command is skipped, one with another command
#                           is an error, because its results would mix with the old ones. If another script is at this
#                           stage, it waits for it.

stage() {
  mkdir -p "$run/logs" "$run/stages"
  # The command inherits the lock, which is free when it has ended, however that came.
  (flock 9 && run_stage "$@") 9> "$run/logs/.$1.lock"
}

run_stage() {
  local name=$1 started seconds mark
  shift
  mark=$run/stages/$name
  if [ -e "$mark" ]; then
    if [ "$(tail -n +2 "$mark")" != "$*" ]; then
      echo "error: stage $name was already run with other settings:" >&2
      echo "  then: $(tail -n +2 "$mark")" >&2
      echo "  now:  $*" >&2
      echo "Name another folder for this run (--out), or remove $run." >&2
      return 1
    fi
    echo "$name: done before, $(head -n 1 "$mark") s"
    return
  fi
  echo "$name: running, log in $run/logs/$name.log"
  started=$(date +%s.%N)
  if ! "$@" > "$run/logs/$name.log" 2>&1; then
    tail -n 15 "$run/logs/$name.log" >&2
    echo "error: stage $name failed; see $run/logs/$name.log. Run the same command again to resume." >&2
    return 1
  fi
  seconds=$(date +%s.%N | awk -v a="$started" '{printf "%.1f", $1 - a}')
  printf '%s\n%s\n' "$seconds" "$*" > "$mark.tmp"
  mv "$mark.tmp" "$mark"
  echo "$name: $seconds s"
}
