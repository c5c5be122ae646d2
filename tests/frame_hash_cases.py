"""The runs whose results `tests.frame_hashes` keeps on record, and the files that they read: made here, of numbers and
of the photo in assets/, by none of the code whose results they are to prove.
"""

import os
import wave
from pathlib import Path

import imageio_ffmpeg
import numpy
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.tiny_consis_id import write_release
from tests.tiny_face import write_antelopev2
from tests.tiny_instant_id import write_controlnet, write_instant_id, write_sdxl

SMALL = "--height 64 --width 96 --num_frames 5 --num_inference_steps 3"
FACES = "--antelopv2_path inputs/antelopev2"
SDXL = f"--sdxl_path inputs/sdxl --instantid_path inputs/InstantID {FACES}"
PICTURE = f"--method instantid {SDXL} --ip_image assets/face.png --height 256 --width 256 --num_inference_steps 3"
CONSIS_ID = "--method consisid --ip_image assets/face.png --height 64 --width 96 --num_frames 9 --num_inference_steps 2"
AVATAR = "--width 96 --height 64 --audio inputs/speech.wav --clip_sample_n_frames 17 --overlap_window_length 2"
CLIPS = "--height 32 --width 48 --num_frames 9 --num_inference_steps 2"
STYLE = "--lora_path inputs/style.safetensors"

