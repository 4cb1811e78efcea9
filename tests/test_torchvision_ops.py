import importlib

import pytest

from megadiff import torchvision_ops


@pytest.mark.parametrize("module", ["torchvision", "cleanfid.resize", "transformers.models.clip.modeling_clip", "diffusers"])
def test_packages_that_need_torchvision_can_be_imported_whatever_torch_is_built_for(module):
    torchvision_ops.declare_missing()
    torchvision_ops.declare_missing()  # a second call is none: an operator can be declared once
    importlib.import_module(module)
