"""The VAE on tiny random networks: a stream is the whole clip, a tile is the frame, and all layouts load alike."""

import copy
import logging

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import nn

from errors import WeightsError
from models.wan.vae import (
    LATENTS_MEAN,
    LATENTS_STD,
    StreamState,
    Tiling,
    WanVAE,
    blend_weights,
    detect_vae_config,
    diffusers_names,
    load_vae,
    regroup,
    scaled,
    vae_from_tensors,
)
from tests.conftest import GOLDENS

WAN21 = {"base_dim": 8, "num_res_blocks": 1}
WAN22 = {
    "base_dim": 8,
    "decoder_base_dim": 8,
    "num_res_blocks": 1,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": list(LATENTS_MEAN[48]),
    "latents_std": list(LATENTS_STD[48]),
}
SAME = {"rtol": 1e-5, "atol": 2e-5}  # float32 sums in another order


@pytest.fixture(params=[WAN21, WAN22], ids=["wan2.1", "wan2.2"], scope="module")
def reference(request):
    torch.manual_seed(0)
    return AutoencoderKLWan(**request.param).eval()


@pytest.fixture(scope="module")
def vae(reference):
    return WanVAE(copy.deepcopy(reference))


def random_video(vae, frames=13, height=2, width=3, batch=1):
    generator = torch.Generator().manual_seed(1)
    side = vae.spatial_factor
    return torch.rand(batch, 3, frames, height * side, width * side, generator=generator) * 2 - 1


def random_latents(vae, frames=6, height=2, width=3, batch=1, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, vae.latent_channels, frames, height, width, generator=generator)


def test_whole_clip_is_that_of_diffusers(reference, vae):
    video, latents = random_video(vae, frames=9, batch=2), random_latents(vae, frames=3, batch=2)
    mean, std = (
        torch.tensor(x).view(1, -1, 1, 1, 1) for x in (reference.config.latents_mean, reference.config.latents_std)
    )
    with torch.no_grad():
        encoded = (reference.encode(video).latent_dist.mode() - mean) / std
        decoded = reference.decode(latents * std + mean).sample
    torch.testing.assert_close(vae.encode(video), encoded, **SAME)
    torch.testing.assert_close(vae.decode(latents), decoded, **SAME)


def test_the_posterior_is_that_of_diffusers(reference, vae):
    """Mean and deviation of the whole clip's, normalised like latents; the mean is what inference encodes to."""
    video = random_video(vae)
    mean, std = vae.posterior(video, chunk=2)
    assert torch.equal(mean, vae.encode(video, chunk=2))
    with torch.no_grad():
        expected = reference.encode(video).latent_dist.std
    scale = torch.tensor(reference.config.latents_std).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(std, expected / scale, rtol=1e-4, atol=1e-5)
    assert std.std() > 0


@pytest.mark.parametrize("chunk", [2, 3, 100])
def test_chunk_length_does_not_matter(vae, chunk):
    video, latents = random_video(vae), random_latents(vae)
    torch.testing.assert_close(vae.encode(video, chunk=chunk), vae.encode(video), **SAME)
    torch.testing.assert_close(vae.decode(latents, chunk=chunk), vae.decode(latents), **SAME)


def test_uneven_chunks(vae):
    latents, state = random_latents(vae), StreamState()
    frames = [vae.decode_chunk(part, state) for part in latents.split([1, 2, 1, 2], dim=2)]
    assert [part.shape[2] for part in frames] == [1, 8, 4, 8]
    torch.testing.assert_close(torch.cat(frames, dim=2).clamp(-1, 1), vae.decode(latents), **SAME)


def test_stream_of_pieces(vae):
    """Pieces of any length come in; what goes out is cut as asked for, one latent frame at a time."""
    latents, video = random_latents(vae), random_video(vae)
    frames = list(vae.decode_stream(latents.split([2, 1, 3], dim=2)))
    assert [part.shape[2] for part in frames] == [1, 4, 4, 4, 4, 4]
    assert torch.equal(torch.cat(frames, dim=2), vae.decode(latents))
    encoded = list(vae.encode_stream(video.split([3, 5, 5], dim=2)))
    assert [part.shape[2] for part in encoded] == [1, 1, 1, 1]
    assert torch.equal(torch.cat(encoded, dim=2), vae.encode(video))


def test_stream_is_lazy(vae):
    """A frame comes out when its latents are in, not later."""
    taken = []

    def source():
        for index, part in enumerate(random_latents(vae).split(1, dim=2)):
            taken.append(index)
            yield part

    stream = vae.decode_stream(source())
    assert taken == []
    next(stream)
    assert taken == [0]
    next(stream)
    assert taken == [0, 1]


