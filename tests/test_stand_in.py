"""Stand-In: what the identity is a function of, and what it must leave alone."""

import pytest
import torch
from safetensors.torch import save_file

from errors import WeightsError
from models.identity.stand_in import StandIn, load_stand_in
from pipelines.tiny import tiny_stand_in_tensors
from tests import tiny
from tests.tiny import CONFIG, GRID, LAYERS, TIMESTEP


@pytest.fixture(scope="module")
def model():
    return tiny.transformer()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def run(model, *identities):
    return model(tiny.latents(), TIMESTEP, tiny.prompt(), plugins=identities)


def test_identity_changes_the_video_and_is_gone_without_it(model):
    before = run(model)
    identity = tiny.stand_in(model).encode(model, [tiny.photo()], GRID)
    with_identity = run(model, identity)
    assert (with_identity - before).abs().max() > 1e-3
    assert torch.equal(run(model), before)
    assert torch.equal(run(model, identity), with_identity)


def test_keys_do_not_depend_on_frames_but_on_grid(model):
    adapter = tiny.stand_in(model)
    here, elsewhere = adapter.encode(model, [tiny.photo()], GRID), adapter.encode(model, [tiny.photo()], (5, 6))
    assert not torch.allclose(here.keys_values[0][0], elsewhere.keys_values[0][0])  # K carries the position
    assert torch.equal(here.keys_values[0][1], elsewhere.keys_values[0][1])  # V does not
    longer = tiny.latents(frames=5)
    assert model(longer, TIMESTEP, tiny.prompt(), plugins=[here]).shape == longer.shape
    with pytest.raises(ValueError, match=r"grid of \(5, 6\).*\(4, 6\)"):
        run(model, elsewhere)


def test_strength_scales_the_deltas(model):
    """Strength 0 is the reference without LoRA; V of the first block is linear in the strength."""
    adapter = tiny.stand_in(model)
    values = [adapter.scaled(s).encode(model, [tiny.photo()], GRID).keys_values[0][1] for s in (0.0, 1.0, 2.0)]
    zero = StandIn.from_tensors({k: torch.zeros_like(t) for k, t in adapter.state_dict().items()}, model)
    assert torch.equal(values[0], zero.encode(model, [tiny.photo()], GRID).keys_values[0][1])
    torch.testing.assert_close(values[2] - values[0], 2 * (values[1] - values[0]), rtol=1e-4, atol=1e-5)


def test_two_people_are_each_as_alone_but_for_position(model):
    adapter = tiny.stand_in(model)
    anna, ben = tiny.photo(7), tiny.photo(8)
    both = adapter.encode(model, [anna, ben], GRID)
    alone = [adapter.encode(model, [person], GRID) for person in (anna, ben)]
    tokens = alone[0].keys_values[0][0].shape[1]
    for block in range(LAYERS):
        key, value = both.keys_values[block]
        assert key.shape[1] == 2 * tokens
        assert torch.equal(key[:, :tokens], alone[0].keys_values[block][0])
        assert not torch.allclose(key[:, tokens:], alone[1].keys_values[block][0])
    assert torch.equal(both.keys_values[0][1][:, tokens:], alone[1].keys_values[0][1])
    assert (run(model, both) - run(model, alone[0])).abs().max() > 1e-4


def test_a_batch_sees_the_same_identity(model):
    """Batched guidance: upstream crashes there."""
    identity = tiny.stand_in(model).encode(model, [tiny.photo()], GRID)
    both = torch.cat((tiny.latents(1), tiny.latents(2)))
    prompt = tiny.prompt()
    prompt.text = [prompt.text[0]] * 2
    together = model(both, TIMESTEP.expand(2), prompt, plugins=[identity])
    torch.testing.assert_close(together[:1], run(model, identity), rtol=1e-5, atol=1e-5)


def test_step_range(model):
    adapter = tiny.stand_in(model)
    identity = adapter.encode(model, [tiny.photo()], GRID, steps=(0.25, 0.75))
    assert [identity.active(step, 5) for step in range(5)] == [False, True, True, True, False]
    assert all(adapter.encode(model, [tiny.photo()], GRID).active(step, 1) for step in range(1))


def test_adapter_runs_in_float32_under_a_bfloat16_base():
    model = tiny.transformer().set_compute_dtype(torch.bfloat16)
    adapter = tiny.stand_in(model)
    x = torch.randn(1, 5, tiny.DIM).to(torch.bfloat16)
    query_delta = adapter._delta(0)(x)[0]
    down, up = adapter.down[0]["q"], adapter.up[0]["q"]
    assert down.dtype == up.dtype == torch.float32
    assert torch.equal(query_delta, (x.float() @ down.T @ up.T).to(torch.bfloat16))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "pipe.dit.", "dit."])
def test_released_and_converted_files_load_alike(model, tmp_path, suffix, prefix):
    tensors = {prefix + key: tensor for key, tensor in tiny_stand_in_tensors(CONFIG).items()}
    path = tmp_path / f"Stand-In_wan2.1_T2V_14B_ver1.0{suffix}"
    torch.save({"state_dict": tensors}, path) if suffix == ".ckpt" else save_file(tensors, path)
    loaded = load_stand_in(path, model)
    assert loaded.rank == CONFIG["stand_in"]["rank"]
    for key, tensor in tiny_stand_in_tensors(CONFIG).items():
        assert torch.equal(loaded.state_dict()[key], tensor)


class TestWrongFiles:
    def expect(self, model, tensors, *words):
        with pytest.raises(WeightsError) as error:
            StandIn.from_tensors(tensors, model, source="file.ckpt")
        for word in ("file.ckpt", *words):
            assert word in str(error.value)

    def test_other_model_size(self, model):
        wide = tiny_stand_in_tensors(CONFIG | {"transformer": CONFIG["transformer"] | {"dim": 96}})
        self.expect(model, wide, "width 96", "width 64", "14B")
        deep = tiny_stand_in_tensors(CONFIG | {"transformer": CONFIG["transformer"] | {"num_layers": 5}})
        self.expect(model, deep, "5 blocks", "2 of width 64")

    def test_missing_and_unexpected_keys_are_counted(self, model):
        tensors = tiny_stand_in_tensors(CONFIG)
        del tensors["blocks.1.self_attn.k_loras.up.weight"]
        tensors["blocks.0.ffn.0.weight"] = torch.zeros(1)
        self.expect(model, tensors, "1 keys missing", "1 unexpected", "blocks.0.ffn.0.weight")

    def test_misshapen_key_is_named(self, model):
        tensors = tiny_stand_in_tensors(CONFIG)
        tensors["blocks.1.self_attn.v_loras.up.weight"] = torch.zeros(64, 3)
        self.expect(model, tensors, "blocks.1.self_attn.v_loras.up.weight", "(64, 3)", "(64, 8)")

    def test_another_kind_of_file(self, model):
        self.expect(model, {"lora_unet_blocks_0": torch.zeros(1)}, "no Stand-In weights", "lora_unet_blocks_0")
        self.expect(model, {}, "no Stand-In weights")
