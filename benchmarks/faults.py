"""Faults that are injected into a run of two ranks, and what became of it: steps lost, seconds until it trains again.

    python -m benchmarks.faults [--only NAME ...] [--json FILE]

Every fault has a run of its own: the first stage of tests/tiny.yaml on this machine, ZeRO-1 over gloo, a checkpoint every 4
steps, a fault at step 10. Ranks that have ended are started again by the same command, as a launcher does, until the stage is
done or a rank reports a user's mistake (exit code 2). The start of Python is in the seconds. Where nothing but the batches that
the fault itself spoils may differ, the curve at the end is compared with that of an unbroken run, to the bit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.fault_strikes import (
    AT,
    EVERY,
    STAGE,
    Place,
    asks_to_stop,
    asks_to_stop_in_a_save,
    cut_off,
    cut_off_the_records,
    dies_in_a_save,
    empty_the_disk,
    exits,
    flip_a_bit,
    garble_the_manifest,
    has_a_full_disk,
    lacks_memory,
    lose_a_file,
    lose_the_pointer,
    loses_its_records,
    loses_its_store,
    nothing,
    raises,
    segfaults,
    signalled,
    spoils,
    stands_still,
)
from megadiff.config.run_folder import RunFolder
from megadiff.distributed.ranks import free_port
from megadiff.launcher.children import Command, Signals, run
from tests.minimal import write_yaml

ROOT = Path(__file__).parents[1]
STEPS = 16
PAUSE_S = 0.1
"""Before every step, so that what happens beside a step happens in the step that it is meant for."""
MOST_STARTS = 4
BASE = {
    "base": str(ROOT / "tests" / "tiny.yaml"),
    "stages": [{"name": STAGE, "modalities": {"text": {"predicted": False}}}],
    "showcase": None,
}


# -------------------------------------------------------------------------------------------------------------- the faults


@dataclass(frozen=True)
class Fault:
    """What is done to a run.

    Attributes:
        before_step: on every rank.
        between: before the second start.
        at_start: on every rank, once the engine is built.
        curve: whether the run ends with the curve of an unbroken one.
        starts: how often the ranks are started, at most.
        of_second_start: overrides of all starts but the first.
    """

    before_step: Callable[[Place], None] = nothing
    between: Callable[[RunFolder], None] = nothing
    overrides: Sequence[str] = ()
    at_start: Callable[[Place], None] = nothing
    curve: bool = True
    starts: int = MOST_STARTS
    of_second_start: Sequence[str] = ()


KILLED = signalled(signal.SIGKILL, 1)
SHORT = ("safeguards.collective_timeout_s=10",)
REMOTE = "stages.*.checkpoint.remote=FOLDER/copies"
UNBROKEN = "none"
FAULTS = {
    UNBROKEN: Fault(),
    "a rank is killed (SIGKILL)": Fault(KILLED),
    "the first rank is killed (SIGKILL)": Fault(signalled(signal.SIGKILL, 0)),
    "all ranks are killed (SIGKILL)": Fault(signalled(signal.SIGKILL, 0, 1)),
    "a rank is ended (SIGTERM)": Fault(signalled(signal.SIGTERM, 1)),
    "a rank crashes (SIGSEGV)": Fault(segfaults),
    "a rank raises an error": Fault(raises),
    "a rank exits": Fault(exits),
    "a rank gets no memory": Fault(lacks_memory),
    "a rank stands still": Fault(stands_still, overrides=SHORT),
    "a rank is halted (SIGSTOP)": Fault(signalled(signal.SIGSTOP, 1), overrides=SHORT),
    "a rank dies while it writes a checkpoint": Fault(dies_in_a_save),
    "the disk is full when a checkpoint is written": Fault(has_a_full_disk, starts=2),
    "a bit of the newest checkpoint flips": Fault(KILLED, flip_a_bit),
    "a file of the newest checkpoint is cut off": Fault(KILLED, cut_off),
    "a file of the newest checkpoint is gone": Fault(KILLED, lose_a_file),
    "the manifest of the newest checkpoint is garbled": Fault(KILLED, garble_the_manifest),
    "the pointer to the newest checkpoint is gone": Fault(KILLED, lose_the_pointer),
    "the last line of the records is cut off": Fault(KILLED, cut_off_the_records),
    "the disk is empty, and copies are in the store": Fault(KILLED, empty_the_disk, (REMOTE,)),
    "the store of the copies is away for two checkpoints": Fault(loses_its_store, overrides=(REMOTE,)),
    "records cannot be written for a step": Fault(loses_its_records),
    "a loss is not finite": Fault(at_start=spoils(math.inf, AT), curve=False),
    "losses are not finite three steps in a row": Fault(
        at_start=spoils(math.inf, AT, AT + 1, AT + 2), overrides=("safeguards.skipped_in_a_row=3",), curve=False
    ),
    "the loss is too large two steps in a row": Fault(
        at_start=spoils(1000.0, 13, 14), overrides=("safeguards.spikes={window: 10, steps: 2}",), curve=False
    ),
    "someone makes STOP": Fault(asks_to_stop),
    "someone makes STOP while a checkpoint is written": Fault(asks_to_stop_in_a_save),
    "the learning rate differs at the next start": Fault(KILLED, of_second_start=("stages.*.optimizer.learning_rate=0.1",)),
}


# ---------------------------------------------------------------------------------------------------------------- measured


@dataclass
class Row:
    """What became of a run.

    Attributes:
        codes: by start, the exit code of each rank; negative for a signal.
        incidents: kind and step, in order.
        lost: steps that were done and had to be done again.
        seconds: from the fault until the end of a step after it; None if there was none.
        curve_equal: its steps on record are those of an unbroken run, to the bit; None if the fault changes what is learnt.
    """

    fault: str
    codes: list[list[int]] = field(default_factory=list)
    incidents: list[tuple[str, int]] = field(default_factory=list)
    lost: int = 0
    seconds: float | None = None
    done: bool = False
    curve_equal: bool | None = None


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects."""
    rows = []
    for line in path.read_text().split("\n") if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def curve_of(folder: RunFolder) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows_of(folder.stage(STAGE).metrics)]


