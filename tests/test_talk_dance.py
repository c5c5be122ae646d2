"""SVI-Talk's audio layers and guidance, SVI-Dance's pose embedder, and the files both come in."""

import numpy
import pytest
import torch
from safetensors.torch import save_file

import download_models
from errors import InputError, WeightsError
from models.lora import read_lora
from models.multitalk import Speech, audio_window, latent_windows, load_multitalk
from models.pose_embedder import KEY, PoseEmbedder, load_pose_embedder
from models.wan.schedulers import get_schedule
from pipelines.denoise import NEGATIVE, POSITIVE, Expert, denoise, two_branch
from pipelines.guidance import UNCONDITIONAL, three_branch
from pipelines.long_video.dance import fit_pose, read_poses
from pipelines.memory import offload_groups
from pipelines.tiny import fill_from_seed, tiny_pose_embedder
from preprocess.video import read_frames
from preprocess.video_writer import write_video
from tests import tiny
from tests.tiny import CONFIG, DIM, GRID, LAYERS, TIMESTEP

FRAMES = 9  # video frames of tiny.latents


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def forward(*plugins, model=None, latents=None, prompt=None) -> torch.Tensor:
    model, latents = model or tiny.transformer(), tiny.latents() if latents is None else latents
    return model(latents, TIMESTEP.expand(len(latents)), prompt or tiny.prompt(), plugins=plugins)


def speech(start: int = 4) -> Speech:
    return tiny.multitalk().speech(tiny.audio(20), start, FRAMES)


# -------------------------------------------------------------------------------------------------- audio windows


def test_windows_repeat_the_audio_s_ends():
    audio = torch.arange(10.0).view(10, 1, 1)  # each frame is its own number
    at_start = audio_window(audio, 0, 5)[0, :, :, 0, 0]
    assert at_start.tolist() == [[0, 0, 0, 1, 2], [0, 0, 1, 2, 3], [0, 1, 2, 3, 4], [1, 2, 3, 4, 5], [2, 3, 4, 5, 6]]
    at_end = audio_window(audio, 8, 5)[0, :, :, 0, 0]
    assert at_end.tolist() == [[6, 7, 8, 9, 9], [7, 8, 9, 9, 9], [8, 9, 9, 9, 9], [9] * 5, [9] * 5]
    assert (audio_window(audio, 300, 5) == 9).all()


def test_a_latent_frame_hears_its_four_video_frames():
    first, latter = latent_windows(audio_window(torch.arange(40.0).view(40, 1, 1), 10, 9))
    assert first.flatten().tolist() == [8, 9, 10, 11, 12]
    assert latter[0, :, :, 0, 0].tolist() == [
        [9, 10, 11, 12, 13, 14, 15, 16],  # frames 11 to 14, two on either side
        [13, 14, 15, 16, 17, 18, 19, 20],
    ]


# --------------------------------------------------------------------------------------------------- audio layers


def test_with_projections_of_zero_it_is_plain_wan_bit_for_bit():
    layers = tiny.multitalk()
    for block in layers.blocks:
        block.audio_cross_attn.proj.weight.zero_()
        block.audio_cross_attn.proj.bias.zero_()
    assert torch.equal(forward(layers.speech(tiny.audio(20), 0, FRAMES)), forward())
    assert (forward(speech()) - forward()).abs().max() > 1e-2


def test_audio_is_heard_by_its_own_latent_frame_alone():
    """A change of one latent frame's audio changes the first block's output there and nowhere else."""
    model, layers = tiny.transformer(), tiny.multitalk()
    recorded = []
    model.blocks[0].register_forward_hook(lambda _, __, output: recorded.append(output))
    given = speech()
    changed = Speech(layers, given.first, given.latter.clone())
    changed.latter[:, 0] += 1
    forward(given, model=model)
    forward(changed, model=model)
    difference = (recorded[1] - recorded[0])[0].unflatten(0, (3, GRID[0] * GRID[1])).abs().amax((1, 2))
    assert difference[0] == difference[2] == 0
    assert difference[1] > 1e-2


def test_audio_tokens_are_made_once_and_calls_leave_nothing_behind():
    model, layers = tiny.transformer(), tiny.multitalk()
    calls = []
    layers.audio_proj.register_forward_hook(lambda *_: calls.append(1))
    clip = layers.speech(tiny.audio(20), 0, FRAMES)
    heard = forward(clip, model=model)
    assert torch.equal(forward(clip, model=model), heard)
    assert len(calls) == 1
    assert torch.equal(forward(model=model), forward())


