"""Evaluation that is killed again and again gives the figures of one that was not, to the bit.

    python -m benchmarks.evaluation_resume RUN [--count N] [--kills K] [--seed S]

RUN is a trained run on the emoji that ship with the repository, such as runs/quickstart. Pictures with captions are drawn from
nothing and scored on two processes: once without a disturbance, and at the same time killed K times, at moments that are drawn
evenly over the files that the work leaves (chunks of samples, pieces of features). Every second kill hits one rank alone, the
others the launcher. Then both results.json are compared as bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from megadiff.data.shards.shard import read_manifest
from megadiff.evaluation.evaluate import PIECES
from megadiff.evaluation.picture_sets import PER_PIECE
from megadiff.evaluation.results import RESULTS
from megadiff.generation.writing import PARTS

RECORD = Path(__file__).parent / "results/evaluation_resume.json"
PROCESSES = 2
BATCH = 100
REFERENCE = "examples/emoji32/held_out"
SETTLE_S = 3.0
"""A rank ends within about a second of its launcher."""


def begin(run: str, count: int, out: Path) -> subprocess.Popen[bytes]:
    drawn = ["--task", "joint", "-n", str(count), "--batch", str(BATCH), "--steps", "2", "--seed", "1"]
    scored = ["--metrics", "fd,kd", "--features", "effnet-lite0", "--reference", REFERENCE]
    command = [sys.executable, "-m", "megadiff", "evaluate", run, *drawn, *scored, "--processes", str(PROCESSES)]
    return subprocess.Popen([*command, "--out", str(out)], start_new_session=True)


def files(out: Path) -> int:
    """Chunks of samples and pieces of features that are whole."""
    return sum(1 for folder, form in ((PARTS, "*.json"), (PIECES, "*.npz")) for _ in (out / folder).glob(form))


def files_in_all(count: int) -> int:
    """How many of them there are at the end."""
    pictures = (count, sum(entry.samples for entry in read_manifest(REFERENCE).shards))
    return -(-count // BATCH) + sum(-(-number // PER_PIECE) for number in pictures)


def ranks_of(launcher: int) -> list[int]:
    """The process ids of a launcher's ranks."""
    return [child.pid for child in psutil.Process(launcher).children() if "RANK" in child.environ()]


def killed(run: str, count: int, out: Path, at: int, *, one_rank: bool) -> dict[str, object]:
    """Work until so many files are there, and kill a rank or everything. Returns what happened."""
    process = begin(run, count, out)
    while files(out) < at:
        if process.poll() is not None:
            raise SystemExit(f"the work ended ({process.returncode}) before {at} files were there")
        time.sleep(0.01)
    ranks = ranks_of(process.pid)
    victim = random.choice(ranks) if one_rank else process.pid
    os.kill(victim, signal.SIGKILL)
    code = process.wait(timeout=60)
    time.sleep(SETTLE_S)
    if left := [rank for rank in ranks if psutil.pid_exists(rank)]:
        raise SystemExit(f"ranks {left} outlived their launcher")
    return {"killed": "one rank" if one_rank else "the launcher", "at_files": at, "left_files": files(out), "exit_code": code}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        whole, broken = Path(temporary, "whole"), Path(temporary, "broken")
        undisturbed = begin(arguments.run, arguments.count, whole)
        moments = sorted(random.sample(range(1, files_in_all(arguments.count)), arguments.kills))
        kills = [
            killed(arguments.run, arguments.count, broken, at, one_rank=bool(number % 2)) for number, at in enumerate(moments)
        ]
        if code := begin(arguments.run, arguments.count, broken).wait() or undisturbed.wait():
            raise SystemExit(code)
        results = [(folder / RESULTS).read_bytes() for folder in (whole, broken)]
    metrics = {metric["name"]: metric["value"] for metric in json.loads(results[0])["metrics"]}
    record = {
        "samples": arguments.count,
        "processes": PROCESSES,
        "kills": kills,
        "equal_to_the_bit": results[0] == results[1],
        "figures": metrics,
    }
    print(json.dumps(record, indent=1))
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(0 if record["equal_to_the_bit"] else 1)


if __name__ == "__main__":
    main()
