#!/bin/bash
#SBATCH --job-name=minimal-samples
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --time=1440
#SBATCH --signal=B:USR1@600
#SBATCH --output=/shared/100%%/runs/minimal/submitted/001/samples.log
#SBATCH --open-mode=append
#SBATCH --requeue

# Written by megadiff launch. The job runs the code and the configuration of that moment.
cd /home/me || exit 1
export OMP_NUM_THREADS=12
export NCCL_IB_HCA=mlx5_0,mlx5_1
export MEGADIFF_ERROR_FILE=/shared/100%/runs/minimal/submitted/001/samples.error."$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
export PYTHONSAFEPATH=1 PYTHONPATH=/shared/100%/runs/minimal/submitted/001/code:"${PYTHONPATH:+$PYTHONPATH:}$PWD"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))  # from 32768 on, Linux gives ports to outgoing connections
export MASTER_ADDR MASTER_PORT

start_ranks() {
    srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=1 --kill-on-bad-exit=1 --export=ALL \
        bash -c 'export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"; exec "$@"' task \
        python3 -m megadiff showcase 'a run.yaml'
}

trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
start_ranks &
ranks=$!
while kill -0 "$ranks" 2> /dev/null; do wait "$ranks"; done  # a signal ends the wait, not the ranks
wait "$ranks"
code=$?
if [ -s "$MEGADIFF_ERROR_FILE" ]; then
    echo "megadiff: error: $(cat "$MEGADIFF_ERROR_FILE")" >&2
    exit 2
fi
exit "$code"
