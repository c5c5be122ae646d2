"""The voice of a song without its music: an MDX-Net (Kim_Vocal_2) in onnxruntime.

    separate = load_separator("checkpoints/Kim_Vocal_2.onnx")
    vocals = separate(mixture)                           # (N, 2) at 44.1 kHz -> the same shape

The network maps the spectrum of about six seconds of stereo to the spectrum of the voice in it. Written from the
published facts of the model (MDX-Net, github.com/kuielab/mdx-net; the settings that Ultimate Vocal Remover lists for
it, which are in configs/kim-vocal-2.yaml). Tested with tiny networks of known effect; the released one was not run
here.
"""

from pathlib import Path

import numpy
import torch

from configs import download_command, load_config, part_path
from errors import WeightsError

SAMPLE_RATE = 44100
RUMBLE_BINS = 3  # the lowest frequencies, under 17 Hz, are not given to the network: as Ultimate Vocal Remover
OVERLAP = 0.25  # share of a section that it has in common with the next


def load_separator(path: str | Path | None = None) -> "VocalSeparator":
    """The separator of configs/kim-vocal-2.yaml.

    Args:
        path: the .onnx file; None takes the one that download_models.py fetches.

    Raises:
        WeightsError: not there, damaged, or another network.
    """
    config = load_config("kim-vocal-2")
    path = Path(path) if path is not None else part_path(config, "separator")
    if not path.is_file():
        raise WeightsError(f"--model_path {str(path)!r}: no such file; {download_command(config)}")
    return VocalSeparator(path, **config["separator"])


class VocalSeparator:
    """(N, 2) float32 stereo at 44.1 kHz -> the voice, of the same shape.

    Args:
        path: ONNX network (B, 4, bins, frames) -> the same shape: real and imaginary part of left, then of right.
        n_fft, hop_length: of the short-time Fourier transform, periodic Hann window. The network sees the lower of the
            n_fft / 2 + 1 bins, and those above become silent.
        compensate: what the network's output is multiplied with.
    """

    def __init__(self, path: str | Path, *, n_fft: int, hop_length: int, compensate: float):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider") if torch.cuda.is_available() else ()
        available = onnxruntime.get_available_providers()
        providers = [name for name in wanted if name in available] or ["CPUExecutionProvider"]
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime raises a dozen classes of its own
            reason = str(error).strip().splitlines()[0][:160]
            command = download_command(load_config("kim-vocal-2"))
            raise WeightsError(f"--model_path {str(path)!r} cannot be read ({reason}); {command}") from error
        self.input = self.session.get_inputs()[0]
        shape = self.input.shape
        if len(shape) != 4 or shape[1] != 4 or not all(isinstance(size, int) for size in shape[2:]):
            raise WeightsError(f"--model_path {str(path)!r} takes {shape}; an MDX-Net takes (N, 4, 3072, 256)")
        self.num_bins, self.num_frames = shape[2:]
        if self.num_bins > n_fft // 2 + 1:
            raise WeightsError(f"--model_path {str(path)!r} takes {self.num_bins} bins, {n_fft // 2 + 1} were made")
        self.n_fft, self.hop_length, self.compensate = n_fft, hop_length, compensate
        self.section = hop_length * (self.num_frames - 1)  # samples, of which the transform makes num_frames
        self.overlap = int(self.section * OVERLAP)

    def __call__(self, mixture: numpy.ndarray) -> numpy.ndarray:
        """Section by section; where two overlap, one fades out as the other fades in."""
        from tqdm import tqdm

        length, step = len(mixture), self.section - self.overlap
        starts = range(-self.overlap, length, step)  # the first and last fades lie outside
        fade = (numpy.arange(self.overlap, dtype=numpy.float32) + 0.5) / self.overlap
        weight = numpy.concatenate([fade, numpy.ones(self.section - 2 * self.overlap, numpy.float32), fade[::-1]])[
            :, None
        ]
        padded = numpy.pad(mixture.astype(numpy.float32), ((self.overlap, self.section), (0, 0)))
        vocals = numpy.zeros_like(padded)
        for start in tqdm(starts, desc="separate", unit="section", disable=None):
            place = slice(start + self.overlap, start + self.overlap + self.section)
            vocals[place] += weight * self._separate(padded[place])
        return vocals[self.overlap : self.overlap + length]

    def _separate(self, section: numpy.ndarray) -> numpy.ndarray:
        """One section, (section, 2) -> the same shape."""
        window = torch.hann_window(self.n_fft)
        sound = torch.from_numpy(section.T.copy())  # (2, section)
        spectrum = torch.stft(sound, self.n_fft, self.hop_length, window=window, return_complex=True)  # (2, bins, T)
        given = torch.view_as_real(spectrum[:, : self.num_bins]).permute(0, 3, 1, 2).flatten(0, 1).contiguous()
        given[:, :RUMBLE_BINS] = 0
        try:
            (voice,) = self.session.run(None, {self.input.name: given[None].numpy()})  # (1, 4, bins, T)
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:160]
            raise WeightsError(f"the separator failed ({reason}); is it an MDX-Net?") from error
        voice = torch.from_numpy(voice[0]).unflatten(0, (2, 2)).permute(0, 2, 3, 1).contiguous()
        spectrum = torch.zeros_like(spectrum)
        spectrum[:, : self.num_bins] = torch.view_as_complex(voice)
        sound = torch.istft(spectrum, self.n_fft, self.hop_length, window=window, length=section.shape[0])
        return sound.T.numpy() * self.compensate
