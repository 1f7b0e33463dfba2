#!/usr/bin/env bash
# Runs one experiment in N processes on this machine, joined by JAX's own multi-controller runtime:
#
#   launch/local.sh 2 --config=configs/partial.py --workdir=runs/two
#   python -m tljax.launch local --processes=2 --config=configs/partial.py --workdir=runs/two    # the same, checked first
#
# Each process sees its share of the devices: with GPUs give CUDA_VISIBLE_DEVICES yourself; on a CPU
# JAX_NUM_CPU_DEVICES=k gives each process k devices. PYTHON names another interpreter than `python`.
# Ends with the first exit code that is not 0. SIGTERM and Ctrl-C save and end; the same command goes on.
set -u
count=${1:-}
if ! [[ "$count" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: expected the number of processes first: launch/local.sh 2 --config=configs/partial.py" >&2
  exit 2
fi
shift
python=${PYTHON:-python}

# An interrupt reaches all of them; they agree on a step, save and leave.
pids=() code=0 failed=0 stopped=0
trap 'stopped=1; kill -TERM ${pids[@]+"${pids[@]}"} 2>/dev/null' INT TERM

# A free port, found by asking the system for one.
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$count"

# A mistake of the user's meets every process: it is told once.
exec 2> >(exec awk '{ said = $0; sub(/^\[[0-9]+\] /, "", said) }
  said !~ /^error: / || !told[said]++ { print; fflush() }' >&2)

for ((i = 0; i < count; i++)); do
  if ((stopped)); then code=143; break; fi  # the others are not waited for
  JAX_PROCESS_ID=$i "$python" -m tljax.train "$@" &
  pids+=($!)
done

while ((${#pids[@]})); do
  sleep 0.2
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    wait "${pids[i]}"
    status=$?
    unset "pids[i]"
    if ((status && !code)); then code=$status failed=$SECONDS; fi
  done
  # Without the one that failed the others wait in vain: they have ten seconds to see it.
  if ((code && SECONDS > failed + 10)); then kill -KILL "${pids[@]}" 2>/dev/null; fi
done
exit "$code"
