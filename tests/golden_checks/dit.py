"""Golden kinds of the transformer: whole forward passes with intermediates, precision, positions."""

import torch

from models.wan.attention import apply_rope, rope_table
from models.wan.slots import Prompt
from models.wan.transformer import WanTransformer, sinusoidal_embedding

CONFIG_KEYS = (
    "in_dim",
    "dim",
    "ffn_dim",
    "num_heads",
    "num_layers",
    "out_dim",
    "text_dim",
    "text_len",
    "freq_dim",
    "eps",
)


def build_transformer(config: dict, weights: dict, dtype: torch.dtype = torch.float32) -> WanTransformer:
    """A transformer of a golden's config (upstream's field names), strictly loaded."""
    values = {key: config[key] for key in CONFIG_KEYS if key in config}
    if (norm := weights.get("img_emb.proj.0.weight")) is not None:
        values["image_dim"] = norm.shape[0]
    if (position := weights.get("img_emb.emb_pos")) is not None:
        values["image_tokens"] = position.shape[1]
    model = WanTransformer(patch_size=tuple(config["patch_size"]), **values)
    model.load_state_dict(weights)
    return model.set_compute_dtype(dtype).requires_grad_(False).eval()


def numbered(tensors: dict, name: str) -> list[torch.Tensor]:
    """name0, name1, … in order."""
    return [tensors[f"{name}{i}"] for i in range(len(tensors)) if f"{name}{i}" in tensors]


def record_outputs(modules: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Run-time outputs of the named modules, filled at the next forward pass."""
    recorded = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, __, output, name=name: recorded.__setitem__(name, output))
    return recorded


def run_forward(case, model: WanTransformer, plugins=()) -> list[torch.Tensor]:
    inputs = case.inputs
    image = inputs.get("clip_fea")
    return model(
        numbered(inputs, "x"),
        inputs["t"],
        Prompt(numbered(inputs, "context"), image),
        condition=numbered(inputs, "y") or None,
        plugins=plugins,
        seq_len=case.config["seq_len"],
    )


def check_dit_forward(case) -> None:
    check_forward_outputs(case, build_transformer(case.config, case.weights()))


def check_forward_outputs(case, model: WanTransformer, plugins=()) -> None:
    modules = {
        "text_embedding": model.text_embedding,
        "block0_self_attn_out": model.blocks[0].self_attn,
        "block0_cross_attn_out": model.blocks[0].cross_attn,
        **{f"block{i}_out": block for i, block in enumerate(model.blocks)},
    }
    if hasattr(model, "img_emb"):
        modules["img_emb"] = model.img_emb
    recorded = record_outputs(modules)
    tokens = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: tokens.append(args))
    for i, out in enumerate(run_forward(case, model, plugins)):
        case.check(f"out{i}", out)
    patch_tokens, ctx, _ = tokens[0]
    case.check("patch_embed_tokens", patch_tokens)
    # Wan2.2 always spreads the time embedding over the tokens; ours stays one row while all rows are equal.
    for name, ours in (("time_embed_e", ctx.time), ("time_proj_e0", ctx.modulation)):
        expected = case.outputs[name]
        case.check(name, ours.expand(expected.shape) if expected.ndim == ours.ndim else ours.squeeze(1))
    case.check("context_embed_text_first16", recorded["text_embedding"][:, :16])
    if "img_emb" in recorded:
        case.check("context_embed_image_first8", recorded["img_emb"][:, :8])
    for name in case.outputs:
        if name.startswith("block"):
            case.check(name, recorded[name])


def check_dit_forward_bf16(case) -> None:
    """Our bf16 run may be at most 1.5 times as far from float32 as upstream's bf16 run was."""
    exact = case.outputs["out_fp32"]
    ours32 = run_forward(case, build_transformer(case.config, case.weights()))[0]
    torch.testing.assert_close(ours32, exact, rtol=1e-4, atol=1e-4)
    case.checked.add("out_fp32")
    ours16 = run_forward(case, build_transformer(case.config, case.weights(), torch.bfloat16))[0]
    assert ours16.dtype == torch.float32
    error = (ours16 - exact).norm() / exact.norm()
    assert 0 < error <= 1.5 * case.config["upstream_bf16_rel_l2_error_vs_fp32"], f"relative L2 error {error:.5f}"
    case.check("out_bf16", ours16)


def check_rope_and_time(case) -> None:
    for name, x in case.inputs.items():
        if not name.startswith("x_"):
            continue
        label = name[2:]  # hd128_grid3x5x7
        head_dim, grid = label[2:].split("_grid")
        head_dim, grid = int(head_dim), tuple(int(size) for size in grid.split("x"))
        cos, sin = rope_table(grid, head_dim, (0, 0, 0), torch.device("cpu"))
        tokens = cos.shape[1]
        case.check(f"rot_{label}", torch.cat((apply_rope(x[:, :tokens], (cos, sin)), x[:, tokens:]), dim=1))
        # The original table: position p on every axis. Ours at (p, p, p), p = 0 … 11.
        rows = case.outputs[f"freqs_real_{label}"].shape[0]
        diagonal = [rope_table((1, 1, 1), head_dim, (p, p, p), torch.device("cpu")) for p in range(rows)]
        case.check(f"freqs_real_{label}", torch.stack([torch.stack((c[0, 0, 0], s[0, 0, 0]), -1) for c, s in diagonal]))
    for name in case.outputs:
        if name.startswith("sinusoid_"):
            case.check(name, sinusoidal_embedding(case.inputs["t"], int(name.split("_")[1])))


CHECKS = {
    "wan_dit_forward": check_dit_forward,
    "wan_dit_forward_bf16": check_dit_forward_bf16,
    "wan_rope_and_time_embedding": check_rope_and_time,
}
