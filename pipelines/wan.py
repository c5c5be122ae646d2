"""The parts of one Wan model, loaded when first needed and placed by the memory mode."""

import gc
import logging
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from configs import download_command
from errors import ResourceError
from models.lora import Lora, read_lora, switch_loras
from models.wan.checkpoint import load_transformer
from models.wan.config import WanConfig
from models.wan.float8 import use_float8
from models.wan.image_encoder import ImageEncoder, load_image_encoder
from models.wan.slots import Plugin
from models.wan.text_encoder import (
    TextEncoder,
    load_text_encoder,
)
from models.wan.transformer import WanTransformer
from models.wan.vae import WanVAE, load_vae
from pipelines import tiny
from pipelines.attention_choice import choose_backend, set_backend, try_chosen, warn_without_flash
from pipelines.distributed import Processes, choose_device, shard_weights, split_sequence
from pipelines.job_state import chosen_before
from pipelines.jobs import Job
from pipelines.lora_settings import LoraSettings
from pipelines.loras import Loras
from pipelines.memory import check_host_memory, check_memory, free_bytes, free_cached, offload_groups, stage
from pipelines.model_files import ModelFiles
from pipelines.needs import MODES, TEXT_ENCODER, Needs, estimate_needs
from pipelines.networks import family_of
from pipelines.parts import Part, Reading, meta_transformer
from pipelines.placement import Placement, choose_mode
from pipelines.record import begun_as, describe_run, left_open
from pipelines.settings import Settings, is_tiny
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
        self.is_tiny = is_tiny(settings, config)
        self._transformers: dict[int, WanTransformer] = {}
        self._layers: dict[int, dict[str, ModelMixin]] = {}  # expert -> parts that are moved and freed with it
        self._expert = 0  # whose transformer was asked for last
        self._vae: WanVAE | None = None
        self._image_encoder: ImageEncoder | None = None
        self.loras = Loras()
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
        return self.files.weights(self.is_tiny)

    # ------------------------------------------------------------------------------------------------ before it loads

    def check(self, jobs: Iterable[Job] = (), at_once: Settings | None = None) -> None:
        """Look for what would end the run later, before anything loads; and choose what `--memory auto` leaves open.

        Args:
            jobs: the videos that are to be made; where one of them was begun, its choice is kept.
            at_once: settings of the most that is computed at one time, where that is less than the whole video.

        Raises:
            WeightsError: files that are not there, with the command that fetches them.
            ResourceError: more memory than the device, or the machine, has.
        """
        if not self._checked_files:
            self.check_files()
        self.check_attention_backend()
        self.use_placement(self.processes.share(self.choose_placement(self.needs(at_once), jobs)))
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
            encodes=self.encodes_videos,
            vae=self.config.get("vae") if self.is_tiny else None,
            text_encoder=0 if self.is_tiny else TEXT_ENCODER,
            beside=self.layers_beside(),
            more={memory: self.lora_bytes(memory) for memory in MODES},
            more_fp8={memory: self.lora_bytes(memory, fp8=True) for memory in MODES},
        )

    def layers_beside(self) -> list[ModelMixin]:
        """The layers that are loaded with a transformer, on the meta device."""
        with torch.device("meta"):
            return [part.build(self.transformer_config) for part in self.parts if part.build is not None]

    @property
    def encodes_videos(self) -> bool:
        """Whether the VAE encodes at the video's size, not photos alone."""
        names = ("image", "first_frame", "input_video", "reference_video", "reference_image")
        given = any(getattr(self.settings, name, None) for name in names)
        return given or family_of(self.config) not in ("t2v", "ti2v")

    @property
    def has_own_memory(self) -> bool:
        """Whether the device's memory is another than the machine's."""
        return self.device.type == "cuda"

    def choose_placement(self, needs: Needs, jobs: Iterable[Job] = ()) -> Placement:
        """Where the parts live: as the settings say, and where they say `auto`, what is fastest with what is free. What
        changes frames stays as it was for a video that was begun, as long as that fits: its steps would be lost.
        """
        settings = self.settings
        given = {"fp8": settings.fp8, "tiled": settings.tiled}
        if settings.compile or getattr(settings, "lora_mode", None) == "merged":
            given["fp8"] = bool(given["fp8"])  # not chosen: not to be compiled, and rounds most of a merged LoRA away
        free = free_bytes(self.device)
        choose = partial(
            choose_mode, needs, *free, device="cuda" if self.has_own_memory else "cpu", memory=settings.memory
        )
        placement = choose(**given)
        if settings.memory != "auto":
            return placement
        if (begun := self._begun(jobs)) is not None:
            path, kept = begun[0], given | {name: value for name, value in begun[1].items() if given[name] is None}
            as_begun = choose(**kept)
            changes = as_begun.fits and (as_begun.fp8, as_begun.tiled) != (placement.fp8, placement.tiled)
            placement = as_begun if as_begun.fits else placement
            if changes:
                logger.info(
                    "%s was made with %s weights%s: they are kept, so that it counts (without the file, auto chooses)",
                    *(path, "float8" if as_begun.fp8 else str(self.dtype).removeprefix("torch.")),
                    " and tiles" if as_begun.tiled else "",
                )
        if self.has_own_memory or placement.name != "resident":
            logger.info("--memory auto: %s", placement.describe(*free, on_gpu=self.has_own_memory))
        return placement

    def _begun(self, jobs: Iterable[Job]) -> tuple[Path, dict[str, bool]] | None:
        """The saved progress of the first job that was begun, and what was chosen for it."""
        retries = 0 if self.settings.min_face_score is None else self.settings.max_retries
        for job in jobs:
            for seed in range(job.seed, job.seed + retries + 1):
                name = self.chosen(self.describe(job.prompt, seed))["begun_as"]
                if (found := chosen_before(job.output, name)) is not None:
                    return found[0], {name: value for name, value in found[1].items() if name in left_open()}
        return None

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
            with stage("encoding the prompts", "close other programs, or add swap"):
                return self._encode_prompts(distinct, device)
        except ResourceError:
            if not (self.text_on_device and self.has_own_memory):
                raise
        logger.warning("out of memory while encoding the prompts on %s; going on with the CPU", device)
        self.free()
        with stage("encoding the prompts", "close other programs, or add swap"):
            return self._encode_prompts(distinct, torch.device("cpu"))

    @property
    def text_on_device(self) -> bool:
        if self.placement is not None:
            return self.placement.text_on_device
        return self.memory not in ("group", "sequential")

    def _encode_prompts(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        encoder = self._load_text_encoder(device)
        states = {}
        with ProgressBars(self.processes.rank == 0).work("encoding the prompts", len(prompts), "prompt") as bar:
            for prompt in prompts:
                states[prompt] = encoder.encode_prompts([prompt])[0].cpu()
                bar.advance()
        del encoder
        self.free()
        return states

    def _load_text_encoder(self, device: torch.device) -> TextEncoder:
        if self.is_tiny:
            return tiny.tiny_text_encoder(self.config).to(device)
        path = self.settings.text_encoder_path or self.files.base_path
        logger.info("reading the text encoder from %s", path)
        # On a CPU as the file has it, bfloat16 as released: it stays mapped from disk, where float32 takes 21 GiB.
        # Of a random encoder of width 1024 the states differ from float32's by 0.9 % after 4 layers, 2 % after 24.
        on_cpu = device.type == "cpu"
        return load_text_encoder(
            path,
            self.settings.tokenizer_path,
            dtype=None if on_cpu else torch.bfloat16,
            device=None if on_cpu else device,
            hint=download_command(self.files.base),
        )

    def encode_images(self, images: Sequence[Tensor], keep: bool = False) -> Tensor | None:
        """CLIP features (1, pictures · 257, 1280) of pictures (1, 3, H, W) in [-1, 1], on the CPU; None where the
        model takes none (Wan2.2).

        keep: pictures will follow. The encoder waits for them on the CPU (1.2 GiB) and is not read again (2.4 GB);
            else it is freed before returning.
        """
        if self.transformer_config.image_dim is None:
            return None
        encoder = (self._image_encoder or self._load_image_encoder()).to(self.device)
        features = torch.cat([encoder(image).float().cpu() for image in images], dim=1)
        if keep:
            self._image_encoder = encoder.to("cpu")
            free_cached(self.device)
        else:
            self._image_encoder = encoder = None
            self.free()
        return features

    def _load_image_encoder(self) -> ImageEncoder:
        if self.is_tiny:
            return tiny.tiny_image_encoder(self.config)
        path = self.settings.image_encoder_path or self.files.base_path
        dtype = torch.float32 if self.device.type == "cpu" else torch.float16
        return load_image_encoder(path, dtype=dtype, hint=download_command(self.files.base))

    @contextmanager
    def vae(self):
        """The VAE on the device for as long as the `with` block runs."""
        if self._vae is None:
            if self.is_tiny:
                self._vae = tiny.tiny_vae(self.config)
            else:
                path = self.settings.vae_path or self.files.base_path
                self._vae = load_vae(path, dtype=self.vae_dtype, hint=download_command(self.files.base))
            self._vae = self._vae.to(self.vae_dtype)
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
        layers: dict[str, ModelMixin] = {}
        if self.files.with_transformer is not None:
            transformer, layers[self.files.with_transformer.name] = self.files.with_transformer.load_both(reading)
        else:
            transformer = self._read_transformer(reading)
        for part in self.parts:
            if part.build is not None and part is not self.files.with_transformer:
                layers[part.name] = part.load(transformer, reading)
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

    def _read_transformer(self, reading: Reading) -> WanTransformer:
        if self.is_tiny:
            transformer = tiny.tiny_transformer(self.config, reading.expert).set_compute_dtype(reading.dtype)
            for name, change in reading.changes.items():
                parameter = transformer.get_parameter(name)
                parameter.data = change(parameter.data)
            return use_float8(transformer) if reading.fp8 else transformer
        return load_transformer(
            self.files.transformer_path(reading.expert),
            **reading.options,
            expect=self.transformer_config,
            changes=reading.changes,
            hint=download_command(self.files.base),
        ).requires_grad_(False)

    def _place(self, transformer: WanTransformer) -> None:
        """Prepare a transformer (or a branch beside it) to run as the settings say."""
        if self.shards_weights and isinstance(transformer, WanTransformer):
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

    def use_loras(self, settings: LoraSettings) -> None:
        """Change each expert's weights by the LoRAs of these settings, from its next loading on. The files are checked
        here, against a transformer without weights, so that a wrong one is refused before the right base is loaded.

        Raises:
            WeightsError, InputError: `read_lora`.
            UsageError: a file that cannot be switched off.
        """
        if not self._checked_files:  # what is missing besides is said at once
            self.check_files()
        shape, files = meta_transformer(self.transformer_config), settings.lora_files(self.num_experts)
        paths = dict.fromkeys(path for of_expert in files for path, _ in of_expert)
        read = {path: self._read_lora(path, shape, settings.lora_partial) for path in paths}
        of_experts = {i: [(read[path], scale) for path, scale in of_expert] for i, of_expert in enumerate(files)}
        self.loras = Loras(of_experts, settings.live_loras, settings.lora_steps)
        if self._transformers:
            self._transformers.clear()
            self._layers.clear()
            self.free()

    def _read_lora(self, path: str, shape: WanTransformer, partial: bool) -> Lora:
        key = next((p.key_in_lora for p in self.files.parts_in_loras() if p.files[0].path == Path(path)), None)
        return read_lora(path, shape, partial, key, self.settings.unused_lora_keys)

    def with_loras(self, step: int, num_steps: int) -> bool:
        """Whether the LoRAs work at this step of so many."""
        return self.loras.work_at(step, num_steps)

    def lora_bytes(self, memory: str | None = None, fp8: bool = False) -> int:
        """What live LoRAs add to the device memory under a memory mode, by default the present one.

        fp8: beside float8 weights, where they are live unless they were asked to be merged.
        """
        settings = self.settings
        if not self.loras.of_experts or not (replace(settings, fp8=True).live_loras if fp8 else self.loras.live):
            return 0
        return self.loras.num_bytes(memory or self.memory, self.transformer_config.num_layers, self.dtype.itemsize)

    def check_attention_backend(self) -> None:
        """Attend once by the chosen backend, before minutes go into loading; and say so if that is not the one which
        the model's authors ask for.

        Raises:
            UsageError: it does not run here.
        """
        if not self.is_tiny:
            warn_without_flash(self.settings, self.attention_backend)
        try_chosen(self.attention_backend, self.transformer_config, self.dtype, self.device)

    def use_attention_backend(self, name: str) -> None:
        """Run attention on another of diffusers' backends from now on."""
        self.attention_backend = name
        for expert, transformer in self._transformers.items():
            for model in (transformer, *self._layers[expert].values()):
                set_backend(model, name)

    def use_memory_mode(self, memory: str) -> None:
        """Go on under another memory mode: transformers are loaded again under it."""
        self._transformers.clear()
        self._layers.clear()
        self.free()
        self.memory = memory
        if self.placement is not None:
            self.placement = replace(self.placement, memory=memory, past_on_device=memory != "sequential")

    def free(self) -> None:
        """Give back the memory of parts that were dropped; hooks tie them into cycles, which only gc finds."""
        gc.collect()
        free_cached(self.device)
