"""The audio adapter: equivalences, loading, and the guidances built on it. Golden parity is in test_goldens.py."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import WeightsError
from models.audio_adapter import AudioAdapter, audio_windows, frame_ranges, load_audio_avatar
from models.wan.checkpoint import load_transformer
from models.wan.config import WanConfig
from models.wan.schedulers import get_schedule
from models.wan.slots import Prompt, Slots
from models.wan.tea_cache import TeaCache
from pipelines.denoise import NEGATIVE, POSITIVE, Expert, denoise
from pipelines.guidance import (
    NO_AUDIO,
    NO_PAIR,
    UNCONDITIONAL,
    audio_native,
    branch_plugins,
    branch_prompts,
    three_branch,
)
from pipelines.memory import offload_groups
from tests import tiny
from tests.test_distributed import torchrun
from tests.tiny import DIM, GRID, LAYERS, TIMESTEP

NUM_FRAMES = 9  # of tiny.latents(): three latent frames
FRAME_TOKENS = GRID[0] * GRID[1]
CONDITION = tiny.latents(seed=4, channels=20)
FEATURES = tiny.audio_features()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return tiny.avatar_transformer()


@pytest.fixture(scope="module")
def adapter(model):
    return tiny.audio_adapter(model)


def text(seed: int = 3) -> Prompt:
    image = torch.randn(1, 257, 16, generator=torch.Generator().manual_seed(8))
    return Prompt(tiny.prompt(seed).text, image)


def avatar_forward(model, plugins=(), batch: int = 1, prompt: Prompt | None = None, **options) -> torch.Tensor:
    """A forward pass whose rows differ in nothing but what the plug-ins give them."""
    prompt = prompt or Prompt(text().text * batch, text().image.expand(batch, -1, -1))
    latents, condition = (x.expand(batch, -1, -1, -1, -1) for x in (tiny.latents(), CONDITION))
    return model(latents, TIMESTEP.expand(batch), prompt, condition=condition, plugins=plugins, **options)


# ------------------------------------------------------------------------------------------------ forward passes


def test_without_the_plug_in_it_is_plain_wan_bit_for_bit(model, adapter):
    plain = avatar_forward(model)
    with_speech = avatar_forward(model, [adapter.plugin(FEATURES, NUM_FRAMES)])
    assert (with_speech - plain).abs().max() > 1e-3
    assert torch.equal(avatar_forward(model), plain)  # nothing of the call before is left


def test_an_untrained_adapter_changes_nothing(model):
    """Its audio keys and values start at zero, so that training starts from the plain model."""
    fresh = AudioAdapter(DIM, LAYERS, audio_dim=12)
    assert torch.equal(avatar_forward(model, [fresh.plugin(FEATURES, NUM_FRAMES)]), avatar_forward(model))


def test_rows_hear_by_the_mask_and_not_by_their_place(model, adapter):
    heard, silent = (
        avatar_forward(model, [adapter.plugin(FEATURES, NUM_FRAMES, hears=[hears])])[0] for hears in (True, False)
    )
    assert (heard - silent).abs().max() > 1e-3
    for hears in ([True, False, True], [False, True, False], [True, True, True]):
        rows = avatar_forward(model, [adapter.plugin(FEATURES, NUM_FRAMES, hears=hears)], batch=3)
        expected = torch.stack([heard if row else silent for row in hears])
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="2 rows are said to hear or not, the batch has 3"):
        avatar_forward(model, [adapter.plugin(FEATURES, NUM_FRAMES, hears=[True, False])], batch=3)


def test_of_a_row_that_does_not_hear_remains_the_bias_of_the_audio_values(model, adapter):
    silent = avatar_forward(model, [adapter.plugin(FEATURES, NUM_FRAMES, hears=[False])])
    biases = [block.cross_attn.v_vocal.bias for block in adapter.blocks]
    constant = Slots(cross_attention=[lambda q, _, b=bias: b.expand(*q.shape[:2], -1) for bias in biases])
    torch.testing.assert_close(silent, avatar_forward(model, [lambda *_: constant]), rtol=0, atol=1e-5)
    assert torch.equal(silent, avatar_forward(model, [adapter.plugin(2 * FEATURES, NUM_FRAMES, hears=[False])]))


def test_each_row_has_its_own_speech(model, adapter):
    other = tiny.audio_features(seed=12)
    together = avatar_forward(model, [adapter.plugin(torch.cat((FEATURES, other)), NUM_FRAMES)], batch=2)
    alone = [avatar_forward(model, [adapter.plugin(f, NUM_FRAMES)]) for f in (FEATURES, other)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def record(module) -> list[torch.Tensor]:
    outputs = []
    module.register_forward_hook(lambda _, __, output: outputs.append(output))
    return outputs


def test_a_token_of_the_audio_reaches_the_frames_whose_window_holds_it():
    """17 tokens for 9 frames: the windows of latent frames 0, 1, 2 are tokens 0-5, 0-12 and 4-16 at most."""
    model = tiny.avatar_transformer()
    adapter = tiny.audio_adapter(model)
    terms = record(model.blocks[0].cross_attn)
    tokens = audio_windows(17, NUM_FRAMES)
    for token in range(17):
        changed = FEATURES.clone()
        changed[:, token] += 1
        terms.clear()
        for features in (FEATURES, changed):
            avatar_forward(model, [adapter.plugin(features, NUM_FRAMES)])
        per_frame = (terms[1] - terms[0]).unflatten(1, (3, FRAME_TOKENS)).abs().amax(dim=(0, 2, 3))
        assert torch.equal(per_frame > 1e-6, (tokens == token).any(dim=1)), token


def test_a_part_of_a_clip_hears_its_part_of_the_sound():
    model = tiny.avatar_transformer()
    adapter = tiny.audio_adapter(model)
    heard = record(adapter)
    avatar_forward(model, [adapter.plugin(FEATURES, NUM_FRAMES)])
    part = adapter.plugin(FEATURES, NUM_FRAMES, first_frame=1)
    model(tiny.latents()[:, :, 1:], TIMESTEP, text(), condition=CONDITION[:, :, 1:], plugins=[part])
    torch.testing.assert_close(heard[1], heard[0][:, 1:], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="for 2 latent frames from latent frame 1 on, the video has 3"):
        avatar_forward(model, [part])
    with pytest.raises(ValueError, match="spread over 13 frames is for 4 latent frames, the video has 3"):
        avatar_forward(model, [adapter.plugin(FEATURES, 13)])


def test_one_forward_pass_over_two_processes(tmp_path, model, adapter):
    """36 tokens a process: the middle one of three latent frames of 24 belongs to both."""
    torchrun("tests/audio_worker.py", tmp_path / "out.safetensors")
    ours = load_file(tmp_path / "out.safetensors")
    expected = {
        "frames": avatar_forward(model, [adapter.plugin(FEATURES, NUM_FRAMES)]),
        "clip": avatar_forward(model, [adapter.plugin(FEATURES, NUM_FRAMES, clip_level=True)]),
        "batch": avatar_forward(model, [adapter.plugin(FEATURES, NUM_FRAMES, hears=[False, True])], batch=2),
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("memory", ["group", "sequential"])
def test_offloaded_equals_resident(model, adapter, memory):
    expected = avatar_forward(model, [adapter.plugin(FEATURES, NUM_FRAMES)])
    offloaded = tiny.audio_adapter(model)
    offload_groups(offloaded, torch.device("cpu"), memory, prefetch=False)
    assert torch.equal(avatar_forward(model, [offloaded.plugin(FEATURES, NUM_FRAMES)]), expected)


@pytest.mark.parametrize("layout", [{}, {"audio_hidden_dim": 20}])
def test_bfloat16_stays_close_to_float32(layout):
    def run(dtype):
        model = tiny.avatar_transformer()
        adapter = tiny.audio_adapter(model, **layout).set_compute_dtype(dtype)
        return avatar_forward(model.set_compute_dtype(dtype), [adapter.plugin(FEATURES, NUM_FRAMES)])

    exact, ours = run(torch.float32), run(torch.bfloat16)
    assert ours.dtype == torch.float32
    assert 0 < (ours - exact).norm() / exact.norm() < 0.02


def test_float8_storage_keeps_what_is_small_or_sensitive():
    model = tiny.avatar_transformer()
    exact = avatar_forward(model, [tiny.audio_adapter(model).plugin(FEATURES, NUM_FRAMES)])
    adapter = tiny.audio_adapter(model)
    adapter.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    wide = {name for name, parameter in adapter.named_parameters() if parameter.dtype == torch.float32}
    assert wide == {n for n in wide if "norm" in n or "modulation" in n or "proj_model" in n or "final_head" in n}
    ours = avatar_forward(model, [adapter.plugin(FEATURES, NUM_FRAMES)])
    assert 0 < (ours - exact).norm() / exact.norm() < 0.06


def test_compiled_blocks_share_their_graphs():
    """The audio term is a break in the graph, and the pieces around it are one for all blocks and steps."""
    model = tiny.avatar_transformer(num_layers=12)
    adapter = tiny.audio_adapter(model)
    plugin, prompt = adapter.plugin(FEATURES, NUM_FRAMES), text()
    expected = avatar_forward(model, [plugin])
    for part in (model, adapter):
        part.compile_repeated_blocks(backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        torch.testing.assert_close(avatar_forward(model, [plugin], prompt=prompt), expected, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] < 10


def test_gradients_reach_the_adapter_with_checkpointing_as_without():
    gradients = []
    for checkpointing in (False, True):
        model = tiny.avatar_transformer().train()
        adapter = tiny.audio_adapter(model).requires_grad_(True)
        if checkpointing:
            model.enable_gradient_checkpointing()
        with torch.enable_grad():
            avatar_forward(model, [adapter.plugin(FEATURES, NUM_FRAMES)]).square().mean().backward()
        assert all(parameter.grad is not None for parameter in adapter.parameters())
        gradients.append(
            [adapter.vocal_projector.proj_model.proj.weight.grad, adapter.blocks[0].cross_attn.k_vocal.weight.grad]
        )
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    torch.testing.assert_close(*gradients)


def test_exact_arithmetic_keeps_whole_positions_whole():
    """24 tokens for 9 frames: frames 1 to 5 are tokens 8/3 to 40/3, their middle is 8 exactly; floats say 7.99…"""
    assert frame_ranges(24, 9, exact=True)[1] == (8 - 1 - 5, 8 - 1 + 5)
    assert frame_ranges(24, 9)[1] == (7 - 1 - 5, 7 - 1 + 5)
    for tokens in (161, 167):  # a window of 81 frames at 25 fps, as released
        assert frame_ranges(tokens, 81, exact=True) == frame_ranges(tokens, 81)


# ------------------------------------------------------------------------------------------------------- guidance


def branches(outputs: dict[str, float]):
    """`predict` of branches that answer with a constant, and the list of those that were asked."""
    asked = []

    def predict(branch: str) -> torch.Tensor:
        asked.append(branch)
        return torch.full((2, 3), outputs[branch])

    return predict, asked


@pytest.mark.parametrize(
    ("text_scale", "audio_scale", "needed"),
    [
        (3.0, 5.0, {UNCONDITIONAL, NEGATIVE, POSITIVE}),
        (4.0, 4.0, {UNCONDITIONAL, POSITIVE}),
        (3.0, 1.0, {NEGATIVE, POSITIVE}),
        (0.0, 5.0, {UNCONDITIONAL, NEGATIVE}),
        (1.0, 1.0, {POSITIVE}),
    ],
)
def test_three_branches_by_the_released_formula(text_scale, audio_scale, needed):
    u0, u1, u2 = 0.5, -1.25, 2.0
    predict, asked = branches({UNCONDITIONAL: u0, NEGATIVE: u1, POSITIVE: u2})
    out = three_branch(text_scale, audio_scale)(predict)
    expected = u0 + audio_scale * (u1 - u0) + text_scale * (u2 - u1)
    torch.testing.assert_close(out, torch.full((2, 3), expected))
    assert set(asked) == needed and len(asked) == len(needed)


def test_audio_native_guidance_in_closed_form():
    full, no_audio, no_pair, negative = 2.0, 0.5, -1.0, 0.25
    outputs = {POSITIVE: full, NO_AUDIO: no_audio, NO_PAIR: no_pair, NEGATIVE: negative}
    predict, asked = branches(outputs)
    out = audio_native(2.0, 1.5)(predict)
    torch.testing.assert_close(out, torch.full((2, 3), full + 2.0 * (full - no_audio) + 1.5 * (full - no_pair)))
    assert NEGATIVE not in asked
    out = audio_native(2.0, 1.5, 3.0)(predict)
    expected = full + 2.0 * (full - no_audio) + 1.5 * (full - no_pair) + 3.0 * (full - negative)
    torch.testing.assert_close(out, torch.full((2, 3), expected))
    predict, asked = branches(dict.fromkeys(outputs, 0.75))
    torch.testing.assert_close(audio_native(4.0, 3.0, 2.0)(predict), torch.full((2, 3), 0.75))


def expert(model, adapter, guidance, **options) -> Expert:
    prompts = branch_prompts(text(3), text(5))
    plugins = branch_plugins(adapter, FEATURES, NUM_FRAMES)
    return Expert(model, prompts, guidance, branch_plugins=plugins, **options)


def velocity(model, adapter, guidance) -> torch.Tensor:
    return expert(model, adapter, guidance).velocity(tiny.latents(), TIMESTEP, 0, 1, CONDITION)


def test_audio_native_guidance_at_scales_0_is_the_full_branch(model, adapter):
    full = avatar_forward(model, [adapter.plugin(FEATURES, NUM_FRAMES)], prompt=text(3))
    assert torch.equal(velocity(model, adapter, audio_native(0, 0)), full)


@pytest.mark.parametrize("layout", [{}, {"audio_hidden_dim": 20}], ids=["1.3B", "14B"])
def test_branches_one_by_one_equal_upstreams_batch_of_three(model, layout):
    adapter = tiny.audio_adapter(model, **layout)
    if adapter.is_two_stage:  # the silent row goes through the projector
        features = torch.cat((torch.zeros_like(FEATURES), FEATURES, FEATURES))
        plugin = adapter.plugin(features, NUM_FRAMES)
    else:
        plugin = adapter.plugin(FEATURES, NUM_FRAMES, hears=[False, True, True])
    texts = Prompt([text(seed).text[0] for seed in (5, 5, 3)], text().image.expand(3, -1, -1))
    u0, u1, u2 = avatar_forward(model, [plugin], batch=3, prompt=texts)[:, None]
    assert min((u0 - u1).abs().max(), (u1 - u2).abs().max()) > 1e-3
    expected = u0 + 5.0 * (u1 - u0) + 3.0 * (u2 - u1)
    torch.testing.assert_close(velocity(model, adapter, three_branch(3.0, 5.0)), expected, rtol=1e-4, atol=1e-4)


def test_branches_without_audio_and_without_the_pair_differ(model, adapter):
    """Silence goes through the adapter, which still sees the latents."""
    silence = avatar_forward(model, [adapter.plugin(torch.zeros_like(FEATURES), NUM_FRAMES)], prompt=text(3))
    nothing = avatar_forward(model, [adapter.plugin(FEATURES, NUM_FRAMES, hears=[False])], prompt=text(3))
    full = avatar_forward(model, [adapter.plugin(FEATURES, NUM_FRAMES)], prompt=text(3))
    assert (silence - nothing).abs().max() > 1e-3
    expected = full + 2.0 * (full - silence) + 1.0 * (full - nothing)
    torch.testing.assert_close(velocity(model, adapter, audio_native(2.0, 1.0)), expected, rtol=1e-4, atol=1e-4)


def test_a_short_window_may_be_padded_with_tokens_that_are_seen(model, adapter):
    """Upstream's last window: two latent frames under the sound of three, the third frame's tokens being zeros."""
    latents, condition = tiny.latents()[:, :, :2], CONDITION[:, :, :2]
    options = {"attended_length": 3 * FRAME_TOKENS}
    ours = expert(model, adapter, audio_native(0, 0), **options).velocity(latents, TIMESTEP, 0, 1, condition)
    assert ours.shape == latents.shape

    def run(**padding):
        plugin = adapter.plugin(FEATURES, NUM_FRAMES)
        length = {"seq_len": 3 * FRAME_TOKENS}
        return model(latents, TIMESTEP, text(3), condition=condition, plugins=[plugin], **length, **padding)

    assert torch.equal(ours, run(attend_padding=True))
    assert (ours - run()).abs().max() > 1e-3


def test_step_caches_of_the_branches(model, adapter):
    schedule, guidance = get_schedule("euler", 5, 5.0), three_branch(3.0, 5.0)

    def run(step_caches):
        parts = expert(model, adapter, guidance, step_caches=step_caches)
        return denoise(tiny.latents(), schedule, lambda step: parts, condition=CONDITION)

    plain = run({})
    for threshold, skipped in ((0.0, 0), (1e9, 3)):
        caches = {branch: TeaCache(5, threshold, (1.0, 0.0)) for branch in (UNCONDITIONAL, NEGATIVE, POSITIVE)}
        assert torch.equal(run(caches), plain) == (skipped == 0)
        assert {sum(cache.skipped) for cache in caches.values()} == {skipped}


# -------------------------------------------------------------------------------------------------------- loading

EXPECT = WanConfig(**tiny.CONFIG["transformer"] | {"in_dim": 36, "image_dim": 16})


@pytest.fixture(scope="module")
def released(model, adapter) -> dict[str, torch.Tensor]:
    """As StableAvatar's training writes it: one flat state dict."""
    return model.state_dict() | adapter.state_dict()


