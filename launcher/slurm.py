"""What Slurm is given: the script of a job, and the commands that submit it. Pure: nothing is started or written."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megadiff.config.jobs import Attempt
from megadiff.config.run_folder import StageFolder, SubmissionFolder
from megadiff.config.schema import DeepSpeedCluster, SlurmCluster
from megadiff.launcher.children import ERROR_FILE
from megadiff.launcher.hostfile import RUNNER
from megadiff.launcher.job import CACHES

Slurm = SlurmCluster | DeepSpeedCluster


@dataclass(frozen=True)
class Job:
    """A verb of megadiff on all ranks of an allocation.

    Attributes:
        arguments: the verb's own, after `megadiff`.
        working_folder: where relative paths start.
        node_counts: on how many nodes it can run, from the most down.
        stage: the stage that it trains: the job queues again until that is done. None: it is done when it exits with 0.
    """

    name: str
    arguments: Sequence[str]
    working_folder: Path
    submission: SubmissionFolder
    environment: Mapping[str, str]
    node_counts: Sequence[int]
    stage: StageFolder | None = None

    @property
    def log(self) -> Path:
        """Slurm puts the job's number for %j."""
        return self.stage.job_log("%j") if self.stage else self.submission.log(self.name)

    @property
    def error(self) -> Path:
        return self.stage.error if self.stage else self.submission.error(self.name)


def script(cluster: Slurm, job: Job, run: str) -> str:
    """What sbatch submits for a job of a run. It needs bash and Slurm's commands on the nodes, and no Python of its own."""
    parts = [_header(cluster, job, run), _settings(cluster, job), _srun(cluster, job), _STAGE if job.stage else _VERB]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def submission(path: Path, after: str | None = None) -> list[str]:
    """The command that submits a script and prints its job's number; it starts when job `after` has ended well."""
    chain = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", "--parsable", *chain, str(path)]


def trial() -> list[str]:
    """The command that asks Slurm whether the job of the script on its standard input could ever start."""
    return ["sbatch", "--test-only"]


def _header(cluster: Slurm, job: Job, run: str) -> str:
    tasks = 1 if isinstance(cluster, DeepSpeedCluster) else cluster.ranks_per_node
    elastic = len(job.node_counts) > 1
    options = {
        "job-name": f"{run}-{job.name}",
        "nodes": "-".join(map(str, dict.fromkeys((job.node_counts[-1], job.node_counts[0])))),
        # Of a range of nodes, Slurm 22.05 gives one task a node the fewest if the one is asked for, and else the most.
        "ntasks-per-node": None if elastic and tasks == 1 else tasks,
        "cpus-per-task": cluster.cpus_per_process * cluster.ranks_per_node // tasks,
        "gpus-per-node": cluster.gpus_per_node or None,
        "time": cluster.time_limit_minutes,
        "signal": f"B:USR1@{cluster.stop_before_s}",
        # In the name of a log, Slurm takes % as the start of a pattern.
        "output": str(job.log.parent).replace("%", "%%") + f"/{job.log.name}",
        "open-mode": "append",
        **{key: getattr(cluster, key) for key in ("partition", "account", "qos", "constraint", "exclude")},
    }
    lines = [f"--{key}={value}" for key, value in options.items() if value is not None]
    return "\n".join(["#!/bin/bash", *(f"#SBATCH {shlex.quote(line)}" for line in [*lines, "--requeue", *cluster.options])])


def _settings(cluster: Slurm, job: Job) -> str:
    lines = [
        "# Written by megadiff launch. The job runs the code and the configuration of that moment.",
        f"cd {shlex.quote(str(job.working_folder))} || exit 1",
    ]
    if cluster.modules:
        lines += ["type module > /dev/null 2>&1 || source /etc/profile", f"module load {shlex.join(cluster.modules)} || exit 1"]
    if len(job.node_counts) > 1:
        counts = " ".join(map(str, job.node_counts))
        lines += [
            "# The ranks of so many nodes divide the batch and the layout; further nodes of the allocation stay idle.",
            f"for nodes in {counts}; do if ((nodes <= SLURM_NNODES)); then break; fi; done",
        ]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in job.environment.items()]
    # Ranks that have outlived an earlier turn of the job must not speak for this one.
    lines += [f'export {ERROR_FILE}={shlex.quote(str(job.error))}."$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}"']
    if cluster.cache:
        own = f'{shlex.quote(cluster.cache)}/"$(id -un)"'
        lines += ["export " + " ".join(f"{variable}={own}/{folder}" for variable, folder in CACHES.items())]
    lines += [
        # Else `python -m` would look in the working folder first, which may be a newer state of the code.
        f'export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(job.submission.code))}:"${{PYTHONPATH:+$PYTHONPATH:}}$PWD"',
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))  # from 32768 on, Linux gives ports to outgoing connections",
        "export MASTER_ADDR MASTER_PORT",
    ]
    if job.stage:
        files = {"done_file": job.stage.done, "stop_file": job.stage.of.stop, "attempts": job.stage.attempts}
        files |= {"heartbeats": job.stage.heartbeats, "logs": job.stage.logs, "incidents": job.stage.of.incidents}
        lines += [f"{name}={shlex.quote(str(path))}" for name, path in files.items()]
        lines += [f"attempt={shlex.quote(Attempt.FORM)} key={shlex.quote(Attempt.KEY)} restarts={cluster.restarts}"]
    return "\n".join(lines)


def _srun(cluster: Slurm, job: Job) -> str:
    """The shell function that starts all ranks and waits for them."""
    python = [*cluster.container, cluster.python or sys.executable]
    lines = ["start_ranks() {"]
    if isinstance(cluster, DeepSpeedCluster):
        tasks, hosts = 1, shlex.quote(str(job.submission.hostfile(job.name)))
        slots = f"s/$/ slots={cluster.ranks_per_node}/"
        used = ' | head -n "$nodes"' if len(job.node_counts) > 1 else ""
        lines += [f'    scontrol show hostnames "$SLURM_JOB_NODELIST"{used} | sed {shlex.quote(slots)} > {hosts}']
        task = f'exec {shlex.join([*python, *RUNNER])} --no_ssh --node_rank "$SLURM_NODEID" "$@"'
        master = '--master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT"'
        words = f"{master} --hostfile {hosts} --module {shlex.join(['megadiff', *job.arguments])}"
    else:
        tasks = cluster.ranks_per_node
        task = 'export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"; exec "$@"'
        words = shlex.join([*python, "-m", "megadiff", *job.arguments])
    if len(job.node_counts) > 1:
        size = f'--nodes="$nodes" --ntasks="$((nodes * {tasks}))" --ntasks-per-node={tasks}'
    else:
        size = f"--nodes={job.node_counts[0]} --ntasks={job.node_counts[0] * tasks} --ntasks-per-node={tasks}"
    cores = cluster.cpus_per_process * cluster.ranks_per_node // tasks
    lines += [
        f"    srun {size} --cpus-per-task={cores} --kill-on-bad-exit=1 --export=ALL \\",
        f"        bash -c {shlex.quote(task)} task \\",
        f"        {words}",
        "}",
    ]
    return "\n".join(lines)


_STAGE = r"""
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
"""

_VERB = r"""
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
"""
