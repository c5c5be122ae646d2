"""Every released layout loads; every damaged file is one clear line."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import nn

from errors import WeightsError
from models.lora import read_lora
from models.wan.checkpoint import (
    assign_tensors,
    convert_names,
    fingerprint,
    load_transformer,
    read_tensors,
    safetensors_header,
    to_diffusers_name,
    to_original_name,
)
from models.wan.config import VARIANTS, WanConfig, detect_config, variant_name
from models.wan.slots import Prompt
from models.wan.transformer import WanTransformer
from tests import tiny

TINY = WanConfig(
    in_dim=16, dim=64, ffn_dim=128, num_heads=2, num_layers=2, text_dim=32, text_len=16, freq_dim=32
)  # fmt: skip


def make_transformer(config: WanConfig, seed: int = 0) -> WanTransformer:
    torch.manual_seed(seed)
    transformer = WanTransformer(**config.as_dict())
    with torch.no_grad():
        for parameter in transformer.parameters():  # no norm of ones, no bias of zeros: every tensor is told apart
            parameter.normal_(std=0.05)
    return transformer.eval()


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in make_transformer(TINY).state_dict().items()}


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(WeightsError) as caught:
        call(*args, **kwargs)
    assert caught.value.exit_code == 4
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------- detection

# Parameters in billions and number of tensors, from the model cards' table (specification, section 1).
RELEASED = {
    "t2v-1.3B": (1.419, 825),
    "fun-inp-1.3B": (1.564, 983),
    "t2v-14B": (14.288, 1095),
    "i2v-14B": (16.395, 1303),
    "flf2v-14B": (16.396, 1304),
    "i2v-A14B": (14.289, 1095),
    "ti2v-5B": (5.000, 825),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_told_by_its_shapes(name):
    with torch.device("meta"):
        state = WanTransformer(**VARIANTS[name].as_dict()).state_dict()
    billions, count = RELEASED[name]
    assert round(sum(tensor.numel() for tensor in state.values()) / 1e9, 3) == billions
    assert len(state) == count
    detected = detect_config({key: tuple(tensor.shape) for key, tensor in state.items()})
    assert variant_name(detected) == name


@pytest.mark.parametrize("name", VARIANTS)
def test_diffusers_names_are_a_bijection(name):
    with torch.device("meta"):
        names = set(WanTransformer(**VARIANTS[name].as_dict()).state_dict())
    theirs = {to_diffusers_name(key) for key in names}
    assert len(theirs) == len(names)
    assert {to_original_name(key) for key in theirs} == names


def test_renaming_reaches_names_below_a_module():
    assert to_original_name("blocks.3.attn2.to_out.0.lora_A.weight") == "blocks.3.cross_attn.o.lora_A.weight"
    assert to_diffusers_name("vace_blocks.1.after_proj.bias") == "vace_blocks.1.proj_out.bias"
    assert to_diffusers_name("blocks.1.norm3.weight") == "blocks.1.norm2.weight"


@pytest.mark.parametrize(
    ("key", "word"),
    [("vace_blocks.0.norm3.weight", "VACE"), ("ref_conv.weight", "Fun"), ("control_adapter.x", "camera")],
)
def test_larger_networks_of_the_family_are_refused(tensors, tmp_path, key, word):
    safetensors.torch.save_file({**tensors, key: torch.zeros(1)}, tmp_path / "x.safetensors")
    message = error_of(load_transformer, tmp_path / "x.safetensors", num_heads=2)
    assert "x.safetensors" in message
    assert word in message


# -------------------------------------------------------------------------------------------- layouts


def prefixed(tensors, prefix):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write_shards(tensors, folder, with_index):
    names = sorted(tensors)
    parts = {f"diffusion_pytorch_model-{i + 1:05d}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, keys in parts.items():
        safetensors.torch.save_file({key: tensors[key] for key in keys}, folder / file)
    if with_index:
        index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    torch.save({"other": torch.zeros(1)}, folder / "Wan2.1_VAE.pth")  # lies beside it in the released folders
    return folder


def write_single(tensors, folder):
    safetensors.torch.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    torch.save({"other": torch.zeros(1)}, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    return folder


def write_file(name, save=safetensors.torch.save_file, change=lambda tensors: tensors, **options):
    def write(tensors, folder):
        save(change(tensors), folder / name, **options)
        return folder / name

    return write


LAYOUTS = {
    "single file in a folder": write_single,
    "shards with an index": lambda tensors, folder: write_shards(tensors, folder, with_index=True),
    "shards without an index": lambda tensors, folder: write_shards(tensors, folder, with_index=False),
    "ComfyUI": write_file("wan.safetensors", change=lambda t: prefixed(t, "diffusion_model.")),
    "ComfyUI all in one": write_file(
        "all.safetensors",
        change=lambda t: prefixed(t, "model.diffusion_model.") | {"first_stage_model.conv1.weight": torch.zeros(1)},
    ),
    "DiffSynth": write_file("wan.ckpt", torch.save, lambda t: prefixed(t, "pipe.dit.")),
    "pth": write_file("transformer.pth", torch.save),
    "pth before torch 1.6": write_file("old.pt", torch.save, _use_new_zipfile_serialization=False),
    "ckpt with a wrapper": write_file("last.ckpt", torch.save, lambda t: {"state_dict": t, "epoch": 3}),
    "DiffSynth wrapper": write_file("x.pth", torch.save, lambda t: {"model_state": t}),
    "Diffusers names": write_file(
        "d.safetensors", change=lambda t: convert_names(t, to_diffusers_name)
    ),
    "safetensors under another suffix": write_file("renamed.bin"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_loads(layout, tensors, tmp_path):
    path = LAYOUTS[layout](tensors, tmp_path)
    loaded = load_transformer(path, dtype=torch.float32, num_heads=2).state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_folder_written_by_diffusers_gives_the_same_video(tmp_path):
    """Written by diffusers' own class, with CLIP and FLF2V parts; both networks agree on the output."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(1)
    theirs = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=36, out_channels=16, text_dim=32, freq_dim=32,
        ffn_dim=128, num_layers=2, image_dim=24, added_kv_proj_dim=64, pos_embed_seq_len=514,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    (tmp_path / "model_index.json").write_text("{}")
    ours = load_transformer(tmp_path, dtype=torch.float32)  # heads from its config.json
    assert ours.config.num_heads == 2
    assert ours.config.image_tokens == 514

    latents, text, image = torch.randn(1, 36, 2, 4, 4), torch.randn(1, 512, 32), torch.randn(1, 514, 24)
    timestep = torch.tensor([500])
    with torch.no_grad():
        expected = theirs(latents, timestep, text, image.view(2, 257, 24), return_dict=False)[0]
        found = ours(latents, timestep, Prompt(text, image))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_fp8_with_scales_is_widened(tensors, tmp_path, spelling, prefix):
    stored, expected = {f"{prefix}scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, dict(tensors)
    for name, tensor in tensors.items():
        stored[prefix + name] = tensor
        if name.startswith("blocks.") and tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            quantised = (tensor / scale).to(torch.float8_e4m3fn)
            stored[prefix + name] = quantised
            stored[f"{prefix}{name.removesuffix('weight')}{spelling}"] = scale
            stored[f"{prefix}{name.removesuffix('weight')}scale_input"] = torch.ones(1)
            expected[name] = quantised.float() * scale
    safetensors.torch.save_file(stored, tmp_path / "fp8_scaled.safetensors")
    loaded = load_transformer(tmp_path, dtype=torch.float32, num_heads=2).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in tensors)
    narrow = load_transformer(tmp_path, dtype=torch.bfloat16, num_heads=2).state_dict()
    name = "blocks.1.ffn.2.weight"
    assert torch.equal(narrow[name], expected[name].bfloat16())