def write(tensors: dict, path, wrapped: bool = False):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save({"state_dict": tensors, "global_step": 7} if wrapped else tensors, path)
    return path


def load(path, **options):
    return load_audio_avatar(path, dtype=torch.float32, expect=EXPECT, **options)


def test_the_time_embedding_is_rounded_by_the_loaded_transformer_and_by_no_plug_in(tmp_path, released):
    transformer, loaded = load_audio_avatar(write(released, tmp_path / "a.pt"), dtype=torch.bfloat16, expect=EXPECT)
    plain = tiny.avatar_transformer().set_compute_dtype(torch.bfloat16)
    for ours, exact in zip(*(m.embed_time(torch.tensor([437.0]), "cpu") for m in (transformer, plain)), strict=True):
        assert not torch.equal(ours, exact) and torch.equal(ours, exact.bfloat16().float())
    seen = []

    def listen(tokens, ctx):
        seen.append((ctx.time.clone(), ctx.modulation.clone()))
        return Slots()

    avatar_forward(plain, [listen, loaded.plugin(FEATURES, NUM_FRAMES), listen])
    before, after = seen
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("name", "wrapped"), [("a.pt", False), ("a.pt", True), ("a.safetensors", False)])
def test_released_layouts_load(tmp_path, model, adapter, released, name, wrapped):
    transformer, loaded = load(write(released, tmp_path / name, wrapped))
    assert not any(parameter.requires_grad for part in (transformer, loaded) for parameter in part.parameters())
    found = transformer.state_dict() | loaded.state_dict()
    assert found.keys() == released.keys() and all(torch.equal(found[key], released[key]) for key in released)
    expected = avatar_forward(model, [adapter.plugin(FEATURES, NUM_FRAMES)])
    ours = avatar_forward(transformer, [loaded.plugin(FEATURES, NUM_FRAMES)])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)  # weights lie elsewhere: last bits may differ


