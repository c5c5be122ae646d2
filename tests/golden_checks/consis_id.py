"""ConsisID's parts and whole runs, against the authors' code, consisid_eva_clip and facexlib."""

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.transformers.consisid_transformer_3d import PerceiverCrossAttention
from PIL import Image

from models.identity.consis_id import ConsisIDPipeline, FaceConfig, consis_id_from_tensors, make_extractor
from models.identity.eva_clip import tower_from_tensors
from models.wan.image_encoder import CLIP_MEAN, CLIP_STD
from pipelines.consis_id.face import choose_as_upstream, condition
from pipelines.consis_id.release import make_scheduler
from preprocess.face_alignment import NOT_FACE, align_face, limit_size, similarity_transform
from preprocess.face_detection import Face
from preprocess.keypoints import draw_keypoints
from preprocess.retinaface import RetinaFace, RetinaFaceDetector
from tests.golden_checks.face import made_weight


def check_retinaface(case):
    model = RetinaFace()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if "state_dict_shapes" in case.config:
        assert shapes == {name: list(shape) for name, shape in case.config["state_dict_shapes"].items()}
    model.load_state_dict({name: made_weight(name, shape, case.config) for name, shape in shapes.items()})
    image = case.inputs["image_bgr"].numpy()
    pixels = torch.from_numpy(image.astype(np.float32)) - torch.tensor([104.0, 117.0, 123.0])
    with torch.inference_mode():
        loc, conf, landms = model.eval()(pixels.permute(2, 0, 1)[None])
    case.check("loc", loc)
    case.check("conf", conf)
    case.check("landms", landms)

    detector = RetinaFaceDetector(
        model, min_score=case.config["conf_threshold"], max_overlap=case.config["nms_threshold"]
    )
    faces = detector(image[..., ::-1])
    rows = [[*face.box, face.score, *face.keypoints.flatten()] for face in faces]
    case.check("detections", np.array(rows).reshape(-1, 15))


def check_eva_clip(case):
    tensors, config = case.weights(), case.config
    tower = tower_from_tensors(tensors, head_dim=config["head_width"], trained_grid=config["pt_hw_seq_len"])
    assert tower.image_size == config["image_size"]
    assert len(tower.blocks) == config["layers"]
    embedding, hidden = tower(case.inputs["pixel_values"])
    case.check("embeds", embedding)
    for index, states in enumerate(hidden):
        case.check(f"hidden.{index}", states)


