"""The configuration of training: what a file gives, what is refused, in one line with the place."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs import FOLDER
from errors import UsageError
from training.config import DEFAULTS, RECIPES, TRAINABLE, Config, read_config, resolved_yaml
from training.config_fields import fields_of, is_block
from training.config_file import files_of

PROJECT = Path(__file__).parent.parent
LEAST = {
    "recipe": "base",
    "output": "runs/x",
    "model": {"config": "tiny"},
    "data": {"sources": [{"path": "data/people"}], "resolutions": ["64x64"]},
}
FILES = sorted((FOLDER / "train").glob("*.yaml"))


def write(tmp_path, text) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False))
    return path


def refused(tmp_path, text, *sets) -> str:
    with pytest.raises(UsageError) as caught:
        read_config(write(tmp_path, text), sets)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value).replace(f"{tmp_path}/", "")


def least(**more) -> dict:
    return LEAST | more


# ------------------------------------------------------------------------------------------ what is read


def test_a_file_and_what_is_set_over_it(tmp_path):
    path = write(tmp_path, least(train={"steps": 20, "global_batch": 8}))
    config = read_config(path, ["train.steps=50", "optim.lr=3e-4", "data.frames=[17, 9]", "seed=7"])
    assert (config.train.steps, config.train.global_batch, config.seed) == (50, 8, 7)
    assert config.optim.lr == 3e-4 and config.data.frames == (17, 9)
    assert config.data.sizes == ((64, 64),) and config.data.sources[0].repeat == 1
    assert config.ema is None and config.avatar is None and config.stand_in is None


def test_scientific_notation_is_a_number(tmp_path):
    """PyYAML alone reads 1e-4 as text."""
    text = yaml.safe_dump(LEAST) + "optim: {lr: 1e-4, eps: 1.e-9}\n"
    assert read_config(write(tmp_path, text)).optim.lr == 0.0001
    assert read_config(write(tmp_path, text)).optim.eps == 1e-9


def test_lone_values_are_lists_of_one(tmp_path):
    config = read_config(write(tmp_path, LEAST), ["data.frames=17", "data.resolutions=32x64"])
    assert config.data.frames == (17,) and config.data.sizes == ((32, 64),)


def test_an_optional_block_is_there_when_it_is_given(tmp_path):
    assert read_config(write(tmp_path, least(ema={}))).ema.decay == 0.999
    assert read_config(write(tmp_path, least(ema={"decay": 0.5}))).ema.decay == 0.5
    assert read_config(write(tmp_path, least(ema={"decay": 0.5})), ["ema=null"]).ema is None
    assert read_config(write(tmp_path, least(ema=None)), ["ema.every=2"]).ema.every == 2


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_files_are_read(file):
    config = read_config(file.stem)
    assert config == read_config(file)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_files_ask_for_nothing_that_is_not_there(file):
    from training.start import refuse_unbuilt

    refuse_unbuilt(read_config(file))


def test_every_recipe_has_a_tiny_file():
    assert {f"tiny-{recipe}" for recipe in RECIPES} <= {file.stem for file in FILES}
    assert {read_config(f"tiny-{recipe}").recipe for recipe in RECIPES} == set(RECIPES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_written_back_reads_equal(file, tmp_path):
    config = read_config(file, ["seed=11", "optim.lr=1e-7", "ema.decay=0.9", "data.cache='a b: ü'"])
    written = resolved_yaml(config)
    again = read_config(write(tmp_path, written))
    assert again == config and resolved_yaml(again) == written
    assert again.seed == 11 and again.data.cache == "a b: ü"


def test_defaults_follow_recipe_and_what_is_trained(tmp_path):
    path = write(tmp_path, LEAST)
    assert read_config(path).optim.lr == 1e-4 and read_config(path).train.noise.weighting == "bell"
    full = read_config(path, ["train.trainable=full"])
    assert full.optim.lr == 1e-5 and full.train.noise.weighting == "none" and full.train.lora is None
    given = read_config(path, ["train.trainable=full", "optim.lr=0.5"])
    assert given.optim.lr == 0.5
    stand_in = read_config(path, ["recipe=stand_in"])
    assert (stand_in.train.global_batch, stand_in.train.steps, stand_in.train.trainable) == (48, 3000, "adapter")
    avatar = read_config(path, ["recipe=avatar", "model.config=tiny-avatar"])
    assert avatar.train.clip.norm == 0.05 and avatar.data.fps == 25
    shot, film = (
        read_config(path, ["recipe=error_recycling", f"error_recycling.variant={variant}", "model.config=tiny-i2v"])
        for variant in ("shot", "film")
    )
    assert (shot.error_recycling.p.clean, film.error_recycling.p.clean) == (0.2, 0.5)
    assert shot.train.lora.rank == 128 and shot.data.fps is None


def test_every_default_and_condition_names_a_field_that_accepts_it():
    known = fields_of(Config)
    conditions = [only for only, _ in DEFAULTS] + [field.metadata["only"] for _, field in known.values()]
    for only in conditions:
        for name, values in only.items():
            assert set(values) <= set(known[name][1].metadata["setting"].choices), name
    assert {name for _, better in DEFAULTS for name in better} <= set(known)
    assert set(TRAINABLE) == set(RECIPES)


def test_every_field_has_a_help_and_numbers_have_bounds():
    for name, (kind, field) in fields_of(Config).items():
        if is_block(field):
            continue
        what = field.metadata["setting"]
        assert what.help, name
        if any(number in str(kind) for number in ("int", "float")) and "Source" not in str(kind):
            assert what.low is not None, name


# ------------------------------------------------------------------------------------------ what is refused

TEXT = """recipe: base
output: runs/x
model: {config: tiny}
data:
  sources: [{path: data/people}]
  resolutions: [64x64]
