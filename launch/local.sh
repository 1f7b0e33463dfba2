#!/usr/bin/env bash
# Runs one experiment in N processes on this machine, joined by JAX's own multi-controller runtime:
#
#   launch/local.sh 2 --config=configs/partial.py --workdir=runs/two
#
# Each process sees its share of the devices: with GPUs give CUDA_VISIBLE_DEVICES yourself; on a CPU
# JAX_NUM_CPU_DEVICES=k gives each process k devices. Ends with the first exit code that is not 0.
set -u
count=${1:-}
if ! [[ "$count" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: expected the number of processes first: launch/local.sh 2 --config=configs/partial.py" >&2
  exit 2
fi
shift

# A free port, found by asking the system for one.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$count"

pids=()
for ((i = 0; i < count; i++)); do
  JAX_PROCESS_ID=$i python -m tljax.train "$@" &
  pids+=($!)
done

# An interrupt reaches all of them; each saves and leaves.
trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM
code=0
for pid in "${pids[@]}"; do
  while true; do
    wait "$pid"
    status=$?
    # A trapped signal ends `wait` early: ask again while the process is still there.
    kill -0 "$pid" 2>/dev/null || break
  done
  if [ "$status" -ne 0 ] && [ "$code" -eq 0 ]; then code=$status; fi
done
exit "$code"
