"""Identity-preserving generation: one face photo and a prompt in, a video (or a picture) of that person out.

    python infer.py                                                    the tiny untrained model on the photo in assets/
    python infer.py --wan_version 2.1 --ip_image me.jpg --prompt "A woman reads in a garden"
    python infer.py --wan_version 2.2 --ip_image me.jpg --prompt @prompts.txt --seed 0 1 2
    python infer.py --wan_version 2.1 --ip_image anna.jpg ben.jpg --prompt "A woman and a man dance"
    python infer.py --config out.json --output again.mp4               the run that wrote out.json, once more
    torchrun --nproc_per_node 4 infer.py … --prompt @prompts.txt       prompts split over four processes
    torchrun --nproc_per_node 4 infer.py … --ulysses_degree 4          one video on four GPUs

From a picture, given or made of the photo:

    python infer.py --wan_version 2.1 --image street.jpg --prompt "She turns and walks towards the camera"
    python infer.py --config wan2.1-flf2v-14B-720P --image a.jpg --last_image b.jpg --prompt "…"
    python infer.py --wan_version 2.2 --first_frame instantid --ip_image me.jpg --prompt "A woman in a café looks up"

By other methods than Stand-In:

    python infer.py --method instantid --ip_image me.jpg --prompt "portrait of a woman in the rain" --output rain.png
    python infer.py --method consisid --ip_image me.jpg --prompt "…"   ConsisID; --config consisid-1.5 for 1.5

Weights: python download_models.py --wan_version 2.1, or --method NAME. A run that was stopped goes on when the command
is repeated.
"""

import argparse
from functools import partial
from pathlib import Path

from errors import run_script
from pipelines.consis_id.settings import ConsisIDSettings
from pipelines.flags import Parser, add_flags
from pipelines.instant_id.settings import InstantIdSettings
from pipelines.settings import Method, WanVersion
from pipelines.text_to_video.settings import ImageToVideoSettings


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_flags(parser, Method, ImageToVideoSettings, WanVersion, InstantIdSettings, ConsisIDSettings)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> list[Path]:
    """Make what the arguments ask for; the files that this process made, in the order of prompts and seeds."""
    from pipelines.command import method_of

    # A method is a recipe of its own below, with settings of its own; a flag that it does not have is refused.
    # In each, everything that can be refused without torch is refused before it is imported.
    return {"standin": stand_in, "instantid": instant_id, "consisid": consis_id}[method_of(args)](args)


def stand_in(args: argparse.Namespace) -> list[Path]:
    """Videos by Wan: from a prompt with Stand-In, or from a picture."""
    from pipelines.jobs import all_done, list_jobs, make_all
    from pipelines.text_to_video.command import resolve_image_to_video

    settings, config = resolve_image_to_video(args)
    jobs = list_jobs(settings)

    from pipelines.distributed import start_processes
    from pipelines.opening import open_wan
    from pipelines.scoring import load_scorer, make_scored
    from pipelines.stand_in import stand_in_parts
    from pipelines.text_to_video.from_pictures import open_pictures
    from pipelines.text_to_video.pipeline import VideoMaker, prepare_faces

    with start_processes(settings.device, settings.ulysses_degree, settings.ring_degree) as processes:
        if not (jobs := processes.own(jobs)):  # more processes than videos
            return []
        pictures, settings = open_pictures(settings, config, processes, jobs[0].output)
        wan, jobs = open_wan(settings, config, processes, jobs, stand_in_parts(settings, config))
        if all_done(jobs):
            return make_all(None, jobs, processes)

        faces = prepare_faces(settings, jobs[0].output if processes.writes else None)  # (512, 512, 3) each
        scorer = load_scorer(settings, settings.score_photos, "--ip_image" if settings.ip_image else "--image")
        text = wan.encode_prompts([*settings.prompt, settings.negative_prompt])  # the text encoder is gone after this
        maker = VideoMaker(wan, text, faces, pictures)
        make = partial(make_scored, maker, scorer=scorer, settings=settings, processes=processes)
        return make_all(make, maker.bars.each(jobs), processes)


def instant_id(args: argparse.Namespace) -> list[Path]:
    """Pictures by InstantID on SDXL."""
    from pipelines.instant_id.command import resolve_instant_id
    from pipelines.jobs import all_done, list_jobs, make_all, settle

    settings, config = resolve_instant_id(args)
    jobs = list_jobs(settings, ".png")

    from pipelines.distributed import start_processes
    from pipelines.instant_id.pipeline import PictureMaker, check_files, describe_picture, guide_face
    from pipelines.scoring import load_scorer, make_scored
    from preprocess.face_detection import load_recognizer

    with start_processes(settings.device) as processes:
        if not (jobs := processes.own(jobs)):
            return []
        check_files(settings, config)
        jobs = settle(jobs, settings, partial(describe_picture, settings, config), processes)
        if all_done(jobs):
            return make_all(None, jobs, processes)

        guide = guide_face(settings, load_recognizer(settings.antelopv2_path, "--method instantid"))
        scorer = load_scorer(settings, settings.ip_image)
        maker = PictureMaker(settings, config, guide, processes.device)
        make = partial(make_scored, maker, scorer=scorer, settings=settings)
        return make_all(make, maker.bars.each(jobs), processes)


def consis_id(args: argparse.Namespace) -> list[Path]:
    """Videos by ConsisID on CogVideoX."""
    from pipelines.consis_id.command import resolve_consis_id
    from pipelines.jobs import all_done, list_jobs, make_all, settle

    settings, config = resolve_consis_id(args)
    jobs = list_jobs(settings)

    from pipelines.consis_id.model import ConsisID
    from pipelines.consis_id.pipeline import ConsisIDMaker
    from pipelines.distributed import start_processes
    from pipelines.scoring import load_scorer, make_scored

    with start_processes(settings.device) as processes:
        if not (jobs := processes.own(jobs)):
            return []
        model = ConsisID(settings, config, processes)
        model.check()
        jobs = settle(jobs, settings, model.describe, processes)
        if all_done(jobs):
            return make_all(None, jobs, processes)

        scorer = load_scorer(model.scoring_settings, settings.ip_image)
        face = model.prepare_face(jobs[0].output)  # the face networks are gone after this
        text = model.encode_prompts([*settings.prompt, settings.negative_prompt])  # and so is the text encoder
        maker = ConsisIDMaker(model, face, text)
        make = partial(make_scored, maker, scorer=scorer, settings=settings)
        return make_all(make, maker.bars.each(jobs), processes)


if __name__ == "__main__":
    run_script(main, parse_args)
