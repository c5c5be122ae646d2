"""Optimisers: one AdamW step by hand, float32 masters against bfloat16 that stalls, groups, schedules, resuming."""

import copy
import math
import sys

import pytest
import torch
from torch import nn

from errors import UsageError
from training.gradient_limit import gradient_limit, tightened_limit
from training.optimizers import (
    OPTIMIZERS,
    Masters,
    averaged,
    learning_rate,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
)
from training.sharding import load_state, owners, state_of

OWN = [name for name, package in OPTIMIZERS.items() if package is None]


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def descend(model: nn.Module, name: str, steps: int, lr: float = 1e-2, optimizer=None, masters=None):
    """Train on a fixed random task; the loss of each step."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 6, generator=generator), torch.randn(32, 4, generator=generator)
    masters = masters or Masters(model.named_parameters())
    optimizer = optimizer or make_optimizer(name, parameter_groups(masters.values, lr, 0.01))
    dtype, losses = next(model.parameters()).dtype, []
    for _ in range(steps):
        loss = (model(x.to(dtype)).float() - y).square().mean()
        loss.backward()
        masters.collect()
        optimizer.step()
        optimizer.zero_grad()
        masters.publish()
        losses.append(loss.item())
    return losses, optimizer, masters


def test_adamw_step_by_hand():
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    weight.grad = torch.tensor([[0.5, 0.25]])
    groups = parameter_groups({"transformer.w": weight}, lr=0.1, weight_decay=0.2)
    make_optimizer("adamw", groups, betas=(0.9, 0.99), eps=1e-6).step()
    # The first step's corrected moments are g and g², so it is lr·g/(|g| + eps), after the decay of lr·wd.
    expected = torch.tensor([[1.0, -2.0]]) * (1 - 0.1 * 0.2) - 0.1 * torch.tensor([[0.5 / 0.500001, 0.25 / 0.250001]])
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("name", OWN)
def test_every_optimizer_goes_down_and_resumes_exactly(name):
    model = network()
    losses, optimizer, _ = descend(model, name, 20)
    assert losses[-1] < 0.9 * losses[0]
    halfway, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    unbroken, *_ = descend(model, name, 5, optimizer=optimizer)
    again = network()
    again.load_state_dict(halfway)
    masters = Masters(again.named_parameters())
    resumed = make_optimizer(name, parameter_groups(masters.values, 1e-2, 0.01))
    resumed.load_state_dict(saved)
    assert descend(again, name, 5, optimizer=resumed, masters=masters)[0] == unbroken


def test_muon_moves_hidden_matrices_and_adamw_the_rest():
    torch.manual_seed(0)
    shapes = {
        "transformer.blocks.0.self_attn.q.weight": (4, 4),
        "autoencoder.encoder.mid_block.resnets.0.conv1.weight": (4, 3, 3, 3, 3),
        "transformer.blocks.0.self_attn.q.bias": (4,),
        "transformer.blocks.0.modulation": (1, 6, 4),
        "transformer.patch_embedding.weight": (4, 2, 1, 2, 2),
        "transformer.head.head.weight": (8, 4),
        "autoencoder.decoder.mid_block.resnets.0.norm1.gamma": (4, 1, 1, 1),
    }
    masters = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    before = {name: value.detach().clone() for name, value in masters.items()}
    optimizer = make_optimizer("muon", parameter_groups(masters, 1e-2, 0.01))
    count = {type(part).__name__: sum(len(g["params"]) for g in part.param_groups) for part in optimizer.parts}
    assert count == {"Muon": 2, "AdamW": 5}
    for value in masters.values():
        value.grad = torch.randn_like(value)
    kernel = masters["autoencoder.encoder.mid_block.resnets.0.conv1.weight"]
    alone = nn.Parameter(kernel.detach().clone().flatten(1))
    alone.grad = kernel.grad.flatten(1).clone()
    torch.optim.Muon([alone], lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw").step()
    optimizer.step()
    torch.testing.assert_close(kernel.detach().flatten(1), alone.detach())
    assert not any(torch.equal(value, before[name]) for name, value in masters.items())
    optimizer.zero_grad()
    assert all(value.grad is None for value in masters.values())
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.5}


def test_masters_follow_float32_where_bfloat16_stands_still():
    """StableAvatar's way, AdamW on bfloat16 weights at 2e-5, against masters, on the same gradients."""
    start = 0.02 * torch.randn(20000, 2, generator=torch.Generator().manual_seed(2))
    moved = {}
    for kind in ("float32", "bfloat16", "masters"):
        model = nn.Module()
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        model.weight = nn.Parameter(start.to(dtype, copy=True))
        masters = Masters(model.named_parameters())
        trained = {"weight": model.weight} if kind == "bfloat16" else masters.values
        optimizer = make_optimizer("adamw", parameter_groups(trained, 2e-5, 0.0))
        for _ in range(30):
            model.weight.grad = torch.ones_like(model.weight)
            if kind == "masters":
                masters.collect()
            optimizer.step()
            optimizer.zero_grad()
            masters.publish() if kind == "masters" else None
        moved[kind] = (model.weight.detach().float() - start.to(dtype).float()).mean().item()
    assert moved["float32"] == pytest.approx(-30 * 2e-5, rel=1e-3)
    assert moved["masters"] == pytest.approx(moved["float32"], rel=0.02)
    assert abs(moved["bfloat16"]) < 0.6 * abs(moved["float32"])


