"""The published commands of Stand-In, StableAvatar and SVI on our scripts: what they mean here, and that they run on
the tiny models. Their paths are replaced, and what makes them long.

Copied from: Stand-In README.md; StableAvatar inference.sh, multiple_gpu_inference.sh; Stable-Video-Infinity
scripts/test/*.sh, and the README of its branch svi_wan22.
"""

import logging
import shlex
from pathlib import Path

import numpy
import pytest
from safetensors.torch import load_file, save_file

import infer
import infer_audio_avatar
import infer_face_swap
import infer_long_video
import infer_with_lora
import infer_with_vace
from configs import load_config
from errors import InputError, UsageError, WeightsError
from models.pose_embedder import KEY
from pipelines.audio_avatar.command import resolve_avatar
from pipelines.face_swap.command import make_demo_clip, resolve_face_swap
from pipelines.long_video.command import resolve_long_video
from pipelines.lora_command import resolve_lora_settings
from pipelines.text_to_video.command import resolve_image_to_video
from pipelines.tiny import tiny_pose_embedder
from pipelines.upstream import samples_of
from pipelines.vace.command import resolve_vace_settings
from preprocess.audio import SAMPLE_RATE, write_wav
from preprocess.record import read_metadata
from preprocess.video import probe, read_frames
from preprocess.video_writer import write_video
from tests.test_long_video import write_lora

PROJECT = Path(__file__).parent.parent
SVI = "weights/Stable-Video-Infinity"
AVATAR = """--config_path=deepspeed_config/wan2.1/wan_civitai.yaml
    --pretrained_model_name_or_path=checkpoints/Wan2.1-Fun-V1.1-1.3B-InP
    --transformer_path=checkpoints/StableAvatar-1.3B/transformer3d-square.pt
    --pretrained_wav2vec_path=checkpoints/wav2vec2-base-960h
    --validation_reference_path=examples/case-1/reference.png
    --validation_driven_audio_path=examples/case-1/audio.wav --output_dir=output_infer
    --validation_prompts="A middle-aged woman is speaking" --seed=42"""
V2 = f"""{SVI}/version-2.0/SVI_Wan2.2-I2V-A14B"""

