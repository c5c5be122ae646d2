"""Long video from one picture and a stream of prompts, without drift: clips chained by Stable Video Infinity (SVI).

    python infer_long_video.py                                          three clips of the tiny untrained model
    python infer_long_video.py --variant shot --ref_image_path me.jpg --prompt "She talks and laughs" --num_clips 10
    … --variant film --ref_image_path me.jpg --prompt_path story.txt    one prompt a clip; lines, or prompts = ["…", …]
    … --variant tom …                                                   cartoons
    … --variant 2.0 …            Wan2.2, two experts;  … --variant 2.0-wan2.1 …  for Wan2.1
    … --variant 2.0-pro …        hands clips over as latents: the cleanest seams
    … --variant 2.0-pro --lora_config lora-svi-lightx2v                 six steps: with LightX2V's LoRAs beside SVI's
    … --variant talk --ref_image_path me.jpg --audio_path speech.wav    as long as the speech, with its sound
    … --variant dance --ref_image_path me.jpg --pose_path poses.mp4     a frame for each drawn pose
    … --variant talk --audio_path speech.wav --pose_path poses.mp4 …    speech and poses at once
    … --reference_video pose.mp4 --vace_path branch.safetensors …       controlled frame by frame, by a VACE branch
    … --extend film.mp4 --prompt "She stands up and leaves"             goes on from a video, whose frames stay
    … --first_frame instantid --ip_image me.jpg --prompt "A woman in a café looks up"    the photo in a scene
    python infer_long_video.py --config out.json --output again.mp4

A first frame with a person in it: a photo, one that InstantID makes of the photo, or what infer.py made. The variant
decides how clips are conditioned, handed over and joined; its released LoRA is used, or the first file of --lora_path
(--lora_path_high and --lora_path_low for Wan2.2), and further files run beside it. A run that was stopped goes on when
the command is repeated; finished clips can be watched in .NAME.clips/.

Weights: python download_models.py --only wan2.1-i2v-14B-480P svi-shot
     or: python download_models.py --only wan2.2-i2v-A14B svi-2.0-pro lora-svi-lightx2v
   talk: python download_models.py --only wan2.1-i2v-14B-480P svi-talk
"""

import argparse
import logging
from pathlib import Path

from errors import run_script
from pipelines.flags import Parser, add_flags
from pipelines.long_video.settings import LongVideoCommand, LongVideoSettings
from pipelines.settings import LikenessSettings, StandIn
from pipelines.upstream import SVI, add_flags_without_effect, samples_of

logger = logging.getLogger("selfsame")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    # SVI's models have no place for Stand-In's weights, and its drift report measures the likeness.
    add_flags(parser, LongVideoSettings, LongVideoCommand, without=(StandIn, LikenessSettings))
    add_flags_without_effect(parser, SVI)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> list[Path]:
    """Make what the arguments ask for; the files that this process made, in the order of samples and seeds."""
    from pipelines.jobs import list_jobs
    from pipelines.long_video.command import resolve_long_video

    # Everything that can be refused without torch is refused before it is imported.
    videos = []
    for sample in samples_of(args):
        settings, config, picture = resolve_long_video(sample)
        length = sum(len(clip.kept) for clip in settings.clips(seed=0))
        jobs = list_jobs(settings, frames=2 * length)  # the clips, and all joined
        videos.append((settings, config, picture, jobs))

    from pipelines.distributed import start_processes

    made = []
    with start_processes(settings.device, settings.ulysses_degree, settings.ring_degree) as processes:
        for *video, jobs in videos:
            if jobs := processes.own(jobs):  # none where there are more processes than videos
                made += make_videos(*video, jobs, processes)
    return made


def make_videos(settings, config: dict, picture, jobs: list, processes) -> list[Path]:
    """Make the videos of one picture, a job for each seed.

    Args:
        settings, config, picture: from `resolve_long_video`.
        jobs: those of this process.
        processes: from `start_processes`.
    """
    from metrics.drift import likeness_to, report
    from pipelines.instant_id.first_frame import first_frame_files, make_first_frame
    from pipelines.jobs import Job, all_done, make_all
    from pipelines.long_video.parts import driving_parts
    from pipelines.long_video.pipeline import LongVideoMaker, open_existing
    from pipelines.opening import open_wan

    parts = driving_parts(settings, config)
    wan, jobs = open_wan(settings, config, processes, jobs, parts, further=first_frame_files(settings))
    if all_done(jobs):
        return make_all(None, jobs, processes)
    if settings.first_frame is not None:  # SDXL's memory is free again after this
        picture = processes.share(make_first_frame(settings, jobs[0].output) if processes.writes else None)

    clips = settings.clips(seed=0)
    text = wan.encode_prompts([*(clip.prompt for clip in clips), settings.negative_prompt])  # its encoder is gone then
    maker = LongVideoMaker(wan, text, picture, open_existing(settings) if settings.extend else None)
    likeness = None if settings.no_drift_report else likeness_to(picture, settings.antelopv2_path)

    def make_reported(job: Job) -> Path:
        output = maker.make(job)
        if processes.writes and not settings.no_drift_report:
            logger.info("its clips, drawn in NAME.drift.png:\n%s", report(output, None, likeness, settings.overwrite))
        return output

    return make_all(make_reported, maker.bars.each(jobs), processes)


if __name__ == "__main__":
    run_script(main, parse_args)
