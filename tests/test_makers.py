"""What the makers hand on from step to step, window to window and clip to clip, with stubs in place of the networks.

A tiny random model makes *some* video whatever it is given: that a sigma is one step off, that a window forgets the
frames before it, that every window has the same noise, does not show in its frames. It does here.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from safetensors.torch import save_file

import infer
import infer_audio_avatar
import infer_face_swap
import infer_long_video
import infer_with_lora
import infer_with_vace
from errors import UserError
from models.lora import StatedScale, read_lora
from models.wan.schedulers import add_noise, expert_index, get_schedule
from pipelines.audio_avatar.pipeline import AvatarMaker
from pipelines.clip_plan import Chain, clips_for, plan_clips
from pipelines.conditions import initial_noise
from pipelines.denoise import NEGATIVE, POSITIVE, NonFiniteLatentsError, PinnedFrames, Step, denoise
from pipelines.face_swap import pipeline as face_swap
from pipelines.face_swap.pipeline import FaceSwapMaker, Segment, SwapVideo, WindowedExpert, swap_schedule
from pipelines.jobs import Job
from pipelines.long_video import pipeline as long_video
from pipelines.long_video.pipeline import LongVideoMaker
from pipelines.text_to_video.pipeline import VideoMaker
from pipelines.vace import pipeline as vace
from pipelines.vace.context import noise_with_references, with_known_frames
from pipelines.vace.pipeline import VaceMaker, WindowWriter, read_control
from pipelines.windows import Window
from preprocess.face import choose_face
from preprocess.face_detection import Face
from preprocess.face_paste import largest_face
from preprocess.progress_bars import ProgressBars
from tests import tiny
from tests.test_lora import RANK, dotted, factors

SCRIPTS = [infer, infer_audio_avatar, infer_face_swap, infer_long_video, infer_with_lora, infer_with_vace]


def random(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maker_of(kind, **attributes):
    """A maker that was not given a model."""
    maker = object.__new__(kind)
    for name, value in attributes.items():
        setattr(maker, name, value)
    return maker


# ------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_setting_that_no_script_has_is_refused_by_name(tmp_path, script):
    file = tmp_path / "run.json"
    settings = {"prompt": ["a man"], "sead": [3], "config": "tiny"}
    file.write_text(json.dumps({"made_by": "Selfsame", "settings": settings}))
    with pytest.raises(UserError, match="sead") as error:
        script.main(script.parse_args(["--config", str(file), "--output", str(tmp_path / "out.mp4")]))
    assert error.value.exit_code in (2, 3)
    assert not (tmp_path / "out.mp4").exists()


# -------------------------------------------------------------------------------------------------------- the loop


class ConstantFlow:
    """An expert whose velocity leads straight to `clean`; remembers the timesteps it was told."""

    def __init__(self, noise, clean):
        self.flow, self.timesteps = noise - clean, []

    def velocity(self, sample, timestep, step, num_steps, condition=None):
        self.timesteps.append(timestep)
        return self.flow


def test_each_steps_guess_of_the_clean_latents_is_at_that_steps_sigma():
    noise, clean = random(1, 4, 2, 4, 4), random(1, 4, 2, 4, 4, seed=1)
    steps: list[Step] = []
    expert = ConstantFlow(noise, clean)
    denoise(noise, get_schedule("euler", 4, 3.0), lambda step: expert, on_step=steps.append)
    assert len(steps) == 4
    for step in steps:
        torch.testing.assert_close(step.clean, clean)


def test_pinned_frames_are_told_that_they_are_clean():
    noise, photo = random(1, 4, 3, 4, 6), random(1, 4, 1, 4, 6, seed=1)
    schedule = get_schedule("euler", 3, 5.0)
    expert = ConstantFlow(noise, 0)
    final = denoise(noise, schedule, lambda step: expert, pinned=PinnedFrames(photo))
    assert torch.equal(final[:, :, :1], photo)
    for told, timestep in zip(expert.timesteps, schedule.timesteps.tolist(), strict=True):
        assert told.unflatten(1, (3, 6)).tolist() == [[[0.0] * 6, [timestep] * 6, [timestep] * 6]]


def test_an_avatars_preview_is_the_clean_frame_whatever_the_step():
    clean, noise = random(5, 4, 2, 2), random(5, 4, 2, 2, seed=1)
    schedule = get_schedule("euler-flow", 5, 3.0)
    maker = maker_of(AvatarMaker, schedule=schedule, timeline=SimpleNamespace(num_latent_frames=5))
    at = [(1 - sigma) * clean + sigma * noise for sigma in schedule.sigmas.tolist()]
    for step in range(5):
        guess = maker.guess(step, at[step], at[step + 1]).clean
        torch.testing.assert_close(guess, clean[2:3].transpose(0, 1)[None], rtol=1e-4, atol=1e-4)


def test_each_expert_has_its_own_guidance_scale():
    for scales, wanted in (((4.0, 3.0), [4.0, 3.0]), ((2.0,), [2.0, 2.0])):
        settings = SimpleNamespace(guidance_scale=scales, negative_prompt="", step_cache="none")
        wan = SimpleNamespace(device="cpu", memory="resident", plugins=list)
        maker = maker_of(VideoMaker, settings=settings, wan=wan, text={"": random(2, 4)}, references=[])
        maker.image_features = None
        experts = [maker.expert(Job("", 0, None), index, tiny.transformer()) for index in (0, 1)]
        answers = {POSITIVE: torch.ones(1), NEGATIVE: torch.zeros(1)}
        assert [expert.guidance(answers.__getitem__).item() for expert in experts] == wanted


def test_every_guidance_branch_has_a_step_cache_of_its_own():
    settings = SimpleNamespace(step_cache="teacache", step_cache_threshold=0.1)
    wan = SimpleNamespace(config={"variant": "t2v-1.3B"})
    maker = maker_of(VideoMaker, settings=settings, wan=wan, schedule=get_schedule("euler", 4, 3.0))
    caches = maker.tea_caches()
    assert set(caches) == {POSITIVE, NEGATIVE}
    assert caches[POSITIVE] is not caches[NEGATIVE]


@pytest.mark.parametrize(
    "error", [NonFiniteLatentsError("NaN at step 1"), torch.cuda.OutOfMemoryError()], ids=["NaN", "memory"]
)
def test_identities_of_the_failed_attempt_are_forgotten(error):
    """They were computed by the backend that gave NaN, or lie on the device that is full."""
    wan = SimpleNamespace(
        attention_backend="flash",
        memory="resident",
        dtype=torch.float32,
        processes=SimpleNamespace(together=False),
        use_attention_backend=lambda name: None,
        use_memory_mode=lambda mode: None,
    )
    maker = maker_of(VideoMaker, wan=wan, _identities={0: "keys and values"})
    maker.mend(error)
    assert maker._identities == {}


def test_where_live_loras_set_in_identities_are_computed_anew(monkeypatch):
    """They are keys and values of the weights as they were."""
    built = []
    wan = SimpleNamespace(
        config={}, with_loras=lambda step, steps: step >= 2, transformer=lambda index, with_loras: transformer
    )
    transformer = SimpleNamespace(is_cache_enabled=False)
    settings = SimpleNamespace(step_cache="none")
    maker = maker_of(VideoMaker, wan=wan, settings=settings, schedule=get_schedule("euler", 4, 3.0))
    maker._identities, maker._with_loras = {0: "of other weights"}, False

    def expert(self, job, index, transformer):
        built.append(dict(self._identities))
        self._identities[index] = "of these weights"

    monkeypatch.setattr(VideoMaker, "expert", expert)
    expert_at = maker.experts(Job("", 0, None))
    for step in range(4):
        expert_at(step)
    assert built == [{0: "of other weights"}, {}]


# -------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(("stabilised", "scale"), [(False, 6 / 9), (True, 6 / 3)])
def test_rank_stabilised_loras_divide_alpha_by_the_root_of_the_rank(stabilised, scale):
    assert StatedScale(6.0, stabilised).of(9) == pytest.approx(scale)


def test_the_metadata_say_whether_a_lora_is_rank_stabilised(tmp_path):
    tensors = dotted("transformer.", "lora_A", "lora_B", lambda name: name)(factors())
    stated = json.dumps({"transformer.lora_alpha": 2 * RANK, "transformer.use_rslora": True})
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": stated})
    lora = read_lora(tmp_path / "lora.safetensors", tiny.transformer())
    assert {pair.scale for pair in lora.pairs.values()} == {2 * RANK / math.sqrt(RANK)}


def test_a_step_at_the_boundary_is_the_first_experts():
    boundary = 0.875
    assert [expert_index(torch.tensor(t), boundary) for t in (1000.0, 875.0, 874.9, 0.0)] == [0, 0, 1, 1]


# ---------------------------------------------------------------------------------------------------------- faces


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_largest_face_is_chosen_wherever_it_is(place):
    faces = [Face((100 * i, 0, 100 * i + (80 if i == place else 40), 60), 0.9) for i in range(3)]
    for order in (faces, faces[::-1]):
        assert choose_face(order) is faces[place]
        assert largest_face(order) is faces[place]


# ------------------------------------------------------------------------------------------------------ face swap


def test_the_background_is_put_back_at_the_noise_of_the_next_step():
    clean, noise, sample = (random(1, 4, 2, 4, 4, seed=seed) for seed in range(3))
    mask = torch.zeros(1, 1, 2, 4, 4)
    mask[..., 2:] = 1
    schedule = get_schedule("euler", 4, 3.0, strength=0.7)
    settings = SimpleNamespace(force_background_consistency=True)
    maker = maker_of(FaceSwapMaker, settings=settings, schedule=schedule, clean=clean, noise=noise, face_mask=mask)
    for step in range(4):
        kept = maker.after_step(step, sample)
        assert torch.equal(kept[..., 2:], sample[..., 2:])
        expected = add_noise(clean, noise, schedule.sigmas[step + 1].item())
        torch.testing.assert_close(kept[..., :2], expected[..., :2])
    assert torch.equal(kept[..., :2], clean[..., :2]), "at the end the background is the input's"


def test_every_seed_noises_the_pasted_video_differently():
    clean = random(1, 16, 2, 4, 4)
    schedule = get_schedule("euler", 4, 3.0, strength=0.7)
    maker = maker_of(FaceSwapMaker, clean=clean, cell=8, schedule=schedule, wan=SimpleNamespace(device="cpu"))
    for seed in (3, 4):
        start = maker.start(Job("", seed, None))
        noise = initial_noise((16, 5, 32, 32), seed)
        torch.testing.assert_close(start, add_noise(clean, noise, schedule.sigmas[0].item()))
        assert torch.equal(maker.noise, noise), "the background is noised with the same"


def test_velocities_of_overlapping_windows_are_cross_faded():
    class Numbered:
        def __init__(self):
            self.calls = 0

        def velocity(self, sample, timestep, step, num_steps, condition=None):
            self.calls += 1
            return torch.full_like(sample, float(self.calls - 1))

    expert = WindowedExpert(Numbered(), [slice(0, 4), slice(2, 6)])
    mixed = expert.velocity(torch.zeros(1, 1, 6, 1, 1), torch.ones(1), 0, 1)
    # Weights 1 2 2 1 each: frames 2 and 3 are shared.
    torch.testing.assert_close(mixed.flatten(), torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 1]))


def test_windows_of_a_long_stretch_share_a_quarter_of_their_frames(monkeypatch):
    """Seen where the maker plans them."""
    planned = []
    monkeypatch.setattr(
        face_swap, "plan_windows", lambda *args, **options: planned.append((*args, options)) or [Window(0, 1)]
    )
    parts = {"bars": ProgressBars(shown=False)}
    monkeypatch.setattr(
        VideoMaker, "__init__", lambda self, wan, *args: vars(self).update(parts, wan=wan, settings=settings)
    )
    settings = SimpleNamespace(num_frames=81, step_cache="none", input_video=__file__)
    video = SimpleNamespace(face=SimpleNamespace(rgb=None), segments=[Segment(0, 197, 0)])

    def no_vae():
        raise KeyboardInterrupt

    wan = SimpleNamespace(transformer_config=SimpleNamespace(vae_spatial_factor=8), vae=no_vae)
    monkeypatch.setattr(face_swap, "swap_schedule", lambda settings: None)
    with pytest.raises(KeyboardInterrupt):
        FaceSwapMaker(wan, {}, video, SimpleNamespace(has_audio=False, start=0.0))
    assert planned == [(50, 21, 6, {"start": 0})]


def test_a_latent_frames_mask_holds_the_face_of_all_its_frames(monkeypatch):
    """A face that moves a cell a frame leaves no outline behind."""

    def paste(frame, place, *_):
        mask = numpy.zeros(frame.shape[:2], numpy.uint8)
        mask[:16, 64 * place : 64 * place + 16] = 255
        return frame, mask

    monkeypatch.setattr(face_swap, "paste_face", paste)
    video = SwapVideo(
        numpy.zeros((5, 64, 320, 3), numpy.uint8), [0, 1, 2, 3, 4], (), SimpleNamespace(rgba=None), *[None] * 2, 16
    )
    (first, first_mask), (group, group_mask) = video.pasted(video.segments[0])
    assert (len(first), len(group)) == (1, 4)
    assert [bool(first_mask[0, 64 * i + 8]) for i in range(5)] == [True, False, False, False, False]
    assert [bool(group_mask[0, 64 * i + 8]) for i in range(5)] == [False, True, True, True, True]


def test_a_distilled_step_at_the_strength_is_kept():
    settings = SimpleNamespace(
        num_inference_steps=4,
        shift=1.0,
        solver="euler",
        timesteps=(1000.0, 750.0, 500.0, 250.0),
        denoising_strength=0.75,
    )
    assert swap_schedule(settings).sigmas.tolist() == [0.75, 0.5, 0.25, 0]


# ----------------------------------------------------------------------------------------------------------- VACE


def test_known_frames_are_kept_by_the_mask_and_shown_in_the_video():
    known = numpy.full((5, 16, 16, 3), 255, numpy.uint8)
    video, mask = with_known_frames(torch.zeros(1, 3, 9, 16, 16), torch.ones(1, 1, 9, 16, 16), known)
    assert video[0, 0, :, 0, 0].tolist() == [1.0] * 5 + [0.0] * 4
    assert mask[0, 0, :, 0, 0].tolist() == [0.0] * 5 + [1.0] * 4


def test_the_last_frames_are_those_last_written_in_whatever_pieces():
    """Frames that the window before made stay as they were written, not as this window's VAE gives them back."""
    written = []
    writer = SimpleNamespace(path=None, write=written.append)
    frames = numpy.arange(9, dtype=numpy.uint8)[:, None, None, None].repeat(3, axis=3)
    known = None
    for first, count in ((0, 5), (4, 7), (6, 0)):
        made = WindowWriter(writer, known, count)
        decoded = frames + first
        if known is not None:
            decoded[: len(known)] += 100
        for piece in numpy.split(decoded, [1, 5]):  # as they are decoded: 1, 4, 4
            made.write(piece)
        known = made.last
        assert known.flatten()[::3].tolist() == list(range(first + 9 - count, first + 9))
    assert numpy.concatenate(written)[:, 0, 0, 0].tolist() == list(range(15))


