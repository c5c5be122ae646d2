"""Configs say what the models are; a slip in one is a clear error."""

from argparse import Namespace
from typing import ClassVar

import pytest
import torch
import yaml

import infer
import infer_with_lora
from configs import _DEFAULTS as DEFAULTS
from configs import FOLDER, download_command, file_patterns, known_configs, load_config, part_path
from configs.values import typed
from errors import UsageError
from models.wan.config import VARIANTS, WanConfig
from models.wan.slots import Prompt
from models.wan.tea_cache import coefficients_of
from pipelines.command import resolve_settings
from pipelines.distributed import Processes
from pipelines.flags import described
from pipelines.settings import Settings
from pipelines.text_to_video.command import resolve_image_to_video
from pipelines.tiny import tiny_multitalk, tiny_vace, tiny_vae
from pipelines.wan import Wan
from pipelines.whose import settings_classes

# Command line defaults of upstream: steps, shift, guidance (high, low for two experts), frames, fps, height, width.
UPSTREAM = {
    "wan2.1-t2v-14B": (50, 5.0, 5.0, 81, 16, 720, 1280, "unipc"),
    "wan2.1-t2v-1.3B": (50, 5.0, 5.0, 81, 16, 480, 832, "unipc"),
    "wan2.1-i2v-14B-480P": (40, 3.0, 5.0, 81, 16, 480, 832, "unipc"),
    "wan2.1-i2v-14B-720P": (40, 5.0, 5.0, 81, 16, 720, 1280, "unipc"),
    "wan2.1-flf2v-14B-720P": (50, 16.0, 5.0, 81, 16, 720, 1280, "unipc"),
    "wan2.1-fun-1.3B-inp": (50, 5.0, 6.0, 81, 16, 480, 832, "euler-flow"),  # of VideoX-Fun's predict_i2v.py
    "stableavatar-1.3B": (50, 5.0, 5.0, 81, 25, 512, 512, "euler-flow"),
    "wan2.1-vace-14B": (50, 16.0, 5.0, 81, 16, 720, 1280, "unipc"),
    "wan2.2-t2v-A14B": (40, 12.0, {"high": 4.0, "low": 3.0}, 81, 16, 720, 1280, "unipc"),
    "wan2.2-i2v-A14B": (40, 5.0, 3.5, 81, 16, 720, 1280, "unipc"),
    "wan2.2-ti2v-5B": (50, 5.0, 5.0, 121, 24, 704, 1280, "unipc"),
    # The two below: upstream writes 25 fps, too fast; the rest is upstream's.
    "stand-in-wan2.1": (20, 5.0, 5.0, 81, 16, 480, 832, "euler"),
    "stand-in-wan2.2": (20, 5.0, 5.0, 81, 16, 480, 832, "euler"),
}
KEYS = ("num_inference_steps", "shift", "guidance_scale", "num_frames", "fps", "height", "width", "solver")


@pytest.mark.parametrize(
    ("script", "name", "words"),
    [
        (infer, "antelopev2", "a part of other models"),
        (infer_with_lora, "sdxl-base-1.0", "a part of other models"),
        (infer_with_lora, "instantid", "run it by: python infer.py --config instantid"),
        (infer_with_lora, "consisid-1.5", "run it by: python infer.py --config consisid-1.5"),
    ],
)
def test_a_config_that_the_script_cannot_run_is_refused(script, name, words):
    sizes = ["--height", "64", "--width", "64", "--num_frames", "5", "--fps", "8"]
    rest = ["--prompt", "x", "--num_inference_steps", "1", "--guidance_scale", "1", "--shift", "3", "--solver", "euler"]
    with pytest.raises(UsageError, match=f"--config {name}: .*{words}"):
        script.main(script.parse_args(["--config", name, *sizes, *rest]))


