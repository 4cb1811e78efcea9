#!/bin/bash
#SBATCH --job-name=minimal-first
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
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
export MEGADIFF_ERROR_FILE=/shared/100%/runs/minimal/first/error.txt."$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
export TRITON_CACHE_DIR='/local disk/cache'/"$(id -un)"/triton TORCH_EXTENSIONS_DIR='/local disk/cache'/"$(id -un)"/torch_extensions TORCHINDUCTOR_CACHE_DIR='/local disk/cache'/"$(id -un)"/inductor
export PYTHONSAFEPATH=1 PYTHONPATH=/shared/100%/runs/minimal/submitted/001/code:"${PYTHONPATH:+$PYTHONPATH:}$PWD"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))  # from 32768 on, Linux gives ports to outgoing connections
export MASTER_ADDR MASTER_PORT
done_file=/shared/100%/runs/minimal/first/DONE
stop_file=/shared/100%/runs/minimal/STOP
attempts=/shared/100%/runs/minimal/first/attempts.jsonl
heartbeats=/shared/100%/runs/minimal/first/heartbeats
logs=/shared/100%/runs/minimal/first/logs
incidents=/shared/100%/runs/minimal/incidents.jsonl
attempt='{"time": %d, "job": "%s", "outcome": "%s", "code": %d}' key='"job": "%s", "outcome": "%s"' restarts=3

start_ranks() {
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 's/$/ slots=8/' > /shared/100%/runs/minimal/submitted/001/first.hosts
    srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=96 --kill-on-bad-exit=1 --export=ALL \
        bash -c 'exec apptainer exec --nv '"'"'it'"'"'"'"'"'"'"'"'s.sif'"'"' python3 -m deepspeed.launcher.runner --no_local_rank --log_level error --no_ssh --node_rank "$SLURM_NODEID" "$@"' task \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --hostfile /shared/100%/runs/minimal/submitted/001/first.hosts --module megadiff train /shared/100%/runs/minimal/submitted/001/config.yaml --stage first --deepspeed /shared/100%/runs/minimal/submitted/001/deepspeed.json
}

record() { printf "$attempt\n" "$(date +%s)" "$SLURM_JOB_ID" "$1" "$2" >> "$attempts"; }
count() { grep -cF "$(printf "$key" "$SLURM_JOB_ID" "$1")" "$attempts"; }
# The last step that a rank was at; 0 if none has come so far.
reached() {
    sed -n 's/.*"step": \([0-9]*\).*/\1/p' "$heartbeats"/rank_*.json 2> /dev/null | sort -n | tail -n 1 | grep . || echo 0
}
say() { echo "megadiff: $1" >&2; }
leave_to_newer_turn() {  # a node that was cut off may run this on after the job has started again elsewhere
    if (($(count started) == turn)); then return; fi
    say "job $SLURM_JOB_ID has started again, and what is left of this turn ends"
    exit 1
}
requeue() {  # the same job, so that those after it go on waiting; Slurm ends this script within a second
    record "$1" "$2"
    for _ in 1 2 3 4 5; do
        leave_to_newer_turn
        scontrol requeue "$SLURM_JOB_ID" && sleep 120
        sleep 20
    done
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
failed_at=0
if tail -n 1 "$attempts" 2> /dev/null | grep -qF "$(printf "$key" "$SLURM_JOB_ID" failed)"; then failed_at=$(reached); fi
rm -f "$heartbeats"/rank_*.json
export MEGADIFF_FAILED_AT="$failed_at"
record started 0
turn=$(count started)
# Attempts that failed or were cut off, and this one. Slurm itself requeues a job that loses a node.
unplanned=$((turn - $(count 'time limit')))
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
leave_to_newer_turn
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
step=$(reached)
if ((step > 0 && step == failed_at)); then
    record stuck "$code"
    say "the ranks have failed at step $step twice in a row; see $logs, and for the samples of the step $incidents"
    exit 3
fi
if ((unplanned > restarts)); then give_up "$code"; fi
requeue failed "$code"
