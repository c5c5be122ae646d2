"""The parts of one Wan model, loaded when first needed and placed by the memory mode."""

import gc
import logging
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from diffusers import ModelMixin
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from errors import ResourceError
from models.lora import switch_loras
from models.wan.config import WanConfig
from models.wan.float8 import use_float8
from models.wan.image_encoder import ImageEncoder
from models.wan.slots import Plugin
from models.wan.transformer import WanTransformer
from models.wan.vae import WanVAE
from pipelines import tiny
from pipelines.attention_choice import choose_backend, set_backend, try_chosen, warn_without_flash
from pipelines.distributed import Processes, choose_device, shard_weights, split_sequence
from pipelines.jobs import Job
from pipelines.loading import read_image_encoder, read_text_encoder, read_transformer, read_vae
from pipelines.lora_settings import Loras
from pipelines.loras import ModelLoras, read_loras
from pipelines.memory import check_host_memory, check_memory, free_cached, offload_groups, stage
from pipelines.model_files import ModelFiles
from pipelines.needs import MODES, Needs, estimate_needs
from pipelines.parts import Part, Reading
from pipelines.placement import Placement
from pipelines.placement_choice import choose_placement, find_begun
from pipelines.record import begun_as, describe_run
from pipelines.settings import Settings
from pipelines.weights import WeightsFile, check_weights, face_files
from preprocess.progress_bars import ProgressBars

logger = logging.getLogger("selfsame")

