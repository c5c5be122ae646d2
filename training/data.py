"""The training videos: what they are, which can be used, and in which bucket each belongs.

    python -m training.data check data/people                                    # what is wrong with any of them
    python -m training.data check talking_face_data --fps 25 --audio any --masks face lip
    python -m training.data check data/people --config configs/train/stand-in-14b.yaml    # what that run wants

The check decodes every video and sound whole, lists every sample that cannot be used with its path and the reasons,
ends with a table, and exits with 3 if there are any. What it measures is kept in .cache/index.json beside the data, so
that a training run does not measure what has not changed since.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from errors import InputError, UsageError, exit_codes
from preprocess.output import whole_file
from training.config import Config, Source, parse_size, read_config
from training.facts import Facts, measure, stamp_of
from training.layouts import LAYOUTS, Listed, find_references, guess_layout, list_videos
from training.sampler import Bucket, Order

logger = logging.getLogger("selfsame")

CACHE = ".cache"  # within the first source
INDEX = "index.json"
HANDED_OVER = 5  # frames of SVI 2.0 Pro's clips that are the picture and the end of the clip before
FPS_TOLERANCE = 0.005  # 23.976 and 24 a second are a thousandth apart; 24 and 25 four hundredths
AUDIO = ("none", "any", "stereo")


@dataclass(frozen=True)
class Wanted:
    """What a sample must have for a run."""

    fps: float | None = None  # None: any
    sizes: tuple[tuple[int, int], ...] = ((480, 832),)  # (height, width)
    frames: tuple[int, ...] = (1,)
    audio: str = "none"  # or "any", "stereo"
    masks: tuple[str, ...] = ()  # "face", "lip"
    faces: bool = False  # the person's face
    pose: bool = False
    control: bool = False  # a control video, a mask or reference pictures
    references: int = 0  # how many reference pictures
    goes_on: bool = False  # a clip, and the next one that goes on from it

    def length(self, frames: int) -> int:
        """Of a video that clips of so many frames are taken from. The next clip begins within the one before."""
        return frames + frames - HANDED_OVER if self.goes_on else frames


@dataclass(frozen=True)
class Sample:
    """A video that can be trained on."""

    listed: Listed
    facts: Facts
    bucket: Bucket
    source: int  # which of the sources it is from
    further: int = 0  # frames that are needed after those of the bucket

    @property
    def name(self) -> str:
        return self.listed.name


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a video; nothing, if it can be used."""

    listed: Listed
    facts: Facts | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class TrainingSet:
    """All samples of a run, in an order that depends on nothing but them."""

    samples: tuple[Sample, ...]
    held_out: tuple[Sample, ...]  # never trained on
    repeats: tuple[int, ...]  # of each source
    skipped: tuple[Verdict, ...] = ()

    @property
    def hash(self) -> str:
        """Of all that decides what a run sees: a resumed one must find the same."""
        lines = [
            json.dumps(
                [
                    part,
                    s.source,
                    self.repeats[s.source],
                    s.name,
                    s.facts.content,
                    s.facts.beside,
                    s.listed.caption,
                    s.bucket,
                ]
            )
            for part, samples in (("train", self.samples), ("held out", self.held_out))
            for s in samples
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def order(self, global_batch: int, seed: int) -> Order:
        """The order of the samples, by their index in `samples`."""
        ids_of: dict[Bucket, list[int]] = {}
        for number, sample in enumerate(self.samples):
            ids_of.setdefault(sample.bucket, []).extend([number] * self.repeats[sample.source])
        return Order(ids_of, global_batch, seed)


# ---------------------------------------------------------------------------------------------------- for a run


def wanted_by(config: Config) -> Wanted:
    """What the samples of a run must have."""
    avatar, recycling = config.avatar, config.error_recycling
    talks = avatar is not None or (recycling is not None and recycling.variant == "talk")
    masks = () if avatar is None else tuple(
        kind for kind, share in (("face", avatar.masks.face), ("lip", avatar.masks.lip)) if share or avatar.masks.full
    )  # fmt: skip
    if config.stand_in is not None and config.stand_in.face_loss:
        masks = ("face",)
    return Wanted(
        config.data.fps,
        config.data.sizes,
        tuple(sorted(config.data.frames)),
        audio="any" if talks else "none",
        masks=masks,
        faces=config.stand_in is not None,
        pose=recycling is not None and recycling.variant == "dance",
        control=config.vace is not None,
        references=config.vace.references if config.vace is not None else 0,
        goes_on=recycling is not None and recycling.variant == "pro",
    )


def read_samples(config: Config) -> TrainingSet:
    """The samples of a run. Of several processes on a machine the first goes alone: the others find what it measured.

    Raises:
        InputError: a source without videos; unusable ones (`data.bad: refuse`); or none that can be used.
    """
    samples, skipped = [], []
    wanted, cache = wanted_by(config), cache_folder(config)
    for number, source in enumerate(config.data.sources):
        for verdict in verdicts(source, wanted, cache):
            if verdict.reasons:
                skipped.append(verdict)
            else:
                bucket = bucket_of(verdict.facts, wanted)
                further = wanted.length(bucket.frames) - bucket.frames
                samples.append(Sample(verdict.listed, verdict.facts, bucket, number, further))
    if skipped and config.data.bad == "refuse":
        first = skipped[0]
        raise InputError(
            f"{len(skipped)} of {len(samples) + len(skipped)} samples cannot be used, {first.listed.video} first: "
            f"{'; '.join(first.reasons)}. List all with `python -m training.data check {config.data.sources[0].path} "
            "--config CONFIG`, or give data.bad: skip"
        )
    for verdict in skipped:
        logger.warning("%s is skipped: %s", verdict.listed.video, "; ".join(verdict.reasons))
    kept = [sample for sample in samples if not is_held_out(sample.facts.content, config.data.holdout)]
    if not kept:
        raise InputError(f"none of {len(samples) + len(skipped)} samples can be trained on; see what is wrong above")
    if small := [sample for sample in samples if is_enlarged(sample.facts, sample.bucket)]:
        logger.warning(
            "%d of %d videos are smaller than they are trained at and are enlarged, %s of %dx%d first",
            *(len(small), len(samples), small[0].listed.video, small[0].facts.width, small[0].facts.height),
        )
    held_out = [sample for sample in samples if is_held_out(sample.facts.content, config.data.holdout)]
    return TrainingSet(tuple(kept), tuple(held_out), tuple(s.repeat for s in config.data.sources), tuple(skipped))


def cache_folder(config: Config) -> Path:
    """Where what is measured and encoded is kept."""
    return Path(config.data.cache) if config.data.cache else default_cache(config.data.sources[0].path)


def default_cache(path: str | Path) -> Path:
    root = Path(path)
    return (root if root.is_dir() else root.parent) / CACHE


def is_held_out(content: str, share: float) -> bool:
    """Whether a sample is kept for the held-out loss. Its content decides, so that it stays so when data are added."""
    return int(content[:13], 16) < share * 16**13


def bucket_of(facts: Facts, wanted: Wanted) -> Bucket:
    """The size nearest in shape (of equals the largest), and the longest clip that the video has."""

    def distance(size: tuple[int, int]) -> tuple[float, int]:
        height, width = size
        shapes = facts.height * width, facts.width * height
        return max(shapes) / min(shapes), -height * width

    return Bucket(
        *min(wanted.sizes, key=distance), max(n for n in wanted.frames if wanted.length(n) <= facts.num_frames)
    )


def is_enlarged(facts: Facts, bucket: Bucket) -> bool:
    """Whether a video is smaller than what it would be trained at: a network learns its blur."""
    return facts.height < bucket.height or facts.width < bucket.width


# ---------------------------------------------------------------------------------------------------- what is wrong


def verdicts(source: Source, wanted: Wanted, cache: Path) -> list[Verdict]:
    """What is wrong with each video of a source, measured where that is not known.

    Raises:
        InputError: it has no videos in its layout.
    """
    listed = list_videos(source.path, source.layout)
    facts = measured([one for one in listed if not one.trouble], cache)
    return [Verdict(one, facts.get(one), reasons_against(one, facts.get(one), wanted)) for one in listed]


def reasons_against(listed: Listed, facts: Facts | None, wanted: Wanted) -> tuple[str, ...]:
    """Everything that speaks against a video, "kind: details" each."""
    if listed.trouble:
        return (listed.trouble,)
    if facts is None or facts.trouble:
        return (facts.trouble if facts else "damaged: it was not measured",)
    reasons = []
    if facts.num_frames < (least := wanted.length(min(wanted.frames))):
        reasons.append(f"too short: {facts.num_frames} frames, {least} are wanted")
    if wanted.fps is not None and facts.fps == 0:
        reasons.append("unknown rate: pictures need sub_clip.mp4 or audio.wav beside them")
    elif wanted.fps is not None and abs(facts.fps / wanted.fps - 1) > FPS_TOLERANCE:
        reasons.append(f"wrong rate: {facts.fps:.5g} frames a second, {wanted.fps:g} are wanted")
    if wanted.audio != "none":
        if not facts.channels:
            reasons.append("no sound")
        elif facts.is_silent:
            reasons.append("silent sound")
        elif facts.fps and facts.seconds < min(wanted.frames) / facts.fps - 0.1:
            reasons.append(f"short sound: it ends after {facts.seconds:.3g} s")
        if wanted.audio == "stereo" and facts.channels == 1:
            reasons.append("mono sound: stereo is wanted")
    missing = dict(facts.missing_masks)
    for kind in wanted.masks:
        if kind not in dict(listed.masks):
            reasons.append(f"no {kind} masks: make them with `python -m preprocess.masks`")
        elif kind in missing:
            reasons.append(f"missing {kind} masks: {missing[kind][1]} of {facts.num_frames}, {missing[kind][0]} first")
    if wanted.faces and listed.faces is None:
        reasons.append("no face: make it with `python -m training.prepare`")
    if wanted.pose and listed.pose is None:
        reasons.append("no poses: dwpose.mp4 is not there")
    if wanted.control:
        name, pictures = listed.video.stem, len(find_references(listed.references))
        if listed.control is None and listed.made is None and not wanted.references:
            reasons.append(f"no control: neither {name}.control.mp4 nor {name}.mask.mp4 is there")
        if pictures < wanted.references:
            reasons.append(f"no reference: {name}.references/ has {pictures} pictures, {wanted.references} are wanted")
    return tuple(reasons)


def measured(listed: Sequence[Listed], cache: Path) -> dict[Listed, Facts]:
    """The facts of each video: from the index where its files are as they were, else measured and put there."""
    index = read_index(cache / INDEX)
    stamps = {one: stamp_of(one) for one in listed}
    found, new = {}, []
    for one in listed:
        known = index.get(key_of(one))
        if known is not None and known[0] == stamps[one]:
            found[one] = known[1]
        else:
            new.append(one)
    if not new:
        return found
    from tqdm import tqdm

    with quiet(), ThreadPoolExecutor(os.cpu_count()) as pool:  # ffmpeg's processes do the work
        for one, facts in zip(new, tqdm(pool.map(measure, new), "measuring", len(new), disable=None), strict=True):
            found[one] = facts
            index[key_of(one)] = stamps[one], facts
    write_index(cache / INDEX, index)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without a message on each file: what is wrong becomes a reason."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def key_of(listed: Listed) -> str:
    return os.path.abspath(listed.video)


def read_index(path: Path) -> dict[str, tuple[str, Facts]]:
    """What was measured before; nothing, where the file is not there or not ours."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {key: (stamp, Facts.from_json(facts)) for key, (stamp, facts) in entries.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def write_index(path: Path, index: Mapping[str, tuple[str, Facts]]) -> None:
    """Whole or not at all; where it cannot be written, the next run measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            part.write_text(json.dumps({key: [stamp, asdict(facts)] for key, (stamp, facts) in index.items()}))
    except OSError as error:
        logger.warning("%s cannot be written (%s): the next run has to measure again", path, error.strerror or error)


# ---------------------------------------------------------------------------------------------------- the command


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="list every sample that cannot be used")
    check.add_argument("dir", metavar="DIR", help="folder, list or csv of the videos")
    check.add_argument("--layout", choices=tuple(LAYOUTS), help="how they lie there (guessed)")
    check.add_argument("--config", help="a training configuration: what its run wants is checked")
    check.add_argument("--fps", type=float, help="frames a second that are wanted (any)")
    check.add_argument("--frames", type=int, nargs="+", help="lengths of clips (1)")
    check.add_argument("--resolutions", nargs="+", metavar="HEIGHTxWIDTH", help="sizes of clips (480x832)")
    check.add_argument("--audio", choices=AUDIO, help="sound that is wanted (none)")
    check.add_argument("--masks", nargs="+", choices=("face", "lip"), help="masks that are wanted (none)")
    check.add_argument("--faces", action="store_true", default=None, help="the person's face is wanted")
    check.add_argument("--cache", help="folder of encoded samples, which are looked through too (DIR/.cache)")
    return parser.parse_args(argv)