class Networks:
    """The case's stubs: what each network of the preprocessing answers."""

    def __init__(self, case):
        self.case = case

    def recognizer(self, image):
        """antelopev2: the largest face is found by its box."""
        boxes, keypoints = (self.case.inputs[name].numpy() for name in ("bbox", "kps"))
        return [
            Face(tuple(box), 1.0, points, embedding=self.case.inputs[f"embedding{i}"].numpy())
            for i, (box, points) in enumerate(zip(boxes, keypoints, strict=True))
        ]

    def retinaface(self, image):
        return [Face(tuple(row[:4]), row[4], row[5:].reshape(5, 2)) for row in self.case.inputs["dets"].numpy()]

    def parser(self, aligned, box):
        y, x = np.mgrid[: aligned.shape[0], : aligned.shape[1]]
        return (y // 37 * 5 + x // 41) % 19


class ClipStub(torch.nn.Module):
    def __init__(self, image_size, embedding):
        super().__init__()
        self.image_size = image_size
        self.embedding = torch.nn.Parameter(embedding, requires_grad=False)

    def forward(self, pixels):
        self.pixels = pixels
        return self.embedding, []


def read_png(file):
    return np.asarray(Image.open(file).convert("RGB"))


def check_face_preprocess(case):
    config, networks = case.config, Networks(case)
    assert tuple(config["mean"]) == CLIP_MEAN
    assert tuple(config["std"]) == CLIP_STD
    assert set(config["background_labels"]) == set(NOT_FACE)
    image = limit_size(read_png(case.folder / "input.png"), config["long_edge"])
    assert np.array_equal(image, read_png(case.folder / "resized_input.png"))
    face = choose_as_upstream(image, networks.recognizer, networks.retinaface, "the case")
    case.check("affine", similarity_transform(face.landmarks))
    # Made with OpenCV 5; 4.x samples on a grid of 1/32 pixel: up to 1/64 pixel off, of at most 255 levels, on two axes.
    aligned = read_png(case.folder / "aligned_crop.png")
    assert np.abs(align_face(image, face.landmarks).astype(int) - aligned).max() <= 8

    tower = ClipStub(config["clip_image_size"], case.inputs["clip_embed"])
    result = condition(aligned, face, networks.parser, tower)
    assert np.array_equal(result.picture, read_png(case.folder / "face_image.png"))
    case.check("clip_input", tower.pixels)
    case.check("id_cond", result.id_cond)
    case.check("face_kps", result.keypoints)


def check_extractor(case):
    names = {"heads": "num_heads", "num_queries": "num_querie"}
    face = FaceConfig(**{f"LFE_{names.get(key, key)}": value for key, value in case.config.items()})
    extractor = make_extractor(face)
    extractor.load_state_dict(case.weights())
    vit = [case.inputs[f"vit.{i}"] for i in range(face.LFE_num_scale)]
    with torch.no_grad():
        case.check("out", extractor(case.inputs["id_embeds"], vit))
        id_tokens = extractor.id_embedding_mapping(case.inputs["id_embeds"])
        case.check("id_tokens", id_tokens.unflatten(-1, (face.LFE_num_id_token, -1)))
        case.check("mapped0", extractor.mapping_0(vit[0]))


def check_cross_attention(case):
    attention = PerceiverCrossAttention(**case.config)
    attention.load_state_dict(case.weights())
    with torch.no_grad():
        case.check("out", attention(case.inputs["image_embeds"], case.inputs["hidden_states"]))


def face_of(case, face):
    return case.inputs["id_cond"], [case.inputs[f"id_vit_hidden.{i}"] for i in range(face.LFE_num_scale)]


def check_transformer(case):
    transformer, extractor = consis_id_from_tensors(case.weights(), case.config)
    seen = {}
    block = transformer.transformer_blocks[0]
    hooks = (
        (transformer.patch_embed, lambda module, args, out: seen.update(patch_embed=out)),
        (block, lambda module, args, out: seen.update(block0_text=out[1])),
        (block.face_attention, lambda module, args, out: seen.update(block0_video=args[1], pca0=out)),
    )
    for module, hook in hooks:
        module.register_forward_hook(hook)
    with torch.no_grad():
        tokens = extractor(*face_of(case, transformer.face))
        case.check("face_tokens", tokens)
        for name, scale in (("out_noface", 0.0), ("out", transformer.face.local_face_scale)):
            out = transformer(
                case.inputs["hidden_states"],
                case.inputs["encoder_hidden_states"],
                case.inputs["timestep"],
                ofs=case.inputs.get("ofs"),
                image_rotary_emb=(case.inputs["rope_cos"], case.inputs["rope_sin"]),
                attention_kwargs={"face_tokens": tokens, "face_scale": scale},
                return_dict=False,
            )[0]
            case.check(name, out)
    for name, value in seen.items():
        case.check(name, value)


def check_pipeline(case):
    config, weights = case.config, case.weights()
    parts = {prefix: {} for prefix in ("transformer", "vae")}
    for key, tensor in weights.items():
        prefix, _, name = key.partition(".")
        parts[prefix][name] = tensor
    transformer, extractor = consis_id_from_tensors(parts["transformer"], config["transformer"])
    vae = AutoencoderKLCogVideoX(**config["vae"]).eval()
    # The cases keep the encoder only: they end with latents.
    missing, unexpected = vae.load_state_dict(parts["vae"], strict=False)
    assert not unexpected
    assert all(name.startswith("decoder.") for name in missing)
    scheduler = make_scheduler(config["scheduler"])
    pipeline = ConsisIDPipeline(None, None, vae, transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)

    with torch.no_grad():
        tokens = extractor(*face_of(case, transformer.face))
    image = case.inputs["image"].numpy()
    drawn = draw_keypoints(case.inputs["kps"].numpy(), *image.shape[:2])
    case.check("kps_image", drawn)
    pictures = [image, drawn] if transformer.face.is_kps else [image]
    channels = config["transformer"]["in_channels"] // 2
    beside = []
    transformer.register_forward_pre_hook(
        lambda module, args, kwargs: beside.append(kwargs["hidden_states"][:1, :, channels:]), with_kwargs=True
    )
    steps = []
    final = pipeline(
        image=[Image.fromarray(picture) for picture in pictures],
        prompt_embeds=case.inputs["prompt_embeds"],
        negative_prompt_embeds=case.inputs["negative_prompt_embeds"],
        latents=case.inputs["latents"],
        generator=torch.Generator().manual_seed(config["generator_seed"]),
        attention_kwargs={"face_tokens": tokens, "face_scale": transformer.face.local_face_scale},
        output_type="latent",
        callback_on_step_end=lambda pipe, index, t, tensors: steps.append(tensors["latents"]) or {},
        **{
            key: config[key]
            for key in ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "use_dynamic_cfg")
        },
    ).frames
    case.check("image_latents", beside[0])
    for index, step in enumerate(steps):
        case.check(f"step{index}", step)
    case.check("final", final)


CHECKS = {
    "face_retinaface": check_retinaface,
    "cid_eva_clip_vision": check_eva_clip,
    "cid_face_preprocess": check_face_preprocess,
    "cid_local_facial_extractor": check_extractor,
    "cid_perceiver_cross_attention": check_cross_attention,
    "cid_transformer": check_transformer,
    "cid_transformer_v15": check_transformer,
    "cid_pipeline": check_pipeline,
    "cid_pipeline_v15": check_pipeline,
}