def test_gradients_of_micro_batches_are_summed_in_float32():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    masters = Masters(model.named_parameters())
    for value in (1.0, 2.0**-9, 2.0**-9):  # in bfloat16 1 + 2^-9 is 1
        model.weight.grad = torch.full((4,), value, dtype=torch.bfloat16)
        masters.collect()
    assert (masters.values["weight"].grad == 1 + 2.0**-8).all() and model.weight.grad is None


def test_masters_load_what_they_saved_and_nothing_else():
    model = network(torch.bfloat16)
    masters = Masters(model.named_parameters())
    saved = {name: torch.randn_like(value) for name, value in masters.values.items()}
    masters.load(saved)
    assert all(torch.equal(masters.values[name], tensor) for name, tensor in saved.items())
    assert torch.equal(model[0].weight, saved["0.weight"].bfloat16())
    del saved["0.bias"]
    with pytest.raises(UsageError, match="0.bias"):
        masters.load(saved)


def test_what_is_frozen_has_no_master_and_what_is_unused_gets_zero():
    model = network()
    model[0].requires_grad_(False)
    masters = Masters(model.named_parameters())
    assert set(masters.values) == {"2.weight", "2.bias"}
    masters.finish()
    assert all((value.grad == 0).all() for value in masters.values.values())


def test_groups_have_their_rate_and_vectors_do_not_decay():
    names = {
        "transformer.blocks.0.self_attn.q.lora_A.default.weight": (2, 3),
        "transformer.blocks.0.norm3.weight": (3,),
        "audio_adapter.blocks.0.cross_attn.k_vocal.weight": (3, 3),
    }
    masters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in names.items()}
    groups = parameter_groups(masters, 1e-3, 0.1, {"adapter": 10.0})
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.1), (1e-3, 0.0), (1e-2, 0.1)]
    optimizer = make_optimizer("adamw", groups)
    set_learning_rate(optimizer, 5e-4)
    assert [g["lr"] for g in optimizer.param_groups] == [5e-4, 5e-4, 5e-3]
    with pytest.raises(UsageError, match="'decoder' has no trained parameters.*adapter, lora, transformer"):
        parameter_groups(masters, 1e-3, 0.1, {"decoder": 2.0})


@pytest.mark.parametrize("name", [name for name, package in OPTIMIZERS.items() if package is not None])
def test_a_missing_package_is_named_with_its_command(name, monkeypatch):
    module, package, _ = OPTIMIZERS[name]
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    with pytest.raises(UsageError, match=f"pip install {package}"):
        make_optimizer(name, parameter_groups({"w": nn.Parameter(torch.zeros(2, 2))}, 1e-3, 0.0))


