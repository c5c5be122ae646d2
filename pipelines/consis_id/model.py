"""One ConsisID release: its parts, loaded when first needed and placed by the memory mode."""

import dataclasses
import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.hooks import apply_group_offloading
from diffusers.models.transformers.consisid_transformer_3d import LocalFacialExtractor
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from configs import download_command
from errors import UsageError
from models.identity.consis_id import ConsisIDPipeline, load_consis_id, read_json
from pipelines.consis_id.face import FaceCondition, antelopv2_path, face_networks, network_files, prepare_face
from pipelines.consis_id.needs import estimate_needs, to_float8
from pipelines.consis_id.release import PARTS, load_text_encoder, load_tokenizer, load_vae, make_scheduler
from pipelines.consis_id.settings import ConsisIDSettings
from pipelines.distributed import Processes
from pipelines.memory import check_memory, free_bytes, free_cached, offload_groups, stage
from pipelines.needs import Needs
from pipelines.placement import choose_mode
from pipelines.record import describe_run
from pipelines.wan import DTYPES
from pipelines.weights import WeightsFile, check_weights
from preprocess.side_file import write_side_picture

logger = logging.getLogger("selfsame")

diffusers_logging.set_verbosity_error()  # its notes on experimental features are for us, not for users


class ConsisID:
    """One release's parts, loaded when first needed and placed by the memory mode.

    Args:
        settings, config: from `resolve_consis_id`.
        processes: from `start_processes`.
    """

    def __init__(self, settings: ConsisIDSettings, config: dict, processes: Processes):
        self.settings, self.config, self.processes = settings, config, processes
        self.device = processes.device
        self.dtype = DTYPES.get(settings.dtype, torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self.base_path = Path(settings.base_path or Path("checkpoints") / config["dest"])
        # Of `auto` this is the guess until `check` decides.
        self.memory = settings.memory if settings.memory != "auto" else "resident"
        self.text_on_device = self.memory not in ("group", "sequential")
        self.hint = download_command(config)
        self._pipeline: ConsisIDPipeline | None = None
        self._extractor: LocalFacialExtractor | None = None

    # ------------------------------------------------------------------------------------------------ before loading

    @property
    def transformer_path(self) -> Path:
        """The folder of the transformer; averaged weights go first, as in the authors' script."""
        averaged = self.base_path / "transformer_ema"
        return averaged if averaged.is_dir() else self.base_path / "transformer"

    def check(self) -> None:
        """Look for what would end the run later, before anything loads.

        Raises:
            WeightsError: files that are not there, with the command that fetches them, or of another model.
            UsageError: a size that the checkpoint cannot make.
            ResourceError: more memory than the device has.
        """
        check_weights([*self.weights(), *network_files(self.settings, self.base_path, self.config["name"])])
        config = read_json(self.transformer_path / "config.json", self.hint)
        self.check_size(config)
        free = free_bytes(self.device)
        chosen = choose_mode(
            self.needs(config),
            *free,
            device=self.device.type,
            memory=self.settings.memory,
            fp8=self.settings.fp8,
            tiled=self.settings.tiled,
        )
        if self.settings.memory == "auto" and self.device.type == "cuda":
            logger.info("--memory auto: %s", chosen.describe(*free))
        self.memory, self.text_on_device = chosen.memory, chosen.text_on_device
        check_memory(self.settings, chosen.device_bytes, self.device)

    def weights(self) -> list[WeightsFile]:
        """All that is read, without the networks of the face."""
        parts = {"transformer": self.transformer_path} | {part: self.base_path / part for part in PARTS}
        readers = {
            "transformer": partial(load_consis_id, self.transformer_path, dtype=None),
            "text_encoder": partial(load_text_encoder, self.base_path / "text_encoder", dtype=None),
            "vae": partial(load_vae, self.base_path / "vae", dtype=None),
        }  # what is not cast stays on the disk
        return [
            WeightsFile(name, "--base_path", path, self.config["name"], read=readers.get(name))
            for name, path in parts.items()
        ]

    def describe(self, prompt: str, seed: int) -> dict:
        """The record of one video, as far as it is known before anything is read."""
        return describe_run(self.settings, prompt, seed, self.config, self.weights()) | {
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def check_size(self, config: dict) -> None:
        """Positions limit what a checkpoint can make."""
        height, width = (8 * config.get(f"sample_{side}", size) for side, size in (("height", 60), ("width", 90)))
        asked = self.settings.height, self.settings.width
        shown = f"--height {asked[0]} --width {asked[1]}"
        if config.get("use_learned_positional_embeddings") and asked != (height, width):
            raise UsageError(f"{shown}: {self.transformer_path} has learnt its positions for {height}x{width} alone")
        if config.get("patch_size_t") and (asked[0] > height or asked[1] > width):
            raise UsageError(f"{shown}: {self.transformer_path} makes at most {height}x{width} (height x width)")

    def needs(self, config: dict) -> Needs:
        """What a run needs, by the transformer's config.json."""
        settings = self.settings
        return estimate_needs(config, settings.height, settings.width, settings.num_frames, self.dtype)

    @property
    def scoring_settings(self) -> ConsisIDSettings:
        """The settings, with the face models that this release may have brought."""
        folder = face_networks(self.settings, self.base_path, self.hint)
        return dataclasses.replace(self.settings, antelopv2_path=antelopv2_path(self.settings, folder))

    # -------------------------------------------------------------------------------------------------------- parts

    def prepare_face(self, output: Path) -> FaceCondition:
        """The photo's face as the model is given it; also written as NAME.face0.png beside `output`."""
        face = prepare_face(self.settings, self.base_path, self.device, self.hint)
        free_cached(self.device)
        write_side_picture(output.with_suffix(".face0.png"), face.picture, self.settings.overwrite)
        return face

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """T5's states (1, 226, 4096) of each distinct prompt, on the CPU. The encoder is freed before returning.

        Every prompt is padded to the transformer's text length, and the padding attended to, as in training.
        """
        length = read_json(self.transformer_path / "config.json", self.hint).get("max_text_seq_length", 226)
        tokenizer = load_tokenizer(self.base_path / "tokenizer", self.hint)
        encoder = load_text_encoder(self.base_path / "text_encoder", self.dtype, self.hint)
        if self.device.type != "cpu" and not self.text_on_device or self.memory in ("group", "sequential"):
            apply_group_offloading(encoder, onload_device=self.device, offload_type="leaf_level")
        else:
            encoder.to(self.device)
        states = {}
        for prompt in dict.fromkeys(prompts):
            whole = tokenizer(prompt, verbose=False).input_ids
            if len(whole) > length:
                lost = tokenizer.decode(whole[length - 1 : -1])
                logger.warning("prompt of %d tokens is cut at %d: ignored from %r on", len(whole), length, lost)
            ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            states[prompt] = encoder(ids.input_ids.to(self.device)).last_hidden_state.to("cpu", self.dtype)
        del encoder
        gc.collect()  # hooks tie modules into cycles
        free_cached(self.device)
        return states

    def pipeline(self) -> ConsisIDPipeline:
        """diffusers' pipeline around the parts that denoise, ready to run on the device."""
        if self._pipeline is None:
            transformer, extractor = load_consis_id(self.transformer_path, dtype=self.dtype, hint=self.hint)
            vae = load_vae(self.base_path / "vae", self.dtype, self.hint)
            if self.settings.fp8:
                to_float8(transformer, self.dtype)  # layer by layer, before the first value goes to the device
            if self.memory in ("group", "sequential"):
                offload_groups(transformer, self.device, self.memory)
            scheduler = make_scheduler(read_json(self.base_path / "scheduler" / "scheduler_config.json", self.hint))
            self._pipeline = ConsisIDPipeline(None, None, vae.to(self.device), transformer, scheduler)
            self._pipeline.set_progress_bar_config(disable=True)
            self._extractor = extractor.to(self.device)
        if self.memory in ("resident", "model"):
            self._pipeline.transformer.to(self.device)
        return self._pipeline

    @torch.no_grad()
    def face_tokens(self, face: FaceCondition) -> Tensor:
        """What the transformer's blocks look for the face in, (1, 32, 2048): it depends on the photo alone."""
        self.pipeline()  # loads the extractor too: they share a file
        id_cond, *hidden = (t.to(self.device, self.dtype) for t in (face.id_cond, *face.id_vit_hidden))
        return self._extractor(id_cond, hidden)

    @contextmanager
    def decoder(self) -> Iterator[AutoencoderKLCogVideoX]:
        """The VAE, with the device to itself as far as the memory mode goes."""
        pipeline = self.pipeline()
        if self.memory == "model":
            pipeline.transformer.to("cpu")
            free_cached(self.device)
        # Not on the way in: a single frame takes little, and comes out exact.
        pipeline.vae.use_tiling = self.settings.tiled
        try:
            with stage("decoding", "try --tiled"):
                yield pipeline.vae
        finally:
            pipeline.vae.use_tiling = False
