"""The skip policy of tests/conftest.py, tried in a pytest of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

HEAD = "import pytest\n"
PASSES = "def test_passes():\n    pass\n"
SKIPS = "def test_skips():\n    pytest.skip('no reason that counts')\n"
SKIPS_MODULE = "pytest.skip('whole file', allow_module_level=True)\n"
GPU = "@pytest.mark.gpu\ndef test_gpu():\n    pytest.skip('no device')\n"
XFAILS = "@pytest.mark.xfail\ndef test_xfails():\n    assert False\n"


def run_pytest(folder: Path, tests: str, ci: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(Path(__file__).with_name("conftest.py"), folder / "conftest.py")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    timeout\n")
    (folder / "test_inner.py").write_text(HEAD + tests)
    (folder / "test_other.py").write_text(PASSES)
    environment = {**os.environ, "CI": ci, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("tests", "ci", "code"),
    [
        (PASSES, "true", 0),
        (SKIPS, "true", 1),
        (SKIPS, "", 0),
        (SKIPS_MODULE, "true", 1),
        (GPU, "true", 0),
        (XFAILS, "true", 0),
    ],
    ids=["a pass", "a skip in CI", "a skip at home", "a skipped file in CI", "a GPU skip in CI", "an expected failure in CI"],
)
def test_only_skips_without_the_gpu_marker_fail_ci(tmp_path: Path, tests: str, ci: str, code: int) -> None:
    ended = run_pytest(tmp_path, tests, ci)
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert ("skipped without the gpu marker" in ended.stdout) == (code == 1)
