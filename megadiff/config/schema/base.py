"""What all sections have in common: the base class, and the types of a single value."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


def _is_path(text: str) -> str:
    if not text or "://" in text:
        raise ValueError(f"{text!r} must be a path on a file system, not an address")
    return text


LocalPath = Annotated[str, AfterValidator(_is_path)]
"""A path on a (shared) file system, not the address of an object store."""
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, le=1e6)]
NotNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
"""A guidance weight; the bound keeps its products finite."""


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Periodic(Section):
    """What is done with the weights every so many steps of training, and after the last one."""

    every_steps: Positive
    weights: Literal["ema", "raw", "both"] = "both"
    """The first EMA profile, the plain weights, or both."""

    @property
    def kinds(self) -> tuple[Literal["ema", "raw"], ...]:
        """Each kind of weights."""
        return ("ema", "raw") if self.weights == "both" else (self.weights,)
