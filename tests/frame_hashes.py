"""What every script makes, on record: a refactor keeps results bit-identical, and this proves it.

    python -m tests.frame_hashes record tests/records/frame_hashes.json     run all cases, keep hashes and records
    python -m tests.frame_hashes compare tests/records/frame_hashes.json    run them again; exit code 1: they differ
    … --only 'long-*'              some of the cases (of tests/frame_hash_cases.py)
    … --tree FOLDER                the scripts of another checkout, an older commit's

Each case runs a script as a user does, in a process and a folder of its own. Kept are, of each video and picture that
it leaves, the hash of the decoded frames and of the decoded sound, size, length and rate; and of a few cases the JSON
beside the video, in the list's folder: `tests/test_old_records.py` proves that --config still takes it. Some are also
killed (kill -9) while they denoise, and the same command once more has to end in the unbroken run's bits.

The hashes hold for one machine and one set of package versions: elsewhere sums are rounded in another order. Record the
old code there first (--tree), then compare the new.
"""

import argparse
import contextlib
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import imageio_ffmpeg

from tests.frame_hash_cases import CASES, KILLED, RECORDED, write_inputs, write_weights

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy", "opencv-python", "imageio-ffmpeg")
KILLED_SUFFIX = "-killed"
TIMEOUT = 300  # seconds a run


def command_of(tree: Path, script: str, flags: str) -> list[str]:
    program = shlex.split(script) if script.startswith("-m") else [str(tree / script)]
    output = "out.png" if "--method instantid" in flags else "out.mp4"
    return [sys.executable, *program, *shlex.split(flags), "--output", output]


def run_case(tree: Path, inputs: Path, folder: Path, case: tuple[str, str, str]) -> dict:
    """File name -> what is in it; or "failed" -> why."""
    name, script, flags = case
    folder.mkdir()
    (folder / "inputs").symlink_to(inputs)
    (folder / "assets").symlink_to(tree / "assets")
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    options = {"cwd": folder, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = command_of(tree, script, flags)
    if name.endswith(KILLED_SUFFIX) and not kill_when_saved(command, KILLED[name.removesuffix(KILLED_SUFFIX)], options):
        return {"failed": "ended before it could be killed, or nothing was saved"}
    try:
        run = subprocess.run(command, timeout=TIMEOUT, check=False, text=True, **options)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {TIMEOUT} s"}
    if run.returncode != 0:
        return {"failed": f"exit code {run.returncode}: {run.stdout.strip()[-500:]}"}
    if name.endswith(KILLED_SUFFIX) and "going on after" not in run.stdout:
        return {"failed": "the killed run was begun anew, not resumed"}
    kept = {".mp4": describe_video, ".png": describe_video, ".tsv": hash_file}
    return {p.name: kept[p.suffix](p) for p in sorted(folder.glob("[!.]*")) if p.suffix in kept}


def kill_when_saved(command: list[str], saved: tuple[str, int], options: dict) -> bool:
    """Whether the run was killed when it had saved its state so many times, and before its video was there."""
    process = subprocess.Popen(command, **options | {"stdout": subprocess.DEVNULL})
    (pattern, times), folder, deadline = saved, options["cwd"], time.monotonic() + TIMEOUT
    versions = set()
    while len(versions) < times and process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):  # replaced or removed just now
            versions |= {(path, path.stat().st_mtime_ns) for path in folder.glob(pattern)}
        time.sleep(0.002)
    process.kill()
    return process.wait() == -9 and len(versions) == times and not (folder / "out.mp4").exists()


def describe_video(path: Path) -> dict:
    """Of a picture too: it is a video of one frame."""
    frames = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24", output_params=["-fps_mode", "passthrough"])
    about, digest, count = next(frames), hashlib.sha256(), 0
    for frame in frames:
        digest.update(frame)
        count += 1
    width, height = about["size"]
    described = {"frames": digest.hexdigest(), "num_frames": count, "size": f"{width}x{height}"}
    if path.suffix == ".mp4":
        described["fps"] = about["fps"]
    if about.get("audio_codec"):
        decode = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-f", "s16le", "-"]
        described["sound"] = hashlib.sha256(subprocess.run(decode, capture_output=True, check=True).stdout).hexdigest()
    return described