train:
  global_batch: 4
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  step: 5", "run.yaml, line 9: train.step: no such field; did you mean train.steps?"),
        ("  steps: many", "run.yaml, line 9: train.steps is 'many', expected int"),
        ("  steps: 0", "run.yaml, line 9: train.steps 0: accepted are 1 to 1e+09"),
        ("  steps: .nan", "run.yaml, line 9: train.steps is nan, expected int"),
        ("  trainable: lorra", "run.yaml, line 9: train.trainable lorra: accepted are adapter, lora, full; did you"),
        ("  noise: {range: [0.5]}", "run.yaml, line 9: train.noise.range has 1 values, 2 are expected"),
        ("  noise: {range: [0.5, 0.1]}", "run.yaml, line 9: train.noise.range [0.5, 0.1]: the first number must be"),
        ("  noise: 5", "run.yaml, line 9: train.noise is 5, fields and values are expected"),
        ("  noise: null", "run.yaml, line 9: train.noise null: fields of its own are expected"),
        ("  lr: 1e-4", "run.yaml, line 9: train.lr: no such field; did you mean optim.lr?"),
        ("  global_batch: 5", "run.yaml, line 9: train.global_batch is given twice, first in line 8; keep one"),
        ("  trainable: adapter", "run.yaml, line 9: train.trainable adapter: recipe base trains lora, full"),
        ("  micro_batch: 3", "run.yaml, line 8: train.global_batch 4: must be a multiple of train.micro_batch"),
        ("stand_in: {noise: null}", "run.yaml, line 9: stand_in: nothing reads it where recipe is base, only where"),
        ("optim: {name: adafactor, eps: 1e-8}", "run.yaml, line 9: optim.eps 1e-08: nothing reads it where optim"),
        ("optim: {betas: [.9, 1.5]}", "run.yaml, line 9: optim.betas 1.5: accepted are 0 to 0.999999"),
        ("deterministic: on off", "run.yaml, line 9: deterministic is 'on off', expected bool"),
        ("log: {wandb: yes}", "run.yaml, line 9: log.wandb is True, expected str or null (YAML reads yes"),
        ("ema: {decay: 0.9", "run.yaml, line 10: is no YAML"),
        ("<<: {seed: 1}", "run.yaml, line 9: <<: no such field"),
        ("seed: !!python/object/apply:os.getcwd []", "run.yaml, line 9: could not determine a constructor"),
        ("validate: {videos_every: 5}", "run.yaml, line 9: validate.videos_every 5: nothing reads it without"),
        ("validate: {samples: [{prompt: a, sed: 1}]}", "run.yaml, line 9: validate.samples[0]: sed: no such field"),
        ("validate: {samples: [{seed: 1}]}", "run.yaml, line 9: validate.samples[0]: prompt is missing"),
    ],
)  # fmt: skip
def test_one_line_with_file_line_field_and_value(line, expected, tmp_path):
    assert refused(tmp_path, TEXT + line + "\n").startswith(expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("train.step=5", "--set train.step=5: no such field; did you mean train.steps?"),
        ("train.steps=many", "--set train.steps=many: train.steps is 'many', expected int"),
        ("train.steps", "--set train.steps: give a field and its value"),
        ("data.frames=[80]", "--set data.frames=[80]: data.frames [80]: 80 is not 4n+1; the nearest is 81"),
        ("data.frames=[]", "--set data.frames=[]: data.frames []: at least one is needed"),
        ("data.resolutions=480x830", "--set data.resolutions=480x830: data.resolutions [480x830]: accepted are HE"),
        ("data.sources=[{path: a, repeat: 0}]", "--set data.sources=[{path: a, repeat: 0}]: data.sources[0]: "),
        ("model.config=tiny2", "--set model.config=tiny2: model.config tiny2: no such config"),
        ("model.config=wan2.2-t2v-A14B", "model.expert null: wan2.2-t2v-A14B has two experts"),
        ("recipe=avatar", "run.yaml, line 4: model.config tiny: recipe avatar trains image-to-video models"),
        ("model.vae_path=x.pth", "--set model.vae_path=x.pth: model.vae_path x.pth: a tiny model is made"),
        ("model.expert=high", "--set model.expert=high: model.expert high: tiny has one network"),
        ("recipe=error_recycling", "error_recycling.variant is missing (which of SVI's models); accepted are shot"),
        ("train.clip.start_ratio=5", "--set train.clip.start_ratio=5: train.clip.start_ratio 5: nothing reads it"),
    ],
)  # fmt: skip
def test_what_is_set_is_held_to_the_same(given, expected, tmp_path):
    message = refused(tmp_path, LEAST, given).replace("run.yaml: ", "")
    assert message.startswith(expected)


