"""Train an identity, a talking avatar, a long-video LoRA, a LoRA, a whole model or a VAE, on your own videos.

    python train.py --config tiny-base --set data.sources='[{path: data/people}]'      a first try, on a CPU in seconds
    python train.py --config configs/train/tiny-stand_in.yaml --dry_run                what it will take, and stop
    torchrun --nproc_per_node 8 train.py --config my.yaml                              eight processes, the same result
    accelerate launch --multi_gpu --num_processes 8 train.py --config my.yaml          the same

The same command goes on from the last checkpoint, to the bits of a run that was never stopped. Ctrl-C and SIGTERM save
first. In the folder `output`: config.yaml, losses.jsonl, validation.jsonl, step-N/, and export/ with what the scripts
take (lora.safetensors for --lora_path, stand_in.safetensors for --stand_in_path, …).
Data: python -m training.data check DIR lists what is wrong with videos, python -m training.prepare makes them ready.
"""

import argparse
import logging
import os
from pathlib import Path

from errors import UsageError, run_script
from pipelines.flags import Parser
from training.config import read_config, resolved_yaml
from training.config_file import files_of
from training.config_recipes import RECIPES
from training.launcher import check_launcher

logger = logging.getLogger("selfsame")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--recipe", choices=RECIPES, help="what is trained; a file need not say it then")
    parser.add_argument("--config", help="a YAML file, or a name of configs/train/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="train.steps=50, over the file"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="check configuration and data, say what it will take, and stop"
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> list[Path]:
    """Train; the files that were made."""
    if args.config is None:
        raise UsageError(f"--config: give a YAML file, or one of {', '.join(files_of(args.recipe))}")
    # What can be refused without torch is refused before it is imported.
    check_launcher(os.environ)
    config = read_config(args.config, args.set, args.recipe)
    if args.dry_run:
        from training.data import read_samples
        from training.estimate import estimate

        print(resolved_yaml(config), end="")
        data = read_samples(config)
        print("\n".join(estimate(config, data, int(os.environ.get("WORLD_SIZE", 1)))))
        logger.info("%d samples to train on, %d held out; nothing was trained", len(data.samples), len(data.held_out))
        return []
    from training.start import refuse_unbuilt, start

    refuse_unbuilt(config)
    return start(config)


if __name__ == "__main__":
    run_script(main, parse_args)