# name, script, flags. The output, out.mp4 or out.png, is added; each runs in a folder of its own.
CASES = [
    ("infer-default", "infer.py", ""),
    (
        *("infer-batch", "infer.py"),
        f"{SMALL} --prompt 'a woman reads' 'a man, « naïve »' --seed 0 5 --negative_prompt blurry --solver unipc"
        " --shift 3 --guidance_scale 4 --fps 8 --quality 7 --tiled --identity_strength 1.5 --identity_start 0.2"
        " --identity_end 0.9 --no_face_crop --memory model --num_inference_steps 10",
    ),
    (
        *("infer-people", "infer.py"),
        f"{SMALL} --ip_image assets/face.png inputs/face2.png --prompt @inputs/prompts.txt --step_cache teacache"
        " --step_cache_threshold 0.3 --num_inference_steps 8 --preview --allow_no_face --memory sequential"
        " --dtype bf16 --vae_dtype bf16 --attention_backend native",
    ),
    (
        *("infer-retries", "infer.py"),
        f"{SMALL} {FACES} --min_face_score 0.99 --max_retries 1 --face_index 0 --fp8 --solver dpm++ --seed 3"
        " --num_inference_steps 4 --noise_device cpu --device cpu",
    ),
    (
        *("infer-distilled", "infer.py"),
        f"{SMALL} --timesteps 1000 750 400 --solver euler-flow --guidance_scale 1 --memory group --seed 11",
    ),
    (
        *("infer-experts", "infer.py"),
        f"{SMALL} --config inputs/experts.yaml --guidance_scale 4 3 --ip_image assets/face.png --memory resident",
    ),
    (
        *("infer-image", "infer.py"),
        f"{SMALL} --image inputs/a.png --prompt 'she turns' --step_cache first_block --step_cache_threshold 0.2"
        f" --num_inference_steps 6 --preview --solver unipc {FACES} --min_face_score -1",
    ),
    (
        *("infer-last-image", "infer.py"),
        f"{SMALL} --config inputs/flf2v.yaml --image inputs/a.png --last_image inputs/b.png --memory sequential",
    ),
    (
        *("infer-first-frame", "infer.py"),
        f"{SMALL} --first_frame instantid {SDXL} --ip_image assets/face.png --prompt 'a woman' --first_frame_seed 3"
        " --first_frame_prompt rain --face_height 0.4 --face_centre 0.4 0.5 --face_roll 5 --ip_adapter_scale 0.6"
        " --controlnet_conditioning_scale 0.7 --region_mask --height 64 --width 64",
    ),
    ("instantid-default", "infer.py", f"{PICTURE} --prompt 'a woman'"),
    (
        *("instantid-batch", "infer.py"),
        f"{PICTURE} --prompt 'a (woman:1.4) in [rain]' 'a fox' --seed 1 2 --prompt_weighting --face_height 0.6"
        " --face_centre 0.4 0.5 --face_roll 10 --ip_adapter_scale 0.6 --controlnet_conditioning_scale 0.5"
        " --control_guidance_end 0.7 --region_mask --negative_prompt blurry --guidance_scale 3 --tiled",
    ),
    (
        *("instantid-controls", "infer.py"),
        f"{PICTURE} --prompt portrait --pose_image inputs/face2.png --controlnet inputs/depth inputs/depth"
        " --control_image inputs/a.png inputs/b.png --control_scale 0.5 0.8 --face_index 0 --lcm"
        " --lcm_lora_path inputs/lcm.safetensors --dtype bf16 --memory group --min_face_score 0.99 --max_retries 1",
    ),
    (
        *("consisid-default", "infer.py"),
        f"{CONSIS_ID} --config consisid --base_path inputs/consisid --prompt 'a woman smiles'",
    ),
    (
        *("consisid-batch", "infer.py"),
        f"{CONSIS_ID} --config consisid --base_path inputs/consisid --prompt 'a woman smiles' 'a fox' --seed 0 4"
        " --face_detector scrfd --face_index 0 --identity_strength 0.7 --guidance_scale 3 --negative_prompt the"
        " --fps 10 --tiled --quality 8 --memory model --min_face_score -1",
    ),
    (
        *("consisid-1.5", "infer.py"),
        f"{CONSIS_ID} --config consisid-1.5 --base_path inputs/consisid-1.5 --prompt 'the fox' --face_index 1"
        " --dtype bf16 --fp8",
    ),
    ("lora-default", "infer_with_lora.py", STYLE),
    (
        *("lora-two", "infer_with_lora.py"),
        f"{SMALL} {STYLE} inputs/motion.safetensors --lora_scale 0.8 -0.5 --lora_partial --lora_mode merged"
        " --seed 0 3 --prompt 'a woman' --solver unipc --num_inference_steps 12 --identity_strength 0.5 --preview",
    ),
    (
        *("lora-switched", "infer_with_lora.py"),
        f"{SMALL} {STYLE} --lora_scale 1.5 --lora_start 0.3 --lora_end 0.7 --num_inference_steps 6 --fp8 --tiled"
        f" --step_cache first_block --step_cache_threshold 0.05 {FACES} --min_face_score 0.99 --max_retries 1",
    ),
    (
        *("lora-experts", "infer_with_lora.py"),
        f"{SMALL} --config inputs/experts.yaml --ip_image assets/face.png --lora_path_high inputs/style.safetensors"
        " --lora_path_low inputs/motion.safetensors --lora_scale_high 0.7 --lora_scale_low 1.2 --lora_mode live"
        " --guidance_scale 3 2 --memory group --lora_partial",
    ),
    (
        *("lora-preset", "infer_with_lora.py"),
        f"--height 64 --width 96 --num_frames 5 {STYLE} --lora_config lora-lightx2v-4step --memory sequential",
    ),
    ("swap-default", "infer_face_swap.py", ""),
    (
        *("swap-background", "infer_face_swap.py"),
        "--input_video inputs/walk.mp4 --ip_image assets/face.png --prompt 'a woman walks' --denoising_strength 0.6"
        " --force_background_consistency --target_face_index 0 --num_frames 9 --num_inference_steps 12 --seed 2"
        " --solver unipc --guidance_scale 3",
    ),
    (
        *("swap-whole", "infer_face_swap.py"),
        f"--input_video inputs/walk.mp4 --ip_image assets/face.png --no_composite --denoising_strength 1 {FACES}"
        " --num_frames 13 --num_inference_steps 3 --seed 0 1 --tiled --memory model --dtype bf16 --preview"
        " --min_face_score -1 --identity_strength 0.8 --quality 6",
    ),
    ("vace-default", "infer_with_vace.py", ""),
    (
        *("vace-mask", "infer_with_vace.py"),
        "--reference_video inputs/walk.mp4 --reference_mask inputs/mask.png --reference_image inputs/a.png inputs/b.png"
        " --vace_scale 0.7 --num_frames 13 --fps 12 --window_frames 9 --window_overlap 5 --num_inference_steps 8"
        " --prompt 'a tram' --seed 4 --solver unipc --identity_strength 1.2",
    ),
    (
        *("vace-resampled", "infer_with_vace.py"),
        f"--reference_video inputs/gray.mp4 --resample_control --num_frames 5 --num_inference_steps 3 {FACES}"
        " --ip_image assets/face.png inputs/face2.png --memory sequential --dtype bf16 --tiled --preview --shift 4"
        " --height 64 --width 96",
    ),
    (
        *("vace-outpainting", "infer_with_vace.py"),
        "--reference_video inputs/wide.mp4 --reference_mask inputs/wide.mask.mp4 --step_cache first_block"
        " --num_frames 5 --num_inference_steps 3 --seed 0 1 --memory model --fp8",
    ),
    (
        *("vace-retries", "infer_with_vace.py"),
        f"{SMALL} --reference_image inputs/a.png {FACES} --min_face_score 0.99 --max_retries 1 --guidance_scale 2",
    ),
    ("avatar-default", "infer_audio_avatar.py", ""),
    (
        *("avatar-scales", "infer_audio_avatar.py"),
        f"{AVATAR} --reference_image inputs/face2.png --sample_steps 8 --sample_text_guide_scale 3"
        f" --sample_audio_guide_scale 5 --overlapping_weight_scheme log --color_correction 0.5 {STYLE} --lora_scale 0.6"
        " --validation_prompts 'a man speaks' --seed 2 --solver euler --shift 4 --fps 20 --quality 7",
    ),
    (
        *("avatar-native", "infer_audio_avatar.py"),
        f"{AVATAR} --sample_steps 6 --audio_native_guidance 2 2 --last_window legacy --audio_alignment exact --seed 0 1"
        " --step_cache teacache --step_cache_threshold 0.3 --num_skip_start_steps 1 --teacache_offload --tiled"
        f" --GPU_memory_mode sequential_cpu_offload --dtype bf16 {FACES} --min_face_score -1 --face_index 0",
    ),
    ("long-default", "infer_long_video.py", ""),
    (
        *("long-film", "infer_long_video.py"),
        f"{CLIPS} --config tiny-i2v --variant film --prompt_path inputs/prompts.txt --ref_image_path inputs/a.png"
        f" --num_inference_steps 12 --seed 7 --seed_multiplier 10 --prompt_prefix wide --num_clips 3 {FACES}"
        " --prompt_repeat cycle --prompt_repeat_times 2 --guidance_scale 4 --solver unipc --fps 12",
    ),
    (
        *("long-loras", "infer_long_video.py"),
        f"{CLIPS} --config tiny-i2v --variant shot {STYLE} inputs/motion.safetensors --lora_scale 1 0.5 --lora_partial"
        " --first_clip_without_lora --num_clips 2 --use_first_prompt_only --prompt a b --no_drift_report --preview"
        " --memory model --dtype bf16 --tiled --step_cache first_block --seed 0 1",
    ),
    (
        *("long-extend", "infer_long_video.py"),
        "--num_frames 9 --num_inference_steps 2 --config tiny-i2v --variant 2.0-wan2.1 --num_motion_frames 1"
        " --extend inputs/walk.mp4 --prompt leaves --num_clips 2 --memory group",
    ),
    (
        *("long-2.0", "infer_long_video.py"),
        f"{CLIPS} --config tiny-i2v-a14b --variant 2.0 --end_image inputs/b.png --boundary 0.8 --guidance_scale 4 3"
        " --lora_path_high inputs/style.safetensors --lora_path_low inputs/style.safetensors --lora_scale_low 0.5"
        " --num_clips 2 --ref_image_path inputs/a.png --no_drift_report --memory sequential",
    ),
    (
        *("long-2.0-pro", "infer_long_video.py"),
        f"{CLIPS} --config tiny-i2v-a14b --variant 2.0-pro --prompt a b c --prompt_repeat stop --no_drift_report",
    ),
    (
        *("long-talk", "infer_long_video.py"),
        "--num_frames 9 --num_inference_steps 2 --config tiny-i2v --variant talk --audio_path inputs/speech.wav"
        " --audio_guidance_scale 4 --ref_image_path inputs/face2.png --max_width 64 --seed 5",
    ),
    (
        *("long-dance", "infer_long_video.py"),
        f"{CLIPS} --config tiny-i2v --variant dance --pose_path inputs/walk.mp4 --num_clips 2 --no_drift_report --fp8",
    ),
    (
        *("long-first-frame", "infer_long_video.py"),
        f"{CLIPS} --config tiny-i2v --first_frame instantid {SDXL} --ip_image assets/face.png --prompt rain"
        " --prompt_prefix wide --first_frame_seed 1 --face_index 0 --control_guidance_end 0.8 --num_clips 1"
        " --pose_image inputs/face2.png",
    ),
    *(
        (f"control-{task}", "-m preprocess.control", f"{task} {flags}")
        for task, flags in {
            "gray": "--video inputs/walk.mp4",
            "flow": "--video inputs/walk.mp4",
            "outpainting": "--video inputs/walk.mp4 --direction left up --expand_ratio 0.25",
            "inpainting_mask": "--video inputs/walk.mp4 --mask inputs/mask.png --maskaug_mode bbox_expand",
            "frameref": "--image inputs/a.png --image2 inputs/b.png --num_frames 9",
        }.items()
    ),
]
# Those that are also killed while denoising, and resumed: which file of the state has by then been written how often.
KILLED = {
    "infer-batch": (".out-001-seed0.state.safetensors", 2),
    "lora-two": (".out-000-seed3.state.safetensors", 2),
    "swap-background": (".out.*state.safetensors", 2),
    "vace-mask": (".out.clips/.00001.state.safetensors", 2),
    "avatar-scales": (".out.state/latents.safetensors", 3),  # the first is the noise
    "long-film": (".out.clips/.00001.state.safetensors", 2),
}
# Two a script, whose records are kept in tests/records.
RECORDED = {
    *("infer-default", "infer-people", "instantid-controls", "consisid-batch", "lora-two", "lora-experts"),
    *("swap-background", "swap-whole", "vace-mask", "vace-resampled", "avatar-default", "avatar-native"),
    *("long-film", "long-2.0"),
}


