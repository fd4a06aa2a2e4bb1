#!/usr/bin/env bash
# A run on several nodes under Slurm.
#
#   for part in 1 2 3; do sbatch configs/slurm.sh; done
#
# Jobs of one name run one after the other, and each goes on where the last one has saved: submit as many as there is need for
# hours; one that finds nothing left to do ends at once. Two minutes before its time is over, and when it is preempted, a job
# gets SIGTERM, and saves. If a process dies, torchrun starts all of them again from the last checkpoint.
#
# One torchrun a node starts one process a GPU; they find each other at the first node. The repository, the data and out_dir
# lie on a file system that all nodes share.
#SBATCH --job-name=smdm_170m
#SBATCH --dependency=singleton
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm_%x_%j.log
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

# Without it a process that is started again may look for the others where a dead one was.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
launch=(
  .venv/bin/torchrun
  --nnodes="$SLURM_NNODES" --nproc-per-node=8
  --rdzv-backend=c10d --rdzv-endpoint="$first:29500" --rdzv-id="$SLURM_JOB_ID"
  --max-restarts=3
)
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 "${launch[@]}" train.py configs/smdm_170m.py \
  --out_dir=out/smdm_170m --micro_batch_size=4 --save_interval=1000 --keep=2 \
  --log_interval=10  # a stop is seen at such a step, and torchrun waits for 30 seconds only
