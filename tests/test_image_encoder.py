"""CLIP's vision tower on a tiny random network: preprocessing, features, and every layout."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from errors import WeightsError
from models.wan.image_encoder import (
    CLIP_MEAN,
    CLIP_STD,
    clip_pixels,
    detect_vision_config,
    image_encoder_from_tensors,
    load_image_encoder,
    transformers_names,
)
from tests.conftest import GOLDENS

HEADS = 4  # of the golden case
RELEASED = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def weights():
    return load_file(GOLDENS / "wan-clip-visual" / "weights.safetensors")


@pytest.fixture(scope="module")
def whole_tower(weights):
    """transformers' own model, with the last block."""
    names = transformers_names(weights)
    model = CLIPVisionModel(detect_vision_config({key: tuple(tensor.shape) for key, tensor in names.items()}, HEADS))
    model.load_state_dict(names)
    return model.eval()


@pytest.fixture(scope="module")
def encoder(weights):
    return image_encoder_from_tensors(weights, dtype=torch.float32, num_heads=HEADS)


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 40, 70, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_features_are_the_penultimate_states(encoder, whole_tower, images):
    with torch.no_grad():
        states = whole_tower(pixel_values=clip_pixels(images, 56), output_hidden_states=True).hidden_states
    assert torch.equal(encoder(images), states[-2])
    assert len(encoder.model.encoder.layers) == len(whole_tower.encoder.layers) - 1


def test_pixels_of_a_flat_picture():
    """Grey stays grey under any resize: what is left is CLIP's normalisation."""
    pixels = clip_pixels(torch.zeros(1, 3, 30, 50), 28)
    expected = (0.5 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(pixels, expected.view(1, 3, 1, 1).expand(1, 3, 28, 28))


def test_pixels_are_squashed_not_cropped():
    picture = torch.full((1, 3, 32, 128), -1.0)
    picture[..., :64] = 1.0  # left half white, also after the resize
    pixels = clip_pixels(picture, 28)
    white, black = (1 - CLIP_MEAN[0]) / CLIP_STD[0], -CLIP_MEAN[0] / CLIP_STD[0]
    torch.testing.assert_close(pixels[0, 0, :, :12], torch.full((28, 12), white))
    torch.testing.assert_close(pixels[0, 0, :, 16:], torch.full((28, 12), black))


def test_a_batch_is_its_pictures(encoder, images):
    singles = torch.cat([encoder(image[None]) for image in images])
    torch.testing.assert_close(encoder(images), singles, rtol=1e-5, atol=1e-5)


def test_float16_is_close(weights, encoder, images):
    half = image_encoder_from_tensors(weights, num_heads=HEADS)
    assert half(images).dtype == torch.float16
    assert (half(images) - encoder(images)).norm() / encoder(images).norm() < 0.01


def test_every_layout_loads_alike(tmp_path, weights, whole_tower, encoder, images):
    original, folder = tmp_path / "original", tmp_path / "diffusers"
    original.mkdir()
    text_half = {"textual.token_embedding.weight": torch.zeros(3, 2), "log_scale": torch.zeros(())}
    file = original / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    torch.save(weights | text_half, file)
    save_file({f"model.{key}": tensor for key, tensor in weights.items()}, tmp_path / "diffsynth.safetensors")
    whole_tower.save_pretrained(folder / "image_encoder")
    named = {f"vision_model.{key}": tensor for key, tensor in whole_tower.state_dict().items()}
    save_file(named, tmp_path / "older_transformers.safetensors")

    for path in (
        original,
        file,
        tmp_path / "diffsynth.safetensors",
        folder,
        folder / "image_encoder",
        tmp_path / "older_transformers.safetensors",
    ):
        loaded = load_image_encoder(path, dtype=torch.float32, num_heads=HEADS)
        assert torch.equal(loaded(images), encoder(images)), path


def test_wrong_weights_are_refused(weights, tmp_path):
    with pytest.raises(WeightsError, match="not the weights of a CLIP"):
        image_encoder_from_tensors({"patch_embedding.weight": torch.zeros(1)})
    part = {key: tensor for key, tensor in weights.items() if key != "visual.pre_norm.bias"}
    with pytest.raises(WeightsError, match="1 missing"):
        image_encoder_from_tensors(part, num_heads=HEADS)
    with pytest.raises(WeightsError, match="no weights in this folder"):
        load_image_encoder(tmp_path)


def test_released_shape_is_recognised():
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(**RELEASED))
    detected = detect_vision_config({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()})
    assert {key: getattr(detected, key) for key in RELEASED} == RELEASED
