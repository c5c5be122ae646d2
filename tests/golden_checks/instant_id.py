"""InstantID's parts and whole pipeline against its authors' code."""

import numpy
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention

from models.identity.instant_id import (
    FaceAttention,
    attach_face_adapter,
    build_resampler,
    face_rows,
    generate,
    region_tokens,
)
from models.prompt_weighting import encode_weighted, pad_to_equal, parse_weights, split_blocks
from preprocess.image import read_image
from preprocess.keypoints import draw_keypoints, resize_picture


def check_draw_keypoints(case):
    """Every canvas whose picture is among the outputs; pixel by pixel."""
    for name, size in case.config["canvases"].items():
        drawn = draw_keypoints(case.inputs[f"{name}.kps"].numpy(), size["height"], size["width"])
        if name in case.outputs:
            case.check(name, drawn)
        picture = case.folder / f"{name}.png"
        if picture.is_file():
            assert (drawn == read_image(picture)).all(), f"{case.folder.name}: {name}.png"


def check_resize_picture(case):
    for index, call in enumerate(case.config["calls"]):
        options = {"multiple" if name == "base_pixel_number" else name: value for name, value in call.items()}
        options["pad_to_square"] = options.pop("pad_to_max_side", False)
        case.check(f"img{index}", resize_picture(case.inputs[f"img{index}"].numpy(), **options))
    for given, size in case.config.get("default_output_sizes_wh", {}).items():
        width, height = map(int, given.split("x"))
        resized = resize_picture(numpy.zeros((height, width, 3), numpy.uint8))
        assert resized.shape == (size[1], size[0], 3), f"{case.folder.name}: {given}"


@torch.no_grad()
def check_resampler(case):
    resampler = build_resampler(case.weights(), dim_head=case.config["dim_head"], source=case.folder)
    seen = {}
    resampler.proj_in.register_forward_hook(lambda module, args, output: seen.update(proj_in=output))
    first = resampler.layers[0]
    first.ff.register_forward_pre_hook(lambda module, args: seen.update(block0_attn=args[0]))
    first.register_forward_hook(lambda module, args, output: seen.update(block0=output))
    case.check("y", resampler(case.inputs["x"]))
    for name, tensor in seen.items():
        case.check(name, tensor)

    guided = resampler(face_rows(case.inputs["emb"], guided=True)[:, 0])
    case.check("tokens_cfg", guided)
    case.check("tokens_cfg_n2", guided.repeat_interleave(2, dim=0))
    case.check("tokens_nocfg", resampler(face_rows(case.inputs["emb"], guided=False)[:, 0]))