def test_a_scale_without_its_weight(tensors, tmp_path):
    safetensors.torch.save_file(tensors | {"blocks.7.ffn.0.scale_weight": torch.ones(1)}, tmp_path / "x.safetensors")
    message = error_of(load_transformer, tmp_path, num_heads=2)
    assert message.startswith(str(tmp_path))
    assert "scales without their weights: 1 (blocks.7.ffn.0.weight)" in message


def test_plain_fp8_is_widened(tensors, tmp_path):
    stored = {name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(stored, tmp_path / "x.safetensors")
    loaded = load_transformer(tmp_path, dtype=torch.bfloat16, num_heads=2).state_dict()
    assert torch.equal(loaded["blocks.0.ffn.0.weight"], stored["blocks.0.ffn.0.weight"].bfloat16())


def test_other_quantisations_are_refused(tensors, tmp_path):
    stored = {name: t.to(torch.int8) if name.endswith("ffn.0.weight") else t for name, t in tensors.items()}
    safetensors.torch.save_file(stored, tmp_path / "x.safetensors")
    message = error_of(load_transformer, tmp_path, num_heads=2)
    assert "2 quantised" in message
    assert "blocks.0.ffn.0.weight int8" in message


def test_linears_get_the_dtype_and_the_time_path_stays_float32(tensors, tmp_path):
    loaded = load_transformer(write_single(tensors, tmp_path), dtype=torch.bfloat16, num_heads=2)
    narrow = {name for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.bfloat16}
    wide = loaded.state_dict().keys() - narrow
    assert {"patch_embedding.weight", "text_embedding.0.bias", "blocks.0.self_attn.q.weight"} <= narrow
    assert {"time_embedding.0.weight", "time_projection.1.bias", "blocks.0.modulation", "head.head.weight"} <= wide
    assert {"blocks.1.norm3.weight", "blocks.1.cross_attn.norm_k.weight"} <= wide
    assert not loaded.training
    assert all(not tensor.is_meta for tensor in loaded.state_dict().values())


# --------------------------------------------------------------------------------------- config.json


def test_config_json_supplies_heads_and_must_agree(tensors, tmp_path):
    write_single(tensors, tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"_class_name": "WanModel", "num_heads": 4, "dim": 64, "in_dim": 16, "eps": 1e-5}))
    loaded = load_transformer(tmp_path)
    assert (loaded.config.num_heads, loaded.config.eps) == (4, 1e-5)
    assert "4 heads, asked for 2" in error_of(load_transformer, tmp_path, num_heads=2)
    config.write_text(json.dumps({"num_heads": 4, "dim": 1536}))
    assert "says dim 1536, its tensors say 64" in error_of(load_transformer, tmp_path)
    config.write_text(json.dumps({"model_type": "something else"}))
    assert load_transformer(tmp_path, num_heads=2).config.num_heads == 2
    config.write_text("{")
    assert "config.json: not valid JSON" in error_of(load_transformer, tmp_path)


