#!/bin/bash
# One training on the nodes of a Slurm allocation: Ray on all of them, the flow on the first.
#   sbatch infra/slurm.sh                                 # the preset demo on two nodes
#   sbatch --nodes=4 infra/slurm.sh --preset eurosat      # what follows the script's name goes to python -m flows.commands.demo
# This folder, its .venv (make ray) and var/ (or TRAIN_DIFFUSION_HOME, and the store) lie on a file system that all nodes share.
# Submitted again after a cancellation or the end of its time, it goes on from the newest checkpoint.
#SBATCH --job-name=train-diffusion
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:TERM@120
#SBATCH --output=train-diffusion-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit it with sbatch}"
umask 077
chmod 600 "train-diffusion-$SLURM_JOB_ID.log" 2>/dev/null || true # Slurm made it, as the shell's umask says
python=.venv/bin/python

export TRAIN_DIFFUSION_ENGINE=ray RAY_AUTH_MODE=token RAY_worker_niceness=0
export RAY_NUM_REDIS_GET_RETRIES=300 # seconds that a node waits for the head, which may import from a slow disk
# Steps inherit the environment: the token is in no argument.
RAY_AUTH_TOKEN=$($python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
port=$((20000 + SLURM_JOB_ID % 10000)) # allocations that share a node have one each
# Ray opens its folder to everybody, and ranks import code from there: on each node it lies in a private one, of a name that
# nobody can take beforehand.
folder=/tmp/ray-$($python -c 'import secrets; print(secrets.token_hex(8))')
on_all() { srun --overlap --ntasks-per-node=1 --ntasks="${#nodes[@]}" --nodes="${#nodes[@]}" "$@"; }
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address() { srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" hostname -I | cut -d' ' -f1; }
head=$(address "${nodes[0]}")
export RAY_ADDRESS="$head:$port"

ray_on() { # node, and what tells a head from the others
  local node=$1 own
  shift
  own=$(address "$node")
  srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" .venv/bin/ray start "$@" --node-ip-address="$own" --block \
    --min-worker-port=0 --max-worker-port=0 --disable-usage-stats &
  rays+=($!)
}
rays=()
end() { # whatever ends the job; the head's end is that of the others
  kill "${rays[@]}" 2>/dev/null || true
  wait "${rays[@]}" 2>/dev/null || true
  on_all rm -rf "$folder" || true
}
trap end EXIT
on_all mkdir -p -m 700 "$folder"
ray_on "${nodes[0]}" --head --port="$port" --include-dashboard=false --temp-dir="$folder/s"
for node in "${nodes[@]:1}"; do ray_on "$node" --address="$RAY_ADDRESS"; done
$python - "${#nodes[@]}" <<'END' &
import sys, time, ray
deadline = time.monotonic() + 300
while True:
    try:
        ray.init(log_to_driver=False)
        break
    except (ConnectionError, RuntimeError):
        if time.monotonic() > deadline:
            sys.exit("Ray did not start: see above")
        time.sleep(1)
while len([node for node in ray.nodes() if node["Alive"]]) < int(sys.argv[1]):
    if time.monotonic() > deadline:
        sys.exit("not every node has joined: see above")
    time.sleep(1)
END
joined=$!
while kill -0 $joined 2>/dev/null; do
  for ray in "${rays[@]}"; do
    kill -0 "$ray" 2>/dev/null || { echo "Ray did not start on every node: see above" >&2; exit 1; }
  done
  sleep 1
done
wait $joined

$python -m flows.commands.demo "$@" &
flow=$!
trap 'kill -TERM $flow 2>/dev/null || true' TERM # a checkpoint, then gone
while true; do # asked to end, it is waited for
  code=0
  wait $flow || code=$?
  kill -0 $flow 2>/dev/null || break
done
exit $code