def write_inputs(folder: Path, assets: Path) -> None:
    """Every file in inputs/ that a case names."""
    folder.mkdir()
    photo = Image.open(assets / "face.png").convert("RGB")
    photo.crop((60, 0, 420, 360)).resize((256, 256)).save(folder / "face2.png")
    for seed, name in enumerate("ab"):
        pixels = numpy.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).resize((192, 128)).save(folder / f"{name}.png")
    write_sound(folder / "speech.wav", seconds=1.3)

    parts = [photo.crop((100 + 2 * i, 5 + i, 350 - i, 255 - 2 * i)).resize((128, 128)) for i in range(14)]
    frames = numpy.stack([numpy.asarray(part) for part in parts])  # (T, H, W, 3)
    write_clip(folder / "walk.mp4", frames, audio_path=str(folder / "speech.wav"))
    write_clip(folder / "gray.mp4", numpy.repeat(frames.mean(-1, keepdims=True).astype(numpy.uint8), 3, axis=-1))
    white = numpy.zeros((128, 128, 3), numpy.uint8)
    white[32:96, 48:] = 255
    Image.fromarray(white).save(folder / "mask.png")
    edges = ((0, 0), (0, 0), (16, 16), (0, 0))  # left and right of every frame
    write_clip(folder / "wide.mp4", numpy.pad(frames, edges, constant_values=127))
    write_clip(folder / "wide.mask.mp4", numpy.pad(0 * frames, edges, constant_values=255))

    write_lora(folder / "style.safetensors", seed=1)
    write_lora(folder / "motion.safetensors", seed=2)
    (folder / "prompts.txt").write_text("she smiles\nshe turns\n")
    (folder / "experts.yaml").write_text(
        "base: tiny\nseed: 0\nexperts: {high: high_noise_model, low: low_noise_model}\nboundary: 0.9\n"
    )
    (folder / "flf2v.yaml").write_text(
        "base: tiny-i2v\nseed: 0\ntransformer: {in_dim: 36, out_dim: 16, dim: 64, ffn_dim: 128, num_heads: 2,"
        " num_layers: 2, text_dim: 32, text_len: 512, freq_dim: 32, image_dim: 32, image_tokens: 34}\n"
    )


