"""ConsisID's parts and whole runs, against the authors' code, consisid_eva_clip and facexlib."""

import numpy as np
import torch

from models.identity.eva_clip import tower_from_tensors
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


CHECKS = {"face_retinaface": check_retinaface, "cid_eva_clip_vision": check_eva_clip}
