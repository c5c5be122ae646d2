"""InstantID: its rules by themselves, and infer.py --method instantid and --first_frame on tiny networks."""

import gc
import json
import math
import shutil
import weakref
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionXLControlNetImg2ImgPipeline, UNet2DConditionModel
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file

import infer
import infer_long_video
from errors import InputError, UserError, WeightsError
from models.identity.instant_id import (
    attach_face_adapter,
    generate,
    load_controlnet,
    read_face_adapter,
    region_tokens,
)
from models.prompt_weighting import weighted_embeddings
from pipelines.conditions import cover_resize
from pipelines.instant_id import pipeline as instant_id
from pipelines.instant_id.command import resolve_instant_id
from pipelines.text_to_video import command as image_to_video_command
from pipelines.text_to_video.command import picture_settings, resolve_image_to_video
from preprocess.face_detection import Face, load_recognizer
from preprocess.image import read_image
from preprocess.keypoints import box_mask, draw_keypoints, frame_face
from preprocess.record import read_picture_metadata
from preprocess.video import read_frames
from tests.streamed_offload import stream_group_offloading
from tests.tiny_face import write_antelopev2
from tests.tiny_instant_id import adapter_tensors, write_controlnet, write_instant_id, write_sdxl, write_single_file

PORTRAIT = "assets/face.png"
KEYPOINTS = numpy.array([[100.0, 90], [160, 90], [130, 120], [105, 150], [155, 150]])
ONE_FACE = ((6, 8, 0.9, 3),)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Every released folder that an InstantID run needs."""
    root = tmp_path_factory.mktemp("weights")
    write_sdxl(root / "sdxl")
    write_instant_id(root / "InstantID")
    write_controlnet(root / "depth")
    write_antelopev2(root / "antelopev2", ONE_FACE)
    return root


def flags(weights, *more) -> list[str]:
    paths = {"--sdxl_path": "sdxl", "--instantid_path": "InstantID", "--antelopv2_path": "antelopev2"}
    return [str(word) for flag, name in paths.items() for word in (flag, weights / name)] + [*map(str, more)]


SMALL = ("--height", 256, "--width", 256, "--num_inference_steps", 2, "--ip_image", PORTRAIT, "--prompt", "a woman")


def make(weights, output, *more, photo=PORTRAIT) -> numpy.ndarray:
    """Run in this process; the picture of the file."""
    small = [photo if word == PORTRAIT else word for word in SMALL]
    arguments = flags(weights, "--method", "instantid", *small, "--output", output, *more)
    assert infer.main(infer.parse_args(arguments)) == [output]
    return read_image(output)


@pytest.fixture(scope="module")
def reference(weights, tmp_path_factory) -> numpy.ndarray:
    return make(weights, tmp_path_factory.mktemp("reference") / "out.png")


@pytest.fixture(scope="module")
def pipeline(weights):
    """The library's way: diffusers' pipeline with what InstantID adds."""
    args = infer.parse_args(flags(weights, "--method", "instantid", *SMALL))
    settings, config = resolve_instant_id(args)
    pipe = instant_id.load_instant_id(settings, config, torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipeline, seed=0, embedding=None, **call) -> torch.Tensor:
    """Latents of a 64 x 64 picture, two steps."""
    if embedding is None:
        embedding = numpy.linspace(-2, 2, 512, dtype=numpy.float32)
    count = len(call.get("prompt", "x")) if isinstance(call.get("prompt"), list) else 1
    generators = [torch.Generator().manual_seed(seed) for _ in range(count * call.get("num_images_per_prompt", 1))]
    call = {"prompt": "a man", "num_inference_steps": 2, "output_type": "latent"} | call
    drawn = draw_keypoints(KEYPOINTS / 4, 64, 64)
    return generate(pipeline, embedding, drawn, generator=generators, **call).images


# ------------------------------------------------------------------------------------------------- rules by themselves


def test_framed_face_is_where_it_was_asked_for():
    box = (80.0, 60.0, 180.0, 180.0)
    keypoints, moved = frame_face(KEYPOINTS, box, 1000, 500, face_height=0.3, center=(0.5, 0.4), roll=0.0)
    assert moved == pytest.approx((250 - 125, 400 - 150, 250 + 125, 400 + 150))
    numpy.testing.assert_allclose(keypoints, (KEYPOINTS - (130, 120)) * 2.5 + (250, 400))
    turned, _ = frame_face(KEYPOINTS, box, 1000, 500, face_height=0.3, center=(0.5, 0.4), roll=30.0)
    across, down = turned[1] - turned[0]
    assert math.degrees(math.atan2(down, across)) == pytest.approx(30)
    again, _ = frame_face(turned, box, 1000, 500, face_height=0.12, center=(0.5, 0.4), roll=0.0)
    assert again[0][1] == pytest.approx(again[1][1])  # a tilted photo is levelled


def test_box_mask_counts_whole_pixels_and_stays_in_the_picture():
    assert box_mask((1.9, 2.9, 5.9, 4.9), 6, 8).sum() == 4 * 2
    assert box_mask((-5, -5, 3, 2), 6, 8).sum() == 3 * 2
    assert box_mask((-9, 1, -2, 5), 6, 8).sum() == 0


def test_region_has_as_many_tokens_as_the_attention_at_every_size_of_sdxl():
    for height in range(512, 1537, 64):
        for width in range(512, 1537, 64):
            for shrink in (16, 32):  # the two levels that attend
                count = (height // shrink) * (width // shrink)
                assert region_tokens(torch.ones(1, 1, height, width), count).shape == (1, count)


# ------------------------------------------------------------------------------------------------------------ library


def test_a_batch_of_prompts_is_each_prompt_alone(pipeline):
    """Upstream crashes: its face rows are always two."""
    both = sample(pipeline, prompt=["a man", "rain"])
    assert both.shape[0] == 2
    for row, prompt in enumerate(("a man", "rain")):
        torch.testing.assert_close(both[row : row + 1], sample(pipeline, prompt=prompt), atol=1e-4, rtol=1e-4)


def test_two_pictures_of_a_prompt_and_no_guidance(pipeline):
    two = sample(pipeline, num_images_per_prompt=2)
    torch.testing.assert_close(two[:1], two[1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(two[:1], sample(pipeline), atol=1e-4, rtol=1e-4)
    unguided = sample(pipeline, guidance_scale=1.0)
    assert unguided.shape == (1, 4, 8, 8)
    assert not torch.allclose(unguided, two[:1])
    assert torch.isfinite(sample(pipeline, guess_mode=True)).all()  # upstream crashes here too


def test_the_face_matters_and_nothing_of_it_stays(pipeline):
    plain = sample(pipeline)
    assert not torch.allclose(sample(pipeline, embedding=numpy.ones(512, numpy.float32)), plain, atol=1e-3)
    region = numpy.zeros((64, 64), numpy.float32)
    region[16:48, 16:48] = 1
    sample(pipeline, region=region, ip_adapter_scale=0.1)
    torch.testing.assert_close(sample(pipeline), plain, atol=0, rtol=0)
    with pytest.raises(RuntimeError, match="stop"):
        sample(pipeline, callback_on_step_end=lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    assert not pipeline.controlnet._forward_pre_hooks
    assert not pipeline.controlnet._forward_hooks


def test_image_to_image(pipeline):
    """The same glue on diffusers' image-to-image pipeline: at full strength the picture to start from is forgotten."""
    other = StableDiffusionXLControlNetImg2ImgPipeline(
        **{name: part for name, part in pipeline.components.items() if name in ("vae", "text_encoder", "unet")},
        **{name: pipeline.components[name] for name in ("text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")},
        controlnet=pipeline.controlnet,
        add_watermarker=False,
    )
    other.set_progress_bar_config(disable=True)
    start = Image.fromarray(numpy.full((64, 64, 3), 200, numpy.uint8))
    weak, strong = (sample(other, image=start, strength=s, num_inference_steps=4) for s in (0.3, 0.9))
    assert not torch.allclose(weak, strong)
    face = sample(other, image=start, strength=0.9, num_inference_steps=4, embedding=numpy.ones(512, numpy.float32))
    assert not torch.allclose(face, strong, atol=1e-3)


