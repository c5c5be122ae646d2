"""What the makers hand on from step to step, window to window and clip to clip, with stubs in place of the networks.

A tiny random model makes *some* video whatever it is given: that a sigma is one step off, that a window forgets the
frames before it, that every window has the same noise, does not show in its frames. It does here.
"""

import contextlib
import itertools
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
from pipelines.experts import guided_by_text, switch_experts, tea_caches
from pipelines.face_swap import pipeline as face_swap
from pipelines.face_swap.pipeline import FaceSwapMaker, Segment, SwapVideo, WindowedExpert, plan_views, swap_schedule
from pipelines.jobs import Job
from pipelines.long_video import pipeline as long_video
from pipelines.long_video.pipeline import LongVideoMaker, write_clip
from pipelines.recovery import recover
from pipelines.stand_in import Identities
from pipelines.vace import control as vace_control
from pipelines.vace import pipeline as vace
from pipelines.vace.context import noise_with_references, with_known_frames
from pipelines.vace.control import read_control
from pipelines.vace.pipeline import VaceMaker, write_window
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
        settings = SimpleNamespace(guidance_scale=scales, step_cache="none")
        wan = SimpleNamespace(settings=settings, device="cpu", memory="resident", plugins=list)
        schedule, text = get_schedule("euler", 4, 3.0), random(2, 4)
        experts = [guided_by_text(wan, schedule, number, tiny.transformer(), text, text) for number in (0, 1)]
        answers = {POSITIVE: torch.ones(1), NEGATIVE: torch.zeros(1)}
        assert [expert.guidance(answers.__getitem__).item() for expert in experts] == wanted


def test_every_guidance_branch_has_a_step_cache_of_its_own():
    settings = SimpleNamespace(step_cache="teacache", step_cache_threshold=0.1)
    wan = SimpleNamespace(config={"variant": "t2v-1.3B"}, settings=settings)
    caches = tea_caches(wan, get_schedule("euler", 4, 3.0))
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
    identities = Identities(wan, [])
    identities._computed[0] = "keys and values"
    recover(wan, error, identities)
    assert identities._computed == {}


def test_where_live_loras_set_in_identities_are_computed_anew(monkeypatch):
    """They are keys and values of the weights as they were."""
    transformer = SimpleNamespace(is_cache_enabled=False)
    wan = SimpleNamespace(
        config={},
        settings=SimpleNamespace(step_cache="none"),
        loras=SimpleNamespace(work_at=lambda step, steps: step >= 2),
        num_experts=1,
        loras_are_on=True,
    )

    def load(number: int, with_loras: bool):
        wan.loras_are_on = with_loras
        return transformer

    wan.transformer = load
    computed = []
    monkeypatch.setattr(Identities, "_compute", lambda self, *args: computed.append(wan.loras_are_on) or Always())
    identities = Identities(wan, [])
    identities.references = ["a photo"]
    schedule = get_schedule("euler", 4, 3.0)
    seen = []
    for _ in range(2):  # videos
        expert_at = switch_experts(wan, schedule, identities.of)
        seen += [expert_at(step)(step, 4)[0] for step in range(4)]
    assert computed == [False, True, False, True], (
        "what was computed with other weights was kept, or made at every step"
    )
    assert len({id(identity) for identity in seen}) == 4
    assert [a is b for a, b in itertools.pairwise(seen)] == [True, False, True, False, True, False, True]


class Always:
    """An identity that takes part at every step."""

    def active(self, step: int, num_steps: int) -> bool:
        return True


def test_identities_are_kept_for_the_next_video(monkeypatch):
    wan = SimpleNamespace(num_experts=2, memory="resident", loras_are_on=True)
    computed = []
    monkeypatch.setattr(Identities, "_compute", lambda self, *args: computed.append(args[0]) or Always())
    identities = Identities(wan, [])
    identities.references = ["a photo"]
    for _ in range(2):
        for expert in (0, 1):
            identities.of(expert, None)
    assert computed == [0, 1]
    wan.memory = "model"  # 800 MiB a photo: those of one expert at a time
    identities.clear()
    for expert in (0, 1, 0):
        identities.of(expert, None)
    assert computed == [0, 1, 0, 1, 0]


