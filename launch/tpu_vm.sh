#!/usr/bin/env bash
# Runs one experiment on a Cloud TPU slice: queues the slice, spot or not, runs the command on every host, goes on after
# a preemption, brings the workdir back, and deletes the slice.
#
#   gcloud auth login    # once
#   PROJECT=my-project ZONE=us-west4-a ACCELERATOR=v5litepod-16 SPOT=1 BUCKET=gs://my-bucket/runs NAME=partial \
#     launch/tpu_vm.sh --config=configs/partial.py     # the run is in gs://my-bucket/runs/partial, then runs/partial
#   PROJECT=my-project ZONE=us-west4-a NAME=partial launch/tpu_vm.sh down    # deletes the slice, whatever it does
#   python -m tljax.launch tpu_vm --project=my-project --zone=us-west4-a --accelerator=v5litepod-16 --spot \
#     --bucket=gs://my-bucket/runs --config=configs/partial.py --dry-run     # the same, checked and shown first
#
# A slice costs from ACTIVE until it is deleted; gcloud tells no prices. Ctrl-C, or a lost connection, leaves the run at
# work and the slice in place: the same command follows it again, `down` deletes it. DRY_RUN=1 prints the calls.
# RUNTIME is the image, EXTRAS are those of the package that the run needs, WORKDIR is where the run is brought to.
#
# Of the run's exit codes 0 and 2 (a mistake of the user's) end it. After 143 (saved) it starts again at once, or on the
# next slice where this one is preempted. Anything else may fail RETRIES times while the slice is healthy.
set -euo pipefail
NAME=${NAME:-tljax} SPOT=${SPOT:-} EXTRAS=${EXTRAS:-demo,gcs} RETRIES=${RETRIES:-3} POLL=${POLL:-30} DRY_RUN=${DRY_RUN:-}

required=(PROJECT ZONE)
[ "${1:-}" = down ] || required+=(ACCELERATOR BUCKET)
for name in "${required[@]}"; do
  [ -n "${!name:-}" ] || { echo "error: $name is not set; the first lines of $0 say how to use it" >&2; exit 2; }
done

call() {  # gcloud, or what it would be called with
  if [ -n "$DRY_RUN" ]; then
    printf 'gcloud'; printf ' %q' "$@"; echo
  else
    gcloud "$@"
  fi
}
tpus() { call compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet; }
everywhere() { tpus tpu-vm ssh "$NAME" --worker=all --command="$1"; }
delete() { tpus queued-resources delete "$NAME" --force; }
if [ "${1:-}" = down ]; then delete; exit; fi

case $ACCELERATOR in
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v6e-*) image=v2-alpha-tpuv6e ;;
  *) image=tpu-ubuntu2204-base ;;
esac
source=$(cd "$(dirname "$0")/.." && pwd)
run=$BUCKET/$NAME
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

state() {  # of the queued resource; empty where there is none. A call that fails says nothing, and is made again.
  local found
  until found=$(tpus queued-resources list --filter="name~/$NAME\$" --format='value(state.state)'); do sleep "$POLL"; done
  echo "$found"
}

create() {
  tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
    --runtime-version="${RUNTIME:-$image}" --scopes=cloud-platform ${SPOT:+--spot}
}

# On each host `bash host.sh install EXTRAS` installs the source, unless a run is at work (the images' own Python is too
# old), and `bash host.sh run …` starts the run, unless it is at work, shows what it says, and ends with its code.
cat > "$scratch/host.sh" <<'END'
running() { kill -0 "$(cat tljax/pid 2>/dev/null)" 2>/dev/null; }
if [ "$1" = install ]; then
  running && exit 0
  set -e
  rm -rf tljax && mkdir tljax && tar -xzf tljax.tar.gz -C tljax
  python3 -m pip install --quiet --user uv && export PATH="$HOME/.local/bin:$PATH"
  [ -d venv ] || uv venv --quiet --python 3.12 venv
  exec uv pip install --quiet --python venv/bin/python "jax[tpu]" -e "tljax[$2]"
fi
shift
lines=20
if ! running; then
  lines=+1
  cd tljax && rm -f code && : > log || exit 1
  setsid nohup bash -c '"$@"; echo $? > code' - ../venv/bin/python -m tljax.train "$@" >> log 2>&1 < /dev/null &
  echo $! > pid
  cd ..
fi
tail --lines="$lines" --follow --pid="$(cat tljax/pid)" tljax/log
[ -s tljax/code ] || exit 1
exit "$(cat tljax/code)"
END

install() {
  if [ -z "$DRY_RUN" ]; then  # what git knows of
    git -C "$source" ls-files -z --cached --others --exclude-standard |
      tar -C "$source" --null --files-from=- -czf "$scratch/tljax.tar.gz" || return
  fi
  tpus tpu-vm scp "$scratch/tljax.tar.gz" "$scratch/host.sh" "$NAME:" --worker=all &&
    everywhere "bash host.sh install $EXTRAS"
}

train() { everywhere "bash host.sh run$(printf ' %q' "$@" --workdir="$run")"; }

bring_back() {
  mkdir -p "${WORKDIR:-runs/$NAME}"
  call storage rsync --recursive "$run" "${WORKDIR:-runs/$NAME}"
}

if [ -n "$DRY_RUN" ]; then
  create; install; train "$@"; bring_back; delete
  exit
fi

trap 'rm -rf "$scratch"; echo "the slice $NAME may still cost: \`$0 down\` deletes it, the same command goes on" >&2' EXIT
trap 'exit 130' INT  # also where gcloud, which gets it first, ends as if it had failed
failed=0 installed='' ran=''
while true; do
  found=$(state)
  case $found in
    "") create; installed='' ;;
    SUSPENDED) echo "$NAME is preempted: queued again" >&2; delete; installed='' ;;
    FAILED) tpus queued-resources describe "$NAME" >&2 || true; code=1; break ;;
    ACTIVE)
      code=0
      if [ -z "$installed" ]; then
        if install; then installed=1; else code=1; fi
      fi
      if [ -n "$installed" ]; then ran=1; train "$@" || code=$?; fi
      if ((code == 0)); then break; fi
      echo "exit code $code" >&2
      sleep "$POLL"
      if [ "$(state)" != ACTIVE ]; then continue; fi  # preempted: hosts that are left may miss the others, and say 2
      if ((code == 2 || (code != 143 && ++failed > RETRIES))); then break; fi
      ;;
    *) echo "$NAME: $found" >&2; sleep "$POLL" ;;
  esac
done
[ -z "$ran" ] || bring_back || echo "error: $run could not be brought back; it is still there" >&2
delete
trap 'rm -rf "$scratch"' EXIT
exit "$code"
