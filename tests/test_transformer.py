"""The transformer: equivalences, slots, and what diffusers' mixins bring. Golden parity is in test_goldens.py."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from models.wan.slots import Prompt, Slots
from models.wan.tea_cache import TeaCache
from models.wan.transformer import WanTransformer
from tests import tiny
from tests.tiny import LAYERS, TIMESTEP


@pytest.fixture(scope="module")
def model() -> WanTransformer:
    return tiny.transformer()


@pytest.fixture(scope="module")
def plain(model):
    with torch.no_grad():
        return model(tiny.latents(), TIMESTEP, tiny.prompt())


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def run(model, **options):
    return model(tiny.latents(), TIMESTEP, tiny.prompt(), **options)


def test_equals_diffusers_transformer(model, plain):
    theirs = tiny.diffusers_transformer(model)
    text = torch.nn.functional.pad(tiny.prompt().text[0], (0, 0, 0, 512 - 11))[None]
    expected = theirs(tiny.latents(), TIMESTEP, text, return_dict=False)[0]
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=2e-5)


def test_batch_equals_single(model):
    both = torch.cat((tiny.latents(1), tiny.latents(2)))
    times = torch.tensor([900.0, 100.0])
    prompts = [tiny.prompt(3, 11), tiny.prompt(4, 30)]
    together = model(both, times, Prompt([p.text[0] for p in prompts]))
    for i in range(2):
        alone = model(both[i : i + 1], times[i : i + 1], prompts[i])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_prompt_keys_are_kept_with_the_request_and_change_nothing(model, plain):
    kept, recomputed = tiny.prompt(), tiny.prompt(keep_keys_values=False)
    calls = []
    hooks = [block.cross_attn.k.register_forward_hook(lambda *_: calls.append(1)) for block in model.blocks]
    for prompt, expected_calls in ((kept, LAYERS), (recomputed, 3 * LAYERS)):
        calls.clear()
        outs = [model(tiny.latents(), TIMESTEP, prompt) for _ in range(3)]
        assert len(calls) == expected_calls
        assert all(torch.equal(out, plain) for out in outs)
    for hook in hooks:
        hook.remove()


def test_uniform_per_token_timestep_equals_scalar(model, plain):
    tokens = 3 * tiny.GRID[0] * tiny.GRID[1]
    per_token = model(tiny.latents(), TIMESTEP[:, None].expand(1, tokens), tiny.prompt())
    torch.testing.assert_close(per_token, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory", ["group", "sequential"])
def test_offloaded_equals_resident(plain, memory):
    from pipelines.memory import offload_groups

    model = tiny.transformer()
    offload_groups(model, torch.device("cpu"), memory)
    identity = tiny.stand_in(model).encode(model, [tiny.photo()], tiny.GRID)
    resident = tiny.transformer()
    expected = tiny.stand_in(resident).encode(resident, [tiny.photo()], tiny.GRID)
    assert torch.equal(run(model), plain)
    assert torch.equal(run(model, plugins=[identity]), run(resident, plugins=[expected]))


def test_first_block_cache_with_threshold_zero_is_exact_and_skips_above_it(plain):
    model = tiny.transformer(num_layers=4)
    exact = run(model)
    computed = []
    model.blocks[2].ffn.register_forward_hook(lambda *_: computed.append(1))
    for threshold, expected_runs in ((0.0, 2), (10.0, 1)):
        computed.clear()
        model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        for timestep in (600.0, 599.0):
            with model.cache_context("positive"):
                out = model(tiny.latents(), torch.tensor([timestep]), tiny.prompt())
            if timestep == 600.0:
                assert torch.equal(out, exact)
        assert len(computed) == expected_runs
        model.disable_cache()
    assert torch.equal(run(model), exact)


def test_step_cache_holds_residuals_of_plug_ins(model):
    """A skipped step must not add a plug-in's residual a second time: it is inside the blocks, so inside the cache."""
    residual = Slots(block_residuals=[lambda x: torch.full_like(x, 0.25)] * LAYERS)
    cache = TeaCache(num_steps=4, threshold=1e9)
    outs = [run(model, plugins=[lambda tokens, ctx: residual], step_cache=cache) for _ in range(4)]
    assert cache.skipped == [False, True, True, False]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-5)


def test_fp8_storage_halves_weights_and_stays_close(plain):
    model = tiny.transformer()
    before = sum(p.numel() * p.element_size() for p in model.blocks.parameters())
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    after = sum(p.numel() * p.element_size() for p in model.blocks.parameters())
    error = (run(model) - plain).norm() / plain.norm()
    assert after < 0.35 * before
    assert 0 < error < 0.1
    assert model.head.head.weight.dtype == model.time_embedding[0].weight.dtype == torch.float32


def test_bfloat16_keeps_float32_path():
    model = tiny.transformer().set_compute_dtype(torch.bfloat16)
    streams = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: streams.append(args[0].dtype))
    out = run(model)
    assert model.blocks[0].ffn[0].weight.dtype == model.compute_dtype == torch.bfloat16
    assert model.blocks[0].modulation.dtype == model.blocks[0].self_attn.norm_q.weight.dtype == torch.float32
    assert streams == [torch.float32]
    assert out.dtype == torch.float32