def test_each_window_has_noise_of_its_own(monkeypatch):
    settings = SimpleNamespace(height=32, width=32, fps=16, quality=5)
    wan = SimpleNamespace(device="cpu", transformer_config=SimpleNamespace(out_dim=16))
    wan.release_transformers = lambda: None
    wan.processes = SimpleNamespace(writes=False, share=lambda value: value)
    windows = [Window(0, 9, 0), Window(4, 13, 5)]
    maker = maker_of(VaceMaker, settings=settings, wan=wan, windows=windows, pictures=[1], references=[])
    maker.bars, maker.schedule, noises = ProgressBars(shown=False), get_schedule("euler", 2, 3.0), []
    monkeypatch.setattr(VaceMaker, "metadata", lambda *args: {})
    monkeypatch.setattr(VaceMaker, "progress", lambda *args: {})
    monkeypatch.setattr(VaceMaker, "denoise", lambda self, job, state: noises.append(self.start(job)))
    monkeypatch.setattr(vace, "VideoWriter", lambda *args, **options: None)
    wan.processes.wait = lambda: None
    wan.processes.share = lambda value: (0, None) if value is None else value
    maker.make(Job("", 7, Path("out.mp4")))
    for number, noise in enumerate(noises):
        expected = noise_with_references((16, 9, 32, 32), 7 + number, 1, last_first=False)
        assert torch.equal(noise, expected)
    assert len(noises) == 2