@pytest.mark.parametrize("name", UPSTREAM)
def test_defaults_are_upstreams(name):
    defaults = load_config(name)["defaults"]
    assert tuple(defaults[key] for key in KEYS) == UPSTREAM[name]
    assert defaults["negative_prompt"].endswith("倒着走")
    assert defaults["num_frames"] % 4 == 1


@pytest.mark.parametrize("name", known_configs())
def test_every_config_loads_and_names_its_variant(name):
    config = load_config(name)
    assert config["name"] == name
    assert config["description"]
    if "variant" in config:
        assert config["variant"] in VARIANTS
    if "dest" in config:
        assert file_patterns(config)
        assert config["approx_gib"] > 0
        assert ("repo" in config) != ("url" in config)
    for needed in config.get("needs", ()):
        load_config(needed)


def test_negative_prompts_differ_by_their_prefix():
    shared = load_config("wan2.1-t2v-14B")["defaults"]["negative_prompt"]
    image = load_config("wan2.1-i2v-14B-480P")["defaults"]["negative_prompt"]
    assert image == "镜头晃动，" + shared
    assert load_config("wan2.1-i2v-14B-720P")["defaults"]["negative_prompt"] == image
    assert load_config("wan2.1-flf2v-14B-720P")["defaults"]["negative_prompt"] == "镜头切换，" + image
    assert load_config("wan2.2-i2v-A14B")["defaults"]["negative_prompt"] == shared


def test_a_config_takes_the_network_but_not_the_download_from_its_base():
    config = load_config("stand-in-wan2.2")
    assert config["repo"] == "BowenXue/Stand-In"
    assert config["dest"] == "Stand-In"
    assert config["variant"] == "t2v-14B"
    assert (config["experts"]["high"], config["boundary"]) == ("high_noise_model", 0.875)
    assert config["base"]["repo"] == "Wan-AI/Wan2.2-T2V-A14B"
    assert config["base"]["defaults"]["shift"] == 12.0  # the base keeps its own
    assert list(config["files"]) == ["stand_in"]


def test_two_experts_and_their_boundaries():
    assert load_config("wan2.2-i2v-A14B")["boundary"] == 0.9
    assert load_config("wan2.2-t2v-A14B")["boundary"] == 0.875
    assert "boundary" not in load_config("wan2.1-t2v-14B")


def test_teacache_is_fitted_to_the_size_of_image_to_video():
    for size, first in (("480P", 2.57151496e5), ("720P", 8.10705460e3)):
        assert coefficients_of(load_config(f"wan2.1-i2v-14B-{size}"))[0] == first
    assert coefficients_of(load_config("svi-shot")) == coefficients_of(load_config("wan2.1-i2v-14B-480P"))
    assert coefficients_of(load_config("wan2.1-t2v-14B"))[0] == -3.03318725e5
    for name in ("wan2.1-flf2v-14B-720P", "wan2.2-i2v-A14B", "wan2.2-t2v-A14B", "wan2.2-ti2v-5B"):
        assert coefficients_of(load_config(name)) is None, name
    face = str(FOLDER.parent / "assets" / "face.png")
    flags = ["--config", "wan2.1-i2v-14B-720P", "--image", face, "--prompt", "x", "--step_cache", "teacache"]
    assert resolve_image_to_video(infer.parse_args(flags))[0].step_cache == "teacache"


def test_part_paths(tmp_path):
    config = load_config("wan2.1-i2v-14B-480P")
    assert part_path(config, "vae", tmp_path) == tmp_path / "Wan2.1/i2v-480P/Wan2.1_VAE.pth"
    assert part_path(config, "transformer", tmp_path) == tmp_path / "Wan2.1/i2v-480P"
    assert part_path(config, "tokenizer", tmp_path) == tmp_path / "Wan2.1/i2v-480P/google/umt5-xxl"
    experts = load_config("wan2.2-t2v-A14B")
    assert part_path(experts, "transformer", tmp_path) == tmp_path / "Wan2.2/t2v"
    assert part_path(load_config("face-parsing"), "face_parser", tmp_path).name == "parsing_bisenet.pth"


