"""The trainee: which parameters train, how they begin, and that what is exported is what was trained."""

import logging

import pytest
import torch
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from safetensors.torch import save_file

from errors import UsageError
from models.lora import Lora, attach_loras, merge_loras
from tests import tiny
from training.optimizers import Masters, make_optimizer, parameter_groups
from training.recipes.avatar import AvatarRecipe
from training.recipes.base import BaseRecipe, Conditions
from training.recipes.error_recycling import ErrorRecyclingRecipe
from training.recipes.stand_in import StandInRecipe
from training.trainee import TrainableStandIn, Trainee, add_lora, lora_layers, lora_tensors, select_trained

TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")


def with_lora(dtype: torch.dtype = torch.float32, **changes):
    model = tiny.transformer().set_compute_dtype(dtype)
    add_lora(model, **{"rank": 4, "alpha": 6, "targets": TARGETS, "seed": 1} | changes)
    return model


def predict(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.latents(), tiny.TIMESTEP, tiny.prompt())


def test_a_fresh_lora_changes_nothing():
    assert torch.equal(predict(with_lora()), predict(tiny.transformer()))


def test_a_lora_is_on_the_layers_that_are_asked_for():
    blocks = tiny.CONFIG["transformer"]["num_layers"]
    assert len(lora_layers(with_lora())) == blocks * 10  # 14B's 400 on 40 blocks: q, k, v, o twice and two of the ffn
    only_q = lora_layers(with_lora(targets=("q",)))
    assert set(only_q) == {f"blocks.{i}.{part}.q" for i in range(blocks) for part in ("self_attn", "cross_attn")}
    with pytest.raises(UsageError, match="'kv' is no linear layer"):
        with_lora(targets=("q", "kv"))


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_the_start_follows_from_seed_and_name(init):
    one, two, other = (lora_tensors(with_lora(init=init, seed=seed, rank=8)) for seed in (1, 1, 2))
    downs = [name for name in one if "lora_A" in name]
    assert all(torch.equal(one[name], two[name]) and not torch.equal(one[name], other[name]) for name in downs)
    values = torch.cat([one[name].flatten() for name in downs if name.endswith("self_attn.q.lora_A.weight")])
    expected = 1 / (3 * tiny.DIM) ** 0.5 if init == "kaiming" else 1 / 8
    assert values.std().item() == pytest.approx(expected, rel=0.1)
    assert all((one[name] == 0).all() for name in one if "lora_B" in name)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_exported_is_what_was_trained(rslora):
    model = with_lora(rslora=rslora)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    live, base = predict(model), predict(tiny.transformer())
    assert (live - base).abs().mean() > 1e-2
    for apply in (merge_loras, attach_loras):
        fresh = tiny.transformer()
        apply(fresh, [(Lora.from_tensors(lora_tensors(model), fresh), 1.0)])
        torch.testing.assert_close(predict(fresh), live, rtol=1e-4, atol=1e-5)


def test_diffusers_loads_an_exported_lora_and_predicts_the_same(tmp_path):
    """Its loader for Wan takes every key, the scale among them (alpha is not the rank), and misses none."""
    model = with_lora()
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    file = tmp_path / "lora.safetensors"
    save_file(lora_tensors(model), file)
    plain = tiny.transformer()
    theirs = tiny.diffusers_transformer(plain)
    text = torch.nn.functional.pad(tiny.prompt().text[0], (0, 0, 0, 512 - 11))[None]

    def predicted() -> torch.Tensor:
        with torch.no_grad():
            return theirs(tiny.latents(), tiny.TIMESTEP, text, return_dict=False)[0]

    torch.testing.assert_close(predicted(), predict(plain), rtol=1e-4, atol=1e-4)
    converted = WanLoraLoaderMixin.lora_state_dict(str(file))
    factors = {name for name in converted if name.endswith(("lora_A.weight", "lora_B.weight"))}
    assert converted.keys() == factors and len(factors) == 2 * len(lora_layers(model))
    heard: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = heard.append
    logging.getLogger("diffusers").addHandler(handler)
    try:
        WanLoraLoaderMixin.load_lora_into_transformer(converted, theirs)
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    assert not heard
    taken = {name for name, _ in theirs.named_parameters() if ".lora_" in name}
    assert len(taken) == len(factors)
    torch.testing.assert_close(predicted(), predict(model), rtol=1e-4, atol=1e-4)


