"""Golden kind of LoRA files: seven formats, each merged into the same weights by the code of its origin."""

import torch

from models.lora import Lora, merge_loras
from tests.golden_checks.dit import build_transformer


def check_merge(case) -> None:
    weights = case.weights()
    for name, form in case.config["formats"].items():
        transformer = build_transformer(case.config, weights)
        tensors = {key.removeprefix(f"{name}|"): t for key, t in case.inputs.items() if key.startswith(f"{name}|")}
        merge_loras(transformer, [(Lora.from_tensors(tensors, transformer, name), form["strength"])])
        merged = transformer.state_dict()
        changed = [key for key in merged if not torch.equal(merged[key], weights[key])]
        assert len(changed) == form["changed"], f"{name}: changed {changed}"
        for key in changed:
            case.check(f"{name}|{key}", merged[key])


CHECKS = {"lora_merge": check_merge}
