"""From a configuration to networks, and from trained networks to the files that the scripts take."""

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from configs import FOLDER
from errors import UsageError
from models.audio_adapter import load_audio_avatar
from models.identity.stand_in import load_stand_in
from models.lora import Lora, merge_loras
from models.pose_embedder import load_pose_embedder
from models.wan.attention import PlainAttention
from models.wan.checkpoint import load_transformer
from pipelines.networks import shape_of
from tests import tiny
from training.block_memory import waiting_input
from training.build import bank_of, load_trainee, noise_table_of, optimizer_of, recipe_of
from training.config import Config, read_config
from training.export import export
from training.recipes.base import Conditions
from training.recipes.vae import VaeRecipe
from training.trainee import lora_layers, lora_tensors

CPU = torch.device("cpu")
FILES = sorted((FOLDER / "train").glob("tiny-*.yaml"))
SOURCE = "data.sources=[{path: data}]"


def config_of(tmp_path: Path, recipe: str = "base", *sets: str) -> Config:
    model = {"avatar": "tiny-avatar", "error_recycling": "tiny-i2v"}.get(recipe, "tiny")
    given = {"recipe": recipe, "output": str(tmp_path / "run"), "model.config": model, "data.resolutions": "[64x64]"}
    if recipe == "error_recycling" and not any("variant" in each for each in sets):
        given["error_recycling.variant"] = "shot"
    return read_config(None, [SOURCE, *(f"{name}={value}" for name, value in given.items()), *sets])