def start_ranks(name: str, start: int, folder: Path, overrides: Sequence[str]) -> list[int]:
    """Both ranks to their ends, as a launcher starts them."""
    settings = [f"folder={folder}/run", f"stages.*.steps={STEPS}", f"stages.*.checkpoint.every_steps={EVERY}", *overrides]
    train = [str(folder / "run.yaml"), *settings, "--stage", STAGE, "--deepspeed", str(ROOT / "ds_configs/zero1.json")]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.faults", "--rank-of", name, "--start", str(start), "--", "train", *train]
    with Signals() as signals:
        return run([Command(command, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)], signals)


def measure(name: str, fault: Fault, unbroken: Sequence[Any], folder: Path) -> Row:
    """Let a fault happen, and start the ranks again until the stage is done."""
    row, paths = Row(name), RunFolder(folder / "run")
    write_yaml(folder / "run.yaml", BASE)
    told: dict[tuple[str, float], int] = {}
    """The step of every incident, by kind and time; the fault may delete the file."""
    struck = 0.0
    for start in range(fault.starts):
        own = (*fault.overrides, *(fault.of_second_start if start else ()))
        row.codes.append(start_ranks(name, start, folder, [text.replace("FOLDER", str(folder)) for text in own]))
        told |= {(each["kind"], each["time"]): each["step"] for each in rows_of(paths.incidents)}
        if start == 0:
            struck = float((paths.root / "struck").read_text())
            fault.between(paths)
        row.done = paths.stage(STAGE).done.exists()
        if row.done or (start and 2 in row.codes[-1]):
            break
    row.incidents = [(kind, step) for (kind, _), step in told.items()]
    steps = rows_of(folder / "steps.jsonl")
    row.lost = len(steps) - len({each["step"] for each in steps})
    since = next((at for kind, at in told if kind == "resume"), struck)
    again = next((each["time"] for each in steps if each["time"] > since), None)
    row.seconds = None if again is None else round(again - struck, 1)
    if fault.curve and row.done:
        curve = curve_of(paths)
        row.curve_equal = curve[-1] == unbroken[-1] and set(curve) <= set(unbroken)
    return row


def on_rank(name: str, start: int, arguments: Sequence[str]) -> int:
    """`megadiff train` with a fault."""
    from megadiff.cli.main import main
    from megadiff.training import loop

    folder = next(word.partition("=")[2] for word in arguments if word.startswith("folder="))
    place = Place(RunFolder(Path(folder)), int(os.environ["RANK"]), start)
    build, fault = loop.build_engine, FAULTS[name]

    def build_engine(*of: Any, **named: Any) -> Any:
        engine = build(*of, **named)
        step = engine.step

        def faulty(*inputs: Any, **named: Any) -> Any:
            time.sleep(PAUSE_S)
            place.step, place.calls = engine.optimizer_step + 1, place.calls + 1
            fault.before_step(place)
            result = step(*inputs, **named)
            if place.rank == 0:
                with (place.folder.root.parent / "steps.jsonl").open("a") as file:
                    file.write(json.dumps({"step": place.step, "time": time.time()}) + "\n")
            return result

        engine.step = faulty
        fault.at_start(place)
        return engine

    loop.build_engine = build_engine
    return main(arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=FAULTS,
        default=list(FAULTS),
        help="these; rows of others stay in FILE",
    )
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/faults.json"))
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("command", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of is not None:
        raise SystemExit(on_rank(arguments.rank_of, arguments.start, arguments.command))
    kept = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else []
    rows = {row["fault"]: row for row in kept if row["fault"] not in arguments.only}
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, UNBROKEN)
        write_yaml(whole / "run.yaml", BASE)
        start_ranks(UNBROKEN, 0, whole, [])
        unbroken = curve_of(RunFolder(whole / "run"))
        print("| fault | exit codes | incidents | steps lost | seconds | curve |\n|---|---|---|---|---|---|", flush=True)
        for number, name in enumerate(name for name in arguments.only if name != UNBROKEN):
            row = measure(name, FAULTS[name], unbroken, Path(folder, str(number)))
            rows[name] = vars(row)
            cells = (row.fault, row.codes, row.incidents, row.lost, row.seconds, row.curve_equal if row.done else "not done")
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    arguments.json.write_text(
        json.dumps({"cores": os.cpu_count(), "load": os.getloadavg()[2], "rows": list(rows.values())}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