def test_interleaved_videos_do_not_meet(vae):
    first, second = random_latents(vae, frames=3), random_latents(vae, frames=3, seed=3)
    video = random_video(vae, frames=9)
    streams = vae.decode_stream(first), vae.decode_stream(second), vae.encode_stream(video)
    parts = zip(*(parts for parts in zip(*streams, strict=True)), strict=True)
    expected = vae.decode(first), vae.decode(second), vae.encode(video)
    for stream, whole in zip(parts, expected, strict=True):
        assert torch.equal(torch.cat(stream, dim=2), whole)


def test_caches_elsewhere_and_bounded(vae):
    latents = random_latents(vae)
    assert torch.equal(vae.decode(latents, cache_device="cpu"), vae.decode(latents))
    state, sizes = StreamState(), []
    for part in latents.split(1, dim=2):
        vae.decode_chunk(part, state)
        sizes.append(sum(past.untyped_storage().nbytes() for past in state.past.values()))
    assert sizes[1] == sizes[-1]


def test_a_batch_is_its_videos(vae):
    latents = random_latents(vae, frames=2, batch=2)
    torch.testing.assert_close(vae.decode(latents), torch.cat([vae.decode(part) for part in latents.split(1)]), **SAME)


def test_frames_beyond_4n_plus_1_are_left_out_aloud(vae, caplog):
    video = random_video(vae, frames=12)
    with caplog.at_level(logging.WARNING, logger="selfsame"):
        encoded = vae.encode(video)
    assert "last 3 frames" in caplog.text
    assert torch.equal(encoded, vae.encode(video[:, :, :9]))


def test_bfloat16_is_close(reference, vae):
    half = WanVAE(copy.deepcopy(reference)).to(torch.bfloat16)
    latents, video = random_latents(vae, frames=3), random_video(vae, frames=5)
    assert half.decode(latents).dtype == half.encode(video).dtype == torch.float32
    for ours, exact in ((half.decode(latents), vae.decode(latents)), (half.encode(video), vae.encode(video))):
        assert (ours - exact).norm() / exact.norm() < 0.03


def test_original_modules_keep_their_names(reference, vae):
    """Exchanged layers change neither a parameter's name nor, in bfloat16, a bit of the upsampling."""
    assert vae.state_dict().keys() == reference.state_dict().keys()
    pixels = torch.randn(1, 4, 3, 5).to(torch.bfloat16)
    theirs, ours = (next(m for m in model.modules() if isinstance(m, nn.Upsample)) for model in (reference, vae))
    assert type(ours) is not type(theirs)
    assert torch.equal(ours(pixels), theirs(pixels))


def test_one_tile_is_the_whole_frame(vae):
    video, latents = random_video(vae, frames=5), random_latents(vae, frames=2)
    for tiling in (Tiling(), Tiling((2, 3), (1, 1))):
        assert torch.equal(vae.decode(latents, tiling=tiling), vae.decode(latents))
        assert torch.equal(vae.encode(video, tiling=tiling), vae.encode(video))


def test_tiled_stream_is_the_blend_of_its_tiles(vae):
    """Each tile, decoded by itself over the whole time axis and blended at the end, is the tiled stream."""
    latents, tiling, side = random_latents(vae, frames=3, height=5, width=4), Tiling((3, 3), (2, 1)), vae.spatial_factor
    windows = tiling.windows(5, 4)
    expected = torch.zeros(1, 3, 9, 5 * side, 4 * side)
    weights = blend_weights(windows, (5, 4), tiling, side)
    for (row, column), weight in zip(windows, weights, strict=True):
        tile, state = latents[..., row, column], StreamState()
        decoded = torch.cat([vae.decode_chunk(part, state) for part in tile.split(1, dim=2)], dim=2)
        expected[..., scaled(row, side), scaled(column, side)] += decoded * weight
    torch.testing.assert_close(vae.decode(latents, tiling=tiling), expected.clamp(-1, 1), **SAME)


@pytest.mark.parametrize("tile, stride", [(4, 2), (4, 3), (4, 4), (5, 1)])
@pytest.mark.parametrize("size", [3, 4, 5, 9, 11])
def test_tiles_cover_the_frame_once(tile, stride, size):
    tiling = Tiling((tile, tile), (stride, stride))
    windows = tiling.windows(size, size)
    total = torch.zeros(size * 2, size * 2)
    for (row, column), weight in zip(windows, blend_weights(windows, (size, size), tiling, 2), strict=True):
        total[scaled(row, 2), scaled(column, 2)] += weight
    torch.testing.assert_close(total, torch.ones_like(total))
    ends = sorted({row.stop for row, _ in windows})
    assert len(ends) == len({row.start for row, _ in windows}), "a tile wholly inside another"


