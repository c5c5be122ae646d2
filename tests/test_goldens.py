"""Every golden case, by its kind: what the original code computed is what ours computes.

pytest tests/test_goldens.py                          the copies under tests/goldens/
pytest tests/test_goldens.py --goldens DIR -k wan-    any other folder of cases
"""

import importlib
import pkgutil
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import golden_checks
from tests.golden_checks import GoldenCase, read_kind

CHECKS = {
    kind: check
    for file in pkgutil.iter_modules(golden_checks.__path__)
    for kind, check in importlib.import_module(f"tests.golden_checks.{file.name}").CHECKS.items()
}


def test_golden(golden_folder):
    kind = read_kind(golden_folder)
    assert kind in CHECKS, f"{golden_folder.name}: unknown kind {kind!r}"
    case = GoldenCase.open(golden_folder)
    CHECKS[kind](case)
    case.assert_all_checked()


@pytest.mark.parametrize("count", [6, 7, 8])
def test_pasting_of_videos_that_upstream_cuts(tmp_path, count):
    """A case as the copies hold none: a video of other than 4n+1 frames, with a matrix for every frame as decoded."""
    source = Path(__file__).parent / "goldens" / "standin-face-paste-affine"
    chosen = torch.tensor([0, 1, 2, 3, 4, 0, 2, 3][:count])
    kept = min(count, count // 4 * 4 + 1)
    inputs, outputs = (load_file(source / f"{name}.safetensors") for name in ("inputs", "outputs"))
    inputs |= {name: inputs[name][chosen] for name in ("video", "target_kps", "target_bbox")}
    outputs |= {name: outputs[name][chosen[:kept]] for name in ("video", "mask")}
    outputs["affine"] = outputs["affine"][chosen]
    outputs["whf"][2] = kept
    save_file(inputs, tmp_path / "inputs.safetensors")
    save_file(outputs, tmp_path / "outputs.safetensors")
    shutil.copyfile(source / "case.json", tmp_path / "case.json")
    test_golden(tmp_path)
