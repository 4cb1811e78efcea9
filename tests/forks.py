"""Processes without the wait for imports: a server imports torch, DeepSpeed and megadiff once, and forks a child per script.

A child is a process as any other (own session, environment, outputs and end), but what it has imported is the server's. So
this is for tests of what processes compute and exchange; how a program starts is tested with `tests.ranks.start_python`.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
IMPORTED = (
    "megadiff.cli.main",
    "megadiff.training.loop",
    "megadiff.generation.generate",
    "megadiff.engine.pipeline",
    "megadiff.data.codecs.captions",
    "torch._dynamo",
    "torch.utils.tensorboard",
)
FIXED = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
"""What imports read from the environment; every child has the same."""
_LARGEST_REQUEST = 1 << 20


class Outputs(NamedTuple):
    out: str
    err: str


class Forked:
    """A running child; has what tests use of subprocess.Popen."""

    def __init__(self, args: list[str], pid: int, ending: int, outputs: list[Any]) -> None:
        self.args, self.pid = args, pid
        self.returncode: int | None = None
        self._ending, self._outputs = ending, outputs

    def poll(self) -> int | None:
        return self._ended(0)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> Outputs:
        """Wait for its end; returns all that it wrote.

        Raises:
            subprocess.TimeoutExpired: it runs on after `timeout` seconds.
        """
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        texts = []
        for file in self._outputs:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return Outputs(*texts)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._ending], [], [], timeout)[0]:
            code = _message(self._ending)
            self.returncode = int(code) if code else -signal.SIGKILL  # its watcher was killed
            os.close(self._ending)
        return self.returncode


class Server:
    """A server, and the connection to it."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env={**os.environ, **FIXED},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        atexit.register(self._stop)

    def start(self, arguments: list[str], cwd: Path, environment: dict[str, str]) -> Forked:
        """Run `script.py argument ...` or `-m module argument ...` in a child."""
        outputs = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 - communicate closes them
        ending, written = os.pipe()
        request = {"arguments": arguments, "cwd": str(cwd), "environment": {**environment, **FIXED}}
        descriptors = [*(file.fileno() for file in outputs), written]
        socket.send_fds(self._connection, [json.dumps(request).encode()], descriptors)
        os.close(written)
        pid = _message(ending)
        assert pid, "the server of forks has ended"
        return Forked([sys.executable, *arguments], int(pid), ending, outputs)

    def _stop(self) -> None:
        self._connection.close()
        self._process.wait()


_servers: dict[int, Server] = {}


def start_forked(arguments: list[str], *, cwd: Path = ROOT, environment: dict[str, str], turn: int = 0) -> Forked:
    """Run a script or module in a child of this test process's server.

    Args:
        environment: all of the child's, but for FIXED.
        turn: children of even and odd turns come from two servers, so that their strings hash unlike, as those of real
            processes do: what depends on the order of a set then differs between them.
    """
    if turn % 2 not in _servers:
        _servers[turn % 2] = Server()
    return _servers[turn % 2].start(arguments, cwd, environment)


def _message(descriptor: int) -> bytes:
    """What stands before the next newline; nothing where the writer has ended."""
    text = b""
    while (byte := os.read(descriptor, 1)) not in (b"", b"\n"):
        text += byte
    return text


def serve(requests: socket.socket) -> list[str]:
    """Fork until the tests have ended. Returns only in a child: what it shall run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # watchers are not waited for
    while True:
        line, descriptors, *_ = socket.recv_fds(requests, _LARGEST_REQUEST, 3)
        if not line:
            os._exit(0)
        # What another thread has locked would stay locked in a child for ever.
        assert len(list(Path("/proc/self/task").iterdir())) == 1
        if os.fork():
            for descriptor in descriptors:
                os.close(descriptor)
            continue
        requests.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return _watched(json.loads(line), *descriptors)


def _watched(request: dict[str, Any], out: int, err: int, ending: int) -> list[str]:
    """In the server's child: fork once more, tell the grandchild's number and then its exit code. Returns in the grandchild."""
    child = os.fork()
    if child:
        os.write(ending, b"%d\n" % child)
        _, status = os.waitpid(child, 0)
        os.write(ending, b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    os.setsid()
    os.close(ending)
    for descriptor, place in ((out, 1), (err, 2)):
        os.dup2(descriptor, place)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    arguments: list[str] = request["arguments"]
    return arguments


def run(arguments: list[str]) -> None:
    """As Python runs `script.py argument ...` and `-m module argument ...`."""
    if arguments[0] == "-m":
        sys.path[0] = str(Path.cwd())
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(arguments[0]).parent)
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    from megadiff.engine.start import without_compiler

    with without_compiler(), warnings.catch_warnings(action="ignore"):  # as the engine imports it; megatron misses Apex
        importlib.import_module("megadiff.engine.tensor")
    gc.freeze()
    run(serve(socket.socket(fileno=int(sys.argv[1]))))
