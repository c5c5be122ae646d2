"""How training videos lie in folders: each layout as a list of what belongs to a video. Nothing is opened but texts.

    folder         NAME.mp4 with NAME.txt, or metadata.jsonl with file_name and text. Beside a video may lie, as
                   `python -m training.prepare` puts them: NAME.wav, NAME.face_masks/, NAME.lip_masks/, NAME.faces/;
                   and what controls it: NAME.control.mp4, NAME.mask.mp4 (white is to be made), NAME.references/
    stableavatar   {rec,vec,square}/{speech,singing,dancing}/NNNNN/ with images/ or sub_clip.mp4, audio.wav, face_masks/
                   and lip_masks/; or video_{rec,vec,square}_path.txt, one such folder a line
    svi            FOLDER/FOLDER.csv of Filename and Video Description, videos beside it; or folders of video.mp4 and
                   dwpose.mp4. Upstream's pickles are never opened: they could run code

Sources: stableavatar.md 6.1 and `talking_video_dataset_fantasy.py`; svi.md 6.4 and `train_svi*.py`.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from errors import InputError

VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm")
PICTURES = (".png", ".jpg", ".jpeg")
CONTROLS = (".control", ".mask")  # endings of the names of videos that belong to another
LISTS = ("video_rec_path.txt", "video_vec_path.txt", "video_square_path.txt")
IDENTITY = "identity.json"  # how alike the people of a folder's videos are, from `training.prepare`
# What StableAvatar's clips are called -> what they show; the first that is in the path counts.
PROMPTS = {
    "singing": "The protagonist is singing",
    "speech": "The protagonist is talking",
    "dancing": "The protagonist is simultaneously dancing and singing",
}
LONGEST_CAPTION = 2**16  # bytes
LONGEST_TABLE = 2**30


@dataclass(frozen=True)
class Listed:
    """What belongs to one training video."""

    name: str  # within its source
    video: Path  # a file, or a folder of numbered pictures
    caption: str = ""
    audio: Path | None = None  # None: the video's own sound
    timing: Path | None = None  # of a folder of pictures: the video that has its rate
    masks: tuple[tuple[str, Path], ...] = ()  # ("face", folder), ("lip", folder)
    faces: Path | None = None  # folder of the person's face, 512x512 on white
    pose: Path | None = None  # a video of poses
    control: Path | None = None  # a video that says what is to be made: poses, depth, lines, …
    made: Path | None = None  # a video of masks: white is to be made, black is kept
    references: Path | None = None  # folder of pictures of what is to be seen
    alike: tuple[tuple[str, float], ...] = ()  # other videos of the source by their faces' similarity
    within: tuple[tuple[int, int, float], ...] = ()  # two frames, and the similarity of the faces in them
    trouble: str = ""  # why it cannot be used, as far as a list tells, "kind: details"

    def places(self) -> Iterator[Path]:
        """Every file and folder that it is made of."""
        folders = [folder for _, folder in self.masks]
        beside = (self.audio, self.timing, *folders, self.faces, self.pose, self.control, self.made, self.references)
        yield from (place for place in (self.video, *beside) if place is not None)


def list_videos(path: str | Path, layout: str) -> list[Listed]:
    """What a source holds, by name.

    Raises:
        InputError: nothing is there, or nothing in that layout.
    """
    root = Path(path)
    if not root.exists():
        raise InputError(f"{path}: no such folder or file; give the folder of the training videos")
    found = sorted(LAYOUTS[layout](root), key=lambda listed: listed.name)
    if not found:
        expected = __doc__.split(f"    {layout} ", 1)[1].split("\n    ")[0]
        raise InputError(f"{path}: no videos in the layout {layout} there ({' '.join(expected.split())})")
    return found


def guess_layout(path: str | Path) -> str:
    """The layout that a folder looks like."""
    root = Path(path)
    if root.name in LISTS or any((root / name).exists() for name in (*LISTS, "rec", "vec", "square", *PROMPTS)):
        return "stableavatar"
    folders = [root, *sorted(p for p in root.glob("*/") if not p.name.startswith("."))]
    if root.suffix == ".csv" or any((f / f"{f.resolve().name}.csv").is_file() for f in folders):
        return "svi"
    if any(any(f.glob("*.pkl")) or ((f / "video.mp4").is_file() and (f / "dwpose.mp4").is_file()) for f in folders):
        return "svi"
    return "folder"


# ---------------------------------------------------------------------------------------------------- folder


def list_folder(root: Path) -> Iterator[Listed]:
    """Videos at any depth; those that begin with a dot are work files."""
    if not root.is_dir():
        raise InputError(f"{root}: is no folder; give the folder of the videos")
    captions = read_captions(root / "metadata.jsonl")
    alike, within = read_identity(root / IDENTITY)
    seen = set()
    for video in files_below(root, VIDEOS):
        if video.stem.endswith(CONTROLS):
            continue
        name = video.relative_to(root).as_posix()
        seen.add(name)
        caption, trouble = caption_of(video, captions.get(name))
        beside = {
            kind: video.with_name(f"{video.stem}{kind}") for kind in (".wav", ".faces", ".face_masks", ".lip_masks")
        }
        control, made = (video.with_name(f"{video.stem}{kind}.mp4") for kind in CONTROLS)
        references = video.with_name(f"{video.stem}.references")
        masks = tuple((kind, beside[f".{kind}_masks"]) for kind in ("face", "lip") if beside[f".{kind}_masks"].is_dir())
        yield Listed(
            name, video, caption, trouble=trouble, masks=masks, alike=alike.get(name, ()), within=within.get(name, ()),
            audio=beside[".wav"] if beside[".wav"].is_file() else None,
            faces=beside[".faces"] if beside[".faces"].is_dir() else None,
            control=control if control.is_file() else None, made=made if made.is_file() else None,
            references=references if references.is_dir() else None,
        )  # fmt: skip
    for name in captions:
        if name not in seen:
            yield Listed(name, root / name, trouble="missing: metadata.jsonl names it")


def find_references(folder: Path | None) -> list[Path]:
    """The reference pictures of a video, by name."""
    return [] if folder is None else sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)


def files_below(root: Path, endings: tuple[str, ...]) -> Iterator[Path]:
    """Files with such endings, without those in or of a hidden name."""
    for file in sorted(root.rglob("*")):
        if file.suffix.lower() in endings and not any(part.startswith(".") for part in file.relative_to(root).parts):
            yield file


def caption_of(video: Path, listed: str | None) -> tuple[str, str]:
    """(caption, trouble): of NAME.txt, else of the list."""
    text = video.with_suffix(".txt")
    if text.is_file():
        try:
            caption = read_text(text, LONGEST_CAPTION).strip()
        except InputError as error:
            return "", f"damaged caption: {error}"
        return caption, "" if caption else f"empty caption: {text.name}"
    if listed is None:
        return "", f"no caption: {text.name} is not there, nor is it in metadata.jsonl"
    return listed.strip(), "" if listed.strip() else "empty caption: in metadata.jsonl"


def read_captions(table: Path) -> dict[str, str]:
    """File name -> caption of a metadata.jsonl; none where there is no such file.

    Raises:
        InputError: a line that is no such entry.
    """
    if not table.is_file():
        return {}
    captions = {}
    for number, line in enumerate(read_text(table, LONGEST_TABLE).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            texts = [entry[key] for key in ("text", "caption", "prompt") if key in entry]
            name, text = entry["file_name"], texts[0]
            if not (isinstance(name, str) and isinstance(text, str)):
                raise TypeError
        except (ValueError, LookupError, TypeError, RecursionError):
            raise InputError(
                f'{table}, line {number}: expected {{"file_name": "walk.mp4", "text": "A woman walks"}}'
            ) from None
        if name in captions:
            raise InputError(f"{table}, line {number}: {name} is there twice; keep one")
        captions[name] = text
    return captions


def read_identity(file: Path) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Video -> (other video, similarity of their faces), best first; and -> (frame, later frame, similarity).

    Raises:
        InputError: the file is not of `training.prepare`.
    """
    if not file.is_file():
        return {}, {}
    alike: dict[str, list[tuple[str, float]]] = {}
    try:
        entry = json.loads(read_text(file, LONGEST_TABLE))
        for one, other, similarity in entry["pairs"]:
            alike.setdefault(one, []).append((other, float(similarity)))
            alike.setdefault(other, []).append((one, float(similarity)))
        within = {
            name: tuple((int(i), int(j), float(value)) for i, j, value in rows)
            for name, rows in entry["within"].items()
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{file}: is not the list of `python -m training.prepare`; remove it or prepare anew"
        ) from None
    return {name: tuple(sorted(others, key=lambda pair: (-pair[1], pair[0]))) for name, others in alike.items()}, within