def test_weighted_prompts(pipeline):
    """Weight 1 is the text itself; more moves away from it; long prompts grow by blocks."""
    plain, weighted = (weighted_embeddings(pipeline, text, "bad") for text in ("a cat", "a (cat:1.5)"))
    same = weighted_embeddings(pipeline, "a (cat:1.0)", "bad")
    assert torch.equal(plain["prompt_embeds"], same["prompt_embeds"])
    assert not torch.allclose(plain["prompt_embeds"], weighted["prompt_embeds"])
    assert torch.equal(plain["negative_prompt_embeds"], weighted["negative_prompt_embeds"])
    long = weighted_embeddings(pipeline, "word " * 30, None)
    assert long["prompt_embeds"].shape == long["negative_prompt_embeds"].shape == (1, 120 + 4, 24)
    assert torch.isfinite(sample(pipeline, prompt=None, **long)).all()


def test_adapter_loads_strictly(pipeline, tmp_path):
    unet = pipeline.unet
    good = adapter_tensors()
    for part, name, change in [
        ("image_proj", "latents", None),
        ("image_proj", "layers.2.0.to_kv.weight", None),
        ("image_proj", "proj_in.weight", torch.zeros(3, 3)),
        ("image_proj", "layers.0.0.to_x.weight", torch.zeros(3)),
        ("ip_adapter", "1.to_k_ip.weight", None),
        ("ip_adapter", "2.to_k_ip.weight", torch.zeros(3)),
        ("ip_adapter", "3.to_v_ip.weight", torch.zeros(3, 3)),
    ]:
        changed = {key: dict(tensors) for key, tensors in good.items()}
        changed[part].pop(name, None)
        if change is not None:
            changed[part][name] = change
        with pytest.raises(WeightsError, match="adapter.bin: not the weights of"):
            attach_face_adapter(unet, changed, source="adapter.bin")
    with pytest.raises(WeightsError, match="not InstantID's ip-adapter.bin"):
        torch.save({"weight": torch.zeros(1)}, tmp_path / "ip-adapter.bin")
        read_face_adapter(tmp_path / "ip-adapter.bin")
    flat = {f"{part}.{name}": tensor.clone() for part, tensors in good.items() for name, tensor in tensors.items()}
    save_file(flat, tmp_path / "ip-adapter.safetensors")
    read = read_face_adapter(tmp_path / "ip-adapter.safetensors")
    assert {part: set(tensors) for part, tensors in read.items()} == {part: set(t) for part, t in good.items()}


