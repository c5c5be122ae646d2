"""What `accelerate launch` asks of the script that it starts, by its environment. A wish that train.py does not heed is
refused: the run would be another than the one that was asked for. Without torch.
"""

from collections.abc import Callable, Mapping

from errors import UsageError

SHARDED = "--multi_gpu, and --set memory.sharding=zero2: it shards as ZeRO stage 2 does"
NO = ("", "no", "No", "NO", "0", "false", "False")

# variable -> (whether its value is a wish that is not heeded, what the flag is, what to give in its place)
WISHES: Mapping[str, tuple[Callable[[str], bool], str, str]] = {
    "ACCELERATE_USE_FSDP": (lambda value: value not in NO, "--use_fsdp", SHARDED),
    "ACCELERATE_USE_DEEPSPEED": (lambda value: value not in NO, "--use_deepspeed", SHARDED),
    "ACCELERATE_USE_MEGATRON_LM": (lambda value: value not in NO, "--use_megatron_lm", "--multi_gpu"),
    "ACCELERATE_USE_CPU": (lambda value: value not in NO, "--cpu", "CUDA_VISIBLE_DEVICES= before the command"),
    "ACCELERATE_MIXED_PRECISION": (
        lambda value: value not in NO,
        "--mixed_precision",
        "no there, and --set model.base_dtype=bf16: weights that train keep float32 masters",
    ),
    "ACCELERATE_DYNAMO_BACKEND": (lambda value: value not in NO, "--dynamo_backend", "--set memory.compile=true"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        lambda value: value not in (*NO, "1"),
        "--gradient_accumulation_steps",
        "--set train.global_batch=N: what one forward pass does not hold is accumulated",
    ),
    "ACCELERATE_GRADIENT_CLIPPING": (lambda value: value not in NO, "--gradient_clipping", "--set train.clip.norm=X"),
}


def check_launcher(environment: Mapping[str, str]) -> None:
    """Whether the run will be what its launcher was asked for.

    Raises:
        UsageError: it asked for something else.
    """
    for name, (is_wish, flag, instead) in WISHES.items():
        value = environment.get(name)
        if value is not None and is_wish(value):
            raise UsageError(f"accelerate launch {flag} ({name}={value[:40]}): is not heeded here; give {instead}")