def move(trainee: torch.nn.Module, seed: int = 1) -> None:
    """Change what is trained, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainee.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data += noise.to(parameter.dtype)


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_every_tiny_config_can_be_built(file, tmp_path):
    config = read_config(file, [f"output={tmp_path}"])
    recipe = recipe_of(config)
    if config.recipe == "vae":
        assert isinstance(recipe, VaeRecipe)
        return
    trainee = load_trainee(config, CPU)
    masters, optimizer = optimizer_of(config, trainee)
    assert masters.values and all(value.dtype == torch.float32 for value in masters.values.values())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(masters.values)
    assert recipe.noise.weighting == config.train.noise.weighting
    assert (bank_of(config, 0, 0) is None) == (config.error_recycling is None)


def test_machines_that_share_a_disk_have_banks_of_their_own(tmp_path, monkeypatch):
    config = config_of(tmp_path, "error_recycling")
    first = bank_of(config, rank=0, local_rank=0)
    monkeypatch.setenv("GROUP_RANK", "1")
    second, reader = bank_of(config, rank=8, local_rank=0), bank_of(config, rank=9, local_rank=1)
    assert first.folder != second.folder == reader.folder
    assert (first.writes, second.writes, reader.writes) == (True, True, False)
    own = config_of(tmp_path, "error_recycling", "error_recycling.scope=per_rank")
    assert len({bank_of(own, rank, rank).folder for rank in range(3)}) == 3 and bank_of(own, 2, 2).writes


def test_settings_reach_the_recipe(tmp_path):
    sets = ["error_recycling.p.noise=0.3", "error_recycling.p.clean=0.6", "error_recycling.image_frames=2"]
    recipe = recipe_of(config_of(tmp_path, "error_recycling", *sets, "train.noise.shift=3"))
    assert (recipe.noise_error, recipe.clean, recipe.image_frames, recipe.noise.shift) == (0.3, 0.6, 2, 3.0)
    recipe = recipe_of(config_of(tmp_path, "avatar", "avatar.motion_axis=legacy", "avatar.clip_drop=0.1"))
    assert (recipe.motion_axis, recipe.clip_drop, recipe.masks) == ("legacy", 0.1, (0.4, 0.1))
    recipe = recipe_of(config_of(tmp_path, "stand_in", "stand_in.noise=null", "stand_in.face_loss=0.5"))
    assert (recipe.reference_noise, recipe.face_loss, recipe.text_drop) == (None, 0.5, 0.1)


@pytest.mark.parametrize(("expert", "bounds"), [("high", (0, 358)), ("low", (358, 1000))])
def test_an_expert_has_its_noise_levels_and_its_weights(tmp_path, expert, bounds):
    config = config_of(tmp_path, "base", "model.config=tiny-i2v-a14b", f"model.expert={expert}")
    assert noise_table_of(config).bounds == bounds
    trainee = load_trainee(config, CPU)
    other = "low" if expert == "high" else "high"
    of_other = load_trainee(config_of(tmp_path, "base", "model.config=tiny-i2v-a14b", f"model.expert={other}"), CPU)
    assert not torch.equal(trainee.transformer.patch_embedding.weight, of_other.transformer.patch_embedding.weight)
    given = config_of(tmp_path, "base", "model.config=tiny-i2v-a14b", "model.expert=high", "train.noise.range=[0, 0.2]")
    assert noise_table_of(given).bounds == (0, 200)


def test_what_is_frozen_is_kept_as_asked(tmp_path):
    for dtype, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        trainee = load_trainee(config_of(tmp_path, "base", f"model.base_dtype={dtype}"), CPU)
        assert trainee.transformer.blocks[0].ffn[0].base_layer.weight.dtype == expected
        assert lora_tensors(trainee.transformer)["diffusion_model.blocks.0.ffn.0.lora_A.weight"].dtype == torch.float32
    with pytest.raises(UsageError, match="model.base_dtype.*fp8"):
        load_trainee(config_of(tmp_path, "base", "model.base_dtype=fp8", "train.trainable=full"), CPU)


@pytest.mark.parametrize("recipe", ["base", "stand_in", "avatar"])
def test_checkpointing_changes_no_gradient(tmp_path, recipe):
    """Also of what blocks are given from outside: the reference's keys and values, the audio's."""
    found = []
    for kind, offload in (("none", "none"), ("full", "none"), ("attention", "none"), ("full", "checkpoints")):
        memory = [f"memory.checkpointing={kind}", f"memory.offload={offload}"]
        trainee = load_trainee(config_of(tmp_path, recipe, "model.base_dtype=fp32", *memory), CPU)
        move(trainee)
        plugins, image, prompt = (), None, tiny.prompt()
        if recipe == "stand_in":
            plugins = (lambda t: t.stand_in.encode(t.transformer, tiny.photo(), tiny.GRID),)
        if recipe == "avatar":
            features = torch.randn(1, 17, 32, generator=torch.Generator().manual_seed(3))
            features = features[..., : trainee.audio_adapter.config.audio_dim]
            plugins = (lambda t, f=features: t.audio_adapter.plugin(f, 9),)
            image = tiny.latents(3, channels=20)
        out = trainee(tiny.latents(), tiny.TIMESTEP, Conditions(prompt, image, plugins))
        out.square().mean().backward()
        found.append({name: p.grad for name, p in trainee.named_parameters() if p.grad is not None})
    assert found[0]
    for others in found[1:]:
        assert others.keys() == found[0].keys()
        for name, gradient in found[0].items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_plain_attention_is_attention():
    """Also with padding, and with more keys than queries; against the formula in float64."""
    q, k, v = (torch.randn(2, n, 3, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 7, 7))
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., 4:6] = False
    scores = torch.einsum("blnd,bmnd->bnlm", q.double(), k.double()) / 8**0.5
    for given in (None, mask):
        weights = (scores if given is None else scores.masked_fill(~given, -torch.inf)).softmax(-1)
        expected = torch.einsum("bnlm,bmnd->blnd", weights, v.double()).flatten(2).float()
        torch.testing.assert_close(PlainAttention()(q, k, v, mask=given), expected)


def test_small_models_on_a_cpu_attend_plainly(tmp_path):
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.calls += "scaled_dot_product" in str(operator)
            return operator(*args, **(kwargs or {}))

    for kind, fused in (("none", False), ("full", True)):
        trainee = load_trainee(config_of(tmp_path, "base", f"memory.checkpointing={kind}"), CPU)
        with Count() as count:
            trainee(tiny.latents(), tiny.TIMESTEP, Conditions(tiny.prompt())).mean().backward()
        assert bool(count.calls) == fused


def test_inputs_kept_in_bfloat16_give_nearly_the_same_gradient(tmp_path):
    found = []
    for stored in ("false", "true"):
        trainee = load_trainee(config_of(tmp_path, "base", "model.base_dtype=fp32", f"memory.store_bf16={stored}"), CPU)
        move(trainee)
        trainee(tiny.latents(), tiny.TIMESTEP, Conditions(tiny.prompt())).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in trainee.parameters() if p.grad is not None]))
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert 0 < error < 0.01


@pytest.mark.parametrize("offload", [False, True])
def test_a_waiting_input_is_held_nowhere_else(offload):
    x = torch.randn(3, 4, requires_grad=True) * 1
    gone = weakref.ref(x)
    give = waiting_input(x, offload=offload, store_bf16=True)
    assert torch.equal(give(), x)
    expected = x.detach().bfloat16().float()
    del x
    assert gone() is None
    again = give()
    assert torch.equal(again, expected) and again.requires_grad and again.dtype == torch.float32


def test_attention_is_not_computed_again_where_its_output_is_kept(tmp_path):
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.calls += "scaled_dot_product" in str(operator) and "backward" not in str(operator)
            return operator(*args, **(kwargs or {}))

    calls = {}
    for kind in ("full", "attention"):
        trainee = load_trainee(
            config_of(tmp_path, "base", "model.base_dtype=fp32", f"memory.checkpointing={kind}"), CPU
        )
        with Count() as count:
            trainee(tiny.latents(), tiny.TIMESTEP, Conditions(tiny.prompt())).mean().backward()
        calls[kind] = count.calls
    assert calls["full"] == 2 * calls["attention"] > 0


# --------------------------------------------------------------------------------------------------------- export


def test_a_lora_is_exported_and_begun_from(tmp_path):
    config = config_of(tmp_path, "base", "train.lora.rank=4", "train.lora.alpha=6")
    trainee = load_trainee(config, CPU)
    move(trainee)
    (path,) = export(trainee, tmp_path / "out", {"recipe": "base"})
    assert path.name == "lora.safetensors"
    plain = tiny.transformer()
    merge_loras(plain, [(Lora.from_tensors(load_file(path), plain), 1.0)])
    with torch.no_grad():
        fp32 = load_trainee(config_of(tmp_path, "base", "model.base_dtype=fp32", "train.lora.rank=4",
                                      "train.lora.alpha=2", f"model.init_from={path}"), CPU)  # fmt: skip
        live = fp32(tiny.latents(), tiny.TIMESTEP, Conditions(tiny.prompt()))
        merged = plain(tiny.latents(), tiny.TIMESTEP, tiny.prompt())
    torch.testing.assert_close(live, merged, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="of rank 4"):
        load_trainee(config_of(tmp_path, "base", "train.lora.rank=8", f"model.init_from={path}"), CPU)
    with pytest.raises(UsageError, match="train.lora.targets"):
        load_trainee(
            config_of(tmp_path, "base", "train.lora.rank=4", "train.lora.targets=[q]", f"model.init_from={path}"), CPU
        )


def test_stand_in_is_exported_and_begun_from(tmp_path):
    trainee = load_trainee(config_of(tmp_path, "stand_in"), CPU)
    move(trainee)
    (path,) = export(trainee, tmp_path / "out", {})
    loaded = load_stand_in(path, tiny.transformer()).state_dict()
    ours = trainee.stand_in.weights().state_dict()
    assert loaded.keys() == ours.keys() and all(torch.equal(loaded[name], ours[name]) for name in ours)
    again = (
        load_trainee(config_of(tmp_path, "stand_in", f"model.init_from={path}"), CPU).stand_in.weights().state_dict()
    )
    assert all(torch.equal(again[name], ours[name]) for name in ours)


@pytest.mark.parametrize("trainable", ["full", "adapter", "lora"])
def test_an_avatar_is_exported_as_one_file(tmp_path, trainable):
    config = config_of(tmp_path, "avatar", f"train.trainable={trainable}", "model.base_dtype=fp32")
    trainee = load_trainee(config, CPU)
    move(trainee)
    paths = {path.name: path for path in export(trainee, tmp_path / "out", {})}
    assert set(paths) == {"transformer.safetensors"} | ({"lora.safetensors"} if trainable == "lora" else set())
    heads = trainee.transformer.config.num_heads
    transformer, adapter = load_audio_avatar(paths["transformer.safetensors"], dtype=torch.float32, num_heads=heads)
    if trainable == "lora":
        lora = Lora.from_tensors(load_file(paths["lora.safetensors"]), transformer)
        merge_loras(transformer, [(lora, 1.0)])
    features = torch.randn(1, 17, adapter.config.audio_dim, generator=torch.Generator().manual_seed(3))
    image = tiny.latents(3, channels=20)
    plugins = (lambda t: t.audio_adapter.plugin(features, 9),)
    with torch.no_grad():
        live = trainee(tiny.latents(), tiny.TIMESTEP, Conditions(tiny.prompt(), image, plugins))
        loaded = transformer(
            tiny.latents(), tiny.TIMESTEP, tiny.prompt(), condition=image, plugins=[adapter.plugin(features, 9)]
        )
    torch.testing.assert_close(loaded, live, rtol=1e-4, atol=1e-4)


def test_a_whole_transformer_is_exported(tmp_path):
    config = config_of(tmp_path, "base", "train.trainable=full")
    trainee = load_trainee(config, CPU)
    move(trainee)
    (path,) = export(trainee, tmp_path / "out", {})
    heads = trainee.transformer.config.num_heads
    loaded = load_transformer(path, num_heads=heads, expect=shape_of(tiny.CONFIG)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trainee.transformer.state_dict().items())


def test_dance_has_its_embedder_in_the_file_of_its_lora(tmp_path):
    sets = ["error_recycling.variant=dance", "train.lora.rank=4"]
    trainee = load_trainee(config_of(tmp_path, "error_recycling", *sets), CPU)
    move(trainee)
    (path,) = export(trainee, tmp_path / "out", {})
    embedder = load_pose_embedder(path, tiny.DIM).state_dict()
    ours = trainee.pose_embedder.state_dict()
    assert all(torch.equal(embedder[name], ours[name]) for name in ours)
    again = load_trainee(config_of(tmp_path, "error_recycling", *sets, f"model.init_from={path}"), CPU)
    assert torch.equal(again.pose_embedder[0].weight, ours["0.weight"])
    one, two = (lora_tensors(each.transformer) for each in (trainee, again))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert lora_layers(again.transformer)


def test_a_base_from_a_file_takes_the_place_of_the_tiny_one(tmp_path):
    changed = tiny.transformer()
    changed.head.head.bias.data += 1
    save_file(changed.state_dict(), tmp_path / "model.safetensors")
    config = config_of(tmp_path, "base", f"model.base_path={tmp_path / 'model.safetensors'}")
    trained = load_trainee(config, CPU).transformer
    assert torch.equal(trained.head.head.bias, changed.head.head.bias)
    assert trained.config.num_heads == changed.config.num_heads
