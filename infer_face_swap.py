"""Swap a face in a video: the photo's person in place of the video's, everything else as it was.

    python infer_face_swap.py                              the tiny untrained model on a short clip of assets/face.png
    python infer_face_swap.py --wan_version 2.1 --ip_image me.jpg --input_video walk.mp4 \\
        --prompt "A woman walks along a beach"
    python infer_face_swap.py … --force_background_consistency     hold the background while denoising, too
    python infer_face_swap.py … --no_composite             all that the model drew, not its face in the input's picture
    python infer_face_swap.py … --denoising_strength 0.7   closer to the pasted photo (0.85); 1 keeps nothing of it
    python infer_face_swap.py … --target_face_index 0      whom to replace: from the left, in the first frame with faces
    python infer_face_swap.py --config out.json --output again.mp4

Size, length, rate and sound are the input video's. The model's face is put into the input's picture, its colours
matched; all pixels away from it stay the input's. Longer shots are worked on in overlapping windows of --num_frames,
which never span a cut. Weights: python download_models.py --wan_version 2.1.
"""

import argparse
from functools import partial
from pathlib import Path

from errors import run_script
from pipelines.face_swap.settings import FaceSwapSettings
from pipelines.flags import Parser, add_flags
from pipelines.settings import WanVersion


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_flags(parser, FaceSwapSettings, WanVersion)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> list[Path]:
    """Make what the arguments ask for; the files that this process made, in the order of prompts and seeds."""
    from pipelines.face_swap.command import resolve_face_swap
    from pipelines.jobs import all_done, list_jobs, make_all

    # Everything that can be refused without torch is refused before it is imported.
    settings, config, info = resolve_face_swap(args)
    jobs = list_jobs(settings, frames=info.num_frames)  # room for the whole video

    from pipelines.distributed import start_processes
    from pipelines.face_swap.pipeline import FaceSwapMaker, open_swap_video
    from pipelines.opening import open_wan
    from pipelines.scoring import load_scorer, make_scored
    from pipelines.stand_in import stand_in_parts

    with start_processes(settings.device, settings.ulysses_degree, settings.ring_degree) as processes:
        if not (jobs := processes.own(jobs)):  # more processes than videos
            return []
        wan, jobs = open_wan(settings, config, processes, jobs, stand_in_parts(settings, config))
        if all_done(jobs):
            return make_all(None, jobs, processes)

        output = jobs[0].output if processes.writes else None
        video = open_swap_video(settings, info, 2 * wan.transformer_config.vae_spatial_factor, output)
        scorer = load_scorer(settings, settings.score_photos)
        text = wan.encode_prompts([*settings.prompt, settings.negative_prompt])  # the text encoder is gone after this
        maker = FaceSwapMaker(wan, text, video, info)
        make = partial(make_scored, maker, scorer=scorer, settings=settings, processes=processes)
        return make_all(make, maker.bars.each(jobs), processes)


if __name__ == "__main__":
    run_script(main, parse_args)