def test_controlnet_loads_strictly(weights, tmp_path):
    with pytest.raises(WeightsError, match="config.json"):
        load_controlnet(tmp_path, dtype=torch.float32)
    folder = tmp_path / "net"
    load_controlnet(weights / "depth", dtype=torch.float32).save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_tensors(file)
    tensors.pop("conv_in.weight")
    save_file(tensors | {"stray": torch.zeros(1)}, file)
    with pytest.raises(WeightsError, match=r"1 missing \(conv_in.weight\); 1 unexpected \(stray\)"):
        load_controlnet(folder, dtype=torch.float32)


# ------------------------------------------------------------------------------------------------------- the face


def test_largest_face_of_the_pose_picture_is_taken(weights, monkeypatch, tmp_path):
    """InstantID's demos take the last face that was found."""
    args = infer.parse_args(flags(weights, "--method", "instantid", *SMALL, "--pose_image", PORTRAIT))
    settings, _ = resolve_instant_id(args)
    embedding = numpy.ones(512, numpy.float32)
    large = Face((10.0, 10.0, 110.0, 130.0), 0.6, KEYPOINTS, embedding=embedding)
    small = Face((150.0, 10.0, 190.0, 60.0), 0.9, KEYPOINTS + 50, embedding=-embedding)
    for faces in ([large, small], [small, large]):
        guide = instant_id.guide_face(settings, lambda picture, faces=faces: faces)
        assert guide.box == large.box
        assert (guide.keypoints == large.keypoints).all()
        assert (guide.embedding == embedding).all()
        assert guide.size == (256, 256)


def test_pose_picture_places_the_face_of_a_first_frame_too(weights, tmp_path):
    Image.new("RGB", (300, 200)).save(tmp_path / "pose.png")
    first = ("--first_frame", "instantid", "--pose_image", tmp_path / "pose.png", "--control_guidance_end", 0.8)
    args = infer.parse_args(flags(weights, *first, *VIDEO, "--ip_image", PORTRAIT))
    settings = picture_settings(resolve_image_to_video(args)[0])
    assert settings.control_guidance_end == 0.8
    assert not settings.framed
    face = Face((300.0, 100.0, 500.0, 350.0), 1.0, 2 * KEYPOINTS, embedding=numpy.ones(512, numpy.float32))
    seen = []
    guide = instant_id.guide_face(settings, lambda picture: seen.append(picture.shape) or [face])
    assert seen == [(1280, 1280, 3), (*guide.size, 3)]  # keypoints are in pixels of the picture to make
    assert guide.box == face.box


