"""The plan of a long video made of clips: what each is conditioned on, its seed and prompt, which frames are kept.

A clip of T frames goes on from the last frames (or latents) of the one before, so both show some moments; the plan says
which of the two gives them up. Everything is a pure function of lengths.

Upstream's scripts slip here and there. `Chain(drops="neither")`, `overlap=4` with one motion latent and
`upstream_pose_indices` are exactly what they do; what the toolkit's own configs ask for has no doubled frame.

Source: Stable-Video-Infinity `test_svi.py`, `test_svi_talk.py`, `test_svi_dance.py`; branch svi_wan22
`inference_svi_2.0.py`, `inference_svi_2.0_pro.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Frame = tuple[int, int]  # (clip, frame in it)
REFERENCE: Frame = (-1, -1)  # the user's picture, or the end of the video that is being extended

PROMPT_REPEATS = ("last", "cycle", "stop")


@dataclass(frozen=True)
class Chain:
    """How one clip leads to the next.

    frames: of each clip, 4n+1.
    motion_frames: last frames that the next clip is given as pictures.
    motion_latents: last latent frames that it is given as they are (SVI 2.0 Pro), 0 for none.
    overlap: leading frames of a clip that show what the clip before ended with.
    drops: who gives these frames up: the "earlier" clip, the "later" one, or "neither" (upstream's Talk: every seam
        shows a frame twice).
    repeats_reference: the first clip is given the picture as often as later ones are given frames, not once.
    """

    frames: int
    motion_frames: int
    overlap: int
    drops: str
    motion_latents: int = 0
    repeats_reference: bool = False

    def __post_init__(self):
        assert self.frames % 4 == 1 and 0 <= self.overlap < self.frames and self.motion_frames <= self.frames
        assert self.drops in ("earlier", "later", "neither")

    @property
    def step(self) -> int:
        """Frames of video that one more clip adds."""
        return self.frames if self.drops == "neither" else self.frames - self.overlap


@dataclass(frozen=True)
class Clip:
    """One clip.

    start: the moment of the video, in frames, that its first frame shows; audio and poses are looked up from here.
    condition: the frames it is given as pictures, in time order.
    previous: the clip whose last latents it is given; None for the first, and without motion latents.
    kept: which of its frames go into the video.
    """

    index: int
    seed: int
    prompt: str
    start: int
    condition: tuple[Frame, ...]
    previous: int | None
    kept: range


def overlap_of_latents(motion_latents: int) -> int:
    """Leading frames that SVI 2.0 Pro has to drop: one that stands for the anchor, and four for each latent frame."""
    return 4 * motion_latents + 1


def plan_clips(
    chain: Chain,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    seed_multiplier: int = 42,
    num_frames: int | None = None,
    extends: bool = False,
) -> list[Clip]:
    """One clip for each prompt.

    Args:
        seed, seed_multiplier: clip k is made from noise of seed + k·multiplier; the same noise in every clip would add
            its marks up.
        num_frames: cut the video to this length.
        extends: the first clip goes on from a video that is there, and whose frames stay: it gives up the shared ones.
    """
    clips = []
    for k, prompt in enumerate(prompts):
        start = k * chain.step - (chain.overlap if k and chain.drops == "neither" else 0)
        first, last = 0, chain.frames
        if (k and chain.drops == "later") or (extends and not k):
            first = chain.overlap
        if chain.drops == "earlier" and k < len(prompts) - 1:
            last -= chain.overlap
        if num_frames is not None and chain.drops != "neither":
            last = max(first, min(last, num_frames - start))
        if k == 0:
            condition = (REFERENCE,) * (chain.motion_frames if chain.repeats_reference else 1)
        else:
            condition = tuple((k - 1, i) for i in range(chain.frames - chain.motion_frames, chain.frames))
        previous = k - 1 if k and chain.motion_latents else None
        clips.append(Clip(k, seed + k * seed_multiplier, prompt, start, condition, previous, range(first, last)))
    return clips


def clips_for(num_frames: int, chain: Chain) -> int:
    """How many clips make a video of at least this length (of audio, of poses)."""
    return 1 + max(0, math.ceil((num_frames - chain.frames) / (chain.frames - chain.overlap)))


def prompts_of_clips(
    prompts: Sequence[str],
    num_clips: int,
    *,
    times: int = 1,
    first_only: bool = False,
    prefix: str | None = None,
    repeat: str = "last",
) -> list[str]:
    """The prompt of each clip.

    Args:
        times: clips that each prompt is used for.
        first_only: the first prompt is that of all clips.
        prefix: put in front of each, with a comma.
        repeat: what comes after the last prompt: that prompt again ("last"), all of them again ("cycle"), or nothing,
            the video ends ("stop", upstream's way).
    """
    assert repeat in PROMPT_REPEATS and prompts
    chosen = []
    for k in range(num_clips):
        number = 0 if first_only else k // times
        if number >= len(prompts) and repeat == "stop":
            break
        number = number % len(prompts) if repeat == "cycle" else min(number, len(prompts) - 1)
        chosen.append(prompts[number])
    return [f"{prefix}, {prompt}" for prompt in chosen] if prefix else chosen


# ------------------------------------------------------------------------------------------------- audio and poses


def pose_indices(clip: Clip, frames: int, num_poses: int, starts_over: bool = True) -> list[int]:
    """The pose frame of each of a clip's frames: that of its moment. When the poses end they start over, or the last
    one is held, for frames that are cut off but are seen by those before them.
    """
    moments = range(clip.start, clip.start + frames)
    return [moment % num_poses if starts_over else min(moment, num_poses - 1) for moment in moments]


def upstream_pose_indices(chain: Chain, num_clips: int, num_poses: int) -> list[list[int]]:
    """As upstream counts: its cursor goes on from the last pose, not from the one after: the first seam stutters."""
    clips = [[i % num_poses for i in range(chain.frames)]]
    cursor = chain.frames - 1
    for _ in range(1, num_clips):
        new = chain.frames - chain.motion_frames
        clips.append(clips[-1][-chain.motion_frames :] + [(cursor + i) % num_poses for i in range(new)])
        cursor += new
    return clips
