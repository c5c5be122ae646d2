"""Face and lip masks of a data set: what is drawn, which frames, and going on after a stop."""

import shutil

import numpy as np
import onnx
import PIL.Image
import pytest
from onnx import TensorProto, helper, numpy_helper

from errors import InputError, UsageError, WeightsError
from preprocess import masks
from preprocess.face_detection import Face, load_detector
from preprocess.masks import (
    face_mask,
    find_clips,
    find_frames,
    lip_mask,
    main,
    make_masks,
    missing_masks,
    parse_arguments,
)
from tests.test_face import antelopev2  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def _no_checkpoints_here(tmp_path, monkeypatch):
    """Default paths are relative: weights that the developer has must not change what is tested."""
    monkeypatch.chdir(tmp_path)


def face_with_mouth(x=40, y=60, half_width=10, half_height=5):
    """A face whose outer lips are a rhomb around (x, y)."""
    landmarks = np.zeros((68, 2))
    landmarks[48], landmarks[54] = (x - half_width, y), (x + half_width, y)
    for points, side in (((49, 50, 51, 52, 53), -1), ((59, 58, 57, 56, 55), 1)):
        for step, point in enumerate(points, 1):
            reach = 1 - abs(step - 3) / 3
            landmarks[point] = x - half_width + step * half_width / 3, y + side * half_height * reach
    return Face((x - 30.9, y - 50, x + 30, y + 20.7), 0.9, landmarks=landmarks)


def stub_detector(image):
    """One face in pictures that are not black."""
    return [face_with_mouth()] if image.any() else []


def write_frames(clip, names, size=(96, 80), value=100):
    (clip / "images").mkdir(parents=True)
    for name in names:
        PIL.Image.new("RGB", size, (value, value, value)).save(clip / "images" / name)


# ------------------------------------------------------------------------------------------ drawing


def test_face_is_its_box_with_both_corners():
    mask = face_mask([face_with_mouth(40, 60)], 90, 80)  # box 9.1, 10, 70, 80.7
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 255}
    rows, columns = np.where(mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 80, 9, 70)
    assert len(rows) == 71 * 62


def test_lips_are_the_outline_of_the_mouth():
    mask = lip_mask([face_with_mouth(40, 60, 12, 6)], 90, 80)
    rows, columns = np.mgrid[:90, :80]
    distance = np.abs(columns - 40) / 12 + np.abs(rows - 60) / 6  # of a rhomb: 1 on its border
    assert (mask[distance < 0.9] == 255).all()
    assert (mask[distance > 1.3] == 0).all()


def test_every_face_is_drawn_and_none_is_black():
    two = lip_mask([face_with_mouth(20, 30), face_with_mouth(60, 70)], 90, 80)
    assert two[30, 20] == two[70, 60] == 255
    assert not lip_mask([], 90, 80).any()
    assert not face_mask([], 90, 80).any()
    beyond = face_mask([Face((-20, -20, 500, 500), 0.9)], 90, 80)
    assert (beyond == 255).all()


# ------------------------------------------------------------------------------------------ which frames


def test_frames_are_ordered_by_their_number(tmp_path):
    write_frames(tmp_path, ["frame_10.png", "frame_9.jpg", "frame_0.png", ".frame_1.png"])
    (tmp_path / "images" / "notes.txt").touch()
    assert [path.name for path in find_frames(tmp_path)] == ["frame_0.png", "frame_9.jpg", "frame_10.png"]
    (tmp_path / "images" / "9.png").touch()
    with pytest.raises(InputError, match="a second frame 9"):
        find_frames(tmp_path)
    (tmp_path / "images" / "9.png").rename(tmp_path / "images" / "cover.png")
    with pytest.raises(InputError, match="cover.png: no number"):
        find_frames(tmp_path)


def test_clips_by_folder_and_by_list(tmp_path):
    clips = [tmp_path / "data" / "rec" / kind / "00001" for kind in ("singing", "speech")]
    for clip in clips:
        write_frames(clip, ["0.png"])
    assert find_clips(tmp_path / "data") == clips
    assert find_clips(clips[0]) == clips[:1]
    (tmp_path / "list.txt").write_text(f"{clips[1]}\r\n\n{clips[1]}\ndata/rec/singing/00001\n")
    assert find_clips(tmp_path / "list.txt") == [clips[1], type(clips[0])("data/rec/singing/00001")]
    (tmp_path / "list.txt").write_text(f"{clips[1]}\nno/such/clip\n")
    with pytest.raises(InputError, match="line 2: 'no/such/clip' is no clip folder"):
        find_clips(tmp_path / "list.txt")
    with pytest.raises(InputError, match="no clip folder"):
        find_clips(clips[0] / "images")
    with pytest.raises(InputError, match="is no text"):
        find_clips(clips[0] / "images" / "0.png")


# ------------------------------------------------------------------------------------------ the command


def run(monkeypatch, *arguments, detector=stub_detector):
    monkeypatch.setattr(masks, "load_detector", lambda path, landmarks: detector)
    main(parse_arguments(list(map(str, arguments))))