def test_prompts_are_split_over_processes(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    make_all = flags(weights, "--method", "instantid", *SMALL, "--output", tmp_path / "out.png")
    assert infer.main(infer.parse_args([*make_all, "--seed", "0", "1"])) == [tmp_path / "out-000-seed1.png"]
    assert [p.name for p in tmp_path.glob("*.png")] == ["out-000-seed1.png"]
    assert infer.main(infer.parse_args([*make_all, "--seed", "2"])) == []  # the other process's
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_without_a_size_the_picture_has_the_photos_shape(weights):
    arguments = flags(weights, "--method", "instantid", "--ip_image", PORTRAIT, "--prompt", "x")
    settings, _ = resolve_instant_id(infer.parse_args(arguments))
    recognizer = load_recognizer(weights / "antelopev2")
    guide = instant_id.guide_face(settings, recognizer)
    assert guide.size == (1280, 1280)
    # The stub detector's face: cell (6, 8) of stride 32 in a picture of 640, three cells to each side.
    assert guide.box == pytest.approx((320, 192, 704, 576), abs=0.1)
    assert guide.region.sum() == pytest.approx(384 * 384, rel=0.02)


def test_photo_or_pose_without_a_face(weights, tmp_path):
    nobody = tmp_path / "nobody"
    write_antelopev2(nobody, ())
    with pytest.raises(InputError, match="no face found in assets/face.png"):
        make(weights, tmp_path / "out.png", "--antelopv2_path", nobody)
    assert not list(tmp_path.glob("out*"))


# ------------------------------------------------------------------------------------------------- infer.py: pictures


def test_picture_carries_what_made_it_and_is_made_again(weights, tmp_path, reference):
    output = tmp_path / "out.png"
    assert (make(weights, output) == reference).all()
    record = read_picture_metadata(output)
    assert json.loads(output.with_suffix(".json").read_text(encoding="utf-8")) == record
    assert record["settings"]["prompt"] == ["a woman"]
    assert record["face_score"]["frames_looked_at"] == 1
    assert len(record["weights"]) == 6
    infer.main(infer.parse_args(["--config", str(output.with_suffix(".json")), "--output", str(tmp_path / "b.png")]))
    assert (read_image(tmp_path / "b.png") == reference).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.json", "b.png", "out.json", "out.png"]


def test_prompts_and_seeds(weights, tmp_path, reference):
    make_all = flags(weights, "--method", "instantid", *SMALL, "--prompt", "rain", "--seed", 0, 1)
    infer.main(infer.parse_args([*make_all, "--output", str(tmp_path / "out.png")]))
    names = [f"out-{prompt:03d}-seed{seed}.png" for prompt in (0, 1) for seed in (0, 1)]
    assert sorted(p.name for p in tmp_path.glob("*.png")) == names
    pictures = [read_image(tmp_path / name) for name in names]
    assert (pictures[0] == reference).all()
    assert all((a != b).any() for i, a in enumerate(pictures) for b in pictures[:i])


@pytest.mark.parametrize(
    "more",
    [
        ("--negative_prompt", "rain"),
        ("--guidance_scale", 1),
        ("--ip_adapter_scale", 0.2),
        ("--controlnet_conditioning_scale", 0.1),
        ("--control_guidance_end", 0.5),
        ("--face_height", 0.7),
        ("--face_centre", 0.2, 0.7),
        ("--face_roll", 40),
        ("--region_mask",),
        ("--prompt_weighting",),
        ("--pose_image", PORTRAIT),
        ("--dtype", "bf16"),
        ("--tiled",),  # the autoencoder normalises each tile by itself
        ("--face_index", 0, "--controlnet", "{weights}/depth", "--control_image", PORTRAIT),
    ],
    ids=lambda more: more[0] if more[0] != "--face_index" else "--controlnet",
)
def test_every_flag_changes_the_picture(weights, tmp_path, reference, more):
    more = [str(word).format(weights=weights) for word in more]
    picture = make(weights, tmp_path / "out.png", *more)
    assert picture.shape == reference.shape
    assert (picture != reference).any()


@pytest.mark.parametrize("more", [("--memory", "group"), ("--memory", "resident")])
def test_flags_of_the_machine_leave_the_picture(weights, tmp_path, reference, more):
    picture = make(weights, tmp_path / "out.png", *more)
    assert abs(picture.astype(int) - reference.astype(int)).max() <= 1


def test_group_offloading_through_a_stream_survives_the_upcast_of_the_vae(weights, monkeypatch):
    """On CUDA its hooks keep copies of the float16 weights, and diffusers decodes SDXL's in float32."""
    pictures = {}
    for memory in ("resident", "group"):
        if memory == "group":
            stream_group_offloading(monkeypatch)
        args = infer.parse_args(flags(weights, "--method", "instantid", *SMALL, "--dtype", "fp16", "--memory", memory))
        pipe = instant_id.load_instant_id(*resolve_instant_id(args), torch.device("cpu"))
        assert (pipe.vae.dtype, pipe.vae.config.force_upcast) == (torch.float16, True)
        pictures[memory] = [sample(pipe, seed=seed, output_type="np") for seed in (0, 1)]
        assert pipe.vae.dtype == torch.float16
    assert _is_group_offload_enabled(pipe.unet)
    for offloaded, resident in zip(pictures["group"], pictures["resident"], strict=True):
        numpy.testing.assert_array_equal(offloaded, resident)
    assert (pictures["group"][0] != pictures["group"][1]).any()


def test_broken_numbers_end_the_run(weights, tmp_path, monkeypatch):
    """A black picture is no picture."""
    forward, broken = UNet2DConditionModel.forward, []

    def overflow_at_step_2(self, *args, **kwargs):
        broken.append(1)
        (noise,) = forward(self, *args, **kwargs)
        return (noise * (math.nan if len(broken) == 2 else 1),)

    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(UNet2DConditionModel, "forward", overflow_at_step_2)
        make(weights, tmp_path / "out.png")
    words = "the model returned NaN or infinity at step 2 of 2 (torch.float32); try --dtype fp32"
    assert (str(error.value), error.value.exit_code) == (words, 4)

    decode = AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda *args, **more: [decode(*args, **more)[0] * math.nan])
    with pytest.raises(UserError, match="the VAE returned NaN or infinity .torch.float32.; try --dtype fp32") as error:
        make(weights, tmp_path / "out.png")
    assert error.value.exit_code == 4 and not list(tmp_path.iterdir())


