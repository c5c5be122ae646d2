"""float8 storage: what is cast, what is kept with its scales, and that it happens tensor by tensor."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import models.wan.checkpoint as checkpoint
import tests.tiny as tiny
from errors import UsageError
from models.lora import Lora, Pair, attach_loras, lora_changes, merge_loras
from models.multitalk import load_multitalk
from models.wan.checkpoint import load_transformer
from models.wan.float8 import STORAGE, Float8Linear, float8_linears, use_float8
from models.wan.transformer import WanTransformer
from pipelines.checks import check_fp8
from pipelines.memory import offload_groups


def run(model: WanTransformer) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.latents(), tiny.TIMESTEP, tiny.prompt())


def is_mapped(parameter: torch.Tensor, file) -> bool:
    """Whether its memory is that of a file: the ranges of the process's mappings say so."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(str(file))]
    return any(int(start, 16) <= parameter.data_ptr() < int(end, 16) for start, end in ranges)


def load(path, **options) -> WanTransformer:
    return load_transformer(path, num_heads=tiny.CONFIG["transformer"]["num_heads"], **options)


@pytest.fixture
def released(tmp_path):
    """A bfloat16 file of the tiny model."""
    path = tmp_path / "bf16.safetensors"
    save_file({name: t.to(torch.bfloat16) for name, t in tiny.transformer().state_dict().items()}, path)
    return path


@pytest.fixture
def scaled(released, tmp_path):
    """The same as ComfyUI's fp8_scaled: weights too small for plain float8, each with a scale, one of them by rows."""
    path, stored = tmp_path / "fp8.safetensors", {"scaled_fp8": torch.zeros(2).to(STORAGE)}
    linears = float8_linears(tiny.transformer())
    for name, tensor in load_file(released).items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in linears:
            rows = module.endswith("ffn.0")
            scale = tensor.float().abs().amax(1 if rows else None) / 448 / 100  # 100: beyond what plain float8 reaches
            stored[name] = (tensor.float() / 100 / (scale[:, None] if rows else scale)).to(STORAGE)
            stored[f"{module}.scale_weight"] = scale
        else:
            stored[name] = tensor
    save_file(stored, path)
    return path


def test_what_is_read_is_what_a_whole_model_would_be_cast_to(released):
    """The weights' bits are those of the model read in bfloat16 and cast after."""
    read, cast = load(released, fp8=True), use_float8(load(released))
    for name, parameter in cast.named_parameters():
        assert parameter.dtype == read.get_parameter(name).dtype
        assert (parameter.float() == read.get_parameter(name).float()).all(), name
    assert {type(layer) for layer in float8_linears(read).values()} == {Float8Linear}
    assert read.blocks[0].ffn[0].weight.dtype == STORAGE and read.blocks[0].ffn[0].bias.dtype == torch.bfloat16
    assert read.patch_embedding.weight.dtype == torch.bfloat16
    plain = run(load(released))
    assert 0 < (run(read) - plain).abs().mean() < 0.1 * plain.std()


def test_an_fp8_file_is_kept_with_its_scales_and_computes_what_it_says(scaled):
    kept, widened = load(scaled, fp8=True), load(scaled)
    stored = load_file(scaled)
    for name, layer in float8_linears(kept).items():
        assert (layer.weight.view(torch.uint8) == stored[f"{name}.weight"].view(torch.uint8)).all(), name
        assert layer.scale.dtype == torch.float32
    assert (run(kept) == run(widened)).all()
    assert is_mapped(kept.blocks[0].self_attn.q.weight, scaled)


@pytest.mark.parametrize("has_scales", [False, True])
def test_an_e5m2_file_is_kept_too(released, tmp_path, has_scales):
    """Weights below 2^-9, which e4m3 would round away."""
    path, stored, linears = tmp_path / "e5m2.safetensors", load_file(released), float8_linears(tiny.transformer())
    for name in linears:
        stored[f"{name}.weight"] = (stored[f"{name}.weight"].float() / 1000).to(torch.float8_e5m2)
        if has_scales:
            stored[f"{name}.scale_weight"] = torch.tensor(1000.0)
    save_file(stored, path)
    kept, widened = load(path, fp8=True), load(path)
    assert {kept.get_parameter(f"{name}.weight").dtype for name in linears} == {torch.float8_e5m2}
    assert (run(kept) == run(widened)).all()
    assert is_mapped(kept.blocks[0].self_attn.q.weight, path)

    name = "blocks.0.self_attn.q.weight"
    changed = load(path, fp8=True, changes={name: lambda weight: 2 * weight}).get_parameter(name)
    assert changed.dtype == torch.float8_e5m2 and (changed.float() == 2 * kept.get_parameter(name).float()).all()


def test_multitalks_layers_are_cast_as_they_are_read(tmp_path):
    """They are those of the whole layers cast after; and files in float8 keep their scales."""
    saved = {name: tensor.to(torch.bfloat16) for name, tensor in tiny.multitalk().state_dict().items()}
    plain, scaled = tmp_path / "bf16.safetensors", tmp_path / "fp8.safetensors"
    save_file(saved, plain)
    name = "blocks.1.audio_cross_attn.kv_linear.weight"
    scale = saved[name].float().abs().amax() / 448
    stored = saved | {name: (saved[name].float() / scale).to(STORAGE)}
    save_file(stored | {name.replace("weight", "scale_weight"): scale}, scaled)

    cast = use_float8(load_multitalk(plain, tiny.transformer()))
    read = load_multitalk(plain, tiny.transformer(), fp8=True)
    assert {type(layer) for layer in float8_linears(read).values()} == {Float8Linear}
    for key, parameter in cast.named_parameters():
        assert parameter.dtype == read.get_parameter(key).dtype
        assert (parameter.float() == read.get_parameter(key).float()).all(), key

    kept, wide = load_multitalk(scaled, tiny.transformer(), fp8=True), load_multitalk(scaled, tiny.transformer())
    assert (kept.get_parameter(name).view(torch.uint8) == stored[name].view(torch.uint8)).all()
    layer = kept.get_submodule(name.removesuffix(".weight"))
    widened = (layer.weight.float() * layer.scale).to(torch.bfloat16)
    assert (widened == wide.get_parameter(name)).all()


def test_no_second_tensor_is_wide_at_a_time(released, monkeypatch):
    """The whole bfloat16 model never exists: when a weight is widened, those before it are float8 already."""
    alive, original = [], checkpoint._place
    whole = 0

    def place(tensor, *args):
        nonlocal whole
        value = original(tensor.clone(), *args)  # not mapped
        if value.ndim == 2 and value.dtype == torch.bfloat16:
            import weakref

            whole += value.nbytes
            alive.append(weakref.ref(value.untyped_storage()))
        return value

    monkeypatch.setattr(checkpoint, "_place", place)
    model = load(released, fp8=True)
    wide = sum(storage().nbytes() for storage in alive if storage() is not None)
    outside = sum(p.nbytes for p in model.parameters() if p.ndim == 2 and p.dtype == torch.bfloat16)
    assert whole > 3 * outside and wide == outside


def test_loras_merge_as_weights_are_read_and_live_beside_them(released, scaled):
    name = "blocks.0.self_attn.q.weight"
    generator = torch.Generator().manual_seed(3)
    pair = Pair(*(torch.randn(shape, generator=generator) for shape in ((4, tiny.DIM), (tiny.DIM, 4))), 0.05)
    lora = Lora("a", {name: pair}, {})

    merged_wide = load(released)
    merge_loras(merged_wide, [(lora, 1.0)])
    read = load(released, fp8=True, changes=lora_changes([(lora, 1.0)]))
    assert (use_float8(merged_wide).get_parameter(name).float() == read.get_parameter(name).float()).all()

    of_scaled = load(scaled, fp8=True, changes=lora_changes([(lora, 0.0)]))  # the scale stays, or all is rounded away
    assert (of_scaled.get_parameter(name).float() == load(scaled, fp8=True).get_parameter(name).float()).all()

    live, wide = load(released, fp8=True), load(released)
    before = run(live)
    for model in (live, wide):
        attach_loras(model, [(lora, 1.0)])
    assert live.blocks[0].self_attn.q.lora_A["lora0"].weight.dtype == torch.bfloat16
    change = run(live) - before
    assert change.abs().mean() > 0
    assert (change - (run(wide) - run(load(released)))).abs().mean() < 0.3 * change.abs().mean()


@pytest.mark.parametrize("memory", ["group", "sequential"])
def test_offloaded_equals_resident(scaled, memory):
    resident, offloaded = load(scaled, fp8=True), load(scaled, fp8=True)
    offload_groups(offloaded, torch.device("cpu"), memory)
    assert (run(resident) == run(offloaded)).all()


def test_a_float32_file_that_is_cast_is_not_held(tmp_path, released):
    path = tmp_path / "float32.safetensors"
    save_file({name: t.float() for name, t in load_file(released).items()}, path)
    for model in (load(path), load(path, fp8=True)):
        held = [name for name, parameter in model.named_parameters() if is_mapped(parameter, path)]
        assert not held, held
    assert is_mapped(load(released).blocks[0].ffn[0].weight, released)  # nothing to cast


def test_fp8_is_not_compiled():
    settings = type("Settings", (), {"fp8": True, "compile": True, "memory": "auto"})
    with pytest.raises(UsageError, match="--fp8 with --compile"):
        check_fp8(settings)
