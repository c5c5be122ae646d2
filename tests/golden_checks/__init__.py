"""What a golden case is, and how its outputs are compared.

A case is a folder with case.json (kind, config, tolerances), and safetensors files of weights, inputs and outputs that
the original implementation produced in float32. Each module of this package maps kinds to check functions (`CHECKS`);
a check computes every named output with our code and hands it to `case.check`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file


def read_kind(folder: Path) -> str:
    return json.loads((folder / "case.json").read_text(encoding="utf-8"))["kind"]


@dataclass
class GoldenCase:
    """One golden folder, opened."""

    folder: Path
    kind: str
    config: dict
    rtol: float
    atol: float
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    checked: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, folder: Path) -> "GoldenCase":
        case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        inputs, outputs = (
            load_file(file) if (file := folder / f"{name}.safetensors").is_file() else {}  # a plan has no inputs
            for name in ("inputs", "outputs")
        )
        return cls(folder, case["kind"], case["config"], case["rtol"], case["atol"], inputs, outputs)

    def weights(self, file: str = "weights.safetensors") -> dict[str, torch.Tensor]:
        """A weights file of this case; `file` may point to a sibling folder, as `config.vae.weights` does."""
        return load_file((self.folder / file).resolve())

    def check(self, name: str, actual, *, atol: float | None = None) -> None:
        """Compare one named output with the original's (shape, values within the case's tolerances)."""
        expected = self.outputs[name]
        if not isinstance(actual, torch.Tensor):
            actual = torch.as_tensor(numpy.asarray(actual))
        assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        torch.testing.assert_close(
            actual.detach().to(torch.float64),
            expected.to(torch.float64),
            rtol=self.rtol,
            atol=self.atol if atol is None else atol,
            msg=lambda text: f"{self.folder.name}: {name}\n{text}",
        )
        self.checked.add(name)

    def assert_all_checked(self) -> None:
        """A case passes only when every output in the file was compared."""
        missed = sorted(set(self.outputs) - self.checked)
        assert not missed, f"{self.folder.name}: outputs never compared: {missed}"