def test_the_layout_of_14b_is_told_by_its_tensors(tmp_path, model):
    two_stage = tiny.audio_adapter(model, audio_hidden_dim=20)
    _, loaded = load(write(model.state_dict() | two_stage.state_dict(), tmp_path / "a.pt"))
    assert loaded.is_two_stage and (loaded.config.audio_dim, loaded.config.audio_hidden_dim) == (12, 20)
    expected = avatar_forward(model, [two_stage.plugin(FEATURES, NUM_FRAMES)])
    ours = avatar_forward(model, [loaded.plugin(FEATURES, NUM_FRAMES)])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_weights_keep_norms_and_modulation_in_float32(tmp_path, released):
    path = write({name: tensor.bfloat16() for name, tensor in released.items()}, tmp_path / "a.pt")
    _, adapter = load_audio_avatar(path, expect=EXPECT)
    kept = {name for name, parameter in adapter.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {name for name in adapter.state_dict() if "norm" in name or "modulation" in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocal_projector.blocks.1.ffn.0.weight": None}, "AudioAdapter: 1 missing (vocal_projector.blocks.1.ffn.0"),
        ({"vocal_projector.proj_model.proj.weight": None}, "1 missing (vocal_projector.proj_model.proj.weight)"),
        (
            {"blocks.1.cross_attn.k_vocal.bias": None, "blocks.0.cross_attn.v_vocal.bias": None},
            "2 missing (blocks.0.cr",
        ),
        ({"vocal_projector.gate": torch.ones(1)}, "1 unexpected (vocal_projector.gate)"),
        ({"vocal_projector.final_head.modulation": torch.ones(1, 2, 8)}, "[1, 2, 8] instead of [1, 2, 64]"),
        ({"blocks.1.self_attn.q.weight": None}, "WanTransformer: 1 missing (blocks.1.self_attn.q.weight)"),
        ({"audio_gate.weight": torch.ones(1)}, "WanTransformer: 1 unexpected (audio_gate.weight)"),
    ],
)
def test_missing_and_unexpected_keys_are_counted_and_named(tmp_path, released, change, message):
    tensors = {name: tensor for name, tensor in (released | change).items() if tensor is not None}
    with pytest.raises(WeightsError) as error:
        load(write(tensors, tmp_path / "a.pt"))
    assert message in str(error.value)
    assert error.value.exit_code == 4


def test_plain_wan_weights_are_refused_and_so_are_avatar_weights_elsewhere(tmp_path, model, released):
    with pytest.raises(WeightsError, match="no audio adapter in it"):
        load(write(model.state_dict(), tmp_path / "plain.pt"))
    with pytest.raises(WeightsError, match="StableAvatar weights: .* for infer_audio_avatar.py"):
        load_transformer(write(released, tmp_path / "avatar.pt"), expect=EXPECT)


def test_fine_tuned_audio_weights_beside_their_base(tmp_path, model, adapter, released):
    tuned = {name: tensor + 0.1 for name, tensor in adapter.state_dict().items()}
    adapter_path = write(tuned, tmp_path / "tuned.safetensors")
    whole = write(model.state_dict() | tuned, tmp_path / "whole.pt")
    for base in (released, model.state_dict()):
        for source in (adapter_path, whole):
            transformer, loaded = load(write(base, tmp_path / "base.pt"), adapter_path=source)
            assert all(torch.equal(tensor, tuned[name]) for name, tensor in loaded.state_dict().items())
            assert torch.equal(transformer.patch_embedding.weight, model.patch_embedding.weight)
