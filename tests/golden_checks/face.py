"""Face preprocessing against Stand-In's FaceProcessor and facexlib's BiSeNet."""

import zlib

import numpy as np
import torch

from preprocess.face import choose_face, crop_face, parser_input, remove_background
from preprocess.face_detection import Face
from preprocess.face_parsing import BiSeNet


def check_face_crop(case):
    """The stub detector's boxes and the stub parser's labels, through crop, parser input and white background."""
    for i, row in enumerate(case.config["rows"]):
        config = {**case.config, **row}
        image = case.inputs[f"{i}.image"].numpy()
        labels = case.inputs.get(f"{i}.parse_labels", case.inputs.get("parse_labels")).numpy()
        faces = [Face(tuple(box), score=1.0) for box in case.inputs[f"{i}.bboxes"].tolist()]

        crop = crop_face(
            image,
            choose_face(faces) if faces else None,
            size=config["resize_to"],
            border_thresh=config["border_thresh"],
            face_crop_scale=config["face_crop_scale"],
        )
        rgb, rgba = remove_background(crop.picture, labels)

        case.check(f"{i}.crop_ltrb", crop.box, atol=0)
        case.check(f"{i}.square_size", [crop.square_size], atol=0)
        case.check(f"{i}.pad_left_top", crop.pad, atol=0)
        # The case's tolerance counts uint8 steps; the parser's input spans 2 over 255 of them.
        case.check(f"{i}.parser_input", parser_input(crop.picture), atol=case.atol * 2 / 255)
        case.check(f"{i}.white_bg", rgb)
        case.check(f"{i}.rgba", rgba)
        # The tolerance is for resized colours. Which pixels are kept is exact.
        expected = case.outputs[f"{i}.rgba"][..., 3].numpy()
        assert np.array_equal(rgba[..., 3], expected), f"{case.folder.name}: {i}.rgba: alpha differs"


def check_bisenet(case):
    model = BiSeNet(case.config["num_class"])
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if "state_dict_shapes" in case.config:
        assert shapes == {name: list(shape) for name, shape in case.config["state_dict_shapes"].items()}
    model.load_state_dict({name: made_weight(name, shape, case.config) for name, shape in shapes.items()})
    with torch.inference_mode():
        logits = model.eval()(case.inputs["pixel_values"])
    case.check("logits", logits)

    # Where two classes are closer than the tolerance either may win.
    labels, expected = logits.argmax(dim=1), case.outputs["labels"]
    behind = logits.amax(dim=1) - logits.gather(1, expected[:, None])[:, 0]
    case.check("labels", torch.where(behind <= 2 * case.atol, expected, labels))


def made_weight(name, shape, config):
    """One tensor by the rule of the case (`config.weights_rule`): weights are made, not stored."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + config["seed_offset"])
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if name.endswith("running_var"):
        return 0.8 + 0.4 * torch.rand(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    if len(shape) >= 2:
        gain = config["head_gain" if name.startswith(("ClassHead", "BboxHead", "LandmarkHead")) else "gain"]
        return noise * (gain / noise[0].numel()) ** 0.5
    return 1 + 0.1 * noise if name.endswith(".weight") else 0.1 * noise


CHECKS = {"standin_face_crop": check_face_crop, "face_bisenet": check_bisenet}