def test_branches_one_by_one_are_the_branches_of_a_batch():
    clip = speech()
    one_by_one = [forward(clip), forward(clip.silent())]
    both = Speech(
        *(clip.layers, torch.cat((clip.first, clip.silent().first))), torch.cat((clip.latter, 0 * clip.latter))
    )
    prompt = tiny.prompt()
    prompt.text = prompt.text * 2
    batch = forward(both, latents=tiny.latents().expand(2, -1, -1, -1, -1), prompt=prompt)
    torch.testing.assert_close(batch, torch.cat(one_by_one), rtol=0, atol=1e-4)
    assert (one_by_one[0] - one_by_one[1]).abs().max() > 1e-2


def test_bfloat16_stays_close_to_float32():
    model, layers = (part.set_compute_dtype(torch.bfloat16) for part in (tiny.transformer(), tiny.multitalk()))
    assert layers.blocks[0].norm_x.weight.dtype == torch.float32
    ours = forward(layers.speech(tiny.audio(20), 4, FRAMES), model=model)
    exact = forward(speech())
    assert 0 < (ours - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("memory", ["group", "sequential"])
def test_offloaded_is_resident(memory):
    layers = tiny.multitalk()
    offload_groups(layers, torch.device("cpu"), memory, prefetch=False)
    assert torch.equal(forward(layers.speech(tiny.audio(20), 4, FRAMES)), forward(speech()))


def test_audio_that_does_not_fit_is_refused():
    layers = tiny.multitalk()
    with pytest.raises(ValueError, match=r"audio states of shape \(20, 12, 5\)"):
        layers.speech(torch.zeros(20, 12, 5), 0, FRAMES)
    with pytest.raises(ValueError, match="the audio is of 4 latent frames, the video has 3"):
        forward(layers.speech(tiny.audio(20), 0, 13))
    with pytest.raises(ValueError, match="one size, without padding"):
        tiny.transformer()(list(tiny.latents()), TIMESTEP, tiny.prompt(), plugins=[speech()], seq_len=80)


# ------------------------------------------------------------------------------------------------------- guidance


def test_each_branch_gets_its_own_plugins():
    model, clip = tiny.transformer(), speech()
    prompts = {POSITIVE: tiny.prompt(1), NEGATIVE: tiny.prompt(2), UNCONDITIONAL: tiny.prompt(2)}
    plugins = {POSITIVE: [clip], NEGATIVE: [clip], UNCONDITIONAL: [clip.silent()]}
    expert = Expert(model, prompts, three_branch(2.0, 5.0), branch_plugins=plugins)
    c, a, s = (
        forward(plugins[branch][0], model=model, prompt=prompts[branch])
        for branch in (POSITIVE, NEGATIVE, UNCONDITIONAL)
    )
    guided = expert.velocity(tiny.latents(), TIMESTEP, 0, 4)
    torch.testing.assert_close(guided, s + 2 * (c - a) + 5 * (a - s), rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- pose


def test_pose_is_added_to_the_patch_tokens():
    model, pose = tiny.transformer(), tiny.pose()
    entered = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    plain, posed = forward(model=model), forward(pose, model=model)
    torch.testing.assert_close(entered[1] - entered[0], pose.tokens.float(), rtol=0, atol=1e-5)
    assert (posed - plain).abs().max() > 1e-2
    assert torch.equal(forward(model=model), plain)


def test_pose_of_another_size_or_length_is_refused():
    embedder = tiny_pose_embedder(CONFIG)
    for shape in ((8, 64, 96, 3), (9, 60, 96, 3)):
        with pytest.raises(ValueError, match="a pose video of shape"):
            embedder.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="the pose video has a grid of"):
        forward(embedder.encode(torch.zeros(13, 64, 96, 3)))


def test_pose_in_both_branches_or_in_one():
    model, pose = tiny.transformer(), tiny.pose()
    prompts = {POSITIVE: tiny.prompt(1), NEGATIVE: tiny.prompt(2)}
    schedule = get_schedule("euler", 2, 5.0)

    def run(**plugins):
        expert = Expert(model, prompts, two_branch(2.0), **plugins)
        return denoise(tiny.latents(), schedule, lambda step: expert)

    both, in_branches = run(plugins=[pose]), run(branch_plugins={POSITIVE: [pose], NEGATIVE: [pose]})
    assert torch.equal(both, in_branches)
    assert (both - run(branch_plugins={POSITIVE: [pose]})).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------- files


def lora_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"pipe.dit.blocks.{i}.self_attn.q.lora_{side}.default.weight": torch.randn(shape, generator=generator)
        for i in range(LAYERS)
        for side, shape in (("A", (4, DIM)), ("B", (DIM, 4)))
    }