diffusers_logging.set_verbosity_error()  # its notes on experimental features are for us, not for users

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Wan:
    """One model's parts.

    Args:
        settings, config: from `resolve_settings`.
        processes: from `start_processes`; its device is where the model runs.
        parts: the plug-ins' weights beside the transformer.
    """

    def __init__(self, settings: Settings, config: dict, processes: Processes, parts: Sequence[Part] = ()):
        self.settings, self.config, self.processes, self.parts = settings, config, processes, tuple(parts)
        self.files = ModelFiles(settings, config, parts)
        self.device = processes.device
        self.noise_device = choose_device(settings.noise_device, "--noise_device")
        on_cpu = self.device.type == "cpu"
        self.dtype = DTYPES.get(settings.dtype, torch.float32 if on_cpu else torch.bfloat16)
        # The VAE is the cheap part to keep exact: released numerics are float32.
        self.vae_dtype = DTYPES.get(settings.vae_dtype, torch.float32)
        # Of `auto` this is the guess until `check` decides; one memory has nothing to move.
        self.memory = settings.memory if settings.memory != "auto" else "model" if self.has_own_memory else "resident"
        self.placement: Placement | None = None
        self.attention_backend = choose_backend(settings, self.transformer_config, self.dtype, processes)
        self.is_tiny = self.files.has_seeded_transformer
        self._transformers: dict[int, WanTransformer] = {}
        self._layers: dict[int, dict[str, ModelMixin]] = {}  # expert -> parts that are moved and freed with it
        self._expert = 0  # whose transformer was asked for last
        self._vae: WanVAE | None = None
        self._image_encoder: ImageEncoder | None = None
        self.loras = ModelLoras()
        self.loras_are_on = True  # in the transformer that was asked for last, where they can be switched
        self._checked_files = False

    @property
    def transformer_config(self) -> WanConfig:
        return self.files.transformer_config

    @property
    def num_experts(self) -> int:
        return self.files.num_experts

    @property
    def encodes_pictures(self) -> bool:
        """Whether the VAE is used before denoising, too."""
        return self.files.encodes_pictures

    def weights(self) -> list[WeightsFile]:
        """What this run reads (`ModelFiles.weights`)."""
        return self.files.weights()

    # ------------------------------------------------------------------------------------------------ before it loads

    def check(self, jobs: Iterable[Job] = (), at_once: Settings | None = None) -> None:
        """Look for what would end the run later, before anything loads; and choose what `--memory auto` leaves open.

        Args:
            jobs: the videos that are to be made; where one of them was begun, its choice is kept.
            at_once: settings of the most that is computed at one time, where that is less than the whole video.

        Raises:
            WeightsError: files that are not there, with the command that fetches them.
            UsageError: an attention backend that does not run here.
            ResourceError: more memory than the device, or the machine, has.
        """
        if not self._checked_files:
            self.check_files()
        if not self.is_tiny:
            warn_without_flash(self.settings, self.attention_backend)
        try_chosen(self.attention_backend, self.transformer_config, self.dtype, self.device)
        begun = partial(find_begun, self.settings, jobs, self.name_of_begun)
        given = (self.settings, self.needs(at_once), self.device, self.dtype)
        placement = choose_placement(*given, begun, has_own_memory=self.has_own_memory)
        self.use_placement(self.processes.share(placement))
        check_memory(self.settings, self.placement.device_bytes, self.device)
        if self.has_own_memory:
            check_host_memory(self.settings.memory, self.placement.host_bytes)
        if self.is_tiny:
            tiny.announce(self.settings.real_model)

    def needs(self, at_once: Settings | None = None) -> Needs:
        """What a run needs, of which `check` chooses; `at_once` as there."""
        size = at_once or self.settings
        return estimate_needs(
            self.transformer_config,
            size.height,
            size.width,
            size.num_frames,
            itemsize=self.dtype.itemsize,
            vae_itemsize=self.vae_dtype.itemsize,
            experts=self.num_experts,
            photos=len(self.settings.stand_in_photos),
            encodes=self.files.encodes_videos,
            **self.files.encoder_sizes,
            parts=self.files.part_layers(),
            more={memory: self.lora_bytes(memory) for memory in MODES},
            more_fp8={memory: self.lora_bytes(memory, fp8=True) for memory in MODES},
        )

    @property
    def has_own_memory(self) -> bool:
        """Whether the device's memory is another than the machine's."""
        return self.device.type == "cuda"

    def name_of_begun(self, prompt: str, seed: int) -> str:
        """By which the saved progress of a video is found before anything is read."""
        return self.chosen(self.describe(prompt, seed))["begun_as"]

    def chosen(self, record: dict) -> dict:
        """What a state has to tell, so that a later run can choose as this one did. Tiles matter to the latents only
        where the VAE has a part in them.
        """
        later = getattr(self.settings, "of_later_clips", ())
        tiles = {"tiled": bool(self.settings.tiled)} if self.encodes_pictures else {}
        return {"begun_as": begun_as(record, self.weights(), later), "fp8": bool(self.settings.fp8)} | tiles

    def use_placement(self, placement: Placement) -> None:
        """What decides the frames (fp8, tiles) becomes a setting, and so part of the record; the rest does not."""
        self.placement, self.memory = placement, placement.memory
        self.settings = replace(self.settings, fp8=placement.fp8, tiled=placement.tiled)
        if self.loras.of_experts:  # they run beside weights in float8
            self.loras = replace(self.loras, live=self.settings.live_loras)

    def check_files(self, further: Sequence[WeightsFile] = ()) -> None:
        """Say all that is missing or wrong before anything is loaded.

        Args:
            further: of other models that the run needs.

        Raises:
            WeightsError: with the command that fetches it.
        """
        self._checked_files = True
        faces = face_files(self.settings, None if self.settings.min_face_score is None else "--min_face_score")
        check_weights([*self.weights(), *faces, *further])

    def describe(self, prompt: str, seed: int) -> dict:
        """The record of one video, as far as it is known before anything is read."""
        record = describe_run(self.settings, prompt, seed, self.config, self.weights())
        if self.is_tiny:
            record["weights"] = {"tiny": f"untrained, seed {self.config['seed']}"} | record["weights"]
        return record | {
            "untrained": self.is_tiny,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "vae_dtype": str(self.vae_dtype).removeprefix("torch."),
            "attention_backend": self.attention_backend,
        }

    # -------------------------------------------------------------------------------------------------- parts

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Text states (tokens, text_dim) of each distinct prompt, on the CPU. The encoder is freed before returning.

        umT5 takes 10.6 GiB. Where the device has no room for it, it runs on the CPU: prompts are short and are run
        without padding, so that is a matter of seconds.

        Raises:
            ResourceError: out of memory on the CPU too.
        """
        device = self.device if self.text_on_device else torch.device("cpu")
        distinct = list(dict.fromkeys(prompts))
        try:
            return self._encode_prompts(distinct, device)
        except ResourceError:
            if not (self.text_on_device and self.has_own_memory):
                raise
        logger.warning("out of memory while encoding the prompts on %s; going on with the CPU", device)
        self.free()
        return self._encode_prompts(distinct, torch.device("cpu"))

    @property
    def text_on_device(self) -> bool:
        if self.placement is not None:
            return self.placement.text_on_device
        return self.memory not in ("group", "sequential")

    def _encode_prompts(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        states = {}
        bar = ProgressBars(self.processes.rank == 0).work("encoding the prompts", len(prompts), "prompt")
        with stage("encoding the prompts", "close other programs, or add swap"), bar:
            encoder = read_text_encoder(self.files, device)
            for prompt in prompts:
                states[prompt] = encoder.encode_prompts([prompt])[0].cpu()
                bar.advance()
        del encoder
        self.free()
        return states

    def encode_images(self, images: Sequence[Tensor], keep: bool = False) -> Tensor | None:
        """CLIP features (1, pictures · 257, 1280) of pictures (1, 3, H, W) in [-1, 1], on the CPU; None where the
        model takes none (Wan2.2).

        keep: pictures will follow. The encoder waits for them on the CPU (1.2 GiB) and is not read again (2.4 GB);
            else it is freed before returning.
        """
        if self.transformer_config.image_dim is None:
            return None
        encoder = (self._image_encoder or read_image_encoder(self.files, self.device)).to(self.device)
        features = torch.cat([encoder(image).float().cpu() for image in images], dim=1)
        if keep:
            self._image_encoder = encoder.to("cpu")
            free_cached(self.device)
        else:
            self._image_encoder = encoder = None
            self.free()
        return features

    @contextmanager
    def vae(self):
        """The VAE on the device for as long as the `with` block runs."""
        if self._vae is None:
            self._vae = read_vae(self.files, self.vae_dtype)
        if self.placement is not None:
            self._vae.past_device = None if self.placement.past_on_device else torch.device("cpu")
        try:
            yield self._vae.to(self.device)
        finally:
            if self.memory != "resident":
                self._vae.to("cpu")
                free_cached(self.device)

    def transformer(self, expert: int, with_loras: bool = True) -> WanTransformer:
        """The expert's transformer, ready to run on the device; other experts leave it unless all are resident.

        with_loras: False switches live LoRAs off. What is kept from another state, a `Prompt`'s keys and values or an
            `Identity`, is not right any more then.
        """
        if self.memory == "model" or not self.keeps_weights:
            self.release_transformers(keep=expert)
        if expert not in self._transformers:
            self._transformers[expert] = self._load_transformer(expert)
        self._expert, transformer = expert, self._transformers[expert]
        self.loras_are_on = with_loras
        if self.loras.are_switched(expert):
            switch_loras(transformer, with_loras)
        return transformer.to(self.device) if self.memory == "model" else transformer

    def part(self, name: str) -> ModelMixin:
        """A part's layers that were loaded with the transformer that `transformer` returned last."""
        layers = self._layers[self._expert][name]
        return layers.to(self.device) if self.memory == "model" else layers

    def plugins(self) -> list[Plugin]:
        """What parts add to every forward pass of the transformer that `transformer` returned last."""
        return [part.plugin(self.part(part.name)) for part in self.parts if part.plugin is not None]

    def read_part(self, name: str, transformer: WanTransformer | None = None, expert: int = 0) -> nn.Module:
        """A part that is read when it is asked for: what it makes is needed before a forward pass, not in it."""
        part = next(part for part in self.parts if part.name == name)
        return part.load(transformer, Reading(expert, self.dtype))

    @property
    def keeps_weights(self) -> bool:
        """Whether weights wait in RAM for their turn; where that is too small they are read again."""
        return self.placement is None or self.placement.keeps_weights

    def release_transformers(self, keep: int | None = None) -> None:
        """Make room on the device for another part, and in a RAM that does not hold all experts for the one to keep."""
        others = [expert for expert in self._transformers if expert != keep]
        if not self.keeps_weights and (self.memory == "model" or keep is not None):
            if others:
                for expert in others:
                    del self._transformers[expert], self._layers[expert]
                self.free()
        elif self.memory == "model":
            for expert in others:
                for model in (self._transformers[expert], *self._layers[expert].values()):
                    model.to("cpu")
            free_cached(self.device)

    def _load_transformer(self, expert: int) -> WanTransformer:
        """A transformer with its LoRAs, and the layers beside it."""
        # No device has to hold a model whole that is sharded.
        device = self.device if self.memory in ("resident", "model") and not self.shards_weights else None
        fp8 = bool(self.settings.fp8)
        reading = Reading(expert, self.dtype, device, fp8, self.loras.changes(expert, fp8, self.device))
        transformer, layers = read_transformer(self.files, reading)
        for model in layers.values():
            self._place(model)
        self._layers[expert] = layers
        # Before hooks move the weights. What is merged into float8 weights was merged as they were read.
        self.loras.apply(transformer, expert, reading.fp8, self.device)
        self._place(transformer)
        return transformer

    @property
    def shards_weights(self) -> bool:
        """Whether every process holds a part of each block's weights."""
        return getattr(self.settings, "fsdp_dit", False)

    def _place(self, transformer: WanTransformer) -> None:
        """Prepare a transformer (or a branch beside it) to run as the settings say."""
        if self.shards_weights:
            shard_weights(transformer, self.device)
        set_backend(transformer, self.attention_backend)
        if self.processes.context_parallel:
            split_sequence(transformer, self.settings.ulysses_degree, self.settings.ring_degree, self.device)
        if self.settings.fp8:  # layers beside a transformer that were read without
            use_float8(transformer)
        if self.memory in ("group", "sequential"):
            offload_groups(transformer, self.device, self.memory, prefetch=isinstance(transformer, WanTransformer))
        elif self.memory == "resident":
            transformer.to(self.device)
        if self.settings.compile:
            transformer.compile_repeated_blocks()

    def use_loras(self, settings: Loras) -> None:
        """Change each expert's weights by the LoRAs of these settings, from its next loading on. The files are checked
        here, against a transformer without weights, so that a wrong one is refused before the right base is loaded.

        Raises:
            WeightsError, InputError: `read_lora`.
            UsageError: a file that cannot be switched off.
        """
        if not self._checked_files:  # what is missing besides is said at once
            self.check_files()
        self.loras = read_loras(settings, self.num_experts, self.transformer_config, self.files.key_in_lora)
        if self._transformers:
            self._drop_transformers()

    def lora_bytes(self, memory: str | None = None, fp8: bool = False) -> int:
        """What live LoRAs add to the device memory under a memory mode, by default the present one.

        fp8: beside float8 weights, where they are live unless they were asked to be merged.
        """
        settings = self.settings
        if not self.loras.of_experts or not (replace(settings, fp8=True).live_loras if fp8 else self.loras.live):
            return 0
        return self.loras.num_bytes(memory or self.memory, self.transformer_config.num_layers, self.dtype.itemsize)

    def use_attention_backend(self, name: str) -> None:
        """Run attention on another of diffusers' backends from now on."""
        self.attention_backend = name
        for expert, transformer in self._transformers.items():
            for model in (transformer, *self._layers[expert].values()):
                set_backend(model, name)

    def use_memory_mode(self, memory: str) -> None:
        """Go on under another memory mode: transformers are loaded again under it."""
        self._drop_transformers()
        self.memory = memory
        if self.placement is not None:
            self.placement = replace(self.placement, memory=memory, past_on_device=memory != "sequential")

    def _drop_transformers(self) -> None:
        self._transformers.clear()
        self._layers.clear()
        self.free()

    def free(self) -> None:
        """Give back the memory of parts that were dropped; hooks tie them into cycles, which only gc finds."""
        gc.collect()
        free_cached(self.device)