COMMANDS = {
    "Stand-In": """infer.py --prompt "A man sits comfortably at a desk" --ip_image test/input/lecun.jpg
        --output test/output/lecun.mp4""",
    "Stand-In, Wan2.2": """infer.py --prompt "A man sits comfortably at a desk" --ip_image test/input/lecun.jpg
        --output test/output/lecun.mp4 --wan_version 2.2 --fps 16 --base_path checkpoints/Wan2.2/t2v""",
    "Stand-In, LoRA": """infer_with_lora.py --prompt "A man sits comfortably at a desk" --ip_image test/input/lecun.jpg
        --output test/output/lecun.mp4 --lora_path path/to/your/lora.safetensors --lora_scale 1.0""",
    "Stand-In, face swap": """infer_face_swap.py --prompt "The video features a woman" --ip_image test/input/ruonan.jpg
        --output test/output/ruonan.mp4 --denoising_strength 0.85""",
    "Stand-In, VACE": """infer_with_vace.py --prompt "A woman raises her hands." --vace_path checkpoints/VACE/
        --ip_image test/input/first_frame.png --reference_video test/input/pose.mp4
        --reference_image test/input/first_frame.png --output test/output/woman.mp4 --vace_scale 0.8""",
    "inference.sh": f"""infer_audio_avatar.py {AVATAR} --ulysses_degree=1 --ring_degree=1 --motion_frame=25
        --sample_steps=50 --width=512 --height=512 --overlap_window_length=5 --clip_sample_n_frames=81
        --GPU_memory_mode="model_full_load" --sample_text_guide_scale=3.0 --sample_audio_guide_scale=5.0""",
    "multiple_gpu_inference.sh": f"""infer_audio_avatar.py {AVATAR} --ulysses_degree=2 --ring_degree=2 --motion_frame=25
        --sample_steps=50 --width=512 --height=512 --fsdp_dit --overlap_window_length=10
        --sample_text_guide_scale=3.0 --sample_audio_guide_scale=5.0""",
    "svi_shot.sh": f"""infer_long_video.py --output videos/svi_shot/ --dit_root ./weights/Wan2.1-I2V-14B-480P/
        --ref_pad_num -1 --cfg_scale_text 5.0 --num_motion_frames 1 --ref_image_path data/toy_test/shot/frame.jpg
        --prompt_path data/toy_test/shot/prompt.txt --use_first_prompt_only
        --extra_module_root {SVI}/version-1.0/svi-shot.safetensors""",
    "svi_film.sh": f"""infer_long_video.py --output videos/svi_film/ --dit_root ./weights/Wan2.1-I2V-14B-480P/
        --ref_pad_num 0 --cfg_scale_text 5.0 --num_motion_frames 5 --ref_image_path data/toy_test/film/frame.jpg
        --prompt_path data/toy_test/film/prompt.txt
        --extra_module_root {SVI}/version-1.0/svi-film-opt-10212025.safetensors""",
    "svi_tom.sh": f"""infer_long_video.py --output videos/svi_tom/ --dit_root ./weights/Wan2.1-I2V-14B-480P/
        --ref_pad_num 0 --cfg_scale_text 5.0 --num_motion_frames 1 --ref_image_path data/toy_test/tom/frame.png
        --prompt_path data/toy_test/tom/prompt.txt --extra_module_root {SVI}/version-1.0/svi-tom.safetensors""",
    "svi_2.0.sh": f"""infer_long_video.py --output videos/svi_2.0/ --dit_root ./weights/Wan2.1-I2V-14B-480P/
        --ref_pad_num -1 --cfg_scale_text 5.0 --num_motion_frames 5 --num_clips 999
        --ref_image_path data/toy_test/svi_2.0/frame.jpg --prompt_path data/toy_test/svi_2.0/prompt.txt
        --prompt_repeat_times 2 --extra_module_root {SVI}/version-2.0/SVI_Wan2.1-I2V-14B_lora_v2.0.safetensors""",
    "svi_talk.sh": f"""infer_long_video.py --output videos/svi_talk/ --dit_root ./weights/Wan2.1-I2V-14B-480P/
        --ref_pad_num -1 --num_clips 50 --num_motion_frames 1 --ref_image_path data/toy_test/talk/obama.png
        --audio_path data/toy_test/talk/obama_5min.wav
        --extra_module_root {SVI}/version-1.0/svi-talk.safetensors""",
    "svi_dance.sh": f"""infer_long_video.py --output videos/svi_dance --dit_root ./weights/Wan2.1-I2V-14B-480P/
        --cfg_scale_text 2.0 --ref_pad_num -1 --num_clips 10 --num_steps 50 --num_motion_frames 1
        --image_path data/toy_test/dance/image.png --pose_path data/toy_test/dance/pose.mp4
        --extra_module_root {SVI}/version-1.0/svi-dance.safetensors""",
    "inference_svi_2.0.py": f"""infer_long_video.py --output_root videos --height 480 --width 832
        --lora_path_high {V2}_high_noise_lora_v2.0.safetensors --lora_path_low {V2}_low_noise_lora_v2.0.safetensors
        --fps 15 --ref_image_path ./data/toy_test/frame.jpg --prompt_path ./data/toy_test/prompt.txt --num_clips 10""",
    "inference_svi_2.0_pro.py": f"""infer_long_video.py --output_root videos --height 832 --width 480
        --lora_path_high {V2}_high_noise_lora_v2.0_pro.safetensors
        --lora_path_low {V2}_low_noise_lora_v2.0_pro.safetensors --fps 15 --ref_image_path ./data/toy_test/frame.jpg
        --prompt_path ./data/toy_test/prompt.txt --num_clips 50 --cfg_scale 4.0 --num_overlap_frame 5
        --num_motion_latent 1 --num_motion_frame 4 --use_latent_conditioning""",
}
SCRIPTS = {
    "infer.py": (infer, resolve_image_to_video),
    "infer_with_lora.py": (infer_with_lora, resolve_lora_settings),
    "infer_face_swap.py": (infer_face_swap, resolve_face_swap),
    "infer_with_vace.py": (infer_with_vace, resolve_vace_settings),
    "infer_audio_avatar.py": (infer_audio_avatar, resolve_avatar),
    "infer_long_video.py": (infer_long_video, resolve_long_video),
}
# Flags for weights of the released sizes: the tiny models have their own.
WEIGHTS = ("--base_path", "--dit_root", "--vace_path", "--transformer_path", "--pretrained_model_name_or_path")
WEIGHTS += ("--pretrained_wav2vec_path",)
TINY = ["--num_inference_steps", "1", "--height", "32", "--width", "32"]


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> dict[str, Path]:
    """What the commands name, by the end of its path."""
    folder = tmp_path_factory.mktemp("upstream")
    (folder / "prompt.txt").write_text('prompts = ["She looks up", "She smiles"]\n', encoding="utf-8")
    write_wav(folder / "speech.wav", numpy.sin(numpy.arange(round(0.81 * SAMPLE_RATE)) / 20) / 3, SAMPLE_RATE)
    write_video(folder / "pose.mp4", [numpy.zeros((9, 32, 32, 3), numpy.uint8)], fps=30)
    media = {
        ".jpg": PROJECT / "assets/face.png",
        ".png": PROJECT / "assets/face.png",
        "prompt.txt": folder / "prompt.txt",
    }
    media |= {".wav": folder / "speech.wav", "pose.mp4": folder / "pose.mp4"}
    for command in COMMANDS.values():
        for word in shlex.split(command):
            if word.endswith(".safetensors"):
                config = (
                    "tiny-i2v-a14b" if "Wan2.2" in word else "tiny-i2v" if "SVI" in word or "svi" in word else "tiny"
                )
                media[Path(word).name] = write_lora(folder / Path(word).name, config, seed=len(media))
    return media


