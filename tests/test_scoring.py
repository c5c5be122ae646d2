"""The face score: the number itself, and as a gate that tries further seeds."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import pytest

import infer
import infer_with_vace
from errors import InputError, UsageError, UserError, WeightsError
from metrics import likeness as face_score
from metrics.likeness import FaceScore, FaceScorer, cosine, sample_pictures
from pipelines import scoring
from pipelines.jobs import Job, list_jobs
from pipelines.scoring import load_scorer, make_scored
from pipelines.settings import LikenessSettings
from pipelines.text_to_video.command import resolve_image_to_video
from preprocess import image
from preprocess.face_detection import Face, load_recognizer
from preprocess.picture_writer import write_picture
from preprocess.record import read_metadata
from preprocess.video import probe, read_frames
from preprocess.video_writer import write_video
from tests.tiny_face import write_antelopev2

PROJECT = Path(__file__).parent.parent
BOX = (0.0, 0.0, 10.0, 10.0)


def vector(*values) -> numpy.ndarray:
    return numpy.array(values, numpy.float32)


def recognizer_of(**faces):
    """Pictures are named by their first pixel; each shows the faces with these embeddings."""
    shown = {ord(name): [Face(BOX, 0.9, embedding=vector(*v)) for v in vectors] for name, vectors in faces.items()}
    return lambda picture: shown[int(picture[0, 0, 0])]


def picture(name: str) -> numpy.ndarray:
    return numpy.full((4, 4, 3), ord(name), numpy.uint8)


# ---------------------------------------------------------------------------------------------------------- the number


def test_cosine_does_not_depend_on_lengths():
    assert cosine(vector(3, 0), vector(7, 0)) == pytest.approx(1)
    assert cosine(vector(3, 0), vector(0, 2)) == pytest.approx(0)
    assert cosine(vector(1, 0), vector(1, 1)) == pytest.approx(0.5**0.5)
    assert cosine(vector(0, 0), vector(1, 1)) == 0


def test_score_is_the_mean_over_pictures_with_a_face_of_the_most_similar_face():
    recognizer = recognizer_of(a=[(1, 0)], b=[(0, 1), (1, 0)], c=[(1, 1)], d=[])
    score = FaceScorer(recognizer, [picture("a")]).score(map(picture, "bcd"))
    assert score.value == pytest.approx((1 + 0.5**0.5) / 2)
    assert (score.with_face, score.pictures) == (2, 3)
    assert FaceScorer(recognizer, [picture("a")]).score([picture("d")]) == FaceScore(0.0, 0, 1)


def test_of_several_people_the_least_similar_counts():
    recognizer = recognizer_of(a=[(1, 0)], b=[(0, 1)], c=[(1, 0)])
    assert FaceScorer(recognizer, [picture("a"), picture("b")]).score([picture("c")]).value == pytest.approx(0)


def test_a_photo_without_a_face_cannot_be_compared_with():
    with pytest.raises(InputError, match="no face found in me.jpg"):
        FaceScorer(recognizer_of(a=[]), [picture("a")], names=["me.jpg"])


def test_command_line(tmp_path, capsys):
    """The photo itself has cosine 1."""
    root = write_antelopev2(tmp_path / "antelopev2", ((6, 8, 0.9, 3),))
    photo = str(PROJECT / "assets" / "face.png")
    face_score.main([photo, photo, "--antelopv2_path", str(root)])
    assert capsys.readouterr().out == f"{photo}: 1.000 (1 of 1 pictures with a face)\n"


def test_frames_are_sampled_at_equal_distances(tmp_path):
    frames = numpy.repeat(numpy.arange(0, 250, 10, dtype=numpy.uint8), 16 * 16 * 3).reshape(25, 16, 16, 3)
    write_video(tmp_path / "v.mp4", [frames], fps=8, quality=10)
    found = [int(frame.mean().round(-1)) for frame in sample_pictures(tmp_path / "v.mp4")]
    assert found == [0, 40, 80, 120, 160, 200, 240]
    assert len(read_frames(tmp_path / "v.mp4")) == 25


# ------------------------------------------------------------------------------------------------------------ the gate


@dataclass(frozen=True)
class Gate(LikenessSettings):
    antelopv2_path: str | None = None
    face_index: int | None = None


class GreyMaker:
    """Makes a grey video or picture whose level is its seed."""

    def __init__(self):
        self.made = []

    def metadata(self, job: Job) -> dict:
        return {"settings": {"seed": [job.seed], "prompt": [job.prompt]}}

    def make(self, job: Job) -> Path:
        self.made.append(job.seed)
        frames = numpy.full((2, 16, 16, 3), 20 * job.seed, numpy.uint8)
        if job.output.suffix == ".png":
            write_picture(job.output, frames[0], self.metadata(job))
        else:
            write_video(job.output, [frames], fps=8, metadata=self.metadata(job))
        return job.output


class LevelScorer:
    """Scores by the grey level: `scores` of each seed."""

    def __init__(self, *scores):
        self.scores = scores

    def score(self, pictures) -> FaceScore:
        levels = [round(float(numpy.mean(picture)) / 20) for picture in pictures]
        return FaceScore(self.scores[levels[0]], len(levels), len(levels))


@pytest.mark.parametrize("suffix", [".mp4", ".png"])
def test_the_next_seed_is_tried_until_one_is_good_enough(tmp_path, suffix, caplog):
    maker, output = GreyMaker(), tmp_path / f"out{suffix}"
    make_scored(maker, Job("x", 1, output), LevelScorer(0, 0.2, 0.3, 0.7, 0.9), Gate(min_face_score=0.5))
    assert maker.made == [1, 2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", output.name]
    record = scoring.record_of(output)
    assert record["settings"]["seed"] == [3]
    assert record["face_score"]["cosine"] == 0.7
    assert json.loads(output.with_suffix(".json").read_text()) == record
    assert "none of" not in caplog.text


def test_the_best_is_kept_when_none_is_good_enough(tmp_path, caplog):
    maker, output = GreyMaker(), tmp_path / "out.mp4"
    settings = Gate(min_face_score=0.8, max_retries=2)
    make_scored(maker, Job("x", 0, output), LevelScorer(0.1, 0.4, 0.3, 0.9), settings)
    assert maker.made == [0, 1, 2]
    assert read_metadata(output)["settings"]["seed"] == [1]
    assert "none of 3 seeds reached --min_face_score 0.8; kept is seed 1 with 0.400" in caplog.text


def test_finished_attempts_of_a_stopped_run_are_used_again(tmp_path):
    class Stopped(GreyMaker):
        def make(self, job):
            if job.seed == 2:
                raise KeyboardInterrupt
            return super().make(job)

    output, scorer = tmp_path / "out.mp4", LevelScorer(0.1, 0.2, 0.3, 0.9)
    with pytest.raises(KeyboardInterrupt):
        make_scored(Stopped(), Job("x", 0, output), scorer, Gate(min_face_score=0.5))
    assert not output.exists()
    assert sorted(p.name for p in tmp_path.glob("*.mp4")) == ["out.seed0.mp4", "out.seed1.mp4"]
    maker = GreyMaker()
    make_scored(maker, Job("x", 0, output), scorer, Gate(min_face_score=0.5))
    assert maker.made == [2, 3]
    other = GreyMaker()  # another prompt: nothing of the old run counts
    with pytest.raises(KeyboardInterrupt):
        make_scored(Stopped(), Job("x", 1, tmp_path / "b.mp4"), scorer, Gate(min_face_score=0.5))
    assert (tmp_path / "b.seed1.mp4").exists()
    make_scored(other, Job("y", 1, tmp_path / "b.mp4"), LevelScorer(0, 1, 1), Gate(min_face_score=0.5))
    assert other.made == [1]


def test_a_score_alone_is_measured_once_and_written_down(tmp_path):
    maker, output = GreyMaker(), tmp_path / "out.mp4"
    make_scored(maker, Job("x", 1, output), LevelScorer(0, 0.2), Gate())
    assert maker.made == [1]
    before = GreyMaker().make(Job("x", 1, tmp_path / "plain.mp4"))
    assert (read_frames(output) == read_frames(before)).all()
    assert probe(output) == probe(before)
    assert read_metadata(output)["face_score"] == {"cosine": 0.2, "frames_with_face": 2, "frames_looked_at": 2}


def test_without_face_models(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    photo = str(PROJECT / "assets" / "face.png")
    assert load_scorer(Gate(), [photo]) is None
    assert caplog.text.count("likeness is not measured") == 1
    with pytest.raises(WeightsError, match=r"--min_face_score needs .*download_models.py --only antelopev2"):
        load_scorer(Gate(min_face_score=0.5), [photo])
    assert load_scorer(Gate(), []) is None


def test_a_photo_without_a_face_is_only_an_error_with_a_gate(tmp_path, caplog):
    caplog.set_level("INFO")
    nobody = str(write_antelopev2(tmp_path / "nobody", ()))
    photo = str(PROJECT / "assets" / "face.png")
    assert load_scorer(Gate(antelopv2_path=nobody), [photo]) is None
    assert "likeness is not measured: no face found" in caplog.text
    with pytest.raises(InputError, match="no face found"):
        load_scorer(Gate(antelopv2_path=nobody, min_face_score=0.5), [photo])


def test_videos_of_stand_in_are_scored(tmp_path, caplog):
    """infer.py as it is run, with face models that see a face in everything."""
    caplog.set_level("INFO")
    root = write_antelopev2(tmp_path / "antelopev2", ((6, 8, 0.9, 3),))
    small = ["--height", "64", "--width", "64", "--num_frames", "5", "--num_inference_steps", "1", "--no_face_crop"]
    flags = [*small, "--antelopv2_path", str(root), "--output", str(tmp_path / "out.mp4"), "--min_face_score", "-1"]
    infer.main(infer.parse_args(flags))
    record = read_metadata(tmp_path / "out.mp4")
    assert record["face_score"]["frames_looked_at"] == 5
    assert "face score" in caplog.text
    recognizer = load_recognizer(root)
    embedding = recognizer(scoring.read_image(PROJECT / "assets" / "face.png"))[0].embedding
    frames = [recognizer(frame)[0].embedding for frame in read_frames(tmp_path / "out.mp4")]
    expected = numpy.mean([cosine(embedding, frame) for frame in frames])
    assert record["face_score"]["cosine"] == pytest.approx(expected, abs=1e-4)


def test_a_run_decodes_its_photo_once(tmp_path, monkeypatch):
    """Stand-In and the score both look at it."""
    decoded = []
    decode = image._decode
    monkeypatch.setattr(image, "_decode", lambda open_image, name: decoded.append(name) or decode(open_image, name))
    photo = tmp_path / "me.png"
    photo.write_bytes((PROJECT / "assets" / "face.png").read_bytes())
    root = write_antelopev2(tmp_path / "antelopev2", ((6, 8, 0.9, 3),))
    small = ["--height", "64", "--width", "64", "--num_frames", "1", "--num_inference_steps", "1", "--no_face_crop"]
    flags = [*small, "--antelopv2_path", str(root), "--output", str(tmp_path / "out.mp4"), "--ip_image", str(photo)]
    infer.main(infer.parse_args(flags))
    assert "face_score" in read_metadata(tmp_path / "out.mp4")
    assert [str(photo) in name for name in decoded].count(True) == 1


def test_the_other_scripts_have_the_gate_too(tmp_path, caplog):
    """Stand-In with VACE, tried with two seeds that cannot be good enough."""
    root = write_antelopev2(tmp_path / "antelopev2", ((6, 8, 0.9, 3),))
    flags = ["--antelopv2_path", str(root), "--no_face_crop", "--num_inference_steps", "1"]
    flags += ["--output", str(tmp_path / "out.mp4"), "--min_face_score", "1", "--max_retries", "1"]
    infer_with_vace.main(infer_with_vace.parse_args(flags))
    assert read_metadata(tmp_path / "out.mp4")["settings"]["seed"][0] in (0, 1)
    assert read_metadata(tmp_path / "out.mp4")["face_score"]["cosine"] < 1
    assert "none of 2 seeds reached --min_face_score 1" in caplog.text
    with pytest.raises(UsageError, match="--min_face_score 0.5: there is no photo"):
        infer_with_vace.main(
            infer_with_vace.parse_args(["--config", "wan2.1-vace-1.3B", "--prompt", "x", "--min_face_score", "0.5"])
        )


@pytest.mark.parametrize(
    ("flags", "exit_code", "words"),
    [
        (["--min_face_score", "nan"], 2, ["--min_face_score nan"]),
        (["--max_retries", "-1", "--min_face_score", "0.5"], 2, ["--max_retries -1"]),
        (["--max_retries", "5"], 2, ["--max_retries 5", "--min_face_score"]),
        (["--config", "tiny-i2v", "--min_face_score", "0.5"], 2, ["--min_face_score 0.5", "no photo"]),
        (["--min_face_score", "0.5"], 4, ["--min_face_score", "--only antelopev2"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, flags, exit_code, words):
    monkeypatch.chdir(tmp_path)  # no face models here
    with pytest.raises(UserError) as error:
        infer.main(infer.parse_args(["--output", str(tmp_path / "out.mp4"), *flags]))
    assert error.value.exit_code == exit_code, error.value
    for word in words:
        assert word in str(error.value), error.value


FOREIGN = {
    "video": lambda path: write_video(path, [numpy.zeros((2, 16, 16, 3), numpy.uint8)], fps=8),
    "finished output": lambda path: write_video(
        path,
        [numpy.zeros((2, 16, 16, 3), numpy.uint8)],
        fps=8,
        metadata={"made_by": "Selfsame", "settings": {"seed": [1], "min_face_score": None}},
    ),
    "record": lambda path: path.with_suffix(".json").write_text('{"a recipe": "of somebody else"}'),
    "folder": lambda path: path.mkdir(),
    "dangling link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("script", [infer, infer_with_vace], ids=lambda script: script.__name__)
def test_what_somebody_else_put_under_an_attempts_name_stays(tmp_path, monkeypatch, script, kind):
    """Refused in one line before a model is loaded."""
    FOREIGN[kind](tmp_path / "out.seed1.mp4")
    before = {path.name: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("pipelines.wan.Wan", None)
    flags = ["--min_face_score", "0.5", "--seed", "0", "--ip_image", "assets/face.png", "--prompt", "x"]
    flags += ["--output", str(tmp_path / "out.mp4")]
    monkeypatch.chdir(PROJECT)
    with pytest.raises(UsageError, match=r"out\.seed1\.(mp4|json) is in the way .*--overwrite") as error:
        script.main(script.parse_args(flags))
    assert "\n" not in str(error.value)
    assert {path.name: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()} == before


def test_one_foreign_attempt_blocks_no_other_job_and_ours_no_one(tmp_path, monkeypatch):
    args = ["--min_face_score", "0.5", "--seed", "0", "10", "--ip_image", "assets/face.png", "--prompt", "x"]
    args += ["--output", str(tmp_path / "out.mp4")]
    monkeypatch.chdir(PROJECT)
    settings, _ = resolve_image_to_video(infer.parse_args(args))
    frames = [numpy.zeros((2, 16, 16, 3), numpy.uint8)]
    (tmp_path / "out-000-seed0.seed3.mp4").write_bytes(b"precious")
    (tmp_path / "out-000-seed10.seed14.mp4").write_bytes(b"beyond the retries")
    record = {"made_by": "Selfsame", "settings": {"seed": [11], "min_face_score": 0.4}}
    write_video(tmp_path / "out-000-seed10.seed11.mp4", frames, fps=8, metadata=record)
    assert [job.standing for job in list_jobs(settings)] == ["refused", ""]
    assert [job.standing for job in list_jobs(replace(settings, overwrite=True))] == ["", ""]
    assert [job.standing for job in list_jobs(replace(settings, min_face_score=None))] == ["", ""]


def test_attempts_of_a_first_frame_are_no_foreign_files_either(tmp_path, monkeypatch):
    args = ["--min_face_score", "0.5", "--first_frame", "instantid", "--first_frame_seed", "7", "--prompt", "x"]
    args += ["--ip_image", "assets/face.png", "--output", str(tmp_path / "out.mp4")]
    monkeypatch.chdir(PROJECT)
    settings, _ = resolve_image_to_video(infer.parse_args(args))
    path = tmp_path / "out.first_frame.seed8.png"
    write_picture(path, numpy.zeros((4, 4, 3), numpy.uint8), {"made_by": "Selfsame", "settings": {"seed": [8]}})
    assert [job.standing for job in list_jobs(settings)] == [""]
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match="first_frame.seed8.png is in the way of .*--overwrite"):
        list_jobs(settings)
