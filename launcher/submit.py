"""`megadiff launch` on a Slurm cluster: the jobs of a run, frozen beside it, tried and submitted as a chain."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadiff.config.errors import UserError
from megadiff.config.jobs import SubmittedJob
from megadiff.config.load import dump_cluster, dump_run
from megadiff.config.run_folder import SubmissionFolder
from megadiff.config.schema import Run
from megadiff.files import write_text
from megadiff.launcher import folder, queue, slurm
from megadiff.launcher.devices import CPU, CUDA, Devices
from megadiff.launcher.job import check, missing_files, rank_environment
from megadiff.launcher.slurm import Job, Slurm

SAMPLES = "final-samples"
"""The job that draws the sheet of samples; no stage can have this name."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Script:
    """A job and what sbatch is given for it."""

    job: Job
    text: str

    @property
    def path(self) -> Path:
        return self.job.submission.script(self.job.name)


@dataclass(frozen=True)
class RunSubmission:
    """What a launch will submit: a job per stage that is not done, in order, then one for the samples."""

    run: Run
    deepspeed: Mapping[str, Any]
    cluster: Slurm
    number: int
    scripts: tuple[Script, ...]

    @property
    def folder(self) -> SubmissionFolder:
        return self.run.paths.submission(self.number)


def plan_run(run: Run, deepspeed: Mapping[str, Any], cluster: Slurm) -> RunSubmission:
    """Check everything that can be checked on a login node; nothing is written.

    Raises:
        UserError: the DeepSpeed JSON, the batch or the manifests' buckets do not fit the run on these nodes.
    """
    counts = _node_counts(run, deepspeed, cluster)
    number, here = run.paths.next_submission(), Path.cwd()
    # Slurm starts the script elsewhere; relative paths inside the run are of the folder where it was launched.
    absolute = type(run.paths)(run.paths.root.absolute())
    frozen = absolute.submission(number)
    threads = run.launch.threads_per_process
    scripts = []
    for stage in run.stages:
        if not run.paths.stage(stage.name).done.exists():
            train = ["train", str(frozen.config), "--stage", stage.name, "--deepspeed", str(frozen.deepspeed)]
            job = Job(stage.name, train, here, frozen, rank_environment(cluster, threads), counts, absolute.stage(stage.name))
            scripts.append(Script(job, slurm.script(cluster, job, run.name)))
    if run.showcase:
        single = _one_rank(cluster)
        job = Job(SAMPLES, ["showcase", str(frozen.config)], here, frozen, rank_environment(single, threads), [1])
        scripts.append(Script(job, slurm.script(single, job, run.name)))
    return RunSubmission(run, deepspeed, cluster, number, tuple(scripts))


def submit_run(plan: RunSubmission, *, allow_changes: bool = False, say: Say = print) -> int:
    """Freeze the run and submit its jobs as a chain.

    Raises:
        UserError: nothing is left to submit, the run is in work, a folder cannot be written, or Slurm refuses a job.
    """
    run = plan.run
    if absent := missing_files(run):
        raise UserError(f"not found: {'; '.join(absent)}; paths are relative to the folder where megadiff is started")
    if not plan.scripts:
        raise UserError(f"all stages of {run.folder} are done; more steps need stages.NAME.steps=N and --allow-changes")
    with folder.locked(run):
        changes = folder.accepted_changes(run, allowed=allow_changes)
        folder.check_checkpoints(run)
        _try(plan.scripts)
        folder.write(run, plan.deepspeed)
        run.paths.stop.unlink(missing_ok=True)
        texts = {plan.folder.config: dump_run(run), plan.folder.deepspeed: json.dumps(plan.deepspeed, indent=2) + "\n"}
        _freeze(plan.folder, plan.scripts, plan.cluster, texts)
        for line in changes:
            say(line)
        jobs = _submit(plan.scripts)
        for script, job in zip(plan.scripts, jobs, strict=True):
            SubmittedJob(job, script.job.name, plan.number, int(time.time())).append_to(run.paths.jobs)
            say(f"job {job}: {script.job.name}")
    say(f"watch: megadiff status {run.folder}")
    return 0