def test_every_field_of_another_recipe_is_refused_by_name(tmp_path):
    """Whatever a recipe does not read is refused, and whatever is not refused is written back."""
    conditional = [name for name, (_, field) in fields_of(Config).items() if "recipe" in field.metadata["only"]]
    assert len(conditional) > 10
    for recipe in RECIPES:
        written = yaml.safe_load(resolved_yaml(read_config(f"tiny-{recipe}")))
        for name in conditional:
            _, field = fields_of(Config)[name]
            is_read = recipe in field.metadata["only"]["recipe"]
            value = written
            for part in name.split("."):
                value = value.get(part, "absent") if isinstance(value, dict) else "absent"
            assert (value != "absent") == is_read, (recipe, name)
            if not is_read:
                with pytest.raises(UsageError, match=f"{name}.*nothing reads it where recipe is {recipe}"):
                    read_config(f"tiny-{recipe}", [f"{name}=" + ("{}" if is_block(field) else value_for(field))])


def value_for(field) -> str:
    """Some value that the field accepts."""
    what = field.metadata["setting"]
    if field.type is bool:
        return "false"
    if what.choices or what.low is None:
        return "[]" if "tuple" in str(field.type) else (what.choices or ("some text",))[0]
    return f"{what.low:g}"


def test_files_that_the_model_would_not_read_are_refused(tmp_path):
    path = write(tmp_path, LEAST | {"model": {"config": "wan2.1-t2v-1.3B"}})
    with pytest.raises(UsageError, match="image_encoder_path a.pth: wan2.1-t2v-1.3B has no CLIP"):
        read_config(path, ["model.image_encoder_path=a.pth"])
    with pytest.raises(UsageError, match="pretrained_wav2vec_path w: of error_recycling only variant talk hears"):
        read_config("svi-shot-14b", ["model.pretrained_wav2vec_path=w"])
    assert read_config("avatar-1.3b", ["model.pretrained_wav2vec_path=w"]).model.pretrained_wav2vec_path == "w"


