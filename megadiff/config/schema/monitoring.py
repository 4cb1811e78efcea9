"""What a run shows of itself, besides TensorBoard and its own files."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from typing import Annotated, Literal

from pydantic import Field

from megadiff.config.errors import ConfigError
from megadiff.config.schema.base import NotNegative, Seconds, Section

Address = Annotated[str, Field(pattern=r"^https?://.+")]


class WeightsAndBiases(Section):
    """W&B, a run per stage in the group of the run's name. The key is WANDB_API_KEY's, or that of `wandb login`."""

    project: Annotated[str, Field(min_length=1)]
    entity: str | None = None
    """The user or team; None is the key's own."""
    mode: Literal["online", "offline"] = "online"
    """offline: into RUN/wandb, for `wandb sync`."""


class OpenTelemetry(Section):
    """OTLP over HTTP to a collector. Headers that it asks for are OTEL_EXPORTER_OTLP_HEADERS'."""

    endpoint: Address = "http://localhost:4318"
    """Without its path, /v1/metrics."""
    every_s: Seconds = 60.0


class Prometheus(Section):
    """A port of rank 0's machine to be scraped, while a stage is trained."""

    port: Annotated[int, Field(ge=1, le=65535)] = 9464
    host: str = "0.0.0.0"
    """The address to listen at; 0.0.0.0 are all of the machine's, and whoever reaches them reads the numbers."""


class Trace(Section):
    """The steps that a stage keeps a trace of (`STAGE/trace.json.gz`)."""

    after_steps: NotNegative = 20
    """Counted from the start of the ranks: the first steps allocate and compile."""
    steps: Annotated[int, Field(ge=1, le=10)] = 2
    """Fewer where an evaluation or a checkpoint comes between them."""


class Monitoring(Section):
    """What is traced, and where numbers and incidents go besides TensorBoard. May change between two starts of a run."""

    trace: Trace | None = Trace()
    """Null: none."""

    wandb: WeightsAndBiases | None = None
    opentelemetry: OpenTelemetry | None = None
    prometheus: Prometheus | None = None

    def check_installed(self) -> None:
        """Raises ConfigError if a package that is needed is missing; imports none."""
        packages = {
            "wandb": "wandb",
            "opentelemetry": "opentelemetry-exporter-otlp-proto-http",
            "prometheus": "opentelemetry-exporter-prometheus",
        }
        for key, package in packages.items():
            if getattr(self, key) is not None and not _is_installed(package):
                raise ConfigError(
                    f"monitoring.{key} needs the package {package}, which is not installed; "
                    f"pip install 'megadiff[{key}]', or give monitoring.{key}=null"
                )


def _is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True