def plan_verb(arguments: Sequence[str], cluster: Slurm, place: Path) -> Script:
    """A job that runs another verb as all ranks of the cluster; its files go into `place`."""
    name = arguments[0]
    counts = range(cluster.nodes, cluster.fewest_nodes - 1, -1)
    job = Job(name, arguments, Path.cwd(), SubmissionFolder(place.absolute()), rank_environment(cluster), counts)
    return Script(job, slurm.script(cluster, job, "megadiff"))


def submit_verb(script: Script, cluster: Slurm, say: Say = print) -> int:
    """Freeze the code and submit the job.

    Raises:
        UserError: a folder cannot be written, or Slurm refuses the job.
    """
    _try([script])
    _freeze(script.job.submission, [script], cluster, {})
    (job,) = _submit([script])
    say(f"job {job}: {script.job.name}, log {script.job.log}")
    return 0


def describe(scripts: Sequence[Script]) -> str:
    """Every script as it will be written, and the command that submits it."""
    lines, before = [], None
    for script in scripts:
        command = shlex.join(slurm.submission(script.path, before))
        lines += [f"# {command}", script.text]
        before = f"JOB_OF_{script.job.name}"
    return "\n".join(lines)


def _node_counts(run: Run, deepspeed: Mapping[str, Any], cluster: Slurm) -> list[int]:
    """On how many of the cluster's nodes the run can be trained, from the most down.

    Raises:
        UserError: not on the most or the fewest of them.
    """
    fitting = []
    for nodes in range(cluster.nodes, cluster.fewest_nodes - 1, -1):
        ranks = nodes * cluster.ranks_per_node
        try:
            check(run, deepspeed, ranks, Devices(CUDA, ranks) if cluster.accelerated else Devices(CPU, 0))
        except UserError:
            if nodes in (cluster.nodes, cluster.fewest_nodes):
                raise
        else:
            fitting.append(nodes)
    return fitting


def _one_rank(cluster: Slurm) -> Slurm:
    """One rank on one node, with all cores that a node's ranks would have."""
    cores = cluster.cpus_per_process * cluster.ranks_per_node
    size = {"nodes": 1, "least_nodes": None, "gpus_per_node": min(cluster.gpus_per_node, 1), "processes_per_node": 1}
    return cluster.model_copy(update={**size, "cpus_per_process": cores})


def _try(scripts: Sequence[Script]) -> None:
    """Ask Slurm whether the jobs could start; sbatch itself takes jobs that never can."""
    for script in scripts:
        _call(slurm.trial(), f"Slurm refuses the job of {script.job.name}", script.text)


def _freeze(place: SubmissionFolder, scripts: Sequence[Script], cluster: Slurm, files: Mapping[Path, str]) -> None:
    """Write what the jobs run. Slurm fails a job without a word if the folder of its log is missing."""
    try:
        place.root.mkdir(parents=True)
        package = Path(__file__).parents[1]
        shutil.copytree(package, place.code / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        for script in scripts:
            script.job.log.parent.mkdir(parents=True, exist_ok=True)
        texts = {place.cluster: dump_cluster(cluster), **files, **{script.path: script.text for script in scripts}}
        for path, text in texts.items():
            write_text(path, text)
    except OSError as error:
        raise UserError(f"{error.filename or place.root} cannot be written: {error.strerror}") from None


def _submit(scripts: Sequence[Script]) -> list[str]:
    """The numbers of the jobs, each of which waits for the one before; if one is refused, none is left in the queue."""
    jobs: list[str] = []
    for script in scripts:
        try:
            printed = _call(slurm.submission(script.path, jobs[-1] if jobs else None), f"sbatch failed for {script.job.name}")
        except UserError:
            queue.cancel(jobs)
            raise
        jobs.append(printed.strip().split(";")[0])
    return jobs


def _call(command: Sequence[str], fault: str, text: str | None = None) -> str:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=queue.PATIENCE_S, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not here; give this command on a machine of the Slurm cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{fault}: it gave no answer for {queue.PATIENCE_S:g} s; try again later") from None
    if done.returncode:
        raise UserError(f"{fault}: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout
