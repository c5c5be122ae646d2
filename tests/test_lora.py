"""LoRAs: every dialect is the same change, merged is live, what does not apply is refused; and the script."""

import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from safetensors.torch import save_file

import infer_long_video
import infer_with_lora
from configs import load_config, part_path
from errors import InputError, UsageError, UserError, WeightsError
from models.lora import Lora, attach_loras, merge_loras, read_lora
from models.wan.checkpoint import to_diffusers_name
from models.wan.config import VARIANTS
from models.wan.transformer import WanTransformer
from pipelines.distributed import start_processes
from pipelines.long_video.command import resolve_long_video
from pipelines.long_video.variant import variant_config
from pipelines.lora_command import resolve_lora_settings
from pipelines.stand_in import stand_in_parts
from pipelines.wan import Wan
from preprocess.record import read_metadata
from preprocess.video import read_frames
from tests import tiny

PROJECT = Path(__file__).parent.parent
RANK, ALPHA = 4, 2.0
MODULES = [
    *(f"blocks.{i}.{a}.{p}" for i in range(tiny.LAYERS) for a in ("self_attn", "cross_attn") for p in "qkvo"),
    *(f"blocks.{i}.ffn.{n}" for i in range(tiny.LAYERS) for n in (0, 2)),
    # Their own underscores cannot be told from kohya's.
    *("text_embedding.0", "time_embedding.2", "time_projection.1", "head.head", "patch_embedding"),
]


def factors(seed: int = 0, modules: list[str] = MODULES) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module -> A and B that change the output visibly, to be scaled by ALPHA / RANK."""
    generator = torch.Generator().manual_seed(seed)
    weights = tiny.transformer().state_dict()
    found = {}
    for module in modules:
        rows, *columns = weights[f"{module}.weight"].shape
        down = torch.randn(RANK, *columns, generator=generator) / down_size(columns)
        found[module] = down, torch.randn(rows, RANK, *[1] * (len(columns) - 1), generator=generator) / 2
    return found


def down_size(columns: list[int]) -> float:
    return torch.tensor(columns).prod().item() ** 0.5


def dotted(prefix: str, down: str, up: str, name=lambda module: module, alpha: bool = False):
    """A dialect: factors -> keys. Where it has no alpha, the scale is in B."""

    def save(pairs) -> dict[str, torch.Tensor]:
        tensors = {}
        for module, (a, b) in pairs.items():
            stem = prefix + name(module)
            tensors[f"{stem}.{down}.weight"] = a
            tensors[f"{stem}.{up}.weight"] = b if alpha else b * (ALPHA / RANK)
            if alpha:
                tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
        return tensors

    return save


def underscored(module: str) -> str:
    return module.replace(".", "_")


DIALECTS = {
    "bare": dotted("", "lora_A", "lora_B"),
    "PEFT": dotted("base_model.model.", "lora_A", "lora_B"),
    "DiffSynth, SVI 2": dotted("", "lora_A.default", "lora_B.default"),
    "SVI 1": dotted("pipe.dit.", "lora_A.default", "lora_B.default"),
    "SVI 1 from a checkpoint": dotted("module._orig_mod.pipe.dit.", "lora_A.default", "lora_B.default"),
    "ComfyUI": dotted("diffusion_model.", "lora_A", "lora_B"),
    "ComfyUI, named": dotted("model.diffusion_model.", "lora_A.default", "lora_B.default"),
    "LightX2V": dotted("diffusion_model.", "lora_down", "lora_up", alpha=True),
    "kohya, musubi": dotted("lora_unet_", "lora_down", "lora_up", underscored, alpha=True),
    "kohya without alpha": dotted("lora_unet_", "lora_down", "lora_up", underscored),
    "VideoX-Fun": dotted("lora_unet__", "lora_down", "lora_up", underscored, alpha=True),
    "StableAvatar": dotted("lora_transformer__", "lora_down", "lora_up", underscored, alpha=True),
    "Diffusers": dotted("transformer.", "lora_A", "lora_B", to_diffusers_name),
    "Diffusers before PEFT": dotted("transformer.", "lora.down", "lora.up", to_diffusers_name),
    "kohya, Diffusers' names": dotted(
        "lora_unet_", "lora_down", "lora_up", lambda module: underscored(to_diffusers_name(module)), alpha=True
    ),
}


@torch.no_grad()
def run(model: WanTransformer) -> torch.Tensor:
    return model(tiny.latents(), tiny.TIMESTEP, tiny.prompt())


def lora_of(tensors: dict, model: WanTransformer | None = None, **options) -> Lora:
    return Lora.from_tensors(tensors, model or tiny.transformer(), "file.safetensors", **options)


# ----------------------------------------------------------------------------------------------------- dialects


def changed_by_hand() -> WanTransformer:
    model = tiny.transformer()
    for module, (a, b) in factors().items():
        parameter = model.get_parameter(f"{module}.weight")
        parameter.data = parameter.data + 0.7 * (ALPHA / RANK) * (b.flatten(1) @ a.flatten(1)).view(parameter.shape)
    return model


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_the_same_adapter_in_every_dialect_gives_the_same_output(tmp_path, dialect, suffix):
    file = tmp_path / f"lora{suffix}"
    tensors = {key: tensor.contiguous() for key, tensor in DIALECTS[dialect](factors()).items()}
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    model = tiny.transformer()
    lora = read_lora(file, model)
    assert len(lora.pairs) == len(MODULES)
    assert not lora.left_out
    plain = run(model)
    merge_loras(model, [(lora, 0.7)])
    expected = run(changed_by_hand())
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)
    assert (plain - expected).abs().mean() > 0.05


def test_dialects_may_be_mixed_in_a_file():
    names = list(DIALECTS)
    tensors = {}
    for number, (module, pair) in enumerate(factors().items()):
        without_alpha = [n for n in names if not any("alpha" in key for key in DIALECTS[n]({module: pair}))]
        tensors |= DIALECTS[without_alpha[number % len(without_alpha)]]({module: pair})
    model = tiny.transformer()
    merge_loras(model, [(lora_of(tensors), 0.7)])
    torch.testing.assert_close(run(model), run(changed_by_hand()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
def test_every_weight_of_the_network_can_be_named_in_every_spelling(image):
    with torch.device("meta"):
        model = WanTransformer(**VARIANTS["flf2v-14B" if image else "t2v-14B"].as_dict())
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for save in DIALECTS.values():
        sizes = {name: model.get_parameter(f"{name}.weight").shape for name in linears}
        tensors = save({name: (torch.zeros(1, size[1]), torch.zeros(size[0], 1)) for name, size in sizes.items()})
        assert set(lora_of(tensors, model).pairs) == {f"{name}.weight" for name in linears}


def test_changes_in_full_of_weights_norms_biases_and_modulations():
    model, plain = tiny.transformer(), tiny.transformer().state_dict()
    names = {
        "diffusion_model.blocks.0.self_attn.q.diff": "blocks.0.self_attn.q.weight",
        "diffusion_model.blocks.0.self_attn.q.diff_b": "blocks.0.self_attn.q.bias",
        "diffusion_model.blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
        "diffusion_model.blocks.1.norm3.diff": "blocks.1.norm3.weight",
        "diffusion_model.blocks.1.norm3.diff_b": "blocks.1.norm3.bias",
        "diffusion_model.blocks.1.diff_m": "blocks.1.modulation",
        "diffusion_model.head.diff_m": "head.modulation",
        "blocks.0.modulation.diff_m": "blocks.0.modulation",
        "lora_unet_blocks_1_ffn_0.diff_b": "blocks.1.ffn.0.bias",
        "transformer.blocks.1.attn1.to_out.0.diff_b": "blocks.1.self_attn.o.bias",
        "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
    }
    tensors = {key: torch.randn(plain[name].shape) for key, name in names.items()}
    for apply in (merge_loras, attach_loras):
        model = tiny.transformer()
        apply(model, [(lora_of(tensors), 0.5)])
        merged = model.state_dict()
        for key, name in names.items():
            torch.testing.assert_close(merged[name], plain[name] + 0.5 * tensors[key])
        assert {n for n in plain if not torch.equal(plain[n], merged[n])} == set(names.values())


def test_full_changes_beside_pairs_of_the_same_weight():
    q = {"blocks.0.self_attn.q": factors()["blocks.0.self_attn.q"]}
    full = torch.randn(tiny.DIM, tiny.DIM)
    model = tiny.transformer()
    before = model.get_parameter("blocks.0.self_attn.q.weight").clone()
    merge_loras(model, [(lora_of(DIALECTS["bare"](q) | {"blocks.0.self_attn.q.diff": full}), 1.0)])
    ((a, b),) = q.values()
    torch.testing.assert_close(
        model.get_parameter("blocks.0.self_attn.q.weight"), before + ALPHA / RANK * b @ a + full, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("place", ["header", "adapter_config.json"])
def test_alpha_that_only_the_metadata_state(tmp_path, place):
    folder = tmp_path / "adapter"
    folder.mkdir()
    stated = {"lora_alpha": 2 * RANK, "r": RANK}
    tensors = dotted("transformer.", "lora_A", "lora_B", to_diffusers_name)(factors())
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in stated.items()})}
    save_file(tensors, folder / "adapter_model.safetensors", header if place == "header" else {"format": "pt"})
    if place != "header":
        (folder / "adapter_config.json").write_text(json.dumps(stated))
    assert {pair.scale for pair in read_lora(folder, tiny.transformer()).pairs.values()} == {2.0}


# -------------------------------------------------------------------------------------------- merged, live, rounding


def both() -> list[tuple[Lora, float]]:
    """Two LoRAs of different targets; the second one's modules have different ranks."""
    second = {m: (a[: 1 + n % 3], b[:, : 1 + n % 3]) for n, (m, (a, b)) in enumerate(factors(1, MODULES[:5]).items())}
    return [(lora_of(DIALECTS["kohya, musubi"](factors())), 0.7), (lora_of(DIALECTS["ComfyUI"](second)), -1.2)]


def test_merged_is_live():
    plain, merged, live = (tiny.transformer() for _ in range(3))
    merge_loras(merged, both())
    attach_loras(live, both())
    expected = run(merged)
    torch.testing.assert_close(run(live), expected, rtol=1e-5, atol=2e-5)
    assert (run(plain) - expected).abs().mean() > 0.05
    assert not any(parameter.requires_grad for parameter in live.parameters())


def test_live_is_switched_off_and_scaled_between_two_steps():
    live = tiny.transformer()
    attach_loras(live, both())
    changed = run(live)
    live.disable_lora()
    assert torch.equal(run(live), run(tiny.transformer()))
    live.enable_lora()
    assert torch.equal(run(live), changed)
    live.set_adapters(["lora0", "lora1"], [0.0, 1.0])
    alone = tiny.transformer()
    merge_loras(alone, [(both()[1][0], 1.0)])
    torch.testing.assert_close(run(live), run(alone), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("apply", [merge_loras, attach_loras])
def test_reference_tokens_of_stand_in_see_the_changed_base(apply):
    def keys_values(model):
        return tiny.stand_in(model).encode(model, [tiny.photo()], tiny.GRID).keys_values

    model = tiny.transformer()
    with torch.no_grad():
        apply(model, both())
        found, expected, plain = keys_values(model), None, keys_values(tiny.transformer())
        by_hand = tiny.transformer()
        merge_loras(by_hand, both())
        expected = keys_values(by_hand)
    for (key, value), (key0, value0), (plain_key, _) in zip(found, expected, plain, strict=True):
        torch.testing.assert_close(key, key0, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(value, value0, rtol=1e-4, atol=1e-4)
        assert (key - plain_key).abs().mean() > 0.01


def test_bfloat16_weights_are_rounded_once():
    model = tiny.transformer().set_compute_dtype(torch.bfloat16)
    before = model.get_parameter("blocks.0.self_attn.q.weight").float()
    delta = sum(scale * lora.pairs["blocks.0.self_attn.q.weight"].delta("cpu") for lora, scale in both())
    merge_loras(model, both())
    after = model.get_parameter("blocks.0.self_attn.q.weight")
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(after, (before + delta).bfloat16())
    assert model.get_parameter("time_projection.1.weight").dtype == torch.float32


def test_only_targets_are_replaced_and_the_file_is_not_written(tmp_path):
    """Weights mapped from disk that a LoRA leaves alone stay mapped; changed ones are new, never written back."""
    model = tiny.transformer()
    kept = model.get_parameter("blocks.0.ffn.0.weight")
    changed = model.get_parameter("blocks.0.self_attn.q.weight").data
    before, pointer = changed.clone(), kept.data_ptr()
    merge_loras(model, [(lora_of(DIALECTS["bare"](factors(modules=MODULES[:1]))), 1.0)])
    assert kept.data_ptr() == pointer
    assert torch.equal(changed, before)
    assert not torch.equal(model.get_parameter("blocks.0.self_attn.q.weight"), before)


def test_fp8_storage_keeps_a_live_lora_whole():
    live, expected = tiny.transformer(), tiny.transformer()
    attach_loras(live, both())
    for model in (live, expected):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {str(p.dtype) for n, p in live.named_parameters() if ".lora_" in n}
    assert stored == {"torch.float32"}
    assert live.get_parameter("blocks.0.ffn.0.base_layer.weight").dtype == torch.float8_e4m3fn
    change = run(live) - run(expected)
    exact = tiny.transformer()
    merge_loras(exact, both())
    exact_change = run(exact) - run(tiny.transformer())
    assert (change - exact_change).abs().mean() < 0.2 * exact_change.abs().mean()


# ------------------------------------------------------------------------------------------------------ bad inputs


def large(variant: str, blocks: range, name: str = "blocks.{}.self_attn.q") -> dict[str, torch.Tensor]:
    """A LoRA of rank 1 in the size of a released model."""
    width = VARIANTS[variant].dim
    pairs = {name.format(i): (torch.zeros(1, width), torch.zeros(width, 1)) for i in blocks}
    return DIALECTS["ComfyUI"](pairs)


def on_meta(variant: str) -> WanTransformer:
    with torch.device("meta"):
        return WanTransformer(**VARIANTS[variant].as_dict())


Q = "blocks.0.self_attn.q"
GOOD = {f"{Q}.lora_A.weight": torch.ones(RANK, tiny.DIM), f"{Q}.lora_B.weight": torch.ones(tiny.DIM, RANK)}
K = {key.replace(".q.", ".k."): tensor for key, tensor in GOOD.items()}


@pytest.mark.parametrize(
    ("tensors", "variant", "words"),
    [
        (large("t2v-1.3B", range(30)), "t2v-14B", ["60 of 60", "Wan 1.3B, width 1536", "Wan 14B / A14B, width 5120"]),
        (large("t2v-14B", range(40)), "t2v-1.3B", ["80 of 80", "20 unknown", "60 of another shape", "width 5120"]),
        (large("t2v-1.3B", range(31)), "t2v-1.3B", ["2 of 62", "31 or more blocks; this one has 30"]),
        (
            large("t2v-14B", range(2), "blocks.{}.cross_attn.k_img") | large("t2v-14B", range(2)),
            "t2v-14B",
            ["4 of 8", "blocks.0.cross_attn.k_img.lora_A", "image-to-video", "--lora_partial applies the other 4"],
        ),
        (large("t2v-14B", range(2), "transformer_2.blocks.{}.attn1.to_q"), "t2v-14B", ["4 of 4", "--lora_path_high"]),
        (
            {"lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": torch.ones(4, 8)},
            None,
            ["1 of 1", "Stable Diffusion"],
        ),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 8)}, None, ["Flux"]),
        ({f"{Q}.lokr_w1": torch.ones(4, 4)}, None, ["LoKr"]),
        ({f"{Q}_loras.down.weight": torch.ones(4, 8)}, None, ["--stand_in_path"]),
        (GOOD | {"lora_te_text_model_layers_0.alpha": torch.tensor(1.0)}, None, ["1 of 3", "text encoder"]),
        ({"layer.weight": torch.ones(4, 8)}, None, ["1 of 1", "layer.weight", "does not look like a LoRA for Wan"]),
        ({}, None, ["an empty file"]),
        (GOOD | {f"{key}x": t for key, t in K.items()}, None, ["2 of 4", "unknown", f"{Q[:-1]}k.lora_A.weightx"]),
        (
            {f"{Q}.lora_A.weight": torch.ones(0, tiny.DIM), f"{Q}.lora_B.weight": torch.ones(tiny.DIM, 0)},
            None,
            ["2 of 2", "of rank 0"],
        ),
        (GOOD | {f"{Q}.lora_A.weight": torch.full((RANK, tiny.DIM), torch.nan)}, None, ["with NaN or infinity"]),
        (GOOD | {"blocks.0.norm3.diff": torch.full((tiny.DIM,), torch.inf)}, None, ["1 of 3", "NaN or infinity"]),
        (GOOD | {f"{Q}.lora_A.weight": torch.ones(RANK, 7)}, None, ["2 of 2", "of another shape"]),
        (GOOD | {f"{Q}.lora_B.weight": torch.ones(tiny.DIM, RANK + 1)}, None, ["2 of 2", "of another shape"]),
        (GOOD | {"blocks.0.norm3.diff": torch.ones(3)}, None, ["1 of 3", "of another shape"]),
        (GOOD | {f"{Q}.lora_A.weight": torch.ones(RANK)}, None, ["of another shape"]),
        (GOOD | {f"{Q}.lora_A.weight": torch.ones(RANK, tiny.DIM).char()}, None, ["not floating-point numbers"]),
        ({f"{Q}.lora_A.weight": torch.ones(RANK, tiny.DIM)}, None, ["1 of 1", "without their other half"]),
        (GOOD | {f"{Q}.lora_A.other.weight": GOOD[f"{Q}.lora_A.weight"]}, None, ["1 of 3", "given twice"]),
        (GOOD | K | {f"{Q}.alpha": torch.tensor(4.0)}, None, ["2 of 5", "without the alpha that others have"]),
        (GOOD | {f"{Q}.alpha": torch.tensor(0.0)}, None, ["3 of 3", "alpha that is not one number above 0"]),
        (GOOD | {f"{Q}.alpha": torch.tensor(torch.nan)}, None, ["with NaN or infinity"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:50] if isinstance(value, list) else None,
)
def test_a_wrong_lora_is_refused_with_counts_first_keys_and_the_likely_reason(tensors, variant, words):
    with pytest.raises(InputError) as error:
        lora_of(tensors, on_meta(variant) if variant else None)
    message = str(error.value)
    assert error.value.exit_code == 3
    assert message.startswith("file.safetensors: ")
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_partial_leaves_out_what_does_not_apply_and_lists_it(caplog):
    """LightX2V's image-to-video LoRA on a model without image cross-attention."""
    bad = {f"diffusion_model.blocks.{i}.cross_attn.k_img.lora_A.weight": torch.ones(RANK, 8) for i in range(2)}
    with caplog.at_level(logging.WARNING, logger="selfsame"):
        lora = lora_of(GOOD | bad | {"head.head.diff_b": torch.tensor([torch.nan])}, partial=True)
    assert "3 of 5 keys are left out" in caplog.text
    assert "diffusion_model.blocks.N.cross_attn.k_img.lora_A.weight (2)" in caplog.text
    assert "with NaN or infinity: head.head.diff_b" in caplog.text
    assert lora.targets == [f"{Q}.weight"]
    assert len(lora.left_out) == 3
    with pytest.raises(InputError, match="2 of 2") as error:  # nothing would be left
        lora_of(bad, partial=True)
    assert "--lora_partial" not in str(error.value)


# What LightX2V's low-noise file for Wan2.2 carries beside what applies (LightX2V#1246), in its own dialect.
IN_VAIN = {
    **{f"diffusion_model.blocks.0.cross_attn.{n}.lora_down.weight": torch.ones(RANK, 8) for n in ("k_img", "v_img")},
    **{f"diffusion_model.blocks.0.cross_attn.{n}.lora_up.weight": torch.ones(8, RANK) for n in ("k_img", "v_img")},
    **{f"diffusion_model.blocks.0.cross_attn.{n}.diff_b": torch.ones(8) for n in ("k_img", "v_img")},
    "diffusion_model.blocks.0.cross_attn.norm_k_img.diff": torch.ones(8),
    "diffusion_model.img_emb.proj.0.diff_b": torch.ones(8),
    "diffusion_model.img_emb.proj.1.lora_down.weight": torch.ones(RANK, 8),
    "diffusion_model.img_emb.proj.1.lora_up.weight": torch.ones(8, RANK),
    "diffusion_model.img_emb.proj.4.diff": torch.ones(8),
}


def test_keys_that_are_known_to_be_in_vain_are_left_out_and_no_others(caplog):
    unused = load_config("lora-svi-lightx2v")["unused_keys"]
    with pytest.raises(InputError, match=f"{len(IN_VAIN)} of {len(GOOD) + len(IN_VAIN)} LoRA keys"):
        lora_of(GOOD | IN_VAIN)
    with caplog.at_level(logging.INFO, logger="selfsame"):
        lora = lora_of(GOOD | IN_VAIN, unused=unused)
    assert (lora.targets, set(lora.left_out)) == ([f"{Q}.weight"], set(IN_VAIN))
    assert f"{len(IN_VAIN)} keys are left out, as known of it" in caplog.text
    for name in IN_VAIN:
        assert re.sub(r"blocks\.0", "blocks.N", name) in caplog.text
    with pytest.raises(InputError, match=r"1 of \d+ LoRA keys do not apply: 1 unknown \(nowhere.lora_A"):
        lora_of(GOOD | IN_VAIN | {"nowhere.lora_A.weight": torch.ones(RANK, 8)}, unused=unused)
    image_model = tiny.transformer(in_dim=36, image_dim=16)  # one that has them takes them, whatever the preset says
    with pytest.raises(InputError, match="of another shape"):
        Lora.from_tensors(GOOD | IN_VAIN, image_model, unused=unused)


def touch_files(config: dict) -> dict[str, str]:
    """Empty files where a config's download would lie: part -> path."""
    files = {part: part_path(config, part) for part in config["files"]}
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return {part: str(file) for part, file in files.items()}


def test_a_preset_brings_its_pair(tmp_path, monkeypatch):
    """Of Wan2.2's experts, each its own file, fetched by one command; one that is named takes its place."""
    monkeypatch.chdir(tmp_path)
    name = "lora-lightx2v-wan2.2-t2v"
    photo = str(PROJECT / "assets" / "face.png")
    flags = ["--ip_image", photo, "--prompt", "x", "--wan_version", "2.2", "--lora_config", name]
    settings, config = resolve_lora_settings(infer_with_lora.parse_args(flags))
    wan = Wan(settings, config, start_processes("cpu"), stand_in_parts(settings, config))
    with pytest.raises(WeightsError, match=f"download_models.py --only wan2.2-t2v-A14B stand-in-wan2.2 {name}$"):
        wan.use_loras(wan.settings)  # says at once what else is not there
    files = touch_files(load_config(name))
    settings, _ = resolve_lora_settings(infer_with_lora.parse_args(flags))
    assert (settings.lora_path_high, settings.lora_path_low) == ((files["lora_high"],), (files["lora_low"],))
    assert (settings.num_inference_steps, settings.shift, settings.guidance_scale) == (4, 5.0, (1.0,))
    Path("mine.safetensors").touch()
    settings, _ = resolve_lora_settings(infer_with_lora.parse_args([*flags, "--lora_path_low", "mine.safetensors"]))
    assert (settings.lora_path_high, settings.lora_path_low) == ((files["lora_high"],), ("mine.safetensors",))
    with pytest.raises(UsageError, match="two experts of Wan2.2"):
        resolve_lora_settings(infer_with_lora.parse_args([*flags, "--wan_version", "2.1"]))


@pytest.mark.parametrize("preset", ["lora-svi-lightx2v", "lora-svi-lightx2v-260412"])
def test_a_preset_brings_its_pair_beside_svis(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = touch_files(variant_config("2.0-pro"))
    flags = ["--prompt", "x", "--variant", "2.0-pro", "--ref_image_path", str(PROJECT / "assets" / "face.png")]
    args = infer_long_video.parse_args([*flags, "--lora_config", preset])
    settings, config, _ = resolve_long_video(args)
    with pytest.raises(WeightsError, match=f"download_models.py --only wan2.2-i2v-A14B svi-2.0-pro {preset}$"):
        Wan(settings, config, start_processes("cpu")).check()
    files = touch_files(load_config(preset))
    settings, config, _ = resolve_long_video(infer_long_video.parse_args([*flags, "--lora_config", preset]))
    assert settings.lora_path_high == (own["lora_high"], files["lora_high"])
    assert settings.lora_path_low == (own["lora_low"], files["lora_low"])
    assert (settings.num_inference_steps, settings.shift, settings.guidance_scale) == (6, 8.0, (1.5,))
    assert (settings.lora_scale_high, config["boundary"]) == ((1.0, 0.5), 0.9)


# --------------------------------------------------------------------------------------------------- the script

SMALL = ["--config", "tiny", "--height", "64", "--width", "64", "--num_frames", "1", "--num_inference_steps", "2"]


@pytest.fixture(scope="module", autouse=True)
def faceless(tmp_path_factory) -> None:
    """The tiny model without an identity, as the default of `make`: encoding a photo is most of a tiny video's time."""
    content = yaml.safe_load((PROJECT / "configs" / "tiny.yaml").read_text())
    del content["stand_in"], content["defaults"]["ip_image"]
    config = tmp_path_factory.mktemp("config") / "faceless.yaml"
    config.write_text(yaml.safe_dump(content))
    SMALL[:2] = ["--config", str(config)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("loras")
    made = {
        "a": DIALECTS["kohya, musubi"](factors()),
        "b": DIALECTS["Diffusers"](factors(5)),
        "wrong": GOOD | {f"nowhere.{key}": tensor for key, tensor in GOOD.items()},
    }
    for name, tensors in made.items():
        save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in made}


def make(output: Path, *flags, small=SMALL) -> numpy.ndarray:
    made = infer_with_lora.main(infer_with_lora.parse_args([*small, "--output", str(output), *map(str, flags)]))
    assert made == [output]
    return read_frames(output)


def run_script(*flags, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "infer_with_lora.py", *map(str, flags)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, files) -> numpy.ndarray:
    return make(tmp_path_factory.mktemp("reference") / "out.mp4", "--lora_path", files["a"])


def test_scales_and_several_loras_change_the_video_as_they_should(tmp_path, reference, files):
    import infer

    infer.main(infer.parse_args([*SMALL, "--output", str(tmp_path / "plain.mp4")]))
    plain = read_frames(tmp_path / "plain.mp4")
    path = ("--lora_path", files["a"])
    assert (plain != reference).mean() > 0.5
    assert (make(tmp_path / "0.mp4", *path, "--lora_scale", 0) == plain).all()
    assert (make(tmp_path / "half.mp4", *path, "--lora_scale", 0.5) != reference).mean() > 0.5
    two = make(tmp_path / "two.mp4", *path, files["b"], "--lora_scale", 1, 0.5)
    assert (two != reference).mean() > 0.5
    repeated = ("--lora_path", files["b"], "--lora_scale", 0.5, *path, "--lora_scale", 1)
    difference = abs(make(tmp_path / "repeated.mp4", *repeated).astype(int) - two.astype(int))
    assert difference.mean() < 0.1  # the order of a sum


def test_memory_modes_and_live_make_the_same_video(tmp_path, reference, files):
    for memory in ("resident", "group", "sequential"):
        flags = ("--lora_path", files["a"], "--memory", memory)
        assert (make(tmp_path / f"{memory}.mp4", *flags) == reference).all()
        live = make(tmp_path / f"{memory}-live.mp4", *flags, "--lora_mode", "live").astype(int)
        assert abs(live - reference.astype(int)).mean() < 0.1


@pytest.mark.parametrize("mode", ["merged", "live"])
def test_weights_loaded_again_after_out_of_memory_are_changed_again(tmp_path, reference, files, monkeypatch, mode):
    calls = []
    forward = WanTransformer.forward

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(WanTransformer, "forward", failing)
    flags = ("--lora_path", files["a"], "--lora_mode", mode, "--memory", "model")
    frames = make(tmp_path / "out.mp4", *flags).astype(int)
    assert read_metadata(tmp_path / "out.mp4")["ran_with"]["memory"] == "group"
    assert abs(frames - reference.astype(int)).mean() < 0.1


def test_fp8_computes_beside_the_weights(tmp_path, files, monkeypatch):
    calls = []
    monkeypatch.setattr("pipelines.loras.attach_loras", lambda *args: calls.append(attach_loras(*args)))
    live = make(tmp_path / "live.mp4", "--fp8", "--lora_path", files["a"])
    assert len(calls) == 1
    merged = make(tmp_path / "merged.mp4", "--fp8", "--lora_path", files["a"], "--lora_mode", "merged")
    assert len(calls) == 1
    assert (live != merged).any()


def test_json_has_the_files_hashes_and_makes_the_run_again(tmp_path, files):
    flags = ("--lora_path", files["a"], files["b"], "--lora_scale", 0.5, 1)
    first = make(tmp_path / "first.mp4", *flags)
    made = read_metadata(tmp_path / "first.mp4")
    assert made["weights"][files["a"]].startswith("sha256:")
    assert made["weights"][files["b"]].startswith("sha256:")
    assert made["settings"]["lora_scale"] == [0.5, 1]
    assert (make(tmp_path / "again.mp4", "--config", tmp_path / "first.json", small=()) == first).all()
    assert read_metadata(tmp_path / "again.mp4") == made


def test_a_distilled_lora_brings_its_defaults(tmp_path, files):
    few = [flag for flag in SMALL if flag not in ("--num_inference_steps", "2")]
    flags = ("--lora_path", files["a"], "--lora_config")
    make(tmp_path / "out.mp4", *flags, "lora-lightx2v-4step", "--shift", 3, small=few)
    made = read_metadata(tmp_path / "out.mp4")["settings"]
    assert (made["num_inference_steps"], made["guidance_scale"], made["shift"]) == (4, [1.0], 3.0)
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"lora": True, "defaults": {"timesteps": [1000, 500], "guidance_scale": 1}}))
    make(tmp_path / "own.mp4", *flags, own, small=few)
    assert len(read_metadata(tmp_path / "own.mp4")["sigmas"]) == 3
    # a LoRA chosen on top of an earlier run brings its own; the rest of that run stays
    make(tmp_path / "on.mp4", "--config", tmp_path / "own.json", "--lora_config", "lora-lightx2v-4step", small=())
    made = read_metadata(tmp_path / "on.mp4")["settings"]
    assert (made["shift"], made["lora_path"], made["height"]) == (5.0, [files["a"]], 64)