def words_of(name: str, media: dict[str, Path], folder: Path, *, tiny: bool) -> tuple[str, list[str]]:
    """The script, and the command's words with files that are here; `tiny`: without those that name weights."""
    script, *words = shlex.split(COMMANDS[name])
    split = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    made = []
    for flag, word in zip(["", *split], split, strict=False):
        if tiny and (word in WEIGHTS or flag in WEIGHTS):
            continue
        if flag in ("--output", "--output_root", "--output_dir"):
            word = f"{folder / word}/" if word.endswith("/") else str(folder / word)
        elif not word.startswith("--") and "/" in word:
            word = str(next((path for end, path in media.items() if word.endswith(end)), word))
        made.append(word)
    return script, made


def parse(script: str, words: list[str]):
    return SCRIPTS[script][0].parse_args(words)


def settings_of(name: str, media: dict[str, Path], folder: Path):
    script, words = words_of(name, media, folder, tiny=False)
    if script == "infer_face_swap.py":  # upstream's default is a file of its repository
        words += ["--wan_version", "2.1", "--input_video", str(media["pose.mp4"])]
    return SCRIPTS[script][1](parse(script, words))[0]


MEANINGS = {
    "Stand-In, Wan2.2": {"config": "stand-in-wan2.2", "base_path": "checkpoints/Wan2.2/t2v", "fps": 16},
    "Stand-In, LoRA": {"lora_scale": (1.0,)},
    "Stand-In, face swap": {"denoising_strength": 0.85},
    "Stand-In, VACE": {"vace_scale": 0.8, "vace_path": "checkpoints/VACE/", "config": "stand-in-wan2.1"},
    "inference.sh": {
        "base_path": "checkpoints/Wan2.1-Fun-V1.1-1.3B-InP",
        "seed": (42,),
        "num_inference_steps": 50,
        "overlap": 5,
        "sample_text_guide_scale": 3.0,
        "sample_audio_guide_scale": 5.0,
        "memory": "resident",
        "shift": 5.0,
        "fps": 25,
        "num_frames": 81,
        "width": 512,
        "config": "stableavatar-1.3B",
        "output": "{folder}/output_infer/face.mp4",
    },
    "multiple_gpu_inference.sh": {"ulysses_degree": 2, "ring_degree": 2, "fsdp_dit": True, "overlap": 10},
    "svi_shot.sh": {"variant": "shot", "num_clips": 10, "use_first_prompt_only": True, "guidance_scale": (5.0,)},
    "svi_film.sh": {"variant": "film", "base_path": "./weights/Wan2.1-I2V-14B-480P/", "num_inference_steps": 50},
    "svi_tom.sh": {"variant": "tom", "output": "{folder}/videos/svi_tom/face.mp4"},
    "svi_2.0.sh": {"variant": "2.0-wan2.1", "num_motion_frames": 5},
    "svi_talk.sh": {"variant": "talk", "num_clips": 1, "prompt": ("a person is talking",), "guidance_scale": (2.0,)},
    "svi_dance.sh": {"variant": "dance", "num_clips": 10, "output": "{folder}/videos/svi_dance/face.mp4"},
    "inference_svi_2.0.py": {"variant": "2.0", "num_clips": 10, "fps": 15, "height": 480, "width": 832},
    "inference_svi_2.0_pro.py": {"variant": "2.0-pro", "guidance_scale": (4.0,), "height": 832, "num_clips": 50},
}


