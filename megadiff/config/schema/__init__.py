"""What a run is made of. Torch-free: a login node, the launcher and CI import this.

Every section is frozen and refuses unknown keys. Units stand in the names: _s seconds, _bytes, _px.
The rest of the package imports from here.
"""

from __future__ import annotations

from megadiff.config.schema.cluster import Allocation, Cluster, DeepSpeedCluster, LocalCluster, SlurmCluster
from megadiff.config.schema.data import (
    Cache,
    CaptionField,
    ClassField,
    Data,
    DataField,
    FieldSource,
    LatentField,
    NumberField,
    PixelField,
)
from megadiff.config.schema.evaluation import BestCheckpoint, Evaluation, HeldOutLoss
from megadiff.config.schema.model import (
    RESERVED_NAMES,
    CategoricalSchedule,
    GaussianProcess,
    GridSpace,
    MaskedProcess,
    Modality,
    Model,
    Process,
    Space,
    TokenSpace,
    UniformProcess,
)
from megadiff.config.schema.monitoring import Monitoring
from megadiff.config.schema.run import Launch, Preflight, Run, Safeguards, Spikes
from megadiff.config.schema.sampling import SampleSheets, Sampling, Showcase
from megadiff.config.schema.stage import (
    Alignment,
    Batching,
    Checkpointing,
    Conditioning,
    ConstantEma,
    EmaProfile,
    Initialise,
    LogitNormalTimes,
    Optimizer,
    PowerEma,
    Stage,
    StageModality,
    UniformTimes,
)

__all__ = [
    "Allocation",
    "Alignment",
    "Batching",
    "BestCheckpoint",
    "Cache",
    "CaptionField",
    "CategoricalSchedule",
    "Checkpointing",
    "ClassField",
    "Cluster",
    "Conditioning",
    "ConstantEma",
    "Data",
    "DataField",
    "DeepSpeedCluster",
    "EmaProfile",
    "Evaluation",
    "FieldSource",
    "GaussianProcess",
    "GridSpace",
    "HeldOutLoss",
    "Initialise",
    "LatentField",
    "Launch",
    "LocalCluster",
    "LogitNormalTimes",
    "MaskedProcess",
    "Modality",
    "Model",
    "Monitoring",
    "NumberField",
    "Optimizer",
    "SampleSheets",
    "PixelField",
    "PowerEma",
    "Preflight",
    "Process",
    "RESERVED_NAMES",
    "Run",
    "Safeguards",
    "Spikes",
    "Sampling",
    "Showcase",
    "SlurmCluster",
    "Space",
    "Stage",
    "StageModality",
    "TokenSpace",
    "UniformProcess",
    "UniformTimes",
]