# -------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(("stabilized", "scale"), [(False, 6 / 9), (True, 6 / 3)])
def test_rank_stabilized_loras_divide_alpha_by_the_root_of_the_rank(stabilized, scale):
    assert StatedScale(6.0, stabilized).of(9) == pytest.approx(scale)


def test_the_metadata_say_whether_a_lora_is_rank_stabilized(tmp_path):
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


def steps_of(monkeypatch, room, maker, seed=0) -> SimpleNamespace:
    """What a maker gives to the denoise loop: its noise and its options."""
    given = []
    monkeypatch.setattr(type(maker), "metadata", lambda self, job: {})
    monkeypatch.setattr(room, "progress", lambda *args: {})
    monkeypatch.setattr(room, "open_video", lambda *args, **options: contextlib.nullcontext())
    monkeypatch.setattr(
        room,
        "denoise_with_resume",
        lambda wan, noise, *args, **options: given.append(SimpleNamespace(noise=noise, **options)) or noise,
    )
    maker.make(Job("", seed, Path("out.mp4")))
    return given[0]


def swap_maker(**settings):
    settings = SimpleNamespace(negative_prompt="", **settings)
    wan = SimpleNamespace(
        device="cpu",
        noise_device=torch.device("cpu"),
        transformer_config=SimpleNamespace(vae_spatial_factor=8),
        release_transformers=lambda: None,
        processes=SimpleNamespace(rank=0),
    )
    schedule, clean = get_schedule("euler", 4, 3.0, strength=0.7), random(1, 16, 2, 4, 4)
    parts = {
        "wan": wan,
        "settings": settings,
        "bars": ProgressBars(shown=False),
        "text": {"": None},
        "audio_path": None,
        "audio_start": 0,
    }
    return maker_of(FaceSwapMaker, **parts, schedule=schedule, clean=clean, identities=None, windows=[slice(0, 2)])


def test_the_background_is_put_back_at_the_noise_of_the_next_step(monkeypatch):
    maker = swap_maker(force_background_consistency=True)
    maker.face_mask = torch.zeros(1, 1, 2, 4, 4)
    maker.face_mask[..., 2:] = 1
    after_step = steps_of(monkeypatch, face_swap, maker, seed=5).after_step
    noise, sample = initial_noise((16, 5, 32, 32), 5), random(1, 16, 2, 4, 4, seed=2)
    for step in range(4):
        kept = after_step(step, sample)
        assert torch.equal(kept[..., 2:], sample[..., 2:])
        expected = add_noise(maker.clean, noise, maker.schedule.sigmas[step + 1].item())
        torch.testing.assert_close(kept[..., :2], expected[..., :2])
    assert torch.equal(kept[..., :2], maker.clean[..., :2]), "at the end the background is the input's"
    assert steps_of(monkeypatch, face_swap, swap_maker(force_background_consistency=False)).after_step is None


def test_every_seed_noises_the_pasted_video_differently(monkeypatch):
    for seed in (3, 4):
        maker = swap_maker(force_background_consistency=False)
        start = steps_of(monkeypatch, face_swap, maker, seed).noise
        noise = initial_noise((16, 5, 32, 32), seed)
        torch.testing.assert_close(start, add_noise(maker.clean, noise, maker.schedule.sigmas[0].item()))


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


def test_windows_of_a_long_stretch_share_a_quarter_of_their_frames():
    """81 frames are 21 latent frames, of which six are shared; 197 frames are 50."""
    assert plan_views([Segment(0, 197, 0)], 21) == [slice(0, 21), slice(15, 36), slice(29, 50)]
    assert plan_views([Segment(0, 5, 0), Segment(9, 14, 2)], 21) == [slice(0, 2), slice(2, 4)]
    assert plan_views([Segment(0, 9, 0)], 1) == [slice(0, 1), slice(1, 2), slice(2, 3)]


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
        decoded = frames + first
        if known is not None:
            decoded[: len(known)] += 100
        pieces = iter(numpy.split(decoded, [1, 5]))  # as they are decoded: 1, 4, 4
        known = write_window(writer, pieces, known, count, ProgressBars(shown=False).work("", None, ""))
        assert known.flatten()[::3].tolist() == list(range(first + 9 - count, first + 9))
    assert numpy.concatenate(written)[:, 0, 0, 0].tolist() == list(range(15))


