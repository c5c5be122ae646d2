"""A talking video of any length from a photo, a sound and a prompt (StableAvatar).

    python infer_audio_avatar.py                     the tiny untrained model on the photo and the speech in assets/
    python infer_audio_avatar.py --config stableavatar-1.3B --reference_image me.jpg --audio speech.wav \\
        --prompt "A woman talks to the camera in a bright kitchen" --output talk.mp4
    … --audio interview.mp4                          any audio file, or the sound track of a video
    … --width 480 --height 832                       512x512, 480x832 and 832x480 are what it was trained on
    … --sample_steps 40 --overlap_window_length 5 --sample_text_guide_scale 3 --sample_audio_guide_scale 5
    … --GPU_memory_mode sequential_cpu_offload       upstream's name for --memory sequential
    torchrun --nproc_per_node 4 infer_audio_avatar.py …                       the windows of a video on four GPUs
    torchrun --nproc_per_node 4 infer_audio_avatar.py … --ulysses_degree 4    every window on four GPUs

The video is as long as the sound, which is put into it. Prompts work best as "[first frame]-[behaviour]-[background]".

Weights: python download_models.py --only stableavatar-1.3B. A stopped run goes on when the command is repeated.
"""

import argparse
from functools import partial
from pathlib import Path

from errors import run_script
from pipelines.audio_avatar.settings import AvatarCommand, AvatarSettings
from pipelines.flags import Parser, add_flags
from pipelines.upstream import STABLE_AVATAR, add_flags_without_effect


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_flags(parser, AvatarSettings, AvatarCommand)
    add_flags_without_effect(parser, STABLE_AVATAR)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> list[Path]:
    """Make what the arguments ask for; the files that this process made, in the order of prompts and seeds."""
    from pipelines.audio_avatar.command import resolve_avatar
    from pipelines.jobs import all_done, list_jobs, make_all
    from preprocess.audio import AudioTimeline

    # Everything that can be refused without torch is refused before it is imported.
    settings, config, samples = resolve_avatar(args)  # samples: (N,) at 16 kHz
    jobs = list_jobs(settings, frames=AudioTimeline(len(samples), settings.fps).num_frames)

    from pipelines.audio_avatar.part import audio_adapter_part
    from pipelines.audio_avatar.pipeline import AvatarMaker, read_reference
    from pipelines.distributed import start_processes
    from pipelines.opening import open_wan
    from pipelines.scoring import load_scorer, make_scored

    with start_processes(settings.device, settings.ulysses_degree, settings.ring_degree, by_windows=True) as processes:
        if not (jobs := processes.own(jobs)):  # more processes than videos
            return []
        parts = [audio_adapter_part(settings, config)]
        wan, jobs = open_wan(settings, config, processes, jobs, parts)
        if all_done(jobs):
            return make_all(None, jobs, processes)

        reference = read_reference(settings)  # (H, W, 3) uint8
        scorer = load_scorer(settings, settings.score_photos, "--reference_image")
        text = wan.encode_prompts([*settings.prompt, settings.negative_prompt])  # the text encoder is gone after this
        maker = AvatarMaker(wan, text, reference, samples, jobs[0].output.parent)
        make = partial(make_scored, maker, scorer=scorer, settings=settings, processes=processes)
        return make_all(make, maker.bars.each(jobs), processes)


if __name__ == "__main__":
    run_script(main, parse_args)