def test_released_layout_gives_the_same_layers(tmp_path):
    saved = tiny.multitalk().state_dict()
    assert {name.split(".")[0] for name in saved} == {"audio_proj", "blocks"}
    save_file(saved, tmp_path / "multitalk.safetensors")
    layers = load_multitalk(tmp_path / "multitalk.safetensors", tiny.transformer(), dtype=torch.float32)
    assert layers.config.audio_dim == tiny.multitalk().config.audio_dim
    assert all(torch.equal(tensor, saved[name]) for name, tensor in layers.state_dict().items())
    # not bit-equal: a mapped weight may begin anywhere in memory, and the CPU's kernels differ by alignment
    ours = forward(layers.speech(tiny.audio(20), 4, FRAMES))
    torch.testing.assert_close(ours, forward(speech()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.1.norm_x.bias": None}, ["1 missing (blocks.1.norm_x.bias)", "40 blocks of width 5120"]),
        ({"blocks.2.norm_x.bias": torch.zeros(DIM)}, ["1 unexpected (blocks.2.norm_x.bias)"]),
        (
            {"blocks.0.audio_cross_attn.q_linear.weight": torch.zeros(8, 8)},
            ["blocks.0.audio_cross_attn.q_linear.weight [8, 8] instead of [64, 64]"],
        ),
        ({"audio_proj.proj1.weight": torch.zeros(16, 78)}, ["takes 78 and", "windows of 5"]),
        ({"audio_proj.norm.weight": None}, ["no MultiTalk audio layers", "no audio_proj.norm.weight"]),
    ],
)
def test_wrong_multitalk_files_are_refused_by_name(tmp_path, change, words):
    tensors = {name: tensor for name, tensor in (tiny.multitalk().state_dict() | change).items() if tensor is not None}
    save_file(tensors, tmp_path / "multitalk.safetensors")
    with pytest.raises(WeightsError) as error:
        load_multitalk(tmp_path / "multitalk.safetensors", tiny.transformer(), dtype=torch.float32)
    assert error.value.exit_code == 4
    assert all(word in str(error.value) for word in ["multitalk.safetensors", *words])


def test_one_file_holds_a_lora_and_the_embedder(tmp_path):
    file = tmp_path / "svi-dance.safetensors"
    embedder = tiny_pose_embedder(CONFIG)
    for wrapper in ("", "pipe."):
        own = {f"{wrapper}{KEY}{name}": tensor for name, tensor in embedder.state_dict().items()}
        save_file(lora_tensors() | own, file)
        lora = read_lora(file, tiny.transformer(), other_part=KEY)
        assert len(lora.pairs) == LAYERS and not lora.left_out
        read = load_pose_embedder(file, DIM)
        assert all(torch.equal(tensor, embedder.state_dict()[name]) for name, tensor in read.state_dict().items())
        with pytest.raises(InputError, match="pose embedder of SVI-Dance.*--variant dance"):
            read_lora(file, tiny.transformer())


def test_the_download_brings_what_talk_needs():
    wanted = download_models.wanted_configs(download_models.parse_args(["--only", "svi-talk"]))
    assert [config["name"] for config in wanted] == ["svi-talk", "multitalk", "chinese-wav2vec2-base"]


def test_wrong_embedders_are_refused_by_name(tmp_path):
    file = tmp_path / "svi-dance.safetensors"
    save_file(lora_tensors(), file)
    with pytest.raises(WeightsError, match="no pose embedder in it"):
        load_pose_embedder(file, DIM)
    wide = fill_from_seed(PoseEmbedder(2 * DIM), 0).state_dict()
    save_file({f"{KEY}{name}": tensor for name, tensor in wide.items()}, file)
    with pytest.raises(WeightsError, match=r"2 of another shape \(12.bias \[128\] instead of \[64\]"):
        load_pose_embedder(file, DIM)


# ------------------------------------------------------------------------------------------- sound and pose videos


def test_chosen_poses_are_those_frames_in_that_order(tmp_path):
    frames = numpy.zeros((12, 32, 48, 3), numpy.uint8) + 20 * numpy.arange(12, dtype=numpy.uint8)[:, None, None, None]
    write_video(tmp_path / "pose.mp4", [frames], fps=25)
    decoded = read_frames(tmp_path / "pose.mp4")
    for indices in ([3, 4, 5], [9, 10, 11, 0, 1, 0, 1], [7]):
        assert (read_poses(tmp_path / "pose.mp4", indices, 32, 48) == decoded[indices]).all()


def test_poses_keep_their_shape_and_colors():
    frame = numpy.full((20, 10, 3), 255, numpy.uint8)
    frame[::2] = 7
    fitted = fit_pose(frame, 40, 60)
    assert (fitted[:, 20:40] == frame.repeat(2, axis=0).repeat(2, axis=1)).all()
    assert not fitted[:, :20].any() and not fitted[:, 40:].any()