def test_lcm(weights, tmp_path, reference):
    """A LoRA is merged, sampling changes to LCM's; a LoRA of another model is refused."""
    unet = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"
    generator = torch.Generator().manual_seed(0)
    lora = {f"{unet}.lora_A.weight": torch.randn(2, 8, generator=generator)}
    lora[f"{unet}.lora_B.weight"] = torch.randn(8, 2, generator=generator)
    save_file(lora, tmp_path / "lcm.safetensors")
    lcm = ("--lcm", "--lcm_lora_path", tmp_path / "lcm.safetensors")
    arguments = [word for word in SMALL if word not in ("--num_inference_steps", 2)]
    infer.main(
        infer.parse_args(flags(weights, "--method", "instantid", *arguments, *lcm, "--output", tmp_path / "out.png"))
    )
    record = read_picture_metadata(tmp_path / "out.png")
    assert record["scheduler"] == "LCMScheduler"
    assert (record["settings"]["num_inference_steps"], record["settings"]["guidance_scale"]) == (5, [1.5])
    first = read_image(tmp_path / "out.png")
    save_file({name: 3 * tensor for name, tensor in lora.items()}, tmp_path / "lcm.safetensors")
    assert (make(weights, tmp_path / "b.png", *lcm, "--num_inference_steps", 5) != first).any()
    save_file({name.replace("to_q", "to_nothing"): t for name, t in lora.items()}, tmp_path / "lcm.safetensors")
    with pytest.raises(WeightsError, match="lcm.safetensors: not a LoRA of this SDXL"):
        make(weights, tmp_path / "c.png", *lcm)