def wanted_of(args: Namespace) -> Wanted:
    """What the flags, or the configuration, want.

    Raises:
        UsageError: both, or a value that cannot be.
    """
    own = ("fps", "frames", "resolutions", "audio", "masks", "faces")
    given = {name: getattr(args, name) for name in own if getattr(args, name) is not None}
    if args.config is not None:
        if given:
            raise UsageError(f"--config says what is wanted; leave out --{', --'.join(given)}")
        return wanted_by(read_config(args.config, [f"data.sources=[{{path: {json.dumps(args.dir)}}}]"]))
    if "resolutions" in given:
        try:
            given["sizes"] = tuple(map(parse_size, given.pop("resolutions")))
        except ValueError as error:
            raise UsageError(f"--resolutions {' '.join(args.resolutions)}: {error}") from None
    for name, low in (("fps", 0.1), ("frames", 1)):
        values = given.get(name, ())
        for value in values if isinstance(values, list) else [values] if values != () else []:
            if not value >= low:
                raise UsageError(f"--{name} {value:g}: {low:g} or more is accepted")
    return Wanted(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def main(args: Namespace) -> None:
    wanted, layout = wanted_of(args), args.layout or guess_layout(args.dir)
    cache = Path(args.cache) if args.cache else default_cache(args.dir)
    found = verdicts(Source(path=args.dir, layout=layout), wanted, cache)
    bad = [verdict for verdict in found if verdict.reasons]
    for verdict in bad:
        print(f"{verdict.listed.video}: {'; '.join(verdict.reasons)}")
    broken = broken_files(cache)
    for file, reason in broken:
        print(f"{file}: {reason}")
    print(table(found, wanted, layout))
    if bad or broken:
        raise InputError(
            f"{len(bad)} of {len(found)} samples"
            + (f" and {len(broken)} encoded files" if broken else "")
            + " cannot be used; mend or remove them, or train with data.bad: skip"
        )


def broken_files(cache: Path) -> list[tuple[Path, str]]:
    """Encoded samples in a cache that are damaged or not numbers, and why."""
    files = sorted(cache.glob("*.safetensors"))
    if not files:
        return []
    from training.cache import trouble_in  # torch is loaded only where there is something to look through

    return [(file, trouble) for file in files if (trouble := trouble_in(file))]


def table(found: Iterable[Verdict], wanted: Wanted, layout: str) -> str:
    """How many samples each bucket has, and how many are lost to what."""
    buckets, reasons, seconds, enlarged = Counter(), Counter(), 0.0, 0
    for verdict in found:
        if verdict.reasons:
            reasons.update({reason.partition(":")[0] for reason in verdict.reasons})
        else:
            buckets[bucket := bucket_of(verdict.facts, wanted)] += 1
            enlarged += is_enlarged(verdict.facts, bucket)
            seconds += verdict.facts.num_frames / verdict.facts.fps if verdict.facts.fps else 0
    lines = [f"{'samples':>8}  of layout {layout}, {seconds:.0f} s in all"]
    lines += [f"{count:>8}  {bucket}" for bucket, count in sorted(buckets.items())]
    lines += [f"{enlarged:>8}  of them are smaller and would be enlarged"] if enlarged else []
    lines += [f"{count:>8}  unusable: {kind}" for kind, count in reasons.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    with exit_codes():
        main(parse_arguments())