@pytest.mark.parametrize("name", MEANINGS)
def test_what_a_command_means(media, tmp_path, name):
    settings = settings_of(name, media, tmp_path)
    for field, value in MEANINGS[name].items():
        wanted = value.format(folder=tmp_path) if isinstance(value, str) else value
        assert getattr(settings, field) == wanted, field


def test_the_video_ends_with_the_prompts_as_upstream(media, tmp_path):
    """--num_clips 999 is upstream's "all of them": two prompts, each twice. --num_clips is at most ten of itself."""
    assert [clip.prompt for clip in settings_of("svi_2.0.sh", media, tmp_path).clips(0)] == [
        *("She looks up", "She looks up", "She smiles", "She smiles")
    ]
    assert len(settings_of("svi_film.sh", media, tmp_path).clips(0)) == 2
    assert len(settings_of("svi_shot.sh", media, tmp_path).clips(0)) == 10


# What each takes to be short, and the model of the tiny ones that it runs on.
SHORT_CLIPS = [*TINY, "--no_drift_report", "--num_clips", "2", "--num_frames"]
SHORT = {
    "infer.py": ["--config", "tiny", *TINY, "--num_frames", "5", "--no_face_crop"],
    "infer_with_lora.py": ["--config", "tiny", *TINY, "--num_frames", "5", "--no_face_crop"],
    "infer_face_swap.py": ["--num_inference_steps", "1"],
    "infer_with_vace.py": ["--config", "tiny", *TINY, "--no_face_crop"],
    "infer_audio_avatar.py": ["--config", "tiny-avatar", *TINY, "--clip_sample_n_frames", "49"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_runs_on_the_tiny_models(media, tmp_path, name):
    script, words = words_of(name, media, tmp_path, tiny=True)
    if script == "infer_long_video.py":
        model = "tiny-i2v-a14b" if "2.0" in name and name.endswith(".py") else "tiny-i2v"
        words += ["--config", model, *SHORT_CLIPS, "9"]
    else:
        words += SHORT[script]
    if script == "infer_face_swap.py":
        words += ["--input_video", str(make_demo_clip(tmp_path / "in.mp4", num_frames=1, side=112))]
    if "--wan_version" in words:  # names a model of its own
        del words[words.index("--wan_version") : words.index("--wan_version") + 2]
    if name == "multiple_gpu_inference.sh":  # the test of two processes is tests/test_audio_avatar.py's
        words += ["--ulysses_degree", "1", "--ring_degree", "1"]
        words.remove("--fsdp_dit")
    if name == "svi_dance.sh":
        file = tmp_path / "svi-dance.safetensors"
        tensors = tiny_pose_embedder(load_config("tiny-i2v")).state_dict()
        save_file(
            {f"{KEY}{name}": tensor for name, tensor in tensors.items()} | load_file(media["svi-dance.safetensors"]),
            file,
        )
        words[words.index("--extra_module_root") + 1] = str(file)
    [output] = SCRIPTS[script][0].main(parse(script, words))
    assert output.is_relative_to(tmp_path) and probe(output).num_frames > 0
    if script == "infer_long_video.py":
        assert output.name == "face.mp4"
        assert read_metadata(output)["settings"]["variant"] == MEANINGS[name]["variant"]


def test_what_has_no_effect_says_why(media, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "selfsame")
    settings_of("inference.sh", media, tmp_path)
    settings_of("inference_svi_2.0_pro.py", media, tmp_path)
    said = [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]
    assert [line.split()[0] for line in said] == [
        *("--config_path", "--motion_frame", "--num_motion_frame", "--use_latent_conditioning")
    ]
    assert all(len(line.split(": ", 1)[1]) > 20 for line in said)


def test_every_flag_of_upstreams_scripts_is_known(media, tmp_path):
    """Those that no published command uses."""
    rest = [
        *("--input_perturbation 0.1 --revision x --variant fp16 --offload_model --t5_fsdp --t5_cpu --sample_shift 3"),
        *(" --enable_teacache --teacache_threshold 0.2 --num_skip_start_steps 4 --teacache_offload"),
    ]
    args = infer_audio_avatar.parse_args("".join(rest).split())
    assert args.step_cache_threshold == 0.2 and not hasattr(args, "sample_shift")
    rest = "--train_architecture lora --ref_pad_cfg --test_samples a b --max_prompts_per_sample 3 --use_first_aug"
    rest += " --repeat_first_clip --tiled --tile_size 30 52 --tile_stride 15 26 --num_persistent_param_in_dit 0"
    rest += " --seed_times 7 --prompt_prefix none --lora_alpha 0.5 --data_root data --remove_pose"
    rest += " --max_width 832 --num_steps 30 --cfg_scale_audio 3 --frames_per_clip 41"
    words = ["--config", "tiny-i2v", "--ref_image_path", str(media[".png"]), *rest.split()]
    lora = ["--extra_module_root", str(media["svi-shot.safetensors"])]
    settings = resolve_long_video(infer_long_video.parse_args([*words, *lora]))[0]
    assert (settings.seed_multiplier, settings.lora_scale, settings.prompt_prefix) == (7, (0.5,), None)
    assert (settings.tiled, settings.num_inference_steps, settings.num_frames) == (True, 30, 41)
    standin = "--seed 3 --num_inference_steps 9 --negative_prompt x --tiled --fps 25 --quality 9 --base_path a"
    standin += " --stand_in_path b --antelopv2_path c"
    for script in (infer, infer_with_lora, infer_face_swap, infer_with_vace):
        assert script.parse_args(standin.split()).antelopv2_path == "c"
    swap = ["--force_background_consistency"]
    values = [infer_face_swap.parse_args(words).force_background_consistency for words in ([], swap, [*swap, "False"])]
    assert values == [None, True, False]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ref_pad_num", "0"], "--ref_pad_num 0 has no effect: --variant shot was trained with -1, which stays"),
        (["--num_motion_frames", "5"], "--num_motion_frames 5 has no effect: --variant shot was trained with 1"),
        (["--num_motion_latent", "2"], "--num_motion_latent 2 has no effect: --variant shot was trained with 0"),
        (["--remove_pose"], "--remove_pose has no effect: --variant shot sees no poses"),
        (["--test_samples", "a"], "--test_samples has no effect: there is no --data_root"),
    ],
)
def test_what_the_lora_was_not_trained_with_stays_out_and_a_line_says_so(media, caplog, flags, words):
    caplog.set_level(logging.WARNING, "selfsame")
    command = ["--config", "tiny-i2v", "--extra_module_root", str(media["svi-shot.safetensors"]), "--num_clips", "2"]
    plain, *_ = resolve_long_video(infer_long_video.parse_args(command))
    assert not caplog.messages
    [sample] = samples_of(infer_long_video.parse_args([*command, *flags]))
    settings, *_ = resolve_long_video(sample)
    assert settings.svi == plain.svi and settings.clips(0) == plain.clips(0)
    [line] = [line for line in caplog.messages if "has no effect" in line]
    assert words in line
    assert ("upstream would make another video with it" in line) == ("was trained" in line)


