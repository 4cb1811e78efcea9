#!/bin/bash
#SBATCH --job-name=minimal-first
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --gpus-per-node=8
#SBATCH --time=240
#SBATCH --signal=B:USR1@300
#SBATCH --output=/shared/100%%/runs/minimal/first/logs/job_%j.log
#SBATCH --open-mode=append
#SBATCH --partition=gpu
#SBATCH --account=group
#SBATCH '--exclude=node[3-5]'
#SBATCH --requeue
#SBATCH --mem=0
#SBATCH '--comment=two words'

# Written by megadiff launch. The job runs the code and the configuration of that moment.
cd '/home/me/my work' || exit 1
type module > /dev/null 2>&1 || source /etc/profile
module load cuda/12.8 || exit 1
export OMP_NUM_THREADS=12
export NCCL_IB_HCA=mlx5_0,mlx5_1
export MEGADIFF_ERROR_FILE=/shared/100%/runs/minimal/first/error.txt
export TRITON_CACHE_DIR='/local disk/cache'/"$(id -un)"/triton TORCH_EXTENSIONS_DIR='/local disk/cache'/"$(id -un)"/torch_extensions
export PYTHONSAFEPATH=1 PYTHONPATH=/shared/100%/runs/minimal/submitted/001/code:"${PYTHONPATH:+$PYTHONPATH:}$PWD"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))  # from 32768 on, Linux gives ports to outgoing connections
export MASTER_ADDR MASTER_PORT
done_file=/shared/100%/runs/minimal/first/DONE
stop_file=/shared/100%/runs/minimal/STOP
attempts=/shared/100%/runs/minimal/first/attempts.jsonl
attempt='{"time": %d, "job": "%s", "outcome": "%s", "code": %d}' key='"job": "%s", "outcome": "%s"' restarts=3

start_ranks() {
    srun --nodes=2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=12 --kill-on-bad-exit=1 --export=ALL \
        bash -c 'export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"; exec "$@"' task \
        apptainer exec --nv 'it'"'"'s.sif' python3 -m megadiff train /shared/100%/runs/minimal/submitted/001/config.yaml --stage first --deepspeed /shared/100%/runs/minimal/submitted/001/deepspeed.json
}

record() { printf "$attempt\n" "$(date +%s)" "$SLURM_JOB_ID" "$1" "$2" >> "$attempts"; }
count() { grep -cF "$(printf "$key" "$SLURM_JOB_ID" "$1")" "$attempts"; }
say() { echo "megadiff: $1" >&2; }
requeue() {  # the same job, so that those after it go on waiting; Slurm ends this script within a second
    record "$1" "$2"
    for _ in 1 2 3 4 5; do scontrol requeue "$SLURM_JOB_ID" && sleep 120; sleep 20; done
    say "job $SLURM_JOB_ID could not be requeued"
    exit 1
}
give_up() {
    record 'gave up' "$1"
    say "no restart is left of $restarts; the same launch goes on from the newest checkpoint"
    exit 1
}

if [ -e "$done_file" ]; then exit 0; fi
# An attempt that was killed while it saved leaves its own request.
if [ "$(cat "$stop_file" 2> /dev/null)" = 'time limit' ]; then rm -f "$stop_file"; fi
if [ -e "$stop_file" ]; then
    rm -f "$stop_file"
    record stopped 0
    exit 1
fi
record started 0
rm -f "$MEGADIFF_ERROR_FILE"
# Attempts that failed or were cut off, and this one. Slurm itself requeues a job that loses a node.
unplanned=$(($(count started) - $(count 'time limit')))
if ((unplanned > restarts + 1)); then give_up 1; fi

# The ranks are never signalled: children of theirs would die of it. They look for the file, save, and end together.
limit=0
near_limit() {
    if [ ! -e "$stop_file" ]; then
        limit=1
        echo 'time limit' > "$stop_file"
    fi
}
trap near_limit USR1
start_ranks &
ranks=$!
while kill -0 "$ranks" 2> /dev/null; do wait "$ranks"; done  # a signal ends the wait, not the ranks
wait "$ranks"
code=$?
if ((limit)); then rm -f "$stop_file"; fi

# Only a whole stage ends with 0, for that starts the next one. The code is srun's, and not that of the rank that failed.
if [ -e "$done_file" ]; then
    record 'done' "$code"
    exit 0
fi
if [ -s "$MEGADIFF_ERROR_FILE" ]; then
    record mistake "$code"
    say "error: $(cat "$MEGADIFF_ERROR_FILE")"
    exit 2
fi
if ((code == 0 && limit)); then requeue 'time limit' 0; fi
if ((code == 0)) || [ -e "$stop_file" ]; then
    rm -f "$stop_file"
    record stopped "$code"
    exit 1
fi
if ((unplanned > restarts)); then give_up "$code"; fi
requeue failed "$code"