def test_a_lora_has_the_key_names_of_released_files():
    """Those that ComfyUI reads and community files have: original names behind a prefix, alpha beside the factors."""
    layers = [f"{part}.{name}" for part in ("self_attn", "cross_attn") for name in "qkvo"] + ["ffn.0", "ffn.2"]
    kinds = ("lora_A.weight", "lora_B.weight", "alpha")
    expected = {f"diffusion_model.blocks.0.{layer}.{kind}" for layer in layers for kind in kinds}
    assert {name for name in lora_tensors(with_lora()) if ".blocks.0." in name} == expected


def test_readers_with_and_without_alpha_get_the_same_strength():
    model = with_lora(rank=4, alpha=6)
    layer = next(iter(lora_layers(model).values()))
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    tensors = lora_tensors(model)
    first = next(name for name in tensors if name.endswith("lora_B.weight")).removesuffix(".lora_B.weight")
    delta = tensors[f"{first}.lora_B.weight"] @ tensors[f"{first}.lora_A.weight"]
    expected = 6 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(delta, expected)
    assert tensors[f"{first}.alpha"] == 4


def test_a_lora_stays_float32_on_a_bfloat16_base_and_trains():
    trainee = Trainee(with_lora(torch.bfloat16))
    select_trained(trainee, lambda name: BaseRecipe().trains(name, "lora"))
    masters = Masters(trainee.named_parameters())
    assert all(masters.values[name] is parameter for name, parameter in masters.parameters.items())
    optimizer = make_optimizer("adamw", parameter_groups(masters.values, 1e-2, 0.0))
    target, losses = tiny.latents(5), []
    for _ in range(8):
        out = trainee(tiny.latents(), tiny.TIMESTEP, Conditions(tiny.prompt()))
        loss = (out - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    ("recipe", "trainable", "expected"),
    [
        (BaseRecipe(), "full", {"transformer"}),
        (BaseRecipe(), "lora", {"lora"}),
        (StandInRecipe(), "adapter", {"stand_in"}),
        (AvatarRecipe(), "adapter", {"audio_adapter"}),
        (AvatarRecipe(), "lora", {"lora", "audio_adapter"}),
        (AvatarRecipe(), "full", {"transformer", "audio_adapter"}),
        (ErrorRecyclingRecipe(variant="dance"), "lora", {"lora"}),
    ],
)
def test_what_each_recipe_trains(recipe, trainable, expected):
    model = tiny.avatar_transformer()
    if trainable != "full":
        add_lora(model, rank=2, alpha=2, targets=("q",))
    stand_in = TrainableStandIn(tiny.DIM, tiny.LAYERS, rank=2)
    trainee = Trainee(model, stand_in=stand_in, audio_adapter=tiny.audio_adapter(model))
    count = select_trained(trainee, lambda name: recipe.trains(name, trainable))
    trained = {name for name, parameter in trainee.named_parameters() if parameter.requires_grad}
    kinds = {"lora" if "lora_" in name else name.split(".")[0] for name in trained}
    assert kinds == expected
    assert count == sum(p.numel() for name, p in trainee.named_parameters() if name in trained)


def test_a_model_without_the_trained_part_is_refused():
    with pytest.raises(UsageError, match="nothing of this model is trained"):
        select_trained(Trainee(tiny.transformer()), lambda name: BaseRecipe().trains(name, "lora"))