def test_blending_hides_the_seams(reference):
    """Smooth content: where one tile ends, blended tiles step like the whole frame, and tiles side by side do not."""
    vae = WanVAE(copy.deepcopy(reference))
    for half in (vae.encoder, vae.decoder):  # random global attention would see another frame in every tile
        nn.init.zeros_(half.mid_block.attentions[0].proj.weight)
    ramp = torch.linspace(-1, 1, 20)
    latents = (ramp.view(-1, 1) + ramp).expand(1, vae.latent_channels, 1, 20, 20)
    whole = vae.decode(latents)

    def error_at_seam(stride):
        tiled = vae.decode(latents, tiling=Tiling((12, 12), (stride, stride)))
        steps = (tiled - whole).diff(dim=-1)  # what tiling adds to the step from one pixel column to the next
        return steps[..., 12 * vae.spatial_factor - 1].abs().max()

    assert error_at_seam(stride=6) < 0.25 * error_at_seam(stride=12)
    encoded, tiled = vae.encode(whole), vae.encode(whole, tiling=Tiling((12, 12), (6, 6)))
    assert (tiled - encoded).abs().mean() < 0.05 * encoded.std()


def test_regroup():
    parts = torch.arange(11).view(1, 1, 11, 1, 1)
    groups = regroup(parts.split([2, 5, 4], dim=2), 1, 4)
    assert [group.flatten().tolist() for group in groups] == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]


def test_unusable_input_is_refused(vae):
    with pytest.raises(ValueError, match="multiples of"):
        vae.encode(torch.zeros(1, 3, 1, 20, 32))
    with pytest.raises(ValueError, match="frames of shape"):
        vae.encode(torch.zeros(3, 1, 16, 16))
    with pytest.raises(ValueError, match="latents of shape"):
        vae.decode(torch.zeros(1, 5, 1, 2, 2))
    with pytest.raises(ValueError, match="floating point"):
        vae.encode(torch.zeros(1, 3, 1, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at least 1"):
        vae.decode(random_latents(vae), chunk=0)
    with pytest.raises(ValueError, match="empty"):
        list(vae.decode_stream([]))
    with pytest.raises(ValueError, match="first"):
        vae.decode_chunk(random_latents(vae, frames=2), StreamState())
    with pytest.raises(ValueError, match="stride"):
        Tiling((2, 2), (3, 1))


@pytest.mark.parametrize("case, name", [("wan-vae21", "Wan2.1_VAE.pth"), ("wan-vae22", "Wan2.2_VAE.pth")])
def test_every_layout_loads_alike(tmp_path, case, name):
    tensors = load_file(GOLDENS / case / "weights.safetensors")
    original, diffsynth, folder = tmp_path / "original", tmp_path / "diffsynth", tmp_path / "diffusers"
    original.mkdir()
    torch.save(tensors, original / name)
    (original / "config.json").write_text('{"_class_name": "WanModel"}')  # the transformer's, in the same folder
    diffsynth.mkdir()
    prefixed = {f"model.{key}": tensor for key, tensor in tensors.items()}
    torch.save({"model_state": prefixed}, diffsynth / name)
    save_file(diffusers_names(tensors), tmp_path / "bare_diffusers.safetensors")
    autoencoder = AutoencoderKLWan.from_config(vae_from_tensors(tensors).config)
    autoencoder.load_state_dict(diffusers_names(tensors))
    autoencoder.save_pretrained(folder / "vae")

    expected = vae_from_tensors(tensors)
    latents = random_latents(expected, frames=2)
    for path in (
        original,
        original / name,
        diffsynth / name,
        folder,
        folder / "vae",
        tmp_path / "bare_diffusers.safetensors",
    ):
        loaded = load_vae(path)
        assert torch.equal(loaded.decode(latents), expected.decode(latents)), path
        assert loaded.spatial_factor == expected.spatial_factor
    assert load_vae(original, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_wrong_weights_are_refused(tmp_path):
    tensors = load_file(GOLDENS / "wan-vae21" / "weights.safetensors")
    with pytest.raises(WeightsError, match="no such file"):
        load_vae(tmp_path / "missing.pth")
    with pytest.raises(WeightsError, match="not the weights of a Wan VAE"):
        vae_from_tensors({"blocks.0.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="1 missing"):
        vae_from_tensors({key: tensor for key, tensor in tensors.items() if key != "decoder.conv1.bias"})
    for name in ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth"):
        torch.save(tensors, tmp_path / name)
    with pytest.raises(WeightsError, match=r"holds 2 \(Wan2.1_VAE.pth, Wan2.2_VAE.pth\) files"):
        load_vae(tmp_path)


@pytest.mark.parametrize(
    "released",
    [
        {},
        WAN22 | {"base_dim": 160, "decoder_base_dim": 256, "num_res_blocks": 2},
    ],
    ids=["wan2.1", "wan2.2"],
)
def test_released_shapes_are_recognised(released):
    with torch.device("meta"):
        autoencoder = AutoencoderKLWan(**released)
    shapes = {key: tuple(tensor.shape) for key, tensor in autoencoder.state_dict().items()}
    assert len(shapes) == {16: 194, 48: 196}[autoencoder.config.z_dim]
    detected = detect_vae_config(shapes)
    expected = dict(autoencoder.config) | {"decoder_base_dim": released.get("decoder_base_dim", 96)}
    assert detected == {key: expected[key] for key in detected}
