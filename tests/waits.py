"""Where the host would wait for a GPU: operations of which it must know a value or a shape. Seen on a CPU as well."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten._unique2.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
"""They wait for the number of places if an index is a mask."""
READING = ("tolist", "numpy", "cpu")
"""Methods of a tensor that dispatch nothing on a CPU."""
PLACES = ("megadiff", "kernels", "deepspeed")


class _Operations(TorchDispatchMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func in INDEXING and any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
        shapeless = func is aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None
        if func in WAITING or masks or shapeless:
            self.seen[_caller()] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READING and isinstance(args[0], Tensor):
            self.seen[_caller()] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(seen: Counter[str]) -> Iterator[None]:
    """Count what would wait in the block, by the innermost function of ours or DeepSpeed's: `statistics.step_result`."""
    with _Operations(seen), _Methods(seen):
        yield


def _caller() -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        room = next((part for part in reversed(path.parts) if part in (*PLACES, "tests")), "")
        if room in PLACES:
            name = f"{path.stem}.{frame.f_code.co_qualname}"
            return f"deepspeed: {name}" if room == "deepspeed" else name
        frame = frame.f_back
    return "elsewhere"
