"""Identity-preserving video with community LoRAs on the base model: a style, a motion, four steps for fifty.

    python infer_with_lora.py --wan_version 2.1 --ip_image me.jpg --prompt "A woman reads in a garden" \\
        --lora_path ghibli.safetensors --lora_scale 0.8
    … --lora_path style.safetensors motion.safetensors --lora_scale 0.8 0.5     several, each with its scale
    … --lora_path lightx2v.safetensors --lora_config lora-lightx2v-4step        distilled: brings its steps and guidance
    … --wan_version 2.2 --lora_path_high a.safetensors --lora_path_low b.safetensors       one for each expert
    … --wan_version 2.2 --lora_config lora-lightx2v-wan2.2-t2v                  LightX2V's pair for Wan2.2: four steps
    … --lora_path style.safetensors --fp8                                       computed beside the weights, not merged
    … --lora_path motion.safetensors --lora_end 0.4                             off after the first 40% of the steps
    python infer_with_lora.py --wan_version 2.1 --image street.jpg --lora_path zoom.safetensors --prompt "…"
    python infer_with_lora.py --config out.json --output again.mp4              the run that wrote out.json, once more

Any dialect is read: ComfyUI, PEFT, DiffSynth, kohya and musubi, VideoX-Fun, Diffusers, LightX2V. A key that does not
apply is an error, unless --lora_partial accepts it. --lora_path is for every expert of the model. The photo's reference
tokens run through the changed weights too. All else is as in infer.py.
"""

import argparse
from functools import partial
from pathlib import Path

from errors import run_script
from pipelines.flags import Parser, add_flags
from pipelines.settings import WanVersion
from pipelines.text_to_video.settings import PictureLoraSettings


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_flags(parser, PictureLoraSettings, WanVersion)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> list[Path]:
    """Make what the arguments ask for; the files that this process made, in the order of prompts and seeds."""
    from pipelines.jobs import all_done, list_jobs, make_all
    from pipelines.text_to_video.command import resolve_picture_loras

    # Everything that can be refused without torch is refused before it is imported.
    settings, config = resolve_picture_loras(args)
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


if __name__ == "__main__":
    run_script(main, parse_args)
