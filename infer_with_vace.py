"""Text-to-video under VACE control (pose, depth, sketch, masks, reference pictures), with or without an identity.

    python infer_with_vace.py                                          the tiny untrained model, a made-up control
    python infer_with_vace.py --wan_version 2.1 --reference_video pose.mp4 --prompt "A woman dances" --ip_image me.jpg
    python infer_with_vace.py --wan_version 2.1 --reference_image dress.png bag.png --prompt "A woman shows her bag"
    python infer_with_vace.py --wan_version 2.1 --reference_video street.mp4 --reference_mask car.mp4 --prompt "A tram"
    python infer_with_vace.py --config wan2.1-vace-1.3B --vace_path FOLDER --reference_video depth.mp4 --prompt "…"

The control video decides size, length and frame rate; give --height and --width, --num_frames or --fps for others.
Masks: WHITE is what the model makes, BLACK is kept. Without a mask everything is made, and the video only guides.

Weights: python download_models.py --vace. A run that was stopped goes on when the command is repeated.
"""

import argparse
from functools import partial
from pathlib import Path

from errors import run_script
from pipelines.flags import Parser, add_flags
from pipelines.settings import WanVersion
from pipelines.vace.settings import VaceSettings


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_flags(parser, VaceSettings, WanVersion)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> list[Path]:
    """Make what the arguments ask for; the files that this process made, in the order of prompts and seeds."""
    from dataclasses import replace

    from pipelines.jobs import all_done, list_jobs, make_all
    from pipelines.vace.command import resolve_vace_settings

    # Everything that can be refused without torch is refused before it is imported.
    settings, config = resolve_vace_settings(args)
    windows = 1 if settings.num_frames <= settings.window_frames else 2  # finished windows, and all joined
    jobs = list_jobs(replace(settings, num_frames=windows * settings.num_frames))

    from pipelines.distributed import start_processes
    from pipelines.opening import open_wan
    from pipelines.scoring import load_scorer, make_scored
    from pipelines.stand_in import stand_in_parts
    from pipelines.text_to_video.pipeline import prepare_faces
    from pipelines.vace.control import read_control
    from pipelines.vace.part import vace_part
    from pipelines.vace.pipeline import VaceMaker

    with start_processes(settings.device, settings.ulysses_degree, settings.ring_degree) as processes:
        if not (jobs := processes.own(jobs)):  # more processes than videos
            return []
        parts = [*stand_in_parts(settings, config), vace_part(settings, config)]
        frames = min(settings.num_frames, settings.window_frames) + 4 * len(settings.reference_image)
        window = replace(settings, num_frames=frames)  # what is computed at one time
        wan, jobs = open_wan(settings, config, processes, jobs, parts, at_once=window)
        if all_done(jobs):
            return make_all(None, jobs, processes)

        control = read_control(settings, demonstrate=wan.is_tiny)
        faces = prepare_faces(settings, jobs[0].output if processes.writes else None)  # (512, 512, 3) each
        scorer = load_scorer(settings, settings.score_photos)
        text = wan.encode_prompts([*settings.prompt, settings.negative_prompt])  # the text encoder is gone after this
        maker = VaceMaker(wan, text, faces, control)
        make = partial(make_scored, maker, scorer=scorer, settings=settings, processes=processes)
        return make_all(make, maker.bars.each(jobs), processes)


if __name__ == "__main__":
    run_script(main, parse_args)