def test_upstream_folders():
    """Where Stand-In's and StableAvatar's own scripts look."""
    assert load_config("wan2.1-t2v-14B")["dest"] == "Wan2.1/t2v"
    assert load_config("wan2.2-t2v-A14B")["dest"] == "Wan2.2/t2v"
    assert load_config("wan2.1-vace-14B")["dest"] == "Wan2.1/vace"
    assert load_config("antelopev2")["dest"] == "antelopev2/models/antelopev2"
    assert load_config("wan2.1-fun-1.3B-inp")["dest"] == "Wan2.1-Fun-V1.1-1.3B-InP"


def test_download_command():
    config = load_config("wan2.1-t2v-1.3B")
    assert download_command(config) == "run: python download_models.py --only wan2.1-t2v-1.3B"
    assert download_command(config, "/data/w").endswith("--only wan2.1-t2v-1.3B --dest /data/w")


def test_sizes_follow_from_the_parameters():
    """approx_gib = parameters x bytes, within 3 %."""
    text, vae, clip = 5.681 * 2, 0.1269 * 4, 1.19 * 4
    bytes_billion = {
        "wan2.1-t2v-1.3B": 1.419 * 4 + text + vae,
        "wan2.1-t2v-14B": 14.288 * 4 + text + vae,
        "wan2.1-i2v-14B-480P": 16.395 * 4 + text + vae + clip,
        "wan2.1-i2v-14B-720P": 16.395 * 4 + text + vae + clip,
        "wan2.1-flf2v-14B-720P": 16.396 * 4 + text + vae + clip,
        "wan2.1-fun-1.3B-inp": 1.564 * 2 + text + vae + clip,
        "wan2.1-vace-14B": 17.338 * 4 + text + vae,
        "wan2.1-vace-1.3B": 2.154 * 4 + text + vae,
        "wan2.2-t2v-A14B": 2 * 14.288 * 4 + text + vae,
        "wan2.2-i2v-A14B": 2 * 14.289 * 4 + text + vae,
        "wan2.2-ti2v-5B": 5.000 * 4 + text + 0.7047 * 4,
        "stand-in-wan2.1": 2 * 0.15728640 * 4,
        "stand-in-wan2.2": 2 * 0.15728640 * 4,
    }
    for name, expected in bytes_billion.items():
        assert load_config(name)["approx_gib"] == pytest.approx(expected * 1e9 / 2**30, rel=0.03), name


# ------------------------------------------------------------------------------------------- mistakes


def error_of(name_or_path) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(name_or_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_name_lists_what_there_is():
    message = error_of("wan3")
    assert "wan3" in message
    assert all(name in message for name in known_configs())
    assert "_wan" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("shfit: 3", "unknown key shfit; known: base, "),
        ("defaults: {steps: 3}", "defaults: unknown key steps; known: num_inference_steps, "),
        ("defaults: {fps: sixteen}", "fps is 'sixteen', expected int"),
        ("defaults: {num_frames: true}", "num_frames is True, expected int"),
        ("base: nowhere", "config nowhere: no such config"),
        ("a: [", "not valid YAML"),
        ("- a\n- b", "expected keys and values, found list"),
        ("", "expected keys and values, found NoneType"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, words):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert words in error_of(file)


def test_a_base_cannot_be_its_own(tmp_path):
    file = tmp_path / "loop.yaml"
    file.write_text(f"base: {file}")
    assert "its own base" in error_of(file)


def test_own_config_rests_on_a_released_one(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: stand-in-wan2.1\ndefaults: {num_inference_steps: 4}\n", encoding="utf-8-sig")
    config = load_config(file)
    assert config["defaults"]["num_inference_steps"] == 4
    assert config["defaults"]["solver"] == "euler"
    assert config["base"]["base"]["name"] == "wan2.1-t2v-14B"


# ----------------------------------------------------------------------------------------- tiny model


def test_tiny_config_builds_its_models():
    from diffusers import AutoencoderKLWan
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    from models.wan.transformer import WanTransformer

    config = load_config("tiny")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER.parent / config["tokenizer"], local_files_only=True)
    transformer = WanTransformer(**WanConfig(**config["transformer"]).as_dict())
    vae = AutoencoderKLWan(**config["vae"])
    text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **config["text_encoder"]))
    assert transformer.config.in_dim == vae.config.z_dim
    assert text_encoder.config.d_model == transformer.config.text_dim
    size = sum(p.numel() for model in (transformer, vae, text_encoder) for p in model.parameters())
    assert size < 1_000_000