def test_a_spread_control_takes_its_mask_along(monkeypatch):
    """Frame i of the result has the mask of the control frame that it shows."""
    levels = (20 * numpy.arange(9, dtype=numpy.uint8))[:, None, None]
    frames = (levels + numpy.zeros((16, 16), numpy.uint8))[..., None].repeat(3, axis=3)
    monkeypatch.setattr(vace, "probe", lambda path: SimpleNamespace(num_frames=9, fps=8.0))
    monkeypatch.setattr(vace, "stream_frames", lambda path: iter(frames))
    monkeypatch.setattr(vace, "read_mask", lambda path, count: frames[..., 0])
    settings = SimpleNamespace(
        reference_image=(),
        reference_video="v",
        reference_mask="m",
        resample_control=True,
        num_frames=5,
        height=16,
        width=16,
    )
    control = read_control(settings)
    assert control.frames[:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160]
    assert control.mask[:, 0, 0].tolist() == [0, 40, 80, 120, 160]


# ----------------------------------------------------------------------------------------------------- long videos


@pytest.mark.parametrize(("frames", "clips"), [(1, 1), (81, 1), (82, 2), (161, 2), (162, 3), (241, 3), (242, 4)])
def test_a_moment_more_than_clips_hold_takes_another_clip(frames, clips):
    chain = Chain(81, 1, 1, "earlier")
    assert clips_for(frames, chain) == clips
    planned = plan_clips(chain, ["p"] * clips, num_frames=frames)
    assert sum(len(clip.kept) for clip in planned) == frames


