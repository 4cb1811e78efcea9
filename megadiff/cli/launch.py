"""`megadiff launch`: all stages of a run, on this machine or a cluster. Without torch; the ranks import it."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megadiff.cli.arguments import (
    Verbs,
    add_run,
    add_sizes,
    add_verb,
    cluster_of,
    deepspeed_tree,
    positive,
    sort_overrides,
)
from megadiff.config.errors import UserError
from megadiff.config.load import load_run
from megadiff.config.planning import check_fits
from megadiff.config.schema import Allocation, DeepSpeedCluster, LocalCluster, Run
from megadiff.launcher import children, folder, hostfile, job, local, submit
from megadiff.launcher.children import Command, Signals, several
from megadiff.launcher.devices import find_devices

EXAMPLES = """\
  megadiff launch configs/run/quickstart.yaml --deepspeed ds_configs/zero3.json
  megadiff launch configs/run/quickstart.yaml --deepspeed ds_configs/zero2.json folder=runs/short stages.*.steps=20
  megadiff launch configs/run/quickstart.yaml --deepspeed ds_configs/zero3.json --dry-run
  megadiff launch configs/run/paper_8gpu.yaml --deepspeed ds_configs/zero3.json --cluster configs/cluster/slurm.yaml --dry-run
  megadiff launch --processes 8 -- data encode s3://bucket/pairs s3://bucket/latents --autoencoder models/sd-vae
"""


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "launch",
        "train all stages of a run, here or on a cluster, or run another verb as several processes",
        "Check everything, then train the run's stages one after the other through DeepSpeed's launcher, on the GPUs of this\n"
        "machine (CUDA_VISIBLE_DEVICES chooses) or on its CPU, and make the sheet of samples at the end. In a folder with\n"
        "checkpoints the run continues; only its sections launch, preflight, safeguards, monitoring and showcase may have\n"
        "changed. With --cluster, ranks run where that file says; on Slurm a chain of jobs is submitted, which run the code\n"
        "and the configuration of this moment (docs/cluster.md). Overrides of that file start with cluster., as in\n"
        "cluster.nodes=4.\n"
        "Another verb may follow --; it is run once per GPU, or --processes times, or as all ranks of --cluster.",
        EXAMPLES,
    )
    add_run(parser, required=False)
    parser.add_argument("--deepspeed", metavar="DS.json", help="how ranks share the work")
    add_sizes(parser)
    parser.add_argument("--cluster", metavar="CLUSTER.yaml", help="the machines, and how ranks are started there")
    parser.add_argument(
        "--processes", metavar="N", type=positive, help="processes of the verb after --; a run has launch.processes"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, print the commands, and start nothing")
    parser.add_argument("--allow-changes", action="store_true", help="go on where the run was trained otherwise")
    parser.set_defaults(run=run, command=[])


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line's own part, and the verb and arguments after `launch ... --`."""
    if arguments[:1] != ["launch"] or "--" not in arguments:
        return list(arguments), []
    place = list(arguments).index("--")
    return list(arguments[:place]), list(arguments[place + 1 :])


def run(arguments: argparse.Namespace) -> int:
    if arguments.command:
        return _launch_verb(arguments)
    if arguments.run_file is None or arguments.deepspeed is None:
        arguments.parser.error("give RUN.yaml and --deepspeed DS.json, or -- and another verb")
    if arguments.processes is not None:
        arguments.parser.error("--processes is of a verb after --; a run takes launch.processes=N")
    of_cluster, of_run = sort_overrides(arguments.overrides)
    cluster = cluster_of(arguments, of_cluster)
    run, tree = load_run(arguments.run_file, of_run), deepspeed_tree(arguments)
    run.monitoring.check_installed()
    if cluster is not None and run.launch.processes != "accelerators":
        raise UserError(
            f"launch.processes is {run.launch.processes} beside --cluster, whose file says how many ranks there are; "
            "give launch.processes=accelerators"
        )
    if cluster is not None:
        check_fits(run, Path(arguments.deepspeed), tree, cluster)
        if isinstance(cluster, Allocation):  # on fewer ranks each holds more
            check_fits(run, Path(arguments.deepspeed), tree, cluster.model_copy(update={"nodes": cluster.fewest_nodes}))
    match cluster:
        case None:
            plan = job.plan_launch(run, tree)
        case LocalCluster():
            plan = job.plan_local(run, tree, cluster)
        case DeepSpeedCluster() if cluster.hosts:
            plan = hostfile.plan_hosts(run, tree, cluster)
        case _:
            return _launch_on_slurm(submit.plan_run(run, tree, cluster), arguments)
    if arguments.dry_run:
        return _show(run, job.describe(plan), arguments)
    if isinstance(plan, hostfile.SshPlan):
        plan.write_hostfile()
    return local.launch(plan, allow_changes=arguments.allow_changes, say=_say)


def _launch_on_slurm(plan: submit.RunSubmission, arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        return _show(plan.run, submit.describe(plan.scripts), arguments)
    return submit.submit_run(plan, allow_changes=arguments.allow_changes, say=_say)


def _show(run: Run, text: str, arguments: argparse.Namespace) -> int:
    changes = folder.accepted_changes(run, allowed=arguments.allow_changes)
    print(text)
    for line in changes:
        print(f"megadiff: note: {line}", file=sys.stderr)
    for missing in job.missing_files(run):
        print(f"megadiff: note: not there yet: {missing}", file=sys.stderr)
    return 0


def _launch_verb(arguments: argparse.Namespace) -> int:
    words = [word for word in (arguments.run_file, *arguments.overrides) if word]
    of_cluster, others = sort_overrides(words)
    of_a_run = ("deepspeed", "pipeline_stages", "tensor_parallel", "allow_changes")
    if others or any(getattr(arguments, name) for name in of_a_run) or (arguments.dry_run and not arguments.cluster):
        arguments.parser.error("before -- only --processes N may stand, or --cluster CLUSTER.yaml and --dry-run")
    if arguments.command[0] in ("launch", "train"):
        raise UserError(f"launch starts {arguments.command[0]} by RUN.yaml and --deepspeed, not after --")
    cluster = cluster_of(arguments, of_cluster)
    if cluster is None:
        return several(arguments.processes or max(find_devices().count, 1), arguments.command)
    if arguments.processes is not None:
        arguments.parser.error("--processes beside --cluster, whose file says how many ranks there are")
    place = Path("jobs") / f"{arguments.command[0]}-{time.strftime('%Y%m%d-%H%M%S')}"
    match cluster:
        case LocalCluster():
            job.devices_of(cluster)
            environment = {**job.rank_environment(cluster), **job.cache_folders(cluster)}
            if arguments.dry_run:
                print(job.shell(environment), "megadiff", shlex.join(arguments.command), f"# as {cluster.ranks_per_node} ranks")
                return 0
            return several(cluster.ranks_per_node, arguments.command, environment)
        case DeepSpeedCluster() if cluster.hosts:
            path = place.with_suffix(".hosts")
            command = hostfile.verb_command(arguments.command, cluster, path, local.free_port())
            if arguments.dry_run:
                print(shlex.join(command))
                return 0
            hostfile.write(path, cluster.hosts, cluster.ranks_per_node)
            with Signals() as signals:
                (code,) = children.run([Command(command, {})], signals)
            return 128 + signals.received if signals.received else abs(code)
        case _:
            script = submit.plan_verb(arguments.command, cluster, place)
            if arguments.dry_run:
                print(submit.describe([script]))
                return 0
            return submit.submit_verb(script, cluster, _say)


def _say(message: str) -> None:
    print(message, flush=True)
