#!/bin/bash
# One launcher on each machine of a SLURM job, one process on each GPU; the environment and --out lie on a disk
# that all machines share.  sbatch recipes/accelerate/slurm.sh my-texts/ --minutes 60 --out /shared/my-model
#SBATCH --job-name=hf-genlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@60
set -euo pipefail
export GPUS_PER_NODE=${GPUS_PER_NODE:-8}
MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_ADDRESS
# in single quotes: each machine reads its own number
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch \
    --config_file recipes/accelerate/two_machines.yaml \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * GPUS_PER_NODE)) \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_ADDRESS" --main_process_port 29500 \
    -m hf_genlm train "$@"' launch "$@"
