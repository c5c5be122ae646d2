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
from pathlib import Path

from errors import run_script
from pipelines.arguments import add_common_arguments
from pipelines.flags import Parser, add_flags
from pipelines.lora_settings import LoraSettings
from pipelines.settings import LikenessSettings
from pipelines.upstream import STABLE_AVATAR, add_flags_without_effect


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    avatar = parser.add_argument_group("talking avatar (second names are upstream's)")
    avatar.add_argument("--reference_image", "--validation_reference_path", metavar="PHOTO", help="path or URL")
    avatar.add_argument("--audio", "--validation_driven_audio_path", metavar="FILE", help="audio file, or a video's")
    avatar.add_argument("--sample_text_guide_scale", type=float, metavar="S", help="how close to the prompt (5)")
    avatar.add_argument("--sample_audio_guide_scale", type=float, metavar="S", help="… and to the sound (4)")
    avatar.add_argument(
        "--audio_native_guidance",
        type=float,
        nargs=2,
        metavar=("AUDIO", "PAIR"),
        help="experimental, in place of the audio scale; 2 2 to try. Costs a branch each",
    )
    avatar.add_argument("--clip_sample_n_frames", type=int, dest="num_frames", help="frames of a window (81)")
    avatar.add_argument("--overlap_window_length", type=int, help="latent frames that windows share (10)")
    avatar.add_argument("--overlapping_weight_scheme", help="how they fade into each other: uniform, log")
    avatar.add_argument("--last_window", help="full; legacy: cut short, and its sound stretched, as upstream")
    avatar.add_argument("--audio_alignment", help="released; exact: a window hears just the frames it shows")
    avatar.add_argument("--color_correction", type=float, metavar="S", help="towards the photo's colours: 0 to 1 (0)")
    avatar.add_argument("--transformer_path", help="StableAvatar's .pt (default: square or rectangle, by the size)")
    avatar.add_argument("--pretrained_wav2vec_path", help="folder of wav2vec2-base-960h")
    avatar.add_argument("--num_skip_start_steps", type=int, help="that teacache always computes (5)")
    avatar.add_argument("--teacache_offload", action="store_true", default=None, help="keep its residuals in RAM")
    avatar.add_argument("--fsdp_dit", action="store_true", default=None, help="shard the weights over the processes")
    avatar.add_argument("--identity", "--ip_image", nargs="+", help="not here: Stand-In is for text-to-video models")
    avatar.add_argument("--face_index", type=int, help="whose likeness is measured, from the left (the largest face)")
    add_flags(parser, LoraSettings, "LoRA")
    add_common_arguments(parser, identity=False)
    add_flags(parser, LikenessSettings, "likeness")
    upstream = parser.add_argument_group("upstream's names")
    upstream.add_argument("--validation_prompts", dest="prompt", nargs="+", action="extend", help="--prompt")
    upstream.add_argument("--sample_steps", dest="num_inference_steps", type=int, help="--num_inference_steps (50)")
    upstream.add_argument("--pretrained_model_name_or_path", dest="base_path", help="--base_path")
    upstream.add_argument("--GPU_memory_mode", help="--memory and --fp8: model_full_load, model_cpu_offload, …")
    upstream.add_argument("--enable_teacache", action="store_true", default=None, help="--step_cache teacache")
    upstream.add_argument("--teacache_threshold", dest="step_cache_threshold", type=float)
    upstream.add_argument("--output_dir", metavar="FOLDER", help="write there, under the photo's name")
    add_flags_without_effect(upstream, STABLE_AVATAR)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> list[Path]:
    """Make what the arguments ask for; the files that this process made, in the order of prompts and seeds."""
    from pipelines.audio_avatar.settings import resolve_avatar
    from pipelines.jobs import all_done, list_jobs, make_all, settle
    from preprocess.audio import AudioTimeline

    # Everything that can be refused without torch is refused before it is imported.
    settings, config, samples = resolve_avatar(args)  # samples: (N,) at 16 kHz
    jobs = list_jobs(settings, frames=AudioTimeline(len(samples), settings.fps).num_frames)

    from pipelines.audio_avatar.part import audio_adapter_part
    from pipelines.audio_avatar.pipeline import AvatarMaker, read_reference
    from pipelines.distributed import start_processes
    from pipelines.scoring import load_scorer, make_scored
    from pipelines.wan import Wan

    processes = start_processes(settings.device, settings.ulysses_degree, settings.ring_degree, by_windows=True)
    wan = Wan(settings, config, processes, [audio_adapter_part(settings, config)])
    wan.use_loras(settings)
    wan.check(jobs)
    jobs = settle(jobs, settings, wan.describe, processes)
    if all_done(jobs):
        processes.close()
        return make_all(None, jobs, processes)

    reference = read_reference(settings)  # (H, W, 3) uint8
    scorer = load_scorer(settings, settings.score_photos, "--reference_image")
    text = wan.encode_prompts([*settings.prompt, settings.negative_prompt])  # the text encoder is gone after this
    maker = AvatarMaker(wan, text, reference, samples, jobs[0].output.parent)
    made = make_all(lambda job: make_scored(maker, job, scorer, settings, processes), maker.bars.each(jobs), processes)
    processes.close()
    return made


if __name__ == "__main__":
    run_script(main, parse_args)
