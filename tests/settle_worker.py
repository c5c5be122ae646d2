"""Run by torchrun in test_finished.py: two processes of one video whose disks differ; each writes what it settled.

    settle_worker.py FOLDER

The first has the first picture and one of other settings; the second has the second picture alone.
"""

import json
import sys
from pathlib import Path

import numpy

from pipelines.distributed import start_processes
from pipelines.jobs import Job, settle
from pipelines.settings import LikenessSettings
from preprocess.picture_writer import write_picture

HAS = ({"first": {"content": "first"}, "other": {"content": "of other settings"}}, {"second": {"content": "second"}})


def main(folder: Path) -> None:
    processes = start_processes("cpu", ulysses_degree=2)
    disk = folder / str(processes.rank)
    disk.mkdir()
    jobs = []
    for name in ("first", "second", "other"):
        record = HAS[processes.rank].get(name)
        if record is not None:
            write_picture(disk / f"{name}.png", numpy.zeros((2, 2, 3), numpy.uint8), record)
        jobs.append(Job(name, 0, disk / f"{name}.png", "" if record is None else "found"))
    settled = settle(jobs, LikenessSettings(), lambda prompt, seed: {"content": prompt}, processes)
    (folder / f"{processes.rank}.json").write_text(json.dumps([job.standing for job in settled]))
    processes.wait()
    processes.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