def read_text(file: Path, longest: int) -> str:
    """UTF-8 text.

    Raises:
        InputError: it is too long, cannot be read, or is no such text.
    """
    try:
        if file.stat().st_size > longest:
            raise InputError(f"{file}: is too long for a text, {longest} bytes are accepted")
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: is no UTF-8 text") from None


# ---------------------------------------------------------------------------------------------------- StableAvatar


def list_stableavatar(root: Path) -> Iterator[Listed]:
    """Clip folders: those that lists name, else those that are there."""
    lists = [root] if root.is_file() else [root / name for name in LISTS if (root / name).is_file()]
    if not lists:
        clips = {folder.parent for folder in root.rglob("images") if folder.is_dir()}
        clips |= {file.parent for file in root.rglob("sub_clip.mp4")}
        yield from (avatar_clip(clip, clip.relative_to(root).as_posix()) for clip in sorted(clips))
        return
    seen = set()
    for table in lists:
        for number, line in enumerate(read_text(table, LONGEST_TABLE).splitlines(), 1):
            if not (line := line.strip()) or line in seen:
                continue
            seen.add(line)
            places = (Path(line), table.parent / line)
            if (clip := next((place for place in places if place.is_dir()), None)) is None:
                yield Listed(line, table.parent / line, trouble=f"missing: {table.name} line {number} names it")
            else:
                yield avatar_clip(clip, line)