def test_a_clips_condition_is_what_was_handed_over_and_the_end_only_the_last_clips(monkeypatch):
    handed = random(1, 3, 5, 16, 16)
    given, looked_at = [], []

    def condition(vae, frames, num_frames, *, reference, marks_all, end):
        given.append((frames, reference, end))
        return SimpleNamespace(y=torch.zeros(1))

    class Vae:
        def vae(self):
            return self

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

    wan = Vae()
    wan.device = torch.device("cpu")
    wan.processes = SimpleNamespace(rank=0)
    wan.encode_images = lambda pictures, keep: looked_at.append((pictures[0], keep))
    variant = SimpleNamespace(hands_latents=False, padding="zeros", mask="first")
    monkeypatch.setattr(long_video, "frames_to_condition", condition)
    settings = SimpleNamespace(num_frames=9)
    maker = maker_of(LongVideoMaker, variant=variant, settings=settings, wan=wan, reference="photo", end="end")
    maker.bars = ProgressBars(shown=False)
    clip = plan_clips(Chain(9, 5, 5, "earlier"), ["p"] * 2)[1]
    for is_last in (False, True):
        maker.prepare_condition(clip, handed, is_last)
    assert [(reference, end) for _, reference, end in given] == [(None, None), (None, "end")]
    assert all(torch.equal(frames, handed) for frames, *_ in given)
    assert all(torch.equal(picture, handed[:, :, 0]) for picture, _ in looked_at), "CLIP sees the first of them"
    assert [keep for _, keep in looked_at] == [True, False]


def test_a_clip_keeps_its_own_frames_and_hands_its_last_ones_on():
    pieces = torch.arange(9.0)[None, None, :, None, None].expand(1, 3, 9, 2, 2).split([1, 4, 4], dim=2)
    vae = SimpleNamespace(decode_stream=lambda latents, **options: iter(pieces))
    maker = maker_of(
        LongVideoMaker,
        settings=SimpleNamespace(tiled=False),
        wan=SimpleNamespace(memory="resident"),
        variant=SimpleNamespace(motion_frames=5),
        clip=SimpleNamespace(kept=range(2, 6)),
    )
    kept = torch.cat(list(maker.frames(vae, torch.zeros(1))), dim=2)
    assert kept[0, 0, :, 0, 0].tolist() == [2, 3, 4, 5]
    assert maker._last[0, 0, :, 0, 0].tolist() == [4, 5, 6, 7, 8]


def test_an_avatars_noise_is_its_seeds():
    wan = SimpleNamespace(transformer_config=SimpleNamespace(out_dim=4))
    maker = maker_of(AvatarMaker, wan=wan, num_latents=3, grid=(2, 2))
    noise = [torch.stack(list(maker.noise(Job("", seed, None)))) for seed in (1, 2, 1)]
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