@pytest.mark.parametrize(
    ("more", "exit_code", "words"),
    [
        (["--method", "magic"], 2, ["--method magic", "standin, instantid, consisid"]),
        (["--config", "tiny"], 2, ["--method instantid", "--config tiny (standin)", "contradict"]),
        (["--shift", "3"], 2, ["--shift", "--method instantid"]),
        (["--num_frames", "5"], 2, ["--num_frames", "--method instantid"]),
        (["--first_frame", "instantid"], 2, ["--first_frame", "--method instantid"]),
        (["--wan_version", "2.1"], 2, ["--wan_version 2.1", "contradict"]),
        (["--ip_image", PORTRAIT], 2, ["--ip_image", "2 were given"]),
        (["--ip_image", "missing.png"], 2, ["--ip_image"]),
        (["--guidance_scale", "3", "4"], 2, ["--guidance_scale", "2 values"]),
        (["--ip_adapter_scale", "3"], 2, ["--ip_adapter_scale 3", "0 to 2"]),
        (["--face_height", "0"], 2, ["--face_height 0"]),
        (["--face_centre", "0.5", "nan"], 2, ["--face_centre nan"]),
        (["--height", "100"], 2, ["--height 100", "256 to 2048"]),
        (["--pose_image", PORTRAIT, "--face_roll", "3"], 2, ["--pose_image", "--face_roll"]),
        (["--pose_image", "none.png"], 3, ["--pose_image none.png"]),
        (["--controlnet", "a"], 2, ["--control_image", "0 pictures for 1"]),
        (["--controlnet", "a", "--control_image", PORTRAIT], 4, ["--controlnet a"]),
        (["--lcm_lora_path", "a"], 2, ["--lcm"]),
        (["--lcm"], 4, ["--only lcm-lora-sdxl"]),
        (["--max_retries", "2"], 2, ["--min_face_score"]),
        (["--min_face_score", "2"], 2, ["--min_face_score 2"]),
        (["--sdxl_path", "nowhere"], 4, ["nowhere", "--only sdxl-base-1.0"]),
        (["--sdxl_path", "assets"], 4, ["assets", "not a whole SDXL model"]),
        (["--sdxl_path", PORTRAIT], 4, ["--only sdxl-layout"]),
        (["--instantid_path", "assets"], 4, ["ControlNetModel", "--only instantid"]),
        (["--antelopv2_path", "assets"], 4, ["--method instantid", "--only antelopev2"]),
        (["--output", "out.mp4"], 2, ["must end in .png"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_line(weights, tmp_path, more, exit_code, words):
    with pytest.raises(UserError) as error:
        make(weights, tmp_path / "out.png", *more)
    message = str(error.value)
    assert error.value.exit_code == exit_code, message
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert not list(tmp_path.iterdir())


def test_base_in_one_file(weights, tmp_path, reference, monkeypatch):
    """A file with Stability's names, and beside it only the configurations and tokenizers of SDXL."""
    write_single_file(weights / "sdxl", tmp_path / "model.safetensors")
    photo = Path(PORTRAIT).resolve()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="--only sdxl-layout"):
        make(weights, tmp_path / "out.png", "--sdxl_path", "model.safetensors", photo=photo)
    layout = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(weights / "sdxl", tmp_path / "checkpoints" / "stable-diffusion-xl-base-1.0", ignore=layout)
    picture = make(weights, tmp_path / "out.png", "--sdxl_path", "model.safetensors", photo=photo)
    assert (picture == reference).all()
    save_file({"weight": torch.zeros(1)}, "model.safetensors")
    with pytest.raises(WeightsError, match="model.safetensors: not a whole SDXL model"):
        make(weights, tmp_path / "b.png", "--sdxl_path", "model.safetensors", photo=photo)


def drop(file: Path, name: str) -> None:
    tensors = load_tensors(file)
    del tensors[name]
    save_file(tensors, file)


def test_all_that_is_wrong_with_sdxl_is_said_before_it_loads(weights, tmp_path, monkeypatch):
    """diffusers would draw missing tensors at random, and name the rest one after another."""
    monkeypatch.setattr(instant_id, "load_instant_id", None)
    sdxl = shutil.copytree(weights / "sdxl", tmp_path / "sdxl")
    drop(sdxl / "unet" / "diffusion_pytorch_model.safetensors", "conv_out.bias")
    config = json.loads((sdxl / "text_encoder_2" / "config.json").read_text())
    (sdxl / "text_encoder_2" / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    (sdxl / "vae" / "config.json").write_text("{")
    (sdxl / "tokenizer" / "vocab.json").write_text('{"a": 1')
    net = shutil.copytree(weights / "InstantID", tmp_path / "InstantID")
    (net / "ControlNetModel" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError) as error:
        make(weights, tmp_path / "out.png", "--sdxl_path", sdxl, "--instantid_path", net)
    said = str(error.value)
    for words in (
        "unet: not the weights of UNet2DConditionModel: 1 missing (conv_out.bias)",
        "text_encoder_2: not the weights of CLIPTextModelWithProjection: ",
        "mlp.fc1.weight [32, 16] instead of [48, 16]",
        "vae/config.json: describes no vae",
        "tokenizer/vocab.json: ",
        "IdentityNet: ",
    ):
        assert words in said, said
    assert "text_encoder:" not in said and "\n" not in said
    assert said.endswith("download_models.py --only sdxl-base-1.0 instantid"), said


def test_one_file_is_checked_against_the_layout(weights, tmp_path, monkeypatch):
    write_single_file(weights / "sdxl", tmp_path / "model.safetensors")
    photo = Path(PORTRAIT).resolve()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(instant_id, "load_instant_id", None)
    layout = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(weights / "sdxl", tmp_path / "checkpoints" / "stable-diffusion-xl-base-1.0", ignore=layout)
    for name, words in (
        ("model.diffusion_model.out.2.bias", r"unet: .* 1 missing \(conv_out.bias\)"),
        ("first_stage_model.encoder.conv_in.weight", "vae: .*encoder.conv_in.weight"),
    ):
        shutil.copy("model.safetensors", "damaged.safetensors")
        drop(Path("damaged.safetensors"), name)
        with pytest.raises(WeightsError, match=words):
            make(weights, tmp_path / "out.png", "--sdxl_path", "damaged.safetensors", photo=photo)


def test_an_adapter_of_another_base_is_said_before_sdxl_loads(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(instant_id, "load_instant_id", None)
    net = shutil.copytree(weights / "InstantID", tmp_path / "InstantID")
    other = adapter_tensors()
    other["ip_adapter"] = {name: tensor[:, :5].clone() for name, tensor in other["ip_adapter"].items()}
    torch.save(other, net / "ip-adapter.bin")
    with pytest.raises(WeightsError, match="face adapter: .*not the weights of FaceAttentions"):
        make(weights, tmp_path / "out.png", "--instantid_path", net)


def test_a_controlnet_of_another_base_is_said_before_sdxl_loads(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(instant_id, "load_instant_id", None)
    config = json.loads((weights / "depth" / "config.json").read_text())
    net = ControlNetModel.from_config(config | {"cross_attention_dim": 40})
    net.save_pretrained(tmp_path / "depth")
    control = ("--controlnet", tmp_path / "depth", "--control_image", PORTRAIT)
    with pytest.raises(WeightsError, match="depth: a ControlNet for text of width 40, SDXL's UNet here reads 24"):
        make(weights, tmp_path / "out.png", *control)


def test_a_base_of_another_shape_is_refused(weights, tmp_path, monkeypatch):
    """As SD 1.5 would be: the face attentions do not fit."""
    small = {part: dict(tensors) for part, tensors in adapter_tensors().items()}
    small["ip_adapter"] = {name: tensor[:, :5] for name, tensor in small["ip_adapter"].items()}
    monkeypatch.setattr(instant_id, "read_face_adapter", lambda *args, **options: small)
    with pytest.raises(WeightsError, match=r"not the weights of FaceAttentions: \d+ of another shape"):
        make(weights, tmp_path / "out.png")


# ------------------------------------------------------------------------------------ photo -> first frame -> video

VIDEO = ("--num_frames", 5, "--num_inference_steps", 2, "--prompt", "a woman", "--height", 64, "--width", 96)


@pytest.fixture
def small_pictures(monkeypatch):
    """First frames of a megapixel in 30 steps take minutes here; these are as small as they may be."""
    load = image_to_video_command.load_config

    def few_steps(name):
        config = load(name)
        return config | {"defaults": config["defaults"] | {"num_inference_steps": 4}}

    monkeypatch.setattr(image_to_video_command, "load_config", few_steps)
    monkeypatch.setattr(image_to_video_command, "picture_size", lambda height, width: (256, 256))


def make_video(weights, output, *more) -> numpy.ndarray:
    first = ("--first_frame", "instantid", "--ip_image", PORTRAIT)
    infer.main(infer.parse_args(flags(weights, *first, *VIDEO, "--output", output, *more)))
    return read_frames(output)


def test_photo_to_first_frame_to_video(weights, tmp_path, small_pictures, monkeypatch, caplog):
    """SDXL is gone before Wan loads; what made the frame is beside the video; and the frame is used again."""
    from pipelines.wan import Wan

    pipelines = []
    load, encode = instant_id.load_instant_id, Wan.encode_prompts

    def watched_load(*args):
        pipelines.append(weakref.ref(pipe := load(*args)))
        return pipe

    def watched_encode(self, prompts):
        gc.collect()
        assert pipelines[-1]() is None, "SDXL is still in memory"
        return encode(self, prompts)

    monkeypatch.setattr(instant_id, "load_instant_id", watched_load)
    monkeypatch.setattr(Wan, "encode_prompts", watched_encode)
    output = tmp_path / "out.mp4"
    scene = ("--first_frame_seed", 3, "--first_frame_prompt", "rain")
    video = make_video(weights, output, *scene)
    assert video.shape == (5, 64, 96, 3)
    assert "pixels high: below 90 likeness drifts" in caplog.text
    names = ["out.first_frame" + end for end in (".json", ".keypoints.png", ".png", ".safetensors")]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "out.json", "out.mp4"]
    frame = read_image(tmp_path / names[2])
    assert frame.shape == (64, 96, 3)
    record = read_picture_metadata(tmp_path / names[2])
    assert record["settings"]["num_inference_steps"] == 4  # InstantID's, not the video's
    assert "face_score" in record
    saved = load_file(tmp_path / names[3])
    assert saved["embedding"].shape == (512,)
    assert (read_image(tmp_path / names[1]) == draw_keypoints(saved["keypoints"], 256, 256)).all()

    # It is InstantID's own picture, cut to the video.
    words = ["rain" if word == "a woman" else word for word in SMALL]
    words += ["--seed", 3, "--num_inference_steps", 4, "--output", tmp_path / "picture.png"]
    infer.main(infer.parse_args(flags(weights, "--method", "instantid", *words)))
    assert (frame == cover_resize(read_image(tmp_path / "picture.png"), 96, 64)).all()

    # The same picture by --image is the same video.
    again = ("--config", "tiny-i2v", "--image", tmp_path / names[2], *VIDEO, "--output", tmp_path / "image.mp4")
    infer.main(infer.parse_args([*map(str, again)]))
    assert (read_frames(tmp_path / "image.mp4") == video).all()

    # As after a crash: the frame is there, the video is not.
    output.unlink()
    output.with_suffix(".json").unlink()
    assert (make_video(weights, output, *scene) == video).all()
    assert len(pipelines) == 2
    assert (make_video(weights, output, *scene, "--overwrite", "--face_height", 0.6) != video).any()
    assert len(pipelines) == 3


def test_photo_to_first_frame_to_long_video(weights, tmp_path, small_pictures):
    """Two clips from the frame that was made: those of the same frame by --ref_image_path, also after a crash."""

    def make_long(output, *more) -> numpy.ndarray:
        story = (*VIDEO, "--prompt", "she smiles", "--prompt_prefix", "rain", "--no_drift_report")
        infer_long_video.main(infer_long_video.parse_args([*map(str, (*more, *story, "--output", output))]))
        return read_frames(output)

    first = flags(weights, "--first_frame", "instantid", "--ip_image", PORTRAIT)
    video = make_long(tmp_path / "out.mp4", *first)
    assert video.shape == (9, 64, 96, 3)
    frame = tmp_path / "out.first_frame.png"
    assert read_image(frame).shape == (64, 96, 3)
    assert read_picture_metadata(frame)["settings"]["prompt"] == ["rain, a woman"]
    assert (make_long(tmp_path / "same.mp4", "--config", "tiny-i2v", "--ref_image_path", frame) == video).all()
    made = frame.stat().st_mtime_ns
    (tmp_path / "out.mp4").unlink()
    again = ("--config", tmp_path / "out.json", "--output", tmp_path / "out.mp4", "--overwrite")
    infer_long_video.main(infer_long_video.parse_args([*map(str, again)]))
    assert (read_frames(tmp_path / "out.mp4") == video).all()
    assert frame.stat().st_mtime_ns == made