def avatar_clip(clip: Path, name: str) -> Listed:
    """What one clip folder of StableAvatar holds."""
    path = clip.resolve()
    # A folder of that very name counts before one whose name merely holds the word, as upstream looks for it.
    kind = next((part for part in reversed(path.parts) if part in PROMPTS), None)
    prompt = PROMPTS.get(kind) or next((text for word, text in PROMPTS.items() if word in path.as_posix()), "")
    images, video, audio = clip / "images", clip / "sub_clip.mp4", clip / "audio.wav"
    listed = Listed(
        name,
        images if images.is_dir() else video,
        prompt,
        audio=audio if audio.is_file() else None,
        timing=video if images.is_dir() and video.is_file() else None,
        masks=tuple((kind, clip / f"{kind}_masks") for kind in ("face", "lip") if (clip / f"{kind}_masks").is_dir()),
        trouble="" if prompt else f"no caption: it follows from the path, which has none of {', '.join(PROMPTS)}",
    )
    return (
        listed
        if listed.video.exists()
        else replace(listed, trouble="missing: neither images/ nor sub_clip.mp4 is there")
    )


# ---------------------------------------------------------------------------------------------------- SVI


def list_svi(root: Path) -> Iterator[Listed]:
    """Videos by their category's csv, and folders of a video and its poses."""
    folders = [root.parent] if root.suffix == ".csv" else [root, *sorted(p for p in root.glob("*/"))]
    for folder in folders:
        if folder.name.startswith("."):
            continue
        prefix = "" if folder in (root, root.parent) else f"{folder.name}/"
        table = root if root.suffix == ".csv" else folder / f"{folder.resolve().name}.csv"
        pickles = sorted(folder.glob("*.pkl"))
        if table.is_file():
            yield from svi_category(folder, table, prefix)
        elif (folder / "video.mp4").is_file():
            pose = folder / "dwpose.mp4"
            yield Listed(
                prefix.rstrip("/") or folder.resolve().name, folder / "video.mp4", "the person is dancing",
                pose=pose if pose.is_file() else None,
            )  # fmt: skip
        else:
            for pickle in pickles:
                trouble = "pickle: it could run code and is never opened; give video.mp4 in its place"
                yield Listed(f"{prefix}{pickle.name}", pickle, trouble=trouble)


def svi_category(folder: Path, table: Path, prefix: str) -> Iterator[Listed]:
    """The videos beside a csv; one without a description is of its category."""
    captions = read_descriptions(table)
    category = folder.resolve().name
    videos = {file.name: file for file in sorted(folder.iterdir()) if file.suffix.lower() in VIDEOS}
    for name, video in videos.items():
        if not name.startswith("."):
            yield Listed(f"{prefix}{name}", video, captions.get(name) or f"A video from {category} category")
    for name in captions.keys() - videos.keys():
        yield Listed(f"{prefix}{name}", folder / name, trouble=f"missing: {table.name} names it")


def read_descriptions(table: Path) -> dict[str, str]:
    """Filename -> Video Description.

    Raises:
        InputError: no csv with these columns.
    """
    csv.field_size_limit(LONGEST_CAPTION)
    try:
        rows = list(csv.DictReader(read_text(table, LONGEST_TABLE).splitlines(keepends=True)))
    except csv.Error as error:
        raise InputError(f"{table}: is no csv ({error})") from None
    if rows and not {"Filename", "Video Description"} <= set(rows[0]):
        raise InputError(
            f"{table}: needs the columns Filename and Video Description, it has {', '.join(rows[0])[:200]}"
        )
    return {
        row["Filename"]: re.sub(r"\s+", " ", row["Video Description"] or "").strip() for row in rows if row["Filename"]
    }


LAYOUTS: dict[str, Callable[[Path], Iterator[Listed]]] = {
    "folder": list_folder,
    "stableavatar": list_stableavatar,
    "svi": list_svi,
}
