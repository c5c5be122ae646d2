"""Where the files of one Wan model are, those of its parts and LoRAs among them, and whether they are what they should
be: from headers alone, in milliseconds.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import ModelMixin

from errors import WeightsError
from models.wan import image_encoder, text_encoder, vae
from models.wan.checkpoint import load_transformer, part_of_release, read_tensors
from models.wan.config import WanConfig
from models.wan.image_encoder import load_image_encoder
from models.wan.text_encoder import TOKENIZER_FILES, check_tokenizer, find_tokenizer
from models.wan.vae import load_vae
from pipelines.needs import TEXT_ENCODER
from pipelines.networks import family_of, shape_of
from pipelines.parts import Part
from pipelines.settings import Settings, is_tiny
from pipelines.weights import EXPERTS, WeightsFile, found_or


class ModelFiles:
    """The files that a run reads.

    Args:
        settings, config: from `resolve_settings`.
        parts: the plug-ins' weights beside the transformer.
    """

    def __init__(self, settings: Settings, config: dict, parts: Sequence[Part] = ()):
        self.settings, self.config, self.parts = settings, config, tuple(parts)
        # The part whose file holds the transformer too.
        self.with_transformer = next((part for part in self.parts if part.load_both is not None), None)

    @property
    def are_tiny(self) -> bool:
        """Whether there are none of the model's own: its networks are made from a seed."""
        return is_tiny(self.settings, self.config)

    @property
    def has_seeded_transformer(self) -> bool:
        """Whether the transformer is a tiny model's own; a branch beside it may be of a file."""
        return self.are_tiny and self.settings.base_path is None and self.with_transformer is None

    @property
    def has_seeded_vae(self) -> bool:
        return self.are_tiny and self.settings.vae_path is None

    @property
    def base(self) -> dict:
        """The config of the base model, below an identity's own."""
        if release := next((part.release for part in self.parts if part.release is not None), None):
            return release
        config = self.config
        while "transformer" not in config.get("files", {}) and config.get("base"):
            config = config["base"]
        return config

    @property
    def base_path(self) -> Path:
        """Where the model's parts are looked for, but for those that have a place of their own."""
        folder = next((part.folder for part in self.parts if part.folder is not None), None)
        return Path(self.settings.base_path or folder or Path("checkpoints") / self.base.get("dest", ""))

    @property
    def transformer_config(self) -> WanConfig:
        return shape_of(self.config)

    @property
    def num_experts(self) -> int:
        return len(self.config.get("experts") or (None,))

    def transformer_path(self, expert: int) -> Path:
        if (self.base_path / "model_index.json").is_file():  # a Diffusers repository
            return self.base_path / ("transformer", "transformer_2")[expert]
        if self.num_experts == 1:
            return self.base_path
        return self.base_path / self.config["experts"][EXPERTS[expert]]

    @property
    def encoder_sizes(self) -> dict:
        """What an estimate has to know of the encoders: bytes of the text's, and the shape of a tiny model's VAE."""
        return {
            "vae": self.config.get("vae") if self.has_seeded_vae else None,
            "text_encoder": 0 if self.are_tiny else TEXT_ENCODER,
        }

    def weights(self) -> list[WeightsFile]:
        """What a run reads, each file once, found or not; but for what a tiny model makes from its seed."""
        parts = [part for part in self.parts if part is not self.with_transformer and part.key_in_lora is None]
        of_parts = [file for part in parts for file in part.files]
        return [*self._transformer_files(), *self._encoder_files(), *of_parts, *self._lora_files()]

    def _encoder_files(self) -> list[WeightsFile]:
        """Of the text encoder with its tokenizer, of CLIP and of the VAE."""
        files = []
        if not self.are_tiny:
            files.append(self._part_file("umT5", "text_encoder_path", text_encoder.PLACE, self._check_text_encoder))
            tokenizer = self._tokenizer_file(files[-1].path)
            read = partial(check_tokenizer, tokenizer)
            files.append(WeightsFile("tokenizer", "--tokenizer_path", tokenizer, self.base["name"], read=read))
        if not self.are_tiny and self.transformer_config.image_dim is not None:
            files.append(self._part_file("CLIP", "image_encoder_path", image_encoder.PLACE, self._check_image_encoder))
        if not self.has_seeded_vae:
            files.append(self._part_file("VAE", "vae_path", vae.PLACE, self._check_vae, self.encodes_pictures))
        return files

    def _part_file(
        self, name: str, flag: str, place: tuple[str, str], check: Callable[[Path], None], until_denoised: bool = True
    ) -> WeightsFile:
        """A part that its flag names, or that lies beside the transformer."""
        given = getattr(self.settings, flag)
        path = self._part(given, place)

        def read() -> None:
            if given is None and path == self.base_path:
                if path.is_file():
                    raise WeightsError(f"--base_path {path}: one file; give the model's folder, or this part too")
                raise WeightsError(f"{path}: no {name} there (looked for {place[1]} and {place[0]}/)")
            check(path)

        return WeightsFile(name, f"--{flag}", path, self.base["name"], until_denoised, read)

    def _check_transformer(self, expert: int) -> None:
        """The whole way of loading it, except that no value leaves the disk."""
        if self.base_path.is_file() and self.num_experts > 1:
            raise WeightsError(
                f"--base_path {self.base_path}: one file, the model has two transformers; give its folder"
            )
        load_transformer(self.transformer_path(expert), device="meta", expect=self.transformer_config)

    def _check_text_encoder(self, path: Path) -> None:
        encoder = text_encoder.text_encoder_from_tensors(read_tensors(path), device="meta", source=path)
        if encoder.dim != self.transformer_config.text_dim:
            wanted = self.transformer_config.text_dim
            raise WeightsError(f"{path}: a umT5 of width {encoder.dim}, the transformer was trained with {wanted}")

    def _check_image_encoder(self, path: Path) -> None:
        width = load_image_encoder(path, device="meta").model.config.hidden_size
        if width != self.transformer_config.image_dim:
            wanted = self.transformer_config.image_dim
            raise WeightsError(f"{path}: a CLIP of width {width}, the transformer was trained with {wanted}")

    def _check_vae(self, path: Path) -> None:
        channels = load_vae(path, device="meta").latent_channels
        if channels != self.transformer_config.out_dim:
            wanted = self.transformer_config.out_dim
            raise WeightsError(f"{path}: a VAE of {channels} latent channels, the transformer makes {wanted}")

    def _transformer_files(self) -> list[WeightsFile]:
        if self.with_transformer is not None:
            return list(self.with_transformer.files)
        if self.has_seeded_transformer:
            return []
        files = []
        for expert in range(self.num_experts):
            name = "transformer" if self.num_experts == 1 else f"{EXPERTS[expert]}-noise transformer"
            path = self.base_path if self.base_path.is_file() else self.transformer_path(expert)
            read = partial(self._check_transformer, expert)
            files.append(WeightsFile(name, "--base_path", path, self.base["name"], read=read))
        return files

    def _lora_files(self) -> list[WeightsFile]:
        of_experts = self.settings.lora_files(self.num_experts) if hasattr(self.settings, "lora_files") else ()

        def flag_of(path: str) -> str:
            flags = ("lora_path", "lora_path_high", "lora_path_low")
            return f"--{next(flag for flag in flags if path in getattr(self.settings, flag))}"

        paths = dict.fromkeys(path for files in of_experts for path, _ in files)
        # The part in a LoRA's file is read after minutes of text encoding, else.
        with_part = {part.files[0].path: part.files[0] for part in self.parts_in_loras()}
        return [
            with_part.get(Path(path))
            or WeightsFile(
                "LoRA", flag_of(path), Path(path), self.settings.lora_release(path), read=partial(read_tensors, path)
            )
            for path in paths
        ]

    def parts_in_loras(self) -> list[Part]:
        """The parts whose keys lie among a LoRA's."""
        return [part for part in self.parts if part.key_in_lora is not None and part.files]

    def key_in_lora(self, path: str) -> str | None:
        """What the keys of a part's weights contain, where they lie among those of this LoRA."""
        return next((part.key_in_lora for part in self.parts_in_loras() if part.files[0].path == Path(path)), None)

    @property
    def encodes_pictures(self) -> bool:
        """Whether the VAE is used before denoising, too."""
        settings = self.settings
        starts_from_one = getattr(settings, "image", None) or getattr(settings, "first_frame", None)
        for_a_part = any(part.encodes for part in self.parts)
        return bool(for_a_part or starts_from_one) or family_of(self.config) not in ("t2v", "ti2v")

    @property
    def encodes_videos(self) -> bool:
        """Whether the VAE encodes at the video's size, not photos alone."""
        names = ("image", "first_frame", "input_video", "reference_video", "reference_image")
        given = any(getattr(self.settings, name, None) for name in names)
        return given or family_of(self.config) not in ("t2v", "ti2v")

    def part_layers(self) -> list[ModelMixin]:
        """The layers that are loaded with a transformer, on the meta device."""
        with torch.device("meta"):
            return [part.build(self.transformer_config) for part in self.parts if part.build is not None]

    def _tokenizer_file(self, text_encoder: Path) -> Path:
        """The file that decides what the tokenizer does: as given, or the one that belongs to the text encoder."""
        folder = text_encoder if text_encoder.is_dir() else text_encoder.parent
        given = self.settings.tokenizer_path
        place = Path(given) if given else found_or(folder / "google/umt5-xxl", find_tokenizer, text_encoder)
        return next((place / name for name in TOKENIZER_FILES if (place / name).is_file()), place)

    def _part(self, given: str | None, place: tuple[str, str]) -> Path:
        """A part that is named by its flag, or lies beside the transformer."""
        path = Path(given or self.base_path)
        return found_or(path, part_of_release, path, *place)