def test_one_or_both_experts(tmp_path, files):
    """Each expert has its own LoRAs; what both are given through --lora_path is what each is given through its own."""
    config = tmp_path / "two.yaml"
    experts = {"high": "high_noise_model", "low": "low_noise_model"}
    content = {"base": SMALL[1], "description": "two", "tiny": True, "seed": 0, "experts": experts, "boundary": 0.9}
    config.write_text(yaml.safe_dump(content))
    flags = ("--config", config)
    high, low = ("--lora_path_high", files["a"]), ("--lora_path_low", files["a"])
    both = make(tmp_path / "both.mp4", *flags, "--lora_path", files["a"])
    assert (make(tmp_path / "each.mp4", *flags, *high, *low) == both).all()
    only_high, only_low = make(tmp_path / "high.mp4", *flags, *high), make(tmp_path / "low.mp4", *flags, *low)
    assert (only_high != both).mean() > 0.1
    assert (only_low != both).mean() > 0.1
    assert (only_low != only_high).mean() > 0.1
    weaker = make(tmp_path / "weaker.mp4", *flags, *high, *low, "--lora_scale_high", 0.5)
    assert (weaker != both).mean() > 0.1


def test_killed_run_of_other_loras_is_not_gone_on_with(tmp_path, reference, files, monkeypatch, caplog):
    from pipelines.job_state import JobState

    def interrupt(self, step, save=JobState.save):
        save(self, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(JobState, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "out.mp4", "--lora_path", files["b"])
    assert (make(tmp_path / "out.mp4", "--lora_path", files["a"]) == reference).all()
    assert "belongs to a run with other settings" in caplog.text


@pytest.mark.parametrize(
    ("flags", "exit_code", "words"),
    [
        ([], 2, ["--lora_path", "at least one"]),
        (["--lora_path", "missing.safetensors"], 4, ["LoRA: missing.safetensors: no such weights (--lora_path)"]),
        (["--lora_path", "README.md"], 4, ["README.md"]),
        (["--lora_path", "{wrong}"], 3, ["2 of 4 LoRA keys do not apply", "nowhere.blocks", "--lora_partial"]),
        (["--lora_path", "{a}", "--lora_scale", "1", "2"], 2, ["--lora_scale: 2 values for 1"]),
        (["--lora_path", "{a}", "--lora_scale", "nan"], 2, ["--lora_scale nan", "-10 to 10"]),
        (["--lora_path", "{a}", "--lora_scale", "11"], 2, ["--lora_scale 11"]),
        (["--lora_path", "{a}", "--lora_scale_low", "1"], 2, ["--lora_scale_low", "no --lora_path_low"]),
        (["--lora_path_high", "{a}"], 2, ["--lora_path_high", "one model; use --lora_path"]),
        (["--lora_path", "{a}", "--lora_mode", "fused"], 2, ["--lora_mode fused", "merged, live"]),
        (["--lora_path", "{a}", "--lora_config", "nothing"], 2, ["nothing", "no such config"]),
        (["--lora_path", "{a}", "--lora_config", "tiny"], 2, ["--lora_config tiny", "lora-lightx2v-4step"]),
        (["--lora_path", "{a}", "--config", "lora-lightx2v-4step"], 2, ["lora-lightx2v-4step", "--lora_config"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, files, flags, exit_code, words):
    monkeypatch.chdir(PROJECT)
    with pytest.raises(UserError) as error:
        make(tmp_path / "out.mp4", *(flag.format(**files) for flag in flags))
    message = str(error.value)
    assert error.value.exit_code == exit_code, message
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert not list(tmp_path.glob("*.mp4"))


def test_from_the_shell(tmp_path, files):
    output = tmp_path / "out.mp4"
    refused = run_script(*SMALL, "--lora_path", files["wrong"], "--output", output)
    assert refused.returncode == 3
    assert "2 of 4 LoRA keys do not apply" in refused.stderr
    assert "Traceback" not in refused.stderr
    flags = (*SMALL, "--config", "tiny", "--no_face_crop")  # with the photo in assets/
    accepted = run_script(*flags, "--lora_path", files["wrong"], "--lora_partial", "--output", output)
    assert accepted.returncode == 0, accepted.stderr
    assert "2 of 4 keys are left out: unknown: nowhere.blocks.N.self_attn.q.lora_A.weight" in accepted.stderr
    assert accepted.stdout.strip() == str(output)


def test_help_is_fast():
    start = time.monotonic()
    result = run_script("--help", env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"})
    assert result.returncode == 0
    assert time.monotonic() - start < 1
    assert "torch" not in result.stderr
