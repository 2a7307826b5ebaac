#!/usr/bin/env bash
# A Ray cluster for one run on SLURM: token authentication on, gone with the job.
#   sbatch cluster/deploy/slurm.sh --config configs/sd15_aesthetic.yaml run.dir=/shared/runs/aesthetic
#   sbatch cluster/deploy/slurm.sh -- COMMAND ...          # anything else that reads RAY_ADDRESS
# Submit it from the checkout with its .venv, on a file system that every node sees. Preempted, or a few minutes before
# the time limit, the job is queued again; the same command then goes on from the last closed epoch.
#SBATCH --job-name=tributary
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --no-kill                     # a node that fails costs its actors, not the job
#SBATCH --open-mode=append
set -euo pipefail

fail() { echo "slurm.sh: $*" >&2; exit 1; }
cd "$SLURM_SUBMIT_DIR"
export PATH="${TRIBUTARY_VENV:-$PWD/.venv}/bin:$PATH"
command -v ray > /dev/null || fail "no ray in .venv: run make setup, or set TRIBUTARY_VENV"

# The token: the user's file, made once, readable by no one else. Only its path is in the environment, which SLURM records.
unset RAY_AUTH_TOKEN
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
if [[ ! -s $RAY_AUTH_TOKEN_PATH ]]; then
  mkdir -p -m 700 "${RAY_AUTH_TOKEN_PATH%/*}"
  aside=$(mktemp "$RAY_AUTH_TOKEN_PATH.XXXXXX")     # mode 0600; two jobs that start at once end up with one token
  python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$aside"
  mv -n "$aside" "$RAY_AUTH_TOKEN_PATH" && rm -f "$aside"
fi
[[ $(stat -Lc %a "$RAY_AUTH_TOKEN_PATH") == *00 ]] || fail "others can read the token: chmod 600 $RAY_AUTH_TOKEN_PATH"

# A node that is cut off is noticed in about 5 s. The head's GCS reads these; by default it takes over a minute.
export RAY_health_check_initial_delay_ms=0 RAY_health_check_period_ms=1000
export RAY_health_check_timeout_ms=1000 RAY_health_check_failure_threshold=3

read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
ip=${TRIBUTARY_HEAD_IP:-$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address)}
ip=$(tr ' ' '\n' <<< "$ip" | grep -m 1 -E '^[0-9.]+$' || true)
[[ -n $ip && ( $ip != 127.* || -n ${TRIBUTARY_HEAD_IP:-} ) ]] ||
  fail "the name $head is no address that other nodes reach: set TRIBUTARY_HEAD_IP"
port=$((20000 + SLURM_JOB_ID % 1000 * 10))          # below it are Ray's worker ports
export RAY_ADDRESS=$ip:$port RAY_FOLDER=/tmp/ray-$SLURM_JOB_ID

child='' steps=()
end() {                                             # pid, seconds: TERM, and KILL when they are over
  kill -TERM "$1" 2> /dev/null || return 0
  for ((i = 0; i < $2 * 5; i++)); do kill -0 "$1" 2> /dev/null || return 0; sleep 0.2; done
  kill -KILL "$1" 2> /dev/null || true
}
finish() {
  local status=$?
  trap '' TERM INT USR1
  for pid in $child "${steps[@]}"; do end "$pid" 20; done
  timeout 60 srun --ntasks-per-node=1 rm -rf "$RAY_FOLDER" || true
  [[ -z ${requeue:-} ]] || scontrol requeue "$SLURM_JOB_ID"
  exit "$status"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
trap 'requeue=1; exit 143' USR1
run() { "$@" & child=$!; wait "$child"; }           # in the background: bash answers signals only in `wait`

# Roles are placed by labels: docs/deploy.md.
srun --nodes=1 --ntasks=1 --nodelist="$head" --cpu-bind=none bash -c 'exec ray start --head --block \
  --node-ip-address="${RAY_ADDRESS%:*}" --port="${RAY_ADDRESS#*:}" --temp-dir="$RAY_FOLDER" \
  --dashboard-host=127.0.0.1 --dashboard-port=$((${RAY_ADDRESS#*:} + 1)) --ray-client-server-port=$((${RAY_ADDRESS#*:} + 2)) \
  --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --labels=tributary.role=learner \
  --disable-usage-stats --log-color=false' &
steps+=($!)

seconds=${TRIBUTARY_READY_SECONDS:-600}
run python -m cluster.deploy.wait_for_nodes 1 "$seconds"
if ((SLURM_JOB_NUM_NODES > 1)); then
  others=$((SLURM_JOB_NUM_NODES - 1))
  srun --nodes=$others --ntasks=$others --exclude="$head" --cpu-bind=none --wait=0 --no-kill bash -c 'exec ray start --block \
    --address="$RAY_ADDRESS" --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
    --labels=tributary.role=sampler --disable-usage-stats --log-color=false' &
  steps=($! "${steps[@]}")                          # ended before the head
fi
run python -m cluster.deploy.wait_for_nodes "$SLURM_JOB_NUM_NODES" "$seconds"

if [[ ${1:-} == -- ]]; then shift; else set -- python -m learner.run "$@"; fi
run "$@"