def test_what_contradicts_or_is_not_there_is_refused(media):
    command = ["--config", "tiny-i2v", "--extra_module_root", str(media["svi-shot.safetensors"])]
    with pytest.raises(UsageError, match="--extra_module_root is another name for --lora_path"):
        resolve_long_video(infer_long_video.parse_args([*command, "--lora_path", "x.safetensors"]))
    with pytest.raises(WeightsError, match="--extra_module_root weights/svi-tom.safetensors: no such file"):
        resolve_long_video(infer_long_video.parse_args(["--extra_module_root", "weights/svi-tom.safetensors"]))


def test_remove_pose_leaves_the_poses_out(media, tmp_path):
    """Upstream's comparison: as long as with the poses, led by none of them."""

    def make(name: str, *flags: str):
        words = ["--config", "tiny-i2v", "--variant", "dance", "--pose_path", str(media["pose.mp4"])]
        words += [
            "--no_drift_report",
            "--num_clips",
            "1",
            "--num_frames",
            "9",
            "--output",
            str(tmp_path / name),
            *flags,
        ]
        [output] = infer_long_video.main(infer_long_video.parse_args(words))
        return read_frames(output)

    with_poses, without = make("with.mp4"), make("without.mp4", "--remove_pose")
    assert with_poses.shape == without.shape and (with_poses != without).any()
    write_video(tmp_path / "others.mp4", [numpy.full((9, 32, 32, 3), 200, numpy.uint8)], fps=30)
    others = ["--pose_path", str(tmp_path / "others.mp4")]
    assert (make("others-with.mp4", *others) != with_poses).any()
    assert (make("others-without.mp4", *others, "--remove_pose") == without).all()


