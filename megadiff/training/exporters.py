"""Exporters by other people's libraries, which are imported in the exporters' own threads: W&B, OpenTelemetry, Prometheus."""

from __future__ import annotations

import html
import logging
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image

from megadiff.config.errors import UserError
from megadiff.config.run_folder import Incident, IncidentKind, StageFolder
from megadiff.config.schema import Run, Stage
from megadiff.config.schema.monitoring import OpenTelemetry, Prometheus, WeightsAndBiases
from megadiff.files import write_text
from megadiff.training import tags
from megadiff.training.exporting import CLOSE_S, Background, Exporter

if TYPE_CHECKING:
    from opentelemetry.metrics import Counter
    from opentelemetry.sdk.metrics.export import MetricReader

HARMLESS = (IncidentKind.START, IncidentKind.RESUME, IncidentKind.CHANGED, IncidentKind.STOP)
FATAL = (IncidentKind.ERROR, IncidentKind.PREFLIGHT)
STEP = "step"


def exporters_of(run: Run, stage: Stage, hyper_parameters: Mapping[str, float | str | bool]) -> list[Background]:
    """Those that `monitoring` names; their libraries are installed (`check_installed`)."""
    wanted, paths = run.monitoring, run.paths.stage(stage.name)
    labels = {"run": run.name, "stage": stage.name}
    exporters = []
    if wandb := wanted.wandb:
        exporters.append(Background("W&B", lambda _: WandB(wandb, run.name, paths, hyper_parameters)))
    if collector := wanted.opentelemetry:
        exporters.append(Background("OpenTelemetry", lambda fail: Gauges(otlp_reader(collector, fail), labels)))
    if port := wanted.prometheus:
        exporters.append(Background("Prometheus", lambda _: Scraped(port, labels)))
    return exporters


class WandB(Exporter):
    """A stage as a W&B run, which goes on under its old name where the stage does.

    The step is a number among others, for W&B's own must not decrease: steps that are done again are shown again.
    """

    def __init__(
        self, section: WeightsAndBiases, run: str, paths: StageFolder, hyper_parameters: Mapping[str, float | str | bool]
    ) -> None:
        """Raises UserError without a key, and what W&B raises if it cannot be reached."""
        import wandb

        if section.mode == "online" and not wandb.login(prompt=False):
            raise UserError("there is no key; set WANDB_API_KEY, or give monitoring.wandb.mode=offline")
        if not paths.wandb_id.exists():
            write_text(paths.wandb_id, uuid.uuid4().hex[:8])
        paths.of.wandb.mkdir(exist_ok=True)
        settings = wandb.Settings(console="off", silent=True, finish_timeout=CLOSE_S - 5, finish_timeout_raises=True)
        self._wandb, self._failed = wandb, False
        self._run = wandb.init(
            project=section.project,
            entity=section.entity,
            mode=section.mode,
            id=paths.wandb_id.read_text(encoding="utf-8").strip(),
            resume="allow",
            name=f"{run}/{paths.name}",
            group=run,
            config=dict(hyper_parameters),
            dir=str(paths.of.root),
            settings=settings,
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def scalars(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log({**numbers, STEP: step})

    def picture(self, tag: str, picture: Image.Image, step: int) -> None:
        self._run.log({tag: self._wandb.Image(picture), STEP: step})

    def text(self, tag: str, text: str, step: int) -> None:
        self._run.log({tag: self._wandb.Html(f"<pre>{html.escape(text)}</pre>"), STEP: step})

    def incident(self, incident: Incident) -> None:
        """An alert as well, unless it is harmless."""
        self.text(tags.INCIDENTS, incident.markdown, incident.step)
        self._failed |= incident.kind in FATAL
        if incident.kind not in HARMLESS:
            level = "ERROR" if incident.kind in FATAL else "WARN"
            title = f"{self._run.name}: {incident.kind.value}"
            self._run.alert(title[-63:], incident.markdown, level)

    def close(self) -> None:
        self._run.finish(exit_code=int(self._failed))


class Gauges(Exporter):
    """Numbers as OpenTelemetry's gauges, with run, stage and curve as attributes; incidents as a counter by kind."""

    def __init__(self, reader: MetricReader, labels: Mapping[str, str]) -> None:
        from opentelemetry.sdk.metrics import MeterProvider

        # Failures are told once, as incidents.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._labels = labels
        self._provider = MeterProvider([reader], shutdown_on_exit=False)
        self._meter = self._provider.get_meter("megadiff")
        self._gauges: dict[str, Any] = {}
        self._incidents: Counter = self._meter.create_counter("megadiff.incidents")

    def scalars(self, numbers: Mapping[str, float], step: int) -> None:
        for tag, value in numbers.items():
            name, of = tags.measurement(tag)
            self._set(name, value, {} if of is None else {"curve": of})
        self._set(STEP, step, {})

    def incident(self, incident: Incident) -> None:
        self._incidents.add(1, {**self._labels, "kind": incident.kind.value})

    def close(self) -> None:
        self._provider.shutdown(timeout_millis=1000 * (CLOSE_S - 5))

    def _set(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        if name not in self._gauges:
            self._gauges[name] = self._meter.create_gauge(f"megadiff.{name}")
        self._gauges[name].set(value, {**self._labels, **labels})


def otlp_reader(section: OpenTelemetry, fail: Callable[[str], None]) -> MetricReader:
    """Sends everything to a collector at intervals, and at the end; `fail` hears where it cannot."""
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData, PeriodicExportingMetricReader

    class Told(OTLPMetricExporter):  # type: ignore[misc]
        def export(self, data: MetricsData, *args: Any, **options: Any) -> MetricExportResult:
            result = super().export(data, *args, **options)
            if result is not MetricExportResult.SUCCESS:
                fail(f"{section.endpoint} does not take what is sent")
            return result

    exporter = Told(endpoint=f"{section.endpoint.rstrip('/')}/v1/metrics")
    return PeriodicExportingMetricReader(exporter, export_interval_millis=1000 * section.every_s)


class Scraped(Gauges):
    """Gauges at a port for Prometheus."""

    def __init__(self, section: Prometheus, labels: Mapping[str, str]) -> None:
        """Raises OSError if the port is taken."""
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
        from prometheus_client import start_http_server

        self._server, self._thread = start_http_server(section.port, section.host)
        super().__init__(PrometheusMetricReader(), labels)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        super().close()
