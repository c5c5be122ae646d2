"""The memory check: who is refused, what the modes are estimated to need, and which of them is chosen."""

import dataclasses
import gc
import itertools
import weakref

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import infer
from configs import known_configs, load_config
from errors import ResourceError
from models.wan.config import VARIANTS
from models.wan.transformer import WanTransformer
from models.wan.vae import WanVAE
from models.wan.vae_layers import StreamState
from pipelines import pinned
from pipelines.command import resolve_settings
from pipelines.memory import check_memory, place_pipeline, table
from pipelines.needs import GIB, MODES, Needs, VaeCost, estimate_needs, needs_of_config
from pipelines.placement import LADDER, choose_mode, next_mode, place
from tests import tiny

FLAGS = ["--wan_version", "2.1", "--ip_image", "assets/face.png", "--prompt", "x", "--memory", "model"]


@pytest.fixture
def settings(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    return resolve_settings(infer.parse_args(FLAGS))[0]


def estimate(settings, experts=1, **changes):
    settings = dataclasses.replace(settings, **{"memory": "resident"} | changes)
    size = (settings.height, settings.width, settings.num_frames)
    needs = estimate_needs(VARIANTS["t2v-14B"], *size, experts=experts, photos=len(settings.ip_image), encodes=False)
    return place(needs, settings.memory, settings.fp8, settings.tiled, True, False, not settings.tiled).device_bytes


def test_each_mode_needs_less_and_the_first_holds_the_weights(settings):
    needs = [estimate(settings, memory=mode, experts=2) for mode in MODES]
    assert needs == sorted(needs, reverse=True)
    weights = 14.288e9 * 2  # specs: 14.288 B parameters in bfloat16
    assert needs[0] > 2 * weights
    assert weights < needs[1] < 2 * weights
    assert needs[2] < 0.4 * weights
    halved = estimate(settings, memory="model", fp8=True)
    assert weights / 2 < halved < estimate(settings, memory="model") - 0.45 * weights


def test_further_weights_are_those_of_all_experts_already():
    shape, size = VARIANTS["t2v-14B"], (64, 64, 5)
    more = {"resident": 7, "model": 4, "group": 2}
    for experts in (1, 2):
        plain = estimate_needs(shape, *size, experts=experts)
        needs = estimate_needs(shape, *size, experts=experts, more=more, more_fp8={"model": 3})
        assert {mode: needs.weights[mode] - plain.weights[mode] for mode in MODES} == more | {"sequential": 0}
        assert [needs.weights_fp8[mode] - plain.weights_fp8[mode] for mode in MODES] == [0, 3, 0, 0]
        assert (needs.expert - plain.expert, needs.expert_fp8 - plain.expert_fp8) == (4, 3)


def test_more_frames_and_pixels_need_more(settings):
    base = estimate(settings)
    assert estimate(settings, num_frames=321) > base
    assert estimate(settings, height=960) > base
    assert estimate(settings, height=960, tiled=True) < estimate(settings, height=960)
    assert estimate(settings, ip_image=("a", "b")) >= base


def test_hopeless_run_is_refused_with_advice(settings, monkeypatch):
    memory = type("Memory", (), {"total": 8 * GIB, "available": 6 * GIB})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    device = torch.device("cpu")
    with pytest.raises(ResourceError) as error:
        check_memory(settings, 9 * GIB, device)
    for part in ("9.0 GiB", "8.0 GiB", "--width 832 --height 480 --num_frames 81", "--memory group", "--tiled"):
        assert part in str(error.value)
    check_memory(settings, 5 * GIB, device)


def test_tight_run_is_warned_of(settings, monkeypatch, caplog):
    memory = type("Memory", (), {"total": 8 * GIB, "available": 6 * GIB})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    check_memory(settings, 7 * GIB, torch.device("cpu"))
    assert "7.0 GiB" in caplog.text


def test_modes_end():
    assert [next_mode(mode) for mode in MODES] == ["model", "group", "sequential", None]


# ------------------------------------------------------------------------------------------------ what is chosen

CARDS = [8, 12, 16, 24, 32, 48, 80]  # GiB
NEEDS = {name: needs for name in known_configs() if (needs := needs_of_config(load_config(name))) is not None}


def needs_of(**changes) -> Needs:
    """A made-up job: an expert of 20 GiB in blocks of 1, a call of 2, a decoder of 3 and 4 of past frames."""
    bytes_of = {"resident": 20, "model": 20, "group": 3, "sequential": 1}
    values = {
        "experts": 1, "expert": 20, "expert_fp8": 11, "weights": bytes_of,
        "weights_fp8": {"resident": 11, "model": 11, "group": 2, "sequential": 1},
        "call": 2, "kept_text": 0, "kept_photos": 0, "text_encoder": 10, "image_encoder": 0, "vae": 0,
        "encode": 0, "encode_past": 0, "decode": 3, "decode_past": 4, "tile": 1, "tiles_past": 8,
    }  # fmt: skip
    in_bytes = {
        name: {mode: gib * GIB for mode, gib in value.items()} if isinstance(value, dict) else value * GIB
        for name, value in (values | changes).items()
    }
    return Needs(**in_bytes | {"experts": (values | changes)["experts"]})


@pytest.mark.parametrize(
    ("device", "ram", "changes", "name", "keeps", "past_on_device", "text_on_device"),
    [
        (40, 60, {}, "resident", True, True, True),
        (27, 60, {}, "model", True, True, True),  # resident has 27 GiB at once while it decodes
        (25, 60, {"decode_past": 1, "decode": 1}, "resident", True, True, True),
        (24, 10, {}, "model", False, True, True),  # the RAM has no room for the weights: they are read again
        (12, 60, {}, "group", True, True, True),
        (8, 60, {}, "group", True, False, False),  # past frames and umT5 go to the RAM
        (12, 50, {"experts": 2}, "group", True, True, True),
        (12, 30, {"experts": 2}, "group", False, True, True),  # the RAM holds one expert
        (20, 15, {}, "resident, fp8", True, True, True),  # the RAM does not hold the weights for `group`
        (14, 15, {}, "model, fp8", True, True, True),
        (8, 17, {}, "group, fp8", True, False, False),
        (5, 60, {}, "sequential", True, False, False),  # exact, where float8 does not help
        (4, 60, {}, "sequential, tiles", True, False, False),
    ],
)
def test_the_fastest_mode_that_fits(device, ram, changes, name, keeps, past_on_device, text_on_device):
    chosen = choose_mode(needs_of(**changes), device * GIB, ram * GIB)
    assert chosen.fits
    found = (chosen.name, chosen.keeps_weights, chosen.past_on_device, chosen.text_on_device)
    assert found == (name, keeps, past_on_device, text_on_device), chosen.passed_over


def test_the_choice_says_what_was_passed_over_and_never_refuses():
    assert choose_mode(needs_of(), 12 * GIB, 60 * GIB).passed_over == "model would need 22.0 GiB"
    assert "GiB of RAM" in choose_mode(needs_of(), 20 * GIB, 15 * GIB).passed_over
    hopeless = choose_mode(needs_of(), 1 * GIB, 1 * GIB)
    assert not hopeless.fits and hopeless.memory == "sequential" and hopeless.tiled


def test_what_the_user_asked_for_is_what_there_is():
    for memory in MODES:
        for fp8 in (False, True):
            chosen = choose_mode(needs_of(), 24 * GIB, 60 * GIB, memory=memory, fp8=fp8)
            assert (chosen.memory, chosen.fp8, chosen.tiled) == (memory, fp8, False)
    assert not choose_mode(needs_of(), 24 * GIB, 60 * GIB, memory="group").text_on_device  # as ever
    assert choose_mode(needs_of(), 12 * GIB, 60 * GIB, fp8=True).name == "group, fp8"
    assert choose_mode(needs_of(), 20 * GIB, 15 * GIB, fp8=False).fp8 is False
    assert choose_mode(needs_of(), 80 * GIB, 60 * GIB, tiled=True).name == "resident, tiles"
    assert choose_mode(needs_of(), 4 * GIB, 60 * GIB, tiled=False).tiled is False


def test_a_cpu_has_one_memory():
    for free, memory, fits in ((100, "resident", True), (23, "model", True), (2, "model", False)):
        chosen = choose_mode(needs_of(), free * GIB, free * GIB, device="cpu")
        assert (chosen.memory, chosen.fits, chosen.fp8) == (memory, fits, False)
        assert not chosen.text_on_device and chosen.keeps_weights == (memory == "resident")


@pytest.mark.parametrize("name", NEEDS)
def test_every_model_fits_what_was_free_and_more_memory_is_never_slower(name):
    needs = NEEDS[name]
    speed = {(mode, fp8): rank for rank, (mode, fp8, _) in reversed(list(enumerate(LADDER)))}
    before = None
    for card in CARDS:
        chosen = choose_mode(needs, card * GIB, 60 * GIB)
        assert not chosen.fits or chosen.device_bytes < card * GIB and chosen.host_bytes <= 60 * GIB
        rank = (not chosen.fits, chosen.tiled, speed[chosen.memory, chosen.fp8])
        assert before is None or rank <= before, f"{card} GiB: {chosen}"
        before = rank
    assert chosen.fits and not chosen.tiled and not chosen.fp8


def test_the_table_in_the_readme_is_what_the_function_says(request):
    assert table() in (request.config.rootpath / "README.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ pinned RAM


def test_pinned_weights_are_the_same_in_fewer_bytes(monkeypatch):
    """Pretended: what torch would round up to the next power of two is that already, or it does not count."""
    taken = []
    monkeypatch.setattr(pinned, "BUFFER", 2**17)
    monkeypatch.setattr(
        pinned, "empty_pinned", lambda size: taken.append(size) or torch.full((size,), 255, dtype=torch.uint8)
    )
    model, expected = tiny.transformer().to(torch.bfloat16), tiny.transformer().to(torch.bfloat16)
    model.head.scale_of_a_test = torch.nn.Parameter(torch.tensor(3.0))  # of another dtype and without an axis
    pinned.pin_weights(model)
    for name, parameter in expected.named_parameters():
        assert (model.get_parameter(name) == parameter).all(), name
        assert model.get_parameter(name).dtype == parameter.dtype
    assert model.head.scale_of_a_test == 3
    assert all(size & (size - 1) == 0 and size <= 2**17 for size in taken) and len(taken) > 2
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(storages) == len(taken)
    places = sorted((parameter.data_ptr(), parameter.nbytes) for parameter in model.parameters())
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(places))


@pytest.mark.parametrize("itemsize", [2, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_pinned_weights_take_what_is_estimated(variant, itemsize):
    with torch.device("meta"):
        model = WanTransformer(**VARIANTS[variant].as_dict())
    sizes = [parameter.numel() * itemsize for parameter in model.parameters()]
    places, buffers = pinned.plan_buffers(sizes)
    assert sorted(number for of_buffer in places for number in of_buffer) == list(range(len(sizes)))
    assert sum(sizes) <= sum(buffers) <= pinned.pinned_bytes(sum(sizes)) <= sum(sizes) + 1.6 * pinned.BUFFER
    assert sum(buffers) < 0.8 * sum(map(pinned.power_of_two, sizes))  # one by one


def test_a_pipelines_parts_are_pinned_but_for_the_vae(monkeypatch):
    parts = {"unet": torch.nn.Linear(1, 1), "vae": torch.nn.Linear(1, 1), "scheduler": object()}
    pipeline = type("Pipeline", (), {"components": parts, "enable_group_offload": lambda self, *_, **options: None})()
    moved = []
    monkeypatch.setattr("pipelines.memory.pin_weights", moved.append)
    place_pipeline(pipeline, torch.device("cuda"), "group")
    assert moved == [parts["unet"]]


def test_powers_of_two():
    assert [pinned.power_of_two(size) for size in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [0, 1, 2, 4, 4, 8, 1024, 2048]


def test_weights_that_wait_under_group_are_pinned():
    def in_ram(memory):
        return place(needs_of(expert=20, experts=2), memory, False, False, True, True, True).host_bytes / GIB

    assert in_ram("group") - in_ram("model") == 2 and in_ram("sequential") == in_ram("model")


# ------------------------------------------------------------------------------------------------ what is estimated


class LiveBytes(TorchDispatchMode):
    """How many bytes of tensors live at once, at most and now; those of a module do not count."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.known = {p.untyped_storage()._cdata: 0 for p in module.parameters()}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def freed(self, storage: int) -> None:
        self.now -= self.known.pop(storage)


WAN22 = {
    "base_dim": 20, "decoder_base_dim": 32, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "temperal_downsample": [False, True, True], "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip


@pytest.mark.parametrize("vae", [{"base_dim": 4, "z_dim": 16}, {"base_dim": 24, "z_dim": 16}, WAN22])
def test_the_vaes_estimate_is_what_its_tensors_take(vae):
    """Counted while it runs. The estimate is linear in the width of the network, which here is a small one."""
    model = WanVAE(AutoencoderKLWan(**vae)).eval()
    shape = VARIANTS["ti2v-5B" if vae["z_dim"] == 48 else "t2v-14B"]
    estimated, cells, side = VaeCost.of(shape, vae), 4 * 6, model.spatial_factor
    for run, chunk, work, past in (
        (model.decode_chunk, lambda n: torch.zeros(1, vae["z_dim"], 1, 4, 6), estimated.decode, estimated.decode_past),
        (
            model.encode_chunk,
            lambda n: torch.zeros(1, 3, 4 if n else 1, 4 * side, 6 * side),
            estimated.encode,
            estimated.encode_past,
        ),
    ):
        with LiveBytes(model) as live:
            state = StreamState()
            for number in range(3):
                frames = run(chunk(number), state)  # the ones before are still in use while the next are made
            del frames
            gc.collect()
            assert live.now / 4 / cells == pytest.approx(past, rel=0.02)
            assert live.peak / 4 / cells == pytest.approx(past + work, rel=0.05)