def test_each_window_has_noise_of_its_own(monkeypatch, tmp_path):
    settings = SimpleNamespace(height=32, width=32, negative_prompt="", stand_in_photos=())
    wan = SimpleNamespace(device="cpu", noise_device=torch.device("cpu"), settings=settings)
    wan.transformer_config = SimpleNamespace(out_dim=16)
    wan.release_transformers = lambda: None
    wan.processes = SimpleNamespace(writes=False, share=lambda value: (0, None) if value is None else value)
    windows = [Window(0, 9, 0), Window(4, 13, 5)]
    parts = {"pictures": [1], "text": {"": None}, "control": None}
    maker = maker_of(VaceMaker, settings=settings, wan=wan, windows=windows, **parts)
    maker.bars, maker.schedule, noises = ProgressBars(shown=False), get_schedule("euler", 2, 3.0), []
    maker.identities = SimpleNamespace(references=[])
    monkeypatch.setattr(VaceMaker, "metadata", lambda *args: {})
    monkeypatch.setattr(vace, "encode_control", lambda *args: None)
    monkeypatch.setattr(vace, "progress", lambda *args: {})
    monkeypatch.setattr(vace, "open_video", lambda *args: contextlib.nullcontext())
    monkeypatch.setattr(vace, "denoise_with_resume", lambda wan, noise, *args, **options: noises.append(noise) or noise)
    maker.make(Job("", 7, tmp_path / "out.mp4"))
    for number, noise in enumerate(noises):
        expected = noise_with_references((16, 9, 32, 32), 7 + number, 1, last_first=False)
        assert torch.equal(noise, expected)
    assert len(noises) == 2


def test_a_spread_control_takes_its_mask_along(monkeypatch):
    """Frame i of the result has the mask of the control frame that it shows."""
    levels = (20 * numpy.arange(9, dtype=numpy.uint8))[:, None, None]
    frames = (levels + numpy.zeros((16, 16), numpy.uint8))[..., None].repeat(3, axis=3)
    monkeypatch.setattr(vace_control, "probe", lambda path: SimpleNamespace(num_frames=9, fps=8.0))
    monkeypatch.setattr(vace_control, "stream_frames", lambda path: iter(frames))
    monkeypatch.setattr(vace_control, "read_mask", lambda path, count: frames[..., 0])
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
    handover = random(1, 3, 5, 16, 16)
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
    for is_last in (False, True):
        maker.condition_of(handover, is_last)
    assert [(reference, end) for _, reference, end in given] == [(None, None), (None, "end")]
    assert all(torch.equal(frames, handover) for frames, *_ in given)
    assert all(torch.equal(picture, handover[:, :, 0]) for picture, _ in looked_at), "CLIP sees the first of them"
    assert [keep for _, keep in looked_at] == [True, False]


def test_a_clip_keeps_its_own_frames_and_hands_its_last_ones_on():
    pieces = torch.arange(9.0)[None, None, :, None, None].expand(1, 3, 9, 2, 2).split([1, 4, 4], dim=2)
    written = []
    video = SimpleNamespace(path=None, write=written.append)
    bar = ProgressBars(shown=False).work("", None, "")
    last = write_clip(video, (piece / 10 for piece in pieces), range(2, 6), 5, bar)
    # As they are written; what is handed on is not rounded to 8 bits.
    expected = [round((frame / 10 + 1) * 127.5) for frame in (2, 3, 4, 5)]
    assert numpy.concatenate(written)[:, 0, 0, 0].tolist() == expected
    torch.testing.assert_close(last[0, 0, :, 0, 0], torch.tensor([0.4, 0.5, 0.6, 0.7, 0.8]))


def test_an_avatars_noise_is_its_seeds():
    wan = SimpleNamespace(transformer_config=SimpleNamespace(out_dim=4))
    maker = maker_of(AvatarMaker, wan=wan, num_latents=3, grid=(2, 2))
    noise = [torch.stack(list(maker.noise(Job("", seed, None)))) for seed in (1, 2, 1)]
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