def test_peft_adapter_equals_merged_weights(plain):
    generator = torch.Generator().manual_seed(5)
    down, up = torch.randn(4, tiny.DIM, generator=generator), torch.randn(tiny.DIM, 4, generator=generator)
    model = tiny.transformer()
    model.load_lora_adapter(
        {"blocks.1.self_attn.q.lora_A.weight": down, "blocks.1.self_attn.q.lora_B.weight": up},
        prefix=None,
        adapter_name="style",
    )
    adapted = run(model)
    merged = tiny.transformer()
    merged.blocks[1].self_attn.q.weight += up @ down
    torch.testing.assert_close(adapted, run(merged), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    model.disable_lora()
    assert torch.equal(run(model), plain)


def test_gradient_checkpointing_gives_equal_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny.transformer().requires_grad_(True)
        if checkpointing:
            model.enable_gradient_checkpointing()
        with torch.enable_grad():
            run(model).square().mean().backward()
        gradients.append(model.blocks[0].cross_attn.k.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_compiled_blocks_equal_eager_and_share_their_graphs():
    """One graph while the prompt's keys are new, one once they are kept; not one a block: torch gives up after 8."""
    model = tiny.transformer(num_layers=12)
    prompt = tiny.prompt()
    expected = model(tiny.latents(), TIMESTEP, prompt)
    model.compile_repeated_blocks(backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    prompt = tiny.prompt()
    for _ in range(2):
        torch.testing.assert_close(model(tiny.latents(), TIMESTEP, prompt), expected, rtol=1e-5, atol=1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


class TestSlots:
    """Each slot against a closed form, or against the same change made to the network itself."""

    def test_empty_slots_change_nothing(self, model, plain):
        assert torch.equal(run(model, plugins=[lambda tokens, ctx: Slots()]), plain)

    def test_added_tokens_equal_a_patch_bias(self, model):
        bias = torch.linspace(-1, 1, tiny.DIM)
        slots = Slots(added_tokens=bias.expand(1, 72, -1))
        out = run(model, plugins=[lambda tokens, ctx: slots])
        changed = tiny.transformer()
        changed.patch_embedding.bias += bias
        torch.testing.assert_close(out, run(changed), rtol=1e-4, atol=1e-5)

    def test_cross_attention_term_goes_before_the_output_projection(self, model):
        """A constant c before `o` is the same as a bias of o(c) - o(0)."""
        c = torch.linspace(-1, 1, tiny.DIM)
        slots = Slots(cross_attention=[lambda q, attend: c.expand(1, q.shape[1], -1)] * LAYERS)
        out = run(model, plugins=[lambda tokens, ctx: slots])
        changed = tiny.transformer()
        for block in changed.blocks:
            block.cross_attn.o.bias += block.cross_attn.o.weight @ c
        torch.testing.assert_close(out, run(changed), rtol=1e-4, atol=1e-5)

    def test_middle_residual_comes_after_cross_attention(self, model):
        """A constant between cross-attention and FFN is a bias of cross-attention's output projection."""
        c = torch.linspace(-1, 1, tiny.DIM)
        slots = Slots(middle_residuals=[lambda x: c.expand_as(x)] * LAYERS)
        out = run(model, plugins=[lambda tokens, ctx: slots])
        changed = tiny.transformer()
        for block in changed.blocks:
            block.cross_attn.o.bias += c
        torch.testing.assert_close(out, run(changed), rtol=1e-4, atol=1e-5)

    def test_block_residual_is_what_the_next_block_sees(self, model):
        c = torch.linspace(-1, 1, tiny.DIM)
        seen = []
        hook = model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        run(model)
        run(model, plugins=[lambda tokens, ctx: Slots(block_residuals=[lambda x: c.expand_as(x), None])])
        hook.remove()
        torch.testing.assert_close(seen[1] - seen[0], c.expand_as(seen[0]), rtol=1e-4, atol=1e-5)

    def test_qkv_deltas_equal_merged_weights(self, model):
        delta = torch.randn(3, tiny.DIM, tiny.DIM, generator=torch.Generator().manual_seed(9)) * 0.05
        slots = Slots(self_qkv_deltas=[lambda x: tuple(x @ w.T for w in delta)] * LAYERS)
        out = run(model, plugins=[lambda tokens, ctx: slots])
        changed = tiny.transformer()
        for block in changed.blocks:
            for projection, w in zip("qkv", delta, strict=True):
                getattr(block.self_attn, projection).weight += w
        torch.testing.assert_close(out, run(changed), rtol=1e-4, atol=1e-5)

    def test_slots_of_several_plug_ins_add_up(self, model):
        def residual(scale):
            return lambda tokens, ctx: Slots(block_residuals=[lambda x: scale * torch.ones_like(x)] * LAYERS)

        two, one = run(model, plugins=[residual(0.1), residual(0.2)]), run(model, plugins=[residual(0.3)])
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