def test_the_mean_of_a_schedule_free_optimizer_is_what_is_used():
    """Its package is optional, so here is the least that has its two sets of weights."""

    class TwoSets(torch.optim.SGD):
        def train(self) -> None:
            self.add(-1)

        def eval(self) -> None:
            self.add(1)

        @torch.no_grad()
        def add(self, value: float) -> None:
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(value)

    model = network(torch.bfloat16)
    masters = Masters(model.named_parameters())
    before = model[0].bias.clone()
    with averaged(TwoSets(masters.values.values(), lr=0.1), masters):
        assert torch.equal(model[0].bias, (before.float() + 1).bfloat16())
    torch.testing.assert_close(model[0].bias, before, atol=1e-2, rtol=0)
    with averaged(torch.optim.SGD(masters.values.values(), lr=0.1), masters):
        torch.testing.assert_close(model[0].bias, before, atol=1e-2, rtol=0)


def test_learning_rates():
    constant = [learning_rate(step, 100, 1.0, "constant", 4) for step in (0, 1, 3, 4, 99)]
    assert constant == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert learning_rate(52, 100, 1.0, "cosine", 4) == pytest.approx(0.5)
    assert learning_rate(28, 100, 1.0, "cosine", 4) == pytest.approx(0.5 + math.sqrt(0.5) / 2)
    assert [learning_rate(step, 100, 2.0, "linear", 0) for step in (0, 25, 100)] == [2.0, 1.5, 0.0]


def test_gradient_limits():
    assert [gradient_limit(step, 0.05, 5, 1000) for step in (0, 500, 1000, 9999)] == pytest.approx(
        [0.25, 0.15, 0.05, 0.05]
    )
    assert gradient_limit(0, 1.0, 1, 0) == 1.0
    assert tightened_limit(0.05, 0.24, 2000, 1000) == 0.05  # 4.8 times: ordinary
    assert tightened_limit(0.05, 0.3, 2000, 1000) == pytest.approx(0.05 / 6)
    assert tightened_limit(0.05, 50.0, 2000, 1000) == pytest.approx(0.005)
    assert tightened_limit(0.05, 50.0, 1000, 1000) == 0.05


@pytest.mark.parametrize("name", OWN)
def test_a_state_is_read_by_others_of_the_same_tensors(name):
    """What two owners saved goes to one, and back; by the tensors' names, whatever their order."""
    torch.manual_seed(0)
    shapes = {"a.blocks.0.q": (4, 4), "a.head.head": (2, 4), "a.bias": (4,), "a.blocks.1.conv": (4, 2, 1, 3, 3)}
    values = {key: nn.Parameter(torch.randn(shape)) for key, shape in shapes.items()}

    def made(keys) -> torch.optim.Optimizer:
        return make_optimizer(name, parameter_groups({key: values[key] for key in keys}, 1e-2, 0.01))

    def moments(*optimizers) -> dict:
        entries = [entry for each in optimizers for entry in state_of(each, values)]
        return {entry["names"][i]: state for entry in entries for i, state in entry["state"]["state"].items()}

    one = made(values)
    for value in values.values():
        value.grad = torch.randn_like(value)
    one.step()
    two = [made(["a.blocks.1.conv", "a.bias"]), made(["a.head.head", "a.blocks.0.q"])]
    for each in two:
        load_state(each, values, [state_of(one, values)])
    again = made(reversed(values))
    load_state(again, values, [state_of(each, values) for each in two])
    expected = moments(one)
    assert expected.keys() == values.keys()
    for found in (moments(*two), moments(again)):
        assert found.keys() == expected.keys()
        for key, state in expected.items():
            assert all(torch.equal(torch.as_tensor(found[key][kind]), torch.as_tensor(v)) for kind, v in state.items())


def test_tensors_are_shared_out_evenly_and_alike_everywhere():
    sizes = {f"t{i}": size for i, size in enumerate([100, 1, 60, 50, 40, 30, 2])}
    found = owners(sizes, 3)
    held = [sum(sizes[name] for name, rank in found.items() if rank == each) for each in range(3)]
    assert list(found) == list(sizes) and sum(held) == sum(sizes.values()) and max(held) == 100
    assert owners(dict(reversed(sizes.items())), 3) == found
    with pytest.raises(UsageError, match="2 tensors are trained, in 3 processes"):
        owners({"a": 1, "b": 1}, 3)
