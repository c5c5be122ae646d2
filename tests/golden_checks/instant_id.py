"""InstantID's parts and whole pipeline against its authors' code."""

import numpy

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