def test_another_variant_than_expected(tensors, tmp_path):
    write_single(tensors, tmp_path)
    message = error_of(load_transformer, tmp_path, expect=VARIANTS["i2v-14B"])
    assert "i2v-14B" in message
    assert "dim 64, 2 layers, 16 input channels" in message
    assert load_transformer(tmp_path, expect=TINY).config.text_len == TINY.text_len


# --------------------------------------------------------------------------------------------- errors


def test_state_dict_of_something_else(tmp_path):
    safetensors.torch.save_file({"encoder.conv1.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    message = error_of(load_transformer, tmp_path)
    assert "not a Wan transformer" in message
    assert "patch_embedding.weight" in message


def test_missing_unexpected_and_misshapen_are_counted(tensors, tmp_path):
    changed = dict(tensors)
    for name in [name for name in tensors if name.startswith("blocks.1.self_attn")]:
        del changed[name]
    changed["blocks.0.extra"] = torch.zeros(1)
    changed["blocks.0.cross_attn.q.bias"] = torch.zeros(3)
    message = error_of(load_transformer, write_single(changed, tmp_path), num_heads=2)
    assert "10 missing (blocks.1.self_attn.k.bias, blocks.1.self_attn.k.weight, " in message
    assert "1 unexpected (blocks.0.extra)" in message
    assert "1 of another shape (blocks.0.cross_attn.q.bias [3] instead of [64])" in message


def test_missing_shards_are_named(tensors, tmp_path):
    name = "diffusion_pytorch_model-00002-of-00003.safetensors"
    for with_index in (False, True):
        folder = tmp_path / str(with_index)
        folder.mkdir()
        write_shards(tensors, folder, with_index)
        (folder / name).unlink()
        message = error_of(read_tensors, folder, hint="run: refetch")
        assert name in message
        assert "1 (" in message
        assert message.endswith("run: refetch")


def test_missing_path_ends_with_the_hint(tmp_path):
    message = error_of(load_transformer, tmp_path / "none", hint="run: python download_models.py --only x")
    assert message == f"{tmp_path / 'none'}: no such file or folder; run: python download_models.py --only x"
    assert "no weights in this folder" in error_of(read_tensors, tmp_path)


def test_several_files_in_a_folder_are_not_guessed(tensors, tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        safetensors.torch.save_file(tensors, tmp_path / name)
    message = error_of(read_tensors, tmp_path)
    assert "a.safetensors, b.safetensors" in message


class Touches:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def damaged_files(folder: Path, tensors) -> dict[str, list[str]]:
    """file name -> what its error must say."""
    good = safetensors.torch.save(tensors)
    torch.save(tensors, folder / "good.pth")
    zipped = (folder / "good.pth").read_bytes()
    contents = {
        "cut.safetensors": (good[:-100], ["truncated", f"expected {len(good)} bytes, found {len(good) - 100}"]),
        "cut_header.safetensors": (good[:40], ["truncated", "found 40"]),
        "longer.safetensors": (good + b"x", ["damaged", f"found {len(good) + 1}"]),
        "header.safetensors": ((10).to_bytes(8, "little") + b"{nonsense}" + b"x" * 20, ["damaged safetensors header"]),
        "pointer.safetensors": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5676070424\n",
            ["git-lfs pointer", "5676070424 bytes", "git lfs pull"],
        ),
        "page.pth": (b"\n<!DOCTYPE html><html>Not found</html>", ["web page"]),
        "empty.safetensors": (b"", ["empty file"]),
        "cut.pth": (zipped[: len(zipped) // 2], ["damaged or not a weights file"]),
        "noise.ckpt": (b"hello world" * 9, ["damaged or not a weights file"]),
        "cat.png": (b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" * 9, ["a PNG picture, not weights"]),
        "cat.safetensors": (b"\xff\xd8\xff\xe0" + b"\0" * 90, ["a JPEG picture, not weights"]),
        "clip.pt": (b"\0\0\0\x20ftypisom" + b"\0" * 90, ["video, not weights"]),
        "notes.pth": (b"a style, in watercolour\n", ["damaged or not a weights file"]),
        "settings.ckpt": (b'{"a": 1}', ["damaged or not a weights file"]),
        "q.gguf": (b"GGUF" + b"\0" * 50, ["GGUF weights are not read yet"]),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    return {name: words for name, (_, words) in contents.items()}


def test_damaged_files_are_named(tensors, tmp_path):
    for name, words in damaged_files(tmp_path, tensors).items():
        message = error_of(read_tensors, tmp_path / name)
        assert str(tmp_path / name) in message
        for word in words:
            assert word in message, (name, message)
        assert "trust" not in message, "that is for files that are pickles"


def safetensors_file(header: object, data: int = 64, length: int | None = None) -> bytes:
    """A file with this header (as JSON, or bytes as they are) and as many zeros after it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def entry(begin: int = 0, end: int = 64, **changes) -> dict:
    return {"dtype": "F32", "shape": [4, 4], "data_offsets": [begin, end]} | changes


MALFORMED = {
    "overlapping offsets": (safetensors_file({"a": entry(), "b": entry(32, 96)}, 96), "'b' overlaps"),
    "a gap": (safetensors_file({"a": entry(), "b": entry(96, 160)}, 160), "32 bytes before it unused"),
    "data before the first": (safetensors_file({"a": entry(32, 96)}, 96), "unused"),
    "negative offsets": (safetensors_file({"a": entry(-64, 0)}, 0), "no list of natural numbers"),
    "offsets that go back": (safetensors_file({"a": entry(64, 0)}), "no begin and end"),
    "offsets that are no numbers": (safetensors_file({"a": entry(data_offsets=["0", True])}), "natural numbers"),
    "three offsets": (safetensors_file({"a": entry(data_offsets=[0, 64, 64])}), "no begin and end"),
    "another type": (safetensors_file({"a": entry(dtype="F33")}), "'F33'"),
    "a type that is a list": (safetensors_file({"a": entry(dtype=["F32"])}), "is of type"),
    "another shape": (safetensors_file({"a": entry(shape=[4, 5])}), "takes 80 bytes"),
    "a negative shape": (safetensors_file({"a": entry(shape=[-4, -4])}), "shape of 'a'"),
    "a shape that is a text": (safetensors_file({"a": entry(shape="44")}), "shape of 'a'"),
    "a huge shape": (safetensors_file({"a": entry(shape=[2**62, 2**62])}), "bytes"),
    "many dimensions": (safetensors_file({"a": entry(shape=[2**62] * 10_000)}), "10000 dimensions"),
    "an entry that is a list": (safetensors_file({"a": [1]}), "the entry of 'a'"),
    "an entry that is null": (safetensors_file({"a": None}), "the entry of 'a'"),
    "an entry without offsets": (safetensors_file({"a": {"dtype": "F32", "shape": [4, 4]}}), "the entry of 'a'"),
    "a list": (safetensors_file([entry()]), "no JSON object"),
    "null": (safetensors_file(None), "no JSON object"),
    "a huge header": (safetensors_file({"a": entry()}, length=2**63), "would take"),
    "a long header": (safetensors_file({"a": entry()}, length=2**20), "truncated"),
    "no UTF-8": (safetensors_file(b'{"\xff\xfe": {}}'), "utf-8"),
    "no JSON": (safetensors_file(b"{'a': 1}"), "damaged safetensors header"),
    "a name twice": (
        safetensors_file(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' * 2 + b'"b":{}}', 0),
        "damaged safetensors header",
    ),
    "the same name again": (
        safetensors_file(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
        "'a' is in it twice",
    ),
    "nested without end": (safetensors_file(b'{"a":' + b"[" * 100_000), "damaged safetensors header"),
    "not a number": (safetensors_file(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,64]}}'), "shape of 'a'"),
    "eight bytes": (bytes(8), "damaged safetensors header"),
    "three bytes": (b"abc", "truncated"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_headers_are_one_line(tmp_path, kind):
    content, word = MALFORMED[kind]
    (tmp_path / "w.safetensors").write_bytes(content)
    for read in (read_tensors, safetensors_header):
        message = error_of(read, tmp_path / "w.safetensors")
        assert message.startswith(str(tmp_path / "w.safetensors"))
        assert word in message, message
        assert "\n" not in message and len(message) < 600
    with torch.device("meta"), pytest.raises(WeightsError, match="w.safetensors: "):
        read_lora(tmp_path / "w.safetensors", tiny.transformer())


def test_headers_as_they_should_be(tensors, tmp_path):
    """Whatever safetensors writes is accepted: metadata, empty tensors, scalars, any order, every type."""
    kinds = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.uint8, torch.complex64]
    written = {f"{kind}": torch.zeros(3, dtype=kind) for kind in kinds}
    written |= {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 4), "none": torch.zeros(0)}
    save_file(written, tmp_path / "w.safetensors", {"format": "pt"})
    assert safetensors_header(tmp_path / "w.safetensors").keys() == written.keys() == read_tensors(tmp_path).keys()
    for length in (0x3C20, 0x8B1F):  # their first bytes are " <", as a web page's, and those of gzip
        header = json.dumps({"a": entry()}).encode().ljust(length)
        (tmp_path / "w.safetensors").write_bytes(safetensors_file(header))
        assert read_tensors(tmp_path)["a"].shape == (4, 4)
    save_file({}, tmp_path / "w.safetensors")
    assert safetensors_header(tmp_path / "w.safetensors") == {}


def test_a_folder_of_gguf_files(tmp_path):
    (tmp_path / "Q4.gguf").write_bytes(b"GGUF")
    assert "Q4.gguf: GGUF weights are not read yet" in error_of(read_tensors, tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_run_no_code(tmp_path, zipped):
    torch.save({"w": Touches(tmp_path / "ran")}, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    message = error_of(read_tensors, tmp_path / "evil.pt")
    assert "could run code" in message
    assert "save_file" in message
    assert not (tmp_path / "ran").exists()


def test_not_a_state_dict(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    assert "no state dict inside (found list)" in error_of(read_tensors, tmp_path / "list.pt")
    torch.save({"w": torch.zeros(1), "epoch": 3}, tmp_path / "mixed.pt")
    assert "epoch" in error_of(read_tensors, tmp_path / "mixed.pt")


# ------------------------------------------------------------------------------------------ assigning


class Tied(nn.Module):
    """Like umT5: one embedding under two names; and a buffer that no file holds."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(4, 3, device="meta")
        self.encoder = nn.Module()
        self.encoder.embed_tokens = nn.Embedding(4, 3, device="meta")
        self.encoder.embed_tokens.weight = self.shared.weight
        self.encoder.norm = nn.LayerNorm(3, device="meta")
        self.register_buffer("positions", torch.arange(4), persistent=False)


def test_tied_parameters_need_one_name_and_stay_tied():
    module = Tied()
    given = {
        "shared.weight": torch.randn(4, 3),
        "encoder.norm.weight": torch.ones(3),
        "encoder.norm.bias": torch.ones(3),
    }
    assign_tensors(module, given, dtype=torch.bfloat16, keep_float32=("norm",))
    assert module.shared.weight is module.encoder.embed_tokens.weight
    assert module.shared.weight.dtype == torch.bfloat16
    assert module.encoder.norm.weight.dtype == torch.float32


def test_assign_names_source_and_class():
    message = error_of(assign_tensors, Tied(), {"shared.weight": torch.zeros(4, 3)}, source="file.pth")
    assert message.startswith("file.pth: not the weights of Tied: 2 missing (encoder.norm.bias, encoder.norm.weight)")


def test_tensors_without_a_cast_stay_mapped(tmp_path):
    safetensors.torch.save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "x.safetensors")
    tensors = read_tensors(tmp_path)
    linear = nn.Linear(2, 2, device="meta")
    assign_tensors(linear, tensors)
    assert linear.weight.data_ptr() == tensors["weight"].data_ptr()


MEASURE = """
import resource, sys, torch
from pathlib import Path
from torch import nn
from models.wan.checkpoint import assign_tensors, read_tensors
layers = nn.ModuleList(nn.Linear(2048, 2048, bias=False, device="meta") for _ in range(12))
def peak():  # MiB; VmHWM and not ru_maxrss, which a child inherits from its parent
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
before = peak()
tensors = read_tensors(sys.argv[1])
print(peak() - before)
assign_tensors(layers, tensors, dtype=torch.bfloat16)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_loading_makes_no_second_copy(tmp_path, name):
    weights = {f"{i}.weight": torch.ones(2048, 2048) for i in range(12)}  # 192 MiB
    (safetensors.torch.save_file if name.endswith("safetensors") else torch.save)(weights, tmp_path / name)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / name)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    after_read, after_assign = map(float, result.stdout.split())
    assert after_read < 20  # mapped, not read
    assert after_assign < 1.25 * (192 + 96)  # the pages of the file, and the narrow weights


# ---------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_of_a_small_file_is_its_sha256(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"abc")
    assert fingerprint(tmp_path / "x.pth") == (
        "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_fingerprint_tells_shards_and_large_files_apart(tensors, tmp_path):
    first = fingerprint(write_shards(tensors, tmp_path, with_index=True))
    assert first.startswith("sampled-sha256:")
    assert fingerprint(tmp_path) == first
    write_shards(tensors | {"blocks.1.ffn.0.bias": torch.ones(128)}, tmp_path, with_index=True)
    assert fingerprint(tmp_path) != first

    large = tmp_path / "large.pth"
    with open(large, "wb") as file:
        file.truncate(70 * 2**20)
    empty = fingerprint(large)
    with open(large, "r+b") as file:
        file.seek(30 * 2**20)
        file.write(b"x" * 1_500_000)
    assert fingerprint(large) != empty


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_fingerprint_of_a_large_file_sees_a_change_in_every_tensor(tmp_path, suffix):
    """Also in a bias that lies between the pieces that are spread over the file."""
    file = tmp_path / f"large{suffix}"
    tensors = {"a.weight": torch.zeros(9, 2**20), "b.bias": torch.full((100,), 7.0), "c.weight": torch.zeros(9, 2**20)}
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    content = file.read_bytes()
    whole, bias = fingerprint(file), content.index(struct.pack("<100f", *[7.0] * 100))
    assert whole.startswith("sampled-sha256:")
    ends = (bias - 300, bias + 400 + 300)  # of the tensors around it; torch's archive has a header between them
    for place in (bias, bias + 200, bias + 399, *ends):
        with open(file, "r+b") as stream:
            stream.seek(place)
            stream.write(bytes([content[place] ^ 64]))
            stream.flush()
            assert fingerprint(file) != whole, place
            stream.seek(place)
            stream.write(content[place : place + 1])
    assert fingerprint(file) == whole
