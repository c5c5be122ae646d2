"""The estimate against what is built and counted: parameters exactly, arithmetic within a per cent; known figures."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs import FOLDER, load_config
from models.wan.config import VARIANTS, WanConfig
from pipelines.networks import shape_of
from tests import tiny
from tests.test_training_build import config_of
from training.build import load_trainee
from training.config import read_config
from training.estimate import count_parameters, forward_arithmetic, memory_parts, size_of, tokens_of
from training.recipes.base import Conditions
from training.sampler import Bucket
from training.trainee import TrainableStandIn, Trainee

FILES = sorted((FOLDER / "train").glob("*.yaml"))
CPU = torch.device("cpu")
FULL = Bucket(480, 832, 81)


@pytest.mark.parametrize(
    ("recipe", "sets"),
    [
        ("base", ["train.lora.rank=4"]),
        ("base", ["train.trainable=full"]),
        ("base", ["train.lora.targets=[q, ffn.0]", "train.lora.rank=3"]),
        ("stand_in", []),
        ("avatar", ["train.trainable=full"]),
        ("avatar", ["train.trainable=adapter"]),
        ("avatar", ["train.trainable=lora", "train.lora.rank=2"]),
        ("vace", []),
        ("error_recycling", ["error_recycling.variant=talk"]),
        ("error_recycling", ["error_recycling.variant=dance"]),
    ],
)
def test_parameters_are_those_of_the_built_model(tmp_path, recipe, sets):
    config = config_of(tmp_path, recipe, *sets)
    counts, trainee = count_parameters(config), load_trainee(config, CPU)
    assert counts.trained == sum(p.numel() for p in trainee.parameters() if p.requires_grad)
    assert counts.transformer + counts.adapters + counts.lora == size_of(trainee)


@pytest.mark.parametrize("kind", ["text", "image", "stand_in"])
def test_arithmetic_is_what_a_forward_pass_does(kind):
    model = tiny.avatar_transformer() if kind == "image" else tiny.transformer()
    conditions = Conditions(tiny.prompt())
    reference = 0
    if kind == "image":
        prompt = tiny.prompt()
        prompt.image = torch.zeros(1, 257, 16)
        conditions = Conditions(prompt, tiny.latents(channels=20))
    trainee = Trainee(model, stand_in=TrainableStandIn(tiny.DIM, tiny.LAYERS, rank=1))
    if kind == "stand_in":
        photo = torch.randn(1, 16, 1, 16, 16)
        reference = 64
        conditions = Conditions(tiny.prompt(), plugins=(lambda t: t.stand_in.encode(t.transformer, photo, tiny.GRID),))
    latents = tiny.latents()
    # PyTorch counts nothing for its fused attention on a CPU; the plain one is two products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trainee(latents, tiny.TIMESTEP, conditions)
    tokens = latents.shape[2] * tiny.GRID[0] * tiny.GRID[1]
    expected = forward_arithmetic(model_shape(model), tokens, reference)
    assert expected.linear + expected.attention == pytest.approx(counter.get_total_flops(), rel=0.01)


def model_shape(model) -> WanConfig:
    return WanConfig(**{name: getattr(model.config, name) for name in WanConfig.__dataclass_fields__})


def test_figures_of_the_released_sizes():
    """14B at 480x832x81: 32760 tokens, 1.68 PFLOP forward; LoRA 4.25 a step, 6.37 with full checkpointing, 5.49 where
    attention's outputs are kept. 1.3B: 0.283, full 0.85 and 1.23.
    """
    large, small = VARIANTS["t2v-14B"], VARIANTS["t2v-1.3B"]
    assert tokens_of(FULL, large) == 32760
    forward = forward_arithmetic(large, 32760)
    figures = [
        forward.linear + forward.attention,
        forward.step(False),
        forward.hardware(False, "full"),
        forward.hardware(False, "attention"),
    ]
    assert [value / 1e15 for value in figures] == pytest.approx([1.678, 4.25, 6.37, 5.49], rel=0.01)
    forward = forward_arithmetic(small, 32760)
    figures = [forward.linear + forward.attention, forward.step(True), forward.hardware(True, "full")]
    assert [value / 1e15 for value in figures] == pytest.approx([0.283, 0.85, 1.23], rel=0.01)


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_every_shipped_configuration_can_be_estimated(file):
    config = read_config(file, ["data.sources=[{path: data}]"])
    if config.recipe == "vae":
        return
    counts = count_parameters(config)
    height, width = config.data.sizes[0]
    tokens = tokens_of(Bucket(height, width, max(config.data.frames)), shape_of(load_config(config.model.config)))
    assert 0 < counts.trained <= counts.transformer + counts.adapters + counts.lora
    ranks = 8 if config.memory.sharding == "zero2" else 1
    assert sum(memory_parts(config, counts, tokens, ranks).values()) < 141e9  # an H200, or eight


def test_memory_of_a_lora_of_14b(tmp_path):
    """Rank 128: 613.4 M parameters, 9.8 GB with gradient and moments; 26.8 GB of checkpoints."""
    config = config_of(
        tmp_path, "base", "model.config=wan2.1-t2v-14B", "train.lora.rank=128", "data.resolutions=[480x832]"
    )
    counts = count_parameters(config)
    assert counts.lora == counts.trained == pytest.approx(613.4e6, rel=1e-3)
    parts = memory_parts(config, counts, 32760)
    assert parts["training"] / 1e9 == pytest.approx(9.8, rel=0.01)
    assert parts["kept for the backward pass"] / 1e9 == pytest.approx(26.8, rel=0.01)
    assert parts["weights"] / 1e9 == pytest.approx(28.6, rel=0.01)
    assert parts["one block"] / 1e9 == pytest.approx(15.4, rel=0.02)
    eight = config_of(tmp_path, "base", "model.config=wan2.1-t2v-14B", "train.lora.rank=128", "optim.name=adamw8bit")
    assert memory_parts(eight, counts, 32760)["training"] == counts.trained * 10


def test_sharding_shares_out_what_the_optimizer_has():
    """14B in full with AdamW: 16 bytes a weight of masters, gradients and moments, and 2 of the model's gradients in
    bfloat16. ZeRO-2 leaves 4 of these 18 on eight processes, and all on one.
    """
    sets = ["train.trainable=full", "train.lora=null"]
    config, sharded = (read_config("base-14b", [*sets, f"memory.sharding={kind}"]) for kind in ("none", "zero2"))
    counts = count_parameters(config)
    state = [memory_parts(each, counts, 32760, ranks)["training"] for each in (config, sharded) for ranks in (1, 8)]
    assert [round(size / counts.trained, 2) for size in state] == [18, 18, 18, 4]
