"""The text and the image encoder."""

import torch

from models.wan.image_encoder import clip_pixels, image_encoder_from_tensors
from models.wan.text_encoder import text_encoder_from_tensors
from tests.golden_checks import GoldenCase


def check_umt5(case: GoldenCase) -> None:
    """`context{i}` is what the transformer gets of prompt i; the rest are intermediates of the same forward."""
    encoder = text_encoder_from_tensors(case.weights(), dtype=torch.float32)
    ids, mask = case.inputs["ids"], case.inputs["mask"]
    block_outputs = []
    handles = [
        block.register_forward_hook(lambda *call: block_outputs.append(call[-1])) for block in encoder.encoder.block
    ]
    hidden = encoder(ids, mask)
    for handle in handles:
        handle.remove()

    for name in case.outputs:
        if name.startswith("context"):
            index = int(name.removeprefix("context"))
            length = int(mask[index].sum())
            case.check(name, hidden[index, :length])
            case.check(name, encoder(ids[index : index + 1, :length])[0])  # alone and without padding: the same
    if "hidden_full_first_sample_head20" in case.outputs:
        case.check("hidden_full_first_sample_head20", hidden[0, :20])
    if "block0_out_sample1" in case.outputs:
        case.check("block0_out_sample1", block_outputs[0][1, : int(mask[1].sum())])
    if "relative_bucket_row0" in case.outputs:
        expected = case.outputs["relative_bucket_row0"]  # rows of queries spread evenly over the keys: 0 and L/2
        rows, length = expected.shape
        queries = torch.arange(rows) * length // rows
        relative = torch.arange(length) - queries[:, None]
        attention = encoder.encoder.block[0].layer[0].SelfAttention
        case.check("relative_bucket_row0", attention._relative_position_bucket(relative))


def check_clip_visual(case: GoldenCase) -> None:
    """`image` (3, 1, H, W) in [-1, 1] -> `pixel_values` -> `clip_fea`."""
    encoder = image_encoder_from_tensors(case.weights(), dtype=torch.float32, num_heads=case.config["num_heads"])
    images = case.inputs["image"].transpose(0, 1)  # (1, 3, H, W)
    case.check("pixel_values", clip_pixels(images, case.config["image_size"]))
    case.check("clip_fea", encoder(images))


CHECKS = {"umt5_encoder": check_umt5, "clip_visual_penultimate": check_clip_visual}