def test_masks_go_beside_the_frames(tmp_path, monkeypatch, caplog):
    clip = tmp_path / "clip"
    write_frames(clip, ["frame_0.png", "frame_1.jpg"])
    PIL.Image.new("RGB", (96, 80)).save(clip / "images" / "frame_2.png")  # black: no face
    run(monkeypatch, clip)
    assert "1 of 3 frames have no face" in caplog.text
    for folder, draw in (("face_masks", face_mask), ("lip_masks", lip_mask)):
        files = sorted((clip / folder).iterdir())
        assert [file.name for file in files] == ["frame_0.png", "frame_1.png", "frame_2.png"]
        pictures = [PIL.Image.open(file) for file in files]
        assert {picture.mode for picture in pictures} == {"L"}  # one channel, as the data set reads them
        np.testing.assert_array_equal(pictures[1], draw([face_with_mouth()], 80, 96))
        assert not np.asarray(pictures[2]).any()


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for clip in (whole, broken):
        write_frames(clip, [f"frame_{i}.png" for i in range(5)])
    run(monkeypatch, whole)
    looked_at = []

    def stops_at_the_third(image):
        looked_at.append(image)
        if len(looked_at) == 3:
            raise KeyboardInterrupt
        return stub_detector(image)

    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, broken, detector=stops_at_the_third)
    (broken / "lip_masks" / "frame_1.png").unlink()  # as if it had stopped between the two masks of a frame
    written = {path: path.stat().st_mtime_ns for path in broken.glob("*_masks/*.png")}
    assert len(written) == 3
    counted = []
    run(monkeypatch, broken, detector=lambda image: counted.append(image) or stub_detector(image))
    assert len(counted) == 4
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    for path in whole.glob("*_masks/*"):
        assert path.read_bytes() == (broken / path.relative_to(whole)).read_bytes()
    assert len(list(broken.glob("*_masks/*"))) == 10

    def unexpected(path, landmarks):
        raise AssertionError("nothing is left to do: no model is loaded")

    monkeypatch.setattr(masks, "load_detector", unexpected)
    main(parse_arguments([str(broken)]))


def test_unreadable_frames_do_not_stop_the_others(tmp_path, monkeypatch):
    write_frames(tmp_path / "clip", ["0.png", "2.png"])
    (tmp_path / "clip" / "images" / "1.png").write_bytes(b"half a picture")
    with pytest.raises(InputError, match="1 of 3 frames cannot be read, .*1.png first"):
        run(monkeypatch, tmp_path)
    assert sorted(path.name for path in (tmp_path / "clip" / "lip_masks").iterdir()) == ["0.png", "2.png"]


def test_work_is_shared_out_by_clips(tmp_path, monkeypatch):
    for i in range(4):
        write_frames(tmp_path / f"{i:05d}", ["0.png"])
    run(monkeypatch, tmp_path, "--start", 1, "--end", 3, "--only", "lip")
    assert sorted(path.parts[-3] for path in tmp_path.glob("*/*_masks/*")) == ["00001", "00002"]
    assert not list(tmp_path.glob("*/face_masks"))
    with pytest.raises(UsageError, match="there are 4 clips"):
        run(monkeypatch, tmp_path, "--start", 3, "--end", 9)
    with pytest.raises(InputError, match="no such folder"):
        run(monkeypatch, tmp_path / "none")


def test_lips_need_the_downloaded_model_and_faces_do_not(tmp_path, caplog):
    write_frames(tmp_path / "clip", ["0.png"])
    with pytest.raises(WeightsError, match="landmarks of faces need antelopev2.*--only antelopev2"):
        main(parse_arguments([str(tmp_path)]))
    main(parse_arguments([str(tmp_path), "--only", "face"]))
    assert "OpenCV's cascade" in caplog.text
    assert (tmp_path / "clip" / "face_masks" / "0.png").is_file()


# ------------------------------------------------------------------------------------------ with weights


@pytest.fixture
def with_landmarks(antelopev2, tmp_path):  # noqa: F811
    """A folder as antelopev2's, whose landmark network finds the mouth at a fixed place of the box."""
    folder = tmp_path / "antelopev2"
    shutil.copytree(antelopev2 / "models" / "antelopev2", folder)
    found = np.random.default_rng(0).uniform(-1, 1, (1, 1103, 3)).astype(np.float32)
    found[0, -68:, :2] = (face_with_mouth(0, 0, 0.2, 0.1)).landmarks  # -1 … 1 over the crop, 1.5 times the box
    picture = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 192, 192])
    info = helper.make_tensor_value_info("points", TensorProto.FLOAT, [1, 3309])
    node = helper.make_node("Constant", [], ["points"], value=numpy_helper.from_array(found.reshape(1, 3309)))
    graph = helper.make_graph([node], "graph", [picture], [info])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), folder / "1k3d68.onnx"
    )
    return folder


def test_insightfaces_landmarks_reach_the_mask(with_landmarks, tmp_path):
    write_frames(tmp_path / "clip", ["0.png"], size=(512, 512))
    work, _ = missing_masks([tmp_path / "clip"], ["face", "lip"])
    make_masks(work, load_detector(with_landmarks, landmarks=True))
    mask = np.asarray(PIL.Image.open(tmp_path / "clip" / "lip_masks" / "0.png"))
    # The larger of its two faces is the square 128, 76.8 … 281.6, 230.4: centre 204.8, 153.6, the crop's half 115.2.
    assert mask[153, 204] == 255
    row = np.where(mask[153])[0]
    np.testing.assert_allclose((row.min(), row.max()), (204.8 - 0.2 * 115.2, 204.8 + 0.2 * 115.2), atol=2)
    column = np.where(mask[:, 204])[0]
    np.testing.assert_allclose((column.min(), column.max()), (153.6 - 0.1 * 115.2, 153.6 + 0.1 * 115.2), atol=2)


def test_folder_without_the_landmark_network(antelopev2, with_landmarks):  # noqa: F811
    assert load_detector(with_landmarks)(np.zeros((512, 512, 3), np.uint8))[0].landmarks is None
    with pytest.raises(WeightsError, match="no landmark model .1k3d68.onnx.*--only antelopev2"):
        load_detector(antelopev2, landmarks=True)
