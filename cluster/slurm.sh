#!/bin/bash
# `sbatch cluster/slurm.sh` in the repository, on a file system that all nodes see. docs/clusters.md explains each part.
#SBATCH --job-name=dvc-repro
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export PATH="$PWD/.venv/bin:$PATH"
# With job control each command below is a process group of its own, and sees an interrupt.
set -m

# Five minutes before the time limit, and when the job makes way for another one: training writes a checkpoint. The job
# then waits in the queue again, and goes on from there.
make_way() {
  kill "-$stop_by" -- "-$working" 2>/dev/null || true
  wait "$working" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap make_way TERM

# run SIGNAL COMMAND...: SIGNAL is what the command hands on to what it has started, and then waits for.
run() {
  stop_by=$1
  shift
  "$@" &
  working=$!
  wait "$working"
}

if [ "$SLURM_NNODES" -gt 1 ]; then
  # The stage starts a process for each GPU of its own machine alone. So all machines train first, and the stage then
  # finds that its run has ended. When a process is lost, all start again from the last checkpoint, three times at most.
  run INT dvc repro code base_model split
  run INT python -m preflight.check
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # otherwise a new start may read what the last one left there
  run TERM srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$(hostname):29400" --module stages.finetune
fi
run INT dvc repro
run INT dvc push --run-cache
