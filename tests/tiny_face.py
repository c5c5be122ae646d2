"""A folder as antelopev2's, of small graphs."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Cell (row, column) of stride 32 of the 640x640 picture, score, strides from its corner to each side of the box.
TWO_FACES = ((6, 8, 0.9, 3), (10, 16, 0.6, 1))


def write_antelopev2(root: Path, faces=TWO_FACES) -> Path:
    """A detector that finds `faces` at fixed places whatever the picture shows, and a recogniser: a fixed random
    projection of the face's pixels. In insightface's layout, `root`/models/antelopev2; returns `root`.
    """
    outputs = {}
    for kind, width in (("score", 1), ("box", 4), ("keypoints", 10)):
        for stride in (8, 16, 32):
            outputs[f"{kind}_{stride}"] = np.zeros((2 * (640 // stride) ** 2, width), np.float32)  # 2 anchors a cell
    for row, column, score, reach in faces:
        anchor = 2 * (row * 20 + column)
        outputs["score_32"][anchor] = score
        outputs["box_32"][anchor] = reach
        outputs["keypoints_32"][anchor] = (-1, -1, 1, -1, 0, 0, -1, 1, 1, 1)

    folder = root / "models" / "antelopev2"
    folder.mkdir(parents=True)
    constants = [helper.make_node("Constant", [], [k], value=numpy_helper.from_array(v)) for k, v in outputs.items()]
    save_graph(folder / "scrfd_10g_bnkps.onnx", 640, constants, {k: v.shape for k, v in outputs.items()})
    weight = np.random.default_rng(0).normal(size=(3 * 7 * 7, 512)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["input"], ["cells"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Flatten", ["cells"], ["flat"]),
        helper.make_node("Constant", [], ["weight"], value=numpy_helper.from_array(weight)),
        helper.make_node("MatMul", ["flat", "weight"], ["embedding"]),
    ]
    save_graph(folder / "glintr100.onnx", 112, nodes, {"embedding": (1, 512)})
    return root


def save_graph(path: Path, size: int, nodes, outputs) -> None:
    picture = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, size, size])
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()]
    graph = helper.make_graph(nodes, "graph", [picture], infos)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