@pytest.fixture
def samples(tmp_path) -> Path:
    """Two samples as test_svi.py has them, and what is none."""
    for name, picture, prompt in (("anna", "frame.jpg", "She looks up"), ("ben", "second.png", "He smiles")):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        (folder / picture).write_bytes((PROJECT / "assets/face.png").read_bytes())
        (folder / "prompt.txt").write_text(f'prompts = ["{prompt}"]\n', encoding="utf-8")
    (tmp_path / "data" / "ben" / "third.png").write_bytes(b"not the first PNG")
    (tmp_path / "data" / "notes.txt").write_text("no sample\n", encoding="utf-8")
    return tmp_path / "data"


def test_data_root_makes_a_video_of_each_sample(samples, tmp_path):
    words = ["--config", "tiny-i2v", *SHORT_CLIPS, "9", "--data_root", str(samples), "--output", str(tmp_path / "made")]
    made = infer_long_video.main(infer_long_video.parse_args(words))
    assert made == [tmp_path / "made" / "anna.mp4", tmp_path / "made" / "ben.mp4"]
    assert [read_metadata(video)["settings"]["prompt"] for video in made] == [["She looks up"], ["He smiles"]]
    before = [video.stat().st_mtime_ns for video in made]
    assert infer_long_video.main(infer_long_video.parse_args(words)) == made  # done already
    assert [video.stat().st_mtime_ns for video in made] == before


def test_data_root_of_some_samples_and_what_it_needs(samples, tmp_path, caplog):
    def chosen(*flags: str):
        return samples_of(infer_long_video.parse_args(["--data_root", str(samples), *flags]))

    [sample] = chosen("--test_samples", "ben", "claire", "--output_root", "videos")
    assert (sample.ref_image_path, sample.prompt_path) == (
        str(samples / "ben/second.png"),
        str(samples / "ben/prompt.txt"),
    )
    assert sample.output == "videos/ben.mp4" and "--test_samples claire: not in" in caplog.text
    assert [sample.prompt_path for sample in chosen("--prompt", "x")] == [None, None]
    with pytest.raises(UsageError, match=r"--output a.mp4 with --data_root: .* give a folder"):
        chosen("--output", "a.mp4")
    with pytest.raises(InputError, match="no samples there"):
        chosen("--test_samples", "claire")
    (samples / "anna" / "frame.jpg").unlink()
    with pytest.raises(InputError, match="no picture in .*anna"):
        chosen()
    with pytest.raises(InputError, match="no such folder"):
        samples_of(infer_long_video.parse_args(["--data_root", str(tmp_path / "nowhere")]))


def test_a_lora_without_a_telling_name_is_of_the_variant_that_the_command_describes(media, tmp_path):
    """Of a training of one's own; a folder's files are all applied."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "b.safetensors").write_bytes(media["svi-shot.safetensors"].read_bytes())
    (folder / "a.safetensors").write_bytes(media["svi-shot.safetensors"].read_bytes())
    for flags, variant in (
        (["--ref_pad_num", "-1"], "shot"),
        (["--ref_pad_num", "0", "--num_motion_frames", "5"], "film"),
        ([], "tom"),  # upstream's defaults
    ):
        words = ["--config", "tiny-i2v", "--extra_module_root", str(folder), *flags]
        settings = resolve_long_video(infer_long_video.parse_args(words))[0]
        assert settings.variant == variant
        assert settings.lora_path == (str(folder / "a.safetensors"), str(folder / "b.safetensors"))