def write_weights(folder: Path) -> None:
    """The networks in inputs/ that are read from files: faces, InstantID and ConsisID. It takes seconds."""
    write_antelopev2(folder / "antelopev2", ((6, 8, 0.9, 3),))
    write_sdxl(folder / "sdxl")
    write_instant_id(folder / "InstantID")
    write_controlnet(folder / "depth")
    unet = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{unet}.lora_A.weight": (2, 8), f"{unet}.lora_B.weight": (8, 2)}
    save_file({n: torch.randn(s, generator=generator) for n, s in shapes.items()}, folder / "lcm.safetensors")
    for version, name in {"1.0": "consisid", "1.5": "consisid-1.5"}.items():
        write_release(folder / name, version)


def write_clip(path: Path, frames: numpy.ndarray, **options) -> None:
    """(T, H, W, 3) uint8 as a video of 16 frames a second."""
    height, width = frames.shape[1:3]
    options |= {"fps": 16, "output_params": ["-threads", "1"]}
    writer = imageio_ffmpeg.write_frames(os.fspath(path), (width, height), **options)
    writer.send(None)
    for frame in frames:
        writer.send(numpy.ascontiguousarray(frame))
    writer.close()


def write_sound(path: Path, seconds: float) -> None:
    """A tone that swells, mono at 16 kHz."""
    time = numpy.arange(round(16000 * seconds)) / 16000
    samples = 9000 * numpy.sin(1256 * time) * numpy.sin(9 * time) ** 2
    with wave.open(os.fspath(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.astype("<i2").tobytes())


def write_lora(path: Path, seed: int) -> None:
    """For both tiny transformers, in ComfyUI's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, rows in {"self_attn.q": 64, "self_attn.v": 64, "cross_attn.o": 64, "ffn.0": 128}.items():
        for block in range(2):
            stem = f"diffusion_model.blocks.{block}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, 64, generator=generator) / 8
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 4
    save_file(tensors, path)