@pytest.mark.parametrize("text", ["A woman smiles at the camera.", "一个女人对着镜头微笑 🙂", "Ένα κορίτσι", ""])
def test_tiny_tokenizer_knows_every_language(text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER.parent / "assets/tiny_tokenizer", local_files_only=True)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer) <= 1000) == (0, 1, True)
    row = tokenizer(text, padding="max_length", max_length=96, truncation=True, return_tensors="pt")
    length = int(row.attention_mask.sum())
    assert row.input_ids[0, length - 1] == 1
    assert (row.input_ids[0, length:] == 0).all()
    assert tokenizer.unk_token_id not in row.input_ids
    assert tokenizer.decode(row.input_ids[0], skip_special_tokens=True) == text


def test_yaml_files_are_plain_data():
    for file in FOLDER.glob("*.yaml"):
        assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (tiny_vace, {"vace": None}, "has no vace, which is needed here"),
        (tiny_multitalk, {}, "has no multitalk"),
        (tiny_vae, {"vae": {"base_dim": 4, "z_dim": 16, "dim_mult": []}}, "vae: no network can be made of this"),
    ],
)
def test_a_tiny_model_that_cannot_be_made_says_why(make, changes, words):
    config = {key: value for key, value in (load_config("tiny") | changes).items() if value is not None}
    with pytest.raises(UsageError, match=f"config tiny.*{words}"):
        make(config)


class ImageSettings(Settings):
    families: ClassVar[tuple[str, ...]] = ("i2v",)


def test_tiny_image_to_video_config_takes_a_picture():
    config = load_config("tiny-i2v")
    settings, _ = resolve_settings(Namespace(config="tiny-i2v"), ImageSettings)
    wan = Wan(settings, config, Processes(0, 1, torch.device("cpu"), context_parallel=False))
    pictures = [torch.full((1, 3, 40, 30), value) for value in (-0.5, 0.5)]
    features = wan.encode_images(pictures)
    tokens, width = 1 + (32 // 8) ** 2, config["image_encoder"]["hidden_size"]
    assert features.shape == (1, 2 * tokens, width)
    torch.testing.assert_close(wan.encode_images(pictures[1:]), features[:, tokens:])
    assert not torch.allclose(features[:, :tokens], features[:, tokens:])
    transformer = wan.transformer(0)
    latents, y = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 20, 2, 4, 4)
    prompt = Prompt([torch.randn(3, 32)], image=features[:, :tokens])
    with torch.no_grad():
        assert transformer(latents, torch.tensor([500.0]), prompt, condition=y).shape == latents.shape


def test_settings_refuse_families_the_script_cannot_drive():
    with pytest.raises(UsageError, match="family i2v; accepted here are t2v, ti2v"):
        resolve_settings(Namespace(config="tiny-i2v"))


def test_what_a_config_may_set_is_a_setting_of_that_type():
    """configs/ is a floor below the settings; what it accepts under `defaults` is held against their fields here."""
    fields = {name: field for kind in settings_classes() for name, (field, _) in described(kind).items()}
    for name, kind in DEFAULTS.items():
        if name == "guidance_scale":  # one number, or one for each of two experts
            continue
        (given,) = {int: [3], float: [0.5], str: ["x"], list[float]: [[1.0, 0.5]]}[kind]
        typed(given, fields[name].type)