@torch.no_grad()
def check_ip_attention(case):
    config, weights = case.config, case.weights()
    heads = config["heads"]
    attention = Attention(config["hidden"], config["ctx"], heads=heads, dim_head=config["hidden"] // heads)
    attention.load_state_dict({name: tensor for name, tensor in weights.items() if "_ip" not in name})
    face = FaceAttention(config["hidden"], config["ctx"], num_tokens=(config["num_tokens"],))
    face.load_state_dict({name.replace("_ip.", "_ip.0."): tensor for name, tensor in weights.items() if "_ip" in name})
    attention.set_processor(face)

    def run(scale, **options):
        face.scale = [scale]
        states = (case.inputs["text"], [case.inputs["ip"][:, None]])  # one picture
        return attention(case.inputs["hidden_states"], encoder_hidden_states=states, **options)

    region = case.inputs["region_mask"][None, None]
    case.check("out", run(config["scale"]))
    case.check("out_scale0", run(0.0))
    case.check("out_masked", run(config["scale"], ip_adapter_masks=region))
    case.check("mask_tokens", region_tokens(region, case.inputs["hidden_states"].shape[1])[..., None])


def part(weights, prefix):
    return {name.removeprefix(f"{prefix}."): t for name, t in weights.items() if name.startswith(f"{prefix}.")}


def check_pipeline(case):
    """Every run of the case; and once what IdentityNet is given and gives."""
    config, weights = case.config, case.weights()
    unet = UNet2DConditionModel.from_config(config["unet"])
    unet.load_state_dict(part(weights, "unet"))
    nets = {}
    for name in ("controlnet", "controlnet2"):
        if tensors := part(weights, name):
            nets[name] = ControlNetModel.from_config(config["controlnet"]).eval()
            nets[name].load_state_dict(tensors)
    adapter = {name: part(weights, name) for name in ("image_proj", "ip_adapter")}
    attach_face_adapter(unet.eval(), adapter, source=case.folder)
    vae = AutoencoderKL.from_config(config["vae"])
    drawn = case.inputs["kps_image"].numpy()
    assert (draw_keypoints(case.inputs["kps"].numpy(), config["height"], config["width"]) == drawn).all()

    for name, run in config["runs"].items():
        run = dict(run)
        several = isinstance(run["controlnet_conditioning_scale"], list)
        masked = run.pop("control_mask", False)
        pipeline = StableDiffusionXLControlNetPipeline(
            vae,
            *(None,) * 4,
            unet,
            list(nets.values()) if several else nets["controlnet"],
            EulerDiscreteScheduler.from_config(config["scheduler"]),
            add_watermarker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        steps, residuals, states = [], [], []
        with_kwargs = {"with_kwargs": True}
        hooks = [
            nets["controlnet"].register_forward_hook(lambda net, args, output, r=residuals: r.append(output)),
            # Runs before generate's own hook, so it looks at what the mid block is given.
            nets["controlnet"].mid_block.register_forward_pre_hook(
                lambda block, args, kwargs, s=states: s.append(kwargs["encoder_hidden_states"]), **with_kwargs
            ),
        ]
        final = generate(
            pipeline,
            case.inputs["face_emb"],
            drawn,
            ip_adapter_scale=config["ip_adapter_scale"],
            controls=[case.inputs["control2_image"].numpy()] if several else (),
            region=case.inputs["control_mask"][..., 0].float() / 255 if masked else None,
            guidance_scale=config["guidance_scale"],
            num_inference_steps=config["num_inference_steps"],
            callback_on_step_end=lambda pipe, step, t, tensors, s=steps: s.append(tensors["latents"]) or {},
            output_type="latent",
            latents=case.inputs["latents"],
            **{n: t for n, t in case.inputs.items() if n.endswith("prompt_embeds")},
            **run,
        ).images
        for hook in hooks:
            hook.remove()
        case.check(f"{name}.step0", steps[0])
        case.check(f"{name}.final", final)
        if name == "simple":
            down, middle = residuals[0]
            case.check("face_tokens", states[0])
            case.check("controlnet.mid", middle)
            for output in [output for output in case.outputs if output.startswith("controlnet.down")]:
                case.check(output, down[int(output.removeprefix("controlnet.down"))])


def check_prompt_weighting(case):
    """The parser, the blocks, and the weighted states of the case's stub encoders."""
    for row in case.config["parse"]:
        expected = [(text, weight) for text, weight in row["parsed"]]
        assert parse_weights(row["text"]) == expected, f"{case.folder.name}: {row['text']}"
    for row in case.config["groups"]:
        tokens, weights = list(range(row["n"])), [1.0 + 0.1 * (i % 3) for i in range(row["n"])]
        blocks = split_blocks(tokens, weights, row["pad_last_block"])
        assert [len(ids) for ids, _ in blocks] == row["lengths"]
        ids, their_weights = blocks[-1]
        assert ids[-len(row["tokens_tail"]) :] == row["tokens_tail"]
        numpy.testing.assert_allclose(their_weights[-len(row["weights_tail"]) :], row["weights_tail"], rtol=1e-6)

    def stub_encoder(width, phase):
        def encode(ids):
            t, place, channel = ids[0].float(), torch.arange(ids.shape[1]), torch.arange(width) + 1
            angle = (t % 97 + 1)[:, None] * channel * 0.013 + phase
            angle = angle + (0.05 * place + 0.3 * torch.sin(0.001 * t.cumsum(0)))[:, None]
            hidden = torch.sin(angle)[None]  # (1, n, width)
            return hidden, hidden.mean(dim=1)

        return encode

    for number, row in enumerate(case.config["encode"]):
        encoders = [stub_encoder(row["width1"], 0), stub_encoder(row["width2"], 1)]
        texts = {
            name: [case.inputs[f"e{number}.{key}{kind}"].tolist() for kind in ("tokens", "weights")]
            for name, key in (("prompt", ""), ("negative", "neg_"))
        }
        length = max(len(tokens) for tokens, _ in texts.values())
        for name, (tokens, weights) in texts.items():
            states, pooled = encode_weighted(*pad_to_equal(tokens, weights, length), encoders)
            case.check(f"e{number}.{name}", states)
            case.check(f"e{number}.{'pooled' if name == 'prompt' else 'negative_pooled'}", pooled)


CHECKS = {
    "draw_kps": check_draw_keypoints,
    "iid_resize_img": check_resize_picture,
    "iid_resampler": check_resampler,
    "iid_ip_attention": check_ip_attention,
    "iid_pipeline": check_pipeline,
    "iid_prompt_weighting": check_prompt_weighting,
}
