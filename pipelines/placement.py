"""Which memory mode a job gets, of what it needs and what is free. Pure: nothing is asked of the machine here."""

from dataclasses import dataclass, replace

from pipelines.needs import GIB, MODES, Needs
from pipelines.pinned import pinned_bytes

MAPPED = 1 * GIB  # of RAM that a text encoder on the CPU takes beside its file, which stays mapped
READING = 1 * GIB  # of RAM for the tensor that is being read and cast, and the file system's share
FRAGMENTS, WORKSPACES = 1.03, GIB // 2  # what an allocator and the libraries take beside what was asked for


def next_mode(memory: str) -> str | None:
    """The mode to try when this one does not fit."""
    position = MODES.index(memory) + 1
    return MODES[position] if position < len(MODES) else None


@dataclass(frozen=True)
class Placement:
    """Where the parts of a job live.

    memory: one of MODES.
    fp8: the blocks' linears are stored in float8. Changes the frames.
    tiled: frames are decoded in tiles. Changes the frames, where tiles meet.
    keeps_weights: weights that leave the device, or wait for their turn, stay in RAM; else they are read again.
    text_on_device: umT5 runs on the device, not on the CPU.
    past_on_device: the VAE's past frames wait there between chunks, not in RAM.
    fits: what was free is enough.
    passed_over: what is faster, and why it was not chosen.
    """

    memory: str
    fp8: bool
    tiled: bool
    keeps_weights: bool
    text_on_device: bool
    past_on_device: bool
    device_bytes: int
    host_bytes: int
    fits: bool = False
    passed_over: str = ""

    @property
    def name(self) -> str:
        """`group, fp8, tiles`: what can be seen in the video or in its speed."""
        return ", ".join([self.memory, *(["fp8"] if self.fp8 else []), *(["tiles"] if self.tiled else [])])

    def describe(self, free_device: int, free_host: int, on_gpu: bool = True) -> str:
        """What was chosen and why, in one line."""
        where = "" if self.text_on_device else "; prompts are encoded on the CPU"
        needed = f"about {self.device_bytes / GIB:.1f} of {free_device / GIB:.1f} GiB that are free"
        needed += f" on the GPU and {self.host_bytes / GIB:.1f} of {free_host / GIB:.1f} GiB of RAM" if on_gpu else ""
        return f"{self.name} ({needed}{self.passed_over and f'; {self.passed_over}'}){where}"


# Where the VAE's past frames may wait: all tiles remember theirs until the end, so that those never wait on the device.
# To move the weights of `resident` away is faster than to move past frames each time.
PAST_ON_DEVICE = {
    "resident": (True,),
    "model": (True, False),
    "group": (True, False),
    "sequential": (False,),
}


# (memory, fp8, keeps_weights) from fast to slow
LADDER = (
    ("resident", False, True),
    ("model", False, True),
    ("model", False, False),
    ("group", False, True),
    ("group", False, False),
    ("resident", True, True),
    ("model", True, True),
    ("model", True, False),
    ("group", True, True),
    ("group", True, False),
    ("sequential", False, True),
    ("sequential", False, False),
)


def choose_mode(
    needs: Needs,
    free_device: int,
    free_host: int,
    *,
    device: str = "cuda",
    memory: str = "auto",
    fp8: bool | None = None,
    tiled: bool | None = None,
) -> Placement:
    """The fastest placement that fits, a pure function: the same numbers give the same answer on every machine.

    From fast to slow: `resident`; `model`; `group`, whose transfers hide behind the computation. All three give the
    same frames. Only where none of them fits, because of the device or of the RAM, float8 is taken in these modes, and
    `sequential`, which is exact but many times slower, last. In each mode past frames of the VAE go to the RAM where
    the device has no room for them, and weights that the RAM does not hold are read again. Tiles, which can be seen,
    are taken only where no mode does without.

    Args:
        needs: from `estimate_needs` or `needs_of_config`.
        free_device, free_host: bytes.
        device: "cuda"; of "cpu" (and "mps") there is one memory, and nothing to move: resident, or where not all fits
            at once, part after part, each read when it is needed.
        memory: "auto", or the one mode that is asked for.
        fp8, tiled: None where `auto` may decide.

    Returns:
        a placement; where none fits, the one that needs least, with `fits` False. Never refuses.
    """
    asked, passed_over = memory != "auto", ""
    one_memory = device != "cuda"
    if memory == "auto" and one_memory:
        modes = [("resident", bool(fp8), True), ("model", bool(fp8), False)]
    elif memory == "auto":
        modes = [mode for mode in LADDER if fp8 in (None, mode[1])]
    else:
        modes = [(memory, bool(fp8), True)] + [(memory, bool(fp8), False)] * (not one_memory and memory != "resident")
    tiles = (False, True) if tiled is None and not asked else (bool(tiled),)
    room = int((free_device - WORKSPACES) / FRAGMENTS) if not one_memory else free_device
    text_on_device = not one_memory and needs.text_encoder <= room and memory not in ("group", "sequential")

    candidates = []
    for in_tiles in tiles:
        for mode, narrow, keeps in modes:
            for past_on_device in (True,) if one_memory else (False,) if in_tiles else PAST_ON_DEVICE[mode]:
                one = place(needs, mode, narrow, in_tiles, keeps, text_on_device, past_on_device)
                if one_memory:
                    one = replace(one, device_bytes=max(one.device_bytes, MAPPED * bool(needs.text_encoder)))
                of_device, of_host = one.device_bytes <= room, one_memory or one.host_bytes <= free_host
                if of_device and of_host:
                    return replace(one, fits=True, passed_over=passed_over)
                short = f"{one.host_bytes / GIB:.1f} GiB of RAM" if of_device else f"{one.device_bytes / GIB:.1f} GiB"
                passed_over = f"{one.name} would need {short}"
                candidates.append(one)
    return replace(min(candidates, key=lambda one: (one.device_bytes, one.host_bytes)), passed_over=passed_over)


def place(
    needs: Needs, memory: str, fp8: bool, tiled: bool, keeps: bool, text_on_device: bool, past_on_device: bool
) -> Placement:
    """One placement with what it takes: on the device the largest moment of a run, in RAM what waits there."""
    weights = (needs.weights_fp8 if fp8 else needs.weights)[memory]
    expert = needs.expert_fp8 if fp8 else needs.expert
    expert = pinned_bytes(expert) if memory == "group" else expert
    stays = needs.vae if memory == "resident" else 0
    work, past = (needs.tile, needs.tiles_past) if tiled else (needs.decode, needs.decode_past)
    encode_past = needs.encode_past
    # `model` moves the transformer away before the VAE works, the other modes keep what they have on the device.
    while_decoding = needs.vae + (0 if memory == "model" else weights)
    on_device = max(
        needs.text_encoder if text_on_device else 0,
        needs.image_encoder + stays,
        weights + stays + needs.call + needs.kept_photos + (0 if memory == "sequential" else needs.kept_text),
        while_decoding + work + (past if past_on_device else 0),
        while_decoding + needs.encode + (encode_past if past_on_device else 0),
    )
    waiting = {"resident": 0, "model": needs.experts if keeps else 0}.get(memory, needs.experts if keeps else 1)
    in_ram = waiting * expert + (0 if past_on_device else max(past, encode_past))
    in_ram = max(in_ram, 0 if text_on_device else MAPPED) + READING
    return Placement(memory, fp8, tiled, keeps, text_on_device, past_on_device, on_device, in_ram)