def test_pro_is_of_two_experts_and_has_defaults_of_its_own():
    config = read_config("svi-pro-a14b-high")
    assert (config.model.expert, config.error_recycling.image_frames) == ("high", 1)
    assert config.error_recycling.p.motion == 0.75 and read_config("svi-film-14b").error_recycling.p.motion == 0.9
    with pytest.raises(UsageError, match="variant pro: is of Wan2.2's two experts"):
        read_config("svi-shot-14b", ["error_recycling.variant=pro"])


def test_missing_fields_and_files(tmp_path):
    assert refused(tmp_path, {"output": "x"}) == (
        "run.yaml: recipe is missing (what is trained); accepted are base, vae, stand_in, avatar, vace, error_recycling"
    )
    without_data = {name: value for name, value in LEAST.items() if name != "data"}
    assert refused(tmp_path, without_data) == "run.yaml: data.sources is missing (where the videos are)"
    with pytest.raises(UsageError, match="--config tiny-bas: no such file; did you mean tiny-base?"):
        read_config("tiny-bas")
    with pytest.raises(UsageError, match="is no UTF-8 text"):
        (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
        read_config(tmp_path / "b.yaml")


def test_the_global_batch_is_shared_out_evenly(tmp_path):
    config = read_config(write(tmp_path, TEXT + "  micro_batch: 2\n"))
    assert config.accumulation(1) == 2 and config.accumulation(2) == 1
    with pytest.raises(UsageError, match=r"line 8: train.global_batch 4: .* 2 x 3; give 6 for instance"):
        config.accumulation(3)


def test_nothing_changes_a_configuration(tmp_path):
    config = read_config(write(tmp_path, LEAST))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 3


def test_no_torch_is_loaded():
    code = "import sys, training.config; training.config.read_config('tiny-base'); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


def test_null_turns_off_a_block_that_nothing_would_read():
    """So a file with a LoRA's shape trains all weights by two settings."""
    config = read_config("tiny-base", ["train.trainable=full", "train.lora=null"])
    assert config.train.trainable == "full" and config.train.lora is None
    with pytest.raises(UsageError, match="train.lora null: fields of its own are expected"):
        read_config("tiny-base", ["train.lora=null"])


def test_the_recipe_of_the_command_is_the_files_or_in_its_place(tmp_path):
    assert read_config("tiny-base", recipe="base").recipe == "base"
    with pytest.raises(
        UsageError, match="line 2: recipe is base, --recipe vae; give one of tiny-vae"
    ):
        read_config("tiny-base", recipe="vae")
    text = "output: x\nmodel: {config: tiny}\ndata: {sources: [{path: data}]}\n"
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert read_config(tmp_path / "run.yaml", recipe="vae").recipe == "vae"


def test_every_recipe_has_a_tiny_file_that_its_name_finds():
    for recipe in RECIPES:
        assert f"tiny-{recipe}" in files_of(recipe)
        assert all(read_config(name).recipe == recipe for name in files_of(recipe))


def test_the_commands_in_place_of_upstreams_are_those_of_files_that_are_there():
    text = (FOLDER.parent / "README.md").read_text("utf-8")
    table = text[text.index("| theirs | ours |") :].partition("\n\n")[0]
    named = re.findall(r"--config ([\w.-]+)", table)
    assert len(named) >= 10
    for name in named:
        assert read_config(name).recipe in RECIPES
    shaped = read_config("avatar-1.3b-lora", ["data.resolutions=[480x832, 832x480]"])
    assert shaped.data.sizes == ((480, 832), (832, 480)) and shaped.train.lora.alpha == 64


def test_a_two_expert_model_has_a_file_for_each_expert():
    """They differ in nothing else, and in where they write."""
    for high in sorted(path for path in (FOLDER / "train").glob("*-high.yaml")):
        one, other = read_config(high), read_config(high.with_name(high.name.replace("-high", "-low")))
        assert (one.model.expert, other.model.expert) == ("high", "low") and one.output != other.output
        same = dataclasses.replace(other, model=one.model, output=one.output)
        assert same == one