def hash_file(path: Path) -> dict:
    return {"content": hashlib.sha256(path.read_bytes()).hexdigest()}


def record_of(folder: Path, tree: Path) -> str:
    """The JSON beside a case's first output, its paths from the folder that the run was started in."""
    record = json.loads(min(folder.glob("out*.json"), key=lambda path: path.name).read_text(encoding="utf-8"))
    text = json.dumps(record, indent=1, ensure_ascii=False)
    for place in (tree, folder):
        text = text.replace(f"{place}/", "")
    return text + "\n"


def machine() -> dict[str, str]:
    """What the hashes hold for."""
    found = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"machine": platform.machine(), "python": platform.python_version()} | found


def differences(name: str, what: str, before: dict, after: dict) -> list[str]:
    """A line for each file of a case that is another than before."""
    files = [file for file in sorted(before.keys() | after.keys()) if before.get(file) != after.get(file)]
    return [f"{name}: {file}: {what} {before.get(file)}, now {after.get(file)}" for file in files]


def keep(file: Path, name: str, result: dict, record: str | None) -> None:
    """Put a case into the list, and its record beside the list."""
    listed = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"cases": {}}
    cases = dict(sorted((listed["cases"] | {name: result}).items()))
    file.write_text(json.dumps({"made_on": machine(), "cases": cases}, indent=1) + "\n", encoding="utf-8")
    if record is not None:
        (file.parent / f"{name}.json").write_text(record, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path, metavar="FILE", help="the list of hashes")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="cases so named, as a shell's *")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="runs at once (one a processor)")
    parser.add_argument("--tree", type=Path, default=PROJECT, metavar="FOLDER", help="whose scripts are run")
    args = parser.parse_args(argv)
    tree = args.tree.resolve()
    known = json.loads(args.file.read_text(encoding="utf-8")) if args.action == "compare" else {"cases": {}}
    if known.get("made_on", machine()) != machine():
        print(f"the list was made on {known['made_on']}, this is {machine()}: that the bits differ proves nothing")
    known = known["cases"]
    killed = [(f"{name}{KILLED_SUFFIX}", script, flags) for name, script, flags in CASES if name in KILLED]
    cases = [case for case in [*CASES, *killed] if any(fnmatch.fnmatch(case[0], only) for only in args.only)]

    started, wrong, found = time.monotonic(), [], {}
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(args.jobs) as workers:
        work = Path(work).resolve()
        write_inputs(work / "inputs", tree / "assets")
        write_weights(work / "inputs")
        folders = [work / name for name, _, _ in cases]
        results = workers.map(partial(run_case, tree, work / "inputs"), folders, cases)
        for (name, _, _), result in zip(cases, results, strict=True):
            print(f"{name}: {result.get('failed', ', '.join(result))}", flush=True)
            found[name] = result
            if args.action == "compare":
                wrong += differences(name, "on record", known.get(name, {}), result)
            elif "failed" in result:
                wrong.append(f"{name}: {result['failed']}")
            else:
                keep(args.file, name, result, record_of(work / name, tree) if name in RECORDED else None)
    for name in found.keys() & {case[0] for case in killed}:
        if unbroken := found.get(name.removesuffix(KILLED_SUFFIX)):
            wrong += differences(name, "unbroken", unbroken, found[name])
    wrong += [f"{name}: on record, but no case any more" for name in known.keys() - {c[0] for c in [*CASES, *killed]}]
    print(f"{len(found)} cases in {time.monotonic() - started:.0f} s, {len(wrong)} wrong", *wrong, sep="\n")
    return 1 if wrong or not found else 0


if __name__ == "__main__":
    sys.exit(main())
