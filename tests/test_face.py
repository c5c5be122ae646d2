"""Face preprocessing: which face, which crop, what stays, and what is said when it cannot be."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from errors import InputError, UsageError, WeightsError
from preprocess.face import (
    PARSER_PATH,
    GrabCutParser,
    choose_face,
    crop_face,
    load_parser,
    parser_input,
    prepare_face,
    remove_background,
)
from preprocess.face_detection import DETECTOR_PATH, CascadeDetector, Face, InsightFaceDetector, load_detector
from preprocess.face_parsing import BiSeNet
from preprocess.image import read_image
from tests.tiny_face import write_antelopev2

ROOT = Path(__file__).parents[1]
PORTRAIT = ROOT / "assets" / "face.png"


@pytest.fixture(autouse=True)
def _no_checkpoints_here(tmp_path, monkeypatch):
    """Default paths are relative: weights that the developer has must not change what is tested."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def portrait():
    return read_image(PORTRAIT)


def everything_is_person(picture, face_box):
    return np.ones(picture.shape[:2], np.int64)


def faces(*boxes, score=0.9):
    return [Face(box, score) for box in boxes]


def detector_of(*boxes, **options):
    return lambda image: faces(*boxes, **options)


# ------------------------------------------------------------------------------------------ choosing


def test_largest_face_is_chosen_and_all_are_listed(caplog):
    small, large = (200, 10, 240, 50), (20, 10, 100, 90)
    assert choose_face(faces(small, large)).box == large
    assert "2 faces found" in caplog.text
    assert "--face_index" in caplog.text
    assert "0: box (20, 10, 100, 90)" in caplog.text
    assert "1: box (200, 10, 240, 50)" in caplog.text


def test_one_face_needs_no_word(caplog):
    choose_face(faces((0, 0, 50, 50)))
    assert not caplog.records


def test_face_index_counts_from_the_left(caplog):
    right, middle, left = (200, 0, 210, 10), (100, 0, 150, 50), (5, 0, 15, 10)
    assert [choose_face(faces(right, middle, left), i).box for i in range(3)] == [left, middle, right]
    assert not caplog.records


@pytest.mark.parametrize("index", [-1, 2])
def test_face_index_out_of_range_lists_the_faces(index):
    with pytest.raises(UsageError, match=r"has 2 faces.*0: box \(5, 0, 15, 10\).*1: box \(100, 0, 150, 50\)"):
        choose_face(faces((100, 0, 150, 50), (5, 0, 15, 10)), index)


# ------------------------------------------------------------------------------------------ cropping


def test_crop_is_one_and_a_half_faces_around_its_center():
    image = np.zeros((400, 600, 3), np.uint8)
    crop = crop_face(image, Face((200.9, 100.2, 300.5, 180.7), 1.0))  # truncated to 200, 100, 300, 180
    assert crop.box == (175, 65, 325, 215)
    assert crop.pad == (0, 0)
    assert crop.picture.shape == (512, 512, 3)


def test_crop_at_a_border_is_padded_white():
    image = np.zeros((100, 200, 3), np.uint8)
    crop = crop_face(image, Face((0, 20, 60, 80), 1.0), size=64)  # 90 pixels around (30, 50); 15 are beyond the border
    assert crop.box == (0, 5, 75, 95)
    assert crop.square_size == 90
    assert crop.pad == (7, 0)
    assert (crop.picture[:, :4] == 255).all()
    assert (crop.picture[:, 8:54] == 0).all()
    assert (crop.picture[:, -4:] == 255).all()


def test_whole_picture_only_when_all_four_borders_are_touched():
    image = np.zeros((100, 100, 3), np.uint8)
    assert crop_face(image, Face((10, 10, 90, 90), 1.0)).box == (0, 0, 100, 100)
    assert crop_face(image, Face((0, 0, 100, 70), 1.0)).box == (0, 0, 100, 100)  # 150 wide: clipped, not the rule
    assert crop_face(image, Face((0, 0, 40, 40), 1.0)).box == (0, 0, 50, 50)


def test_crop_maps_boxes():
    crop = crop_face(np.zeros((100, 200, 3), np.uint8), Face((0, 20, 60, 80), 1.0), size=180)
    assert crop.to_crop((0, 5, 75, 95)) == (14, 0, 164, 180)


# ------------------------------------------------------------------------------------------ background


@pytest.mark.parametrize(
    ("mask", "white"), [("default", {0}), ("no-neck", {0, 14, 15, 16, 18}), ("face-only", {0, 14, 15, 16, 17, 18})]
)
def test_masks(mask, white):
    labels = np.arange(19)[None].repeat(2, 0)
    picture = np.full((2, 19, 3), 40, np.uint8)
    rgb, rgba = remove_background(picture, labels, mask)
    assert {int(i) for i in np.flatnonzero((rgb[0] == 255).all(-1))} == white
    assert {int(i) for i in np.flatnonzero(rgba[0, :, 3] == 0)} == white
    assert (rgba[..., :3] == 40).all()


def test_parser_input_normalizations():
    picture = np.array([[[0, 128, 255]]], np.uint8)
    np.testing.assert_allclose(parser_input(picture).ravel(), [-1, 0.003922, 1], atol=1e-5)
    np.testing.assert_allclose(parser_input(picture, "imagenet").ravel(), [-2.117904, 0.205182, 2.64], atol=1e-5)


# ------------------------------------------------------------------------------------------ prepare_face


def test_no_face_is_an_error_that_tells_the_way_out():
    image = np.zeros((48, 64, 3), np.uint8)
    with pytest.raises(InputError, match=r"no face found in me\.jpg \(64x48, 0 faces detected\).*--allow_no_face"):
        prepare_face(image, detector_of(), everything_is_person, name="me.jpg")


def test_allow_no_face_takes_the_whole_picture_padded(caplog):
    image = np.zeros((50, 100, 3), np.uint8)
    face = prepare_face(image, detector_of(), everything_is_person, allow_no_face=True, size=64)
    assert face.face is None
    assert face.crop_box == (0, 0, 100, 50)
    assert (face.rgb[:15] == 255).all()
    assert (face.rgb[17:47] == 0).all()
    assert (face.rgb[49:] == 255).all()
    assert "no face found" in caplog.text


def test_no_crop_keeps_the_whole_picture_and_its_background():
    image = np.full((50, 100, 3), 9, np.uint8)
    face = prepare_face(image, crop=False, size=64)  # neither detector nor parser is asked
    assert (face.rgb[17:47] == 9).all()
    assert (face.rgb[:15] == 255).all()
    assert (face.rgba[17:47, :, 3] == 255).all()
    assert (face.rgba[:15, :, 3] == 0).all()
    for options in ({"face_index": 0}, {"mask": "face-only"}):
        with pytest.raises(UsageError, match="--no_face_crop"):
            prepare_face(image, crop=False, **options)


def test_face_box_is_given_to_the_parser_in_crop_pixels():
    seen = []

    def parser(picture, face_box):
        seen.append(face_box)
        return everything_is_person(picture, face_box)

    prepare_face(np.zeros((400, 400, 3), np.uint8), detector_of((100, 100, 200, 200)), parser, size=300)
    np.testing.assert_allclose(seen, [(50, 50, 250, 250)])  # the face is the middle 2/3 of the crop


def test_a_parser_that_sees_no_person_is_an_error():
    with pytest.raises(InputError, match="nothing of a person is left"):
        prepare_face(
            np.zeros((400, 400, 3), np.uint8),
            detector_of((100, 100, 220, 220)),
            lambda picture, face_box: np.zeros(picture.shape[:2], np.int64),
        )


@pytest.mark.parametrize(
    ("face", "warning"),
    [
        (Face((100, 100, 160, 170), 0.9), "is small (60x70 pixels, score 0.90)"),
        (Face((100, 100, 250, 250), 0.55), "is doubtful (150x150 pixels, score 0.55)"),
        (Face((-3, 100, 150, 250), 0.9), "is cut by the picture's border"),
        (
            Face((100, 100, 250, 250), 0.9, np.array([[120, 150], [140, 150], [110, 190], [0, 0], [0, 0]])),
            "is seen from the side",
        ),
    ],
)
def test_poor_faces_are_warned_of(caplog, face, warning):
    prepare_face(np.zeros((400, 400, 3), np.uint8), lambda image: [face], everything_is_person)
    assert [warning in message for message in caplog.messages] == [True]


def test_good_face_is_not_warned_of(caplog):
    face = Face((100, 100, 250, 250), 0.9, np.array([[130, 150], [220, 150], [175, 190], [0, 0], [0, 0]]))
    prepare_face(np.zeros((400, 400, 3), np.uint8), lambda image: [face], everything_is_person)
    assert not caplog.records


# ------------------------------------------------------------------------------------------ without weights


def test_cascade_finds_the_portrait_and_nothing_else(portrait):
    (face,) = CascadeDetector()(portrait)
    x1, y1, x2, y2 = face.box
    assert x1 < 190 and x2 > 260 and y1 < 75 and 180 < y2 < 200  # brows at 80, chin at 188, cheeks at 180 and 270
    assert face.score > 0.65
    assert CascadeDetector()(np.full((200, 300, 3), 128, np.uint8)) == []


@pytest.mark.parametrize("scale", [0.5, 3])
def test_cascade_boxes_follow_the_picture_size(portrait, scale):
    import cv2

    box = np.array(CascadeDetector()(portrait)[0].box)
    (face,) = CascadeDetector()(cv2.resize(portrait, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
    np.testing.assert_allclose(np.array(face.box) / scale, box, atol=12)


def test_fallbacks_keep_the_person_on_white_and_say_what_they_are(portrait, caplog):
    detector, parser = load_detector(), load_parser()
    assert "download_models.py --only antelopev2" in caplog.text
    assert "download_models.py --only face-parsing" in caplog.text

    face = prepare_face(portrait, detector, parser)
    left, top, right, bottom = face.crop_box
    kept = face.rgba[..., 3] == 255

    def is_kept(x, y):  # in pixels of the photo
        return kept[(y - top) * 512 // (bottom - top), (x - left) * 512 // (right - left)]

    for name, x, y in (
        ("nose", 225, 130),
        ("teeth", 224, 145),
        ("hair on top", 235, 25),
        ("hair left", 165, 90),
        ("hair right", 290, 90),
        ("neck", 222, 185),
    ):
        assert is_kept(x, y), name
    for x, y in ((130, 20), (320, 20), (130, 130), (320, 130)):
        assert not is_kept(x, y), f"backdrop at {x}, {y}"
    assert (face.rgb[~kept] == 255).all()
    np.testing.assert_array_equal(prepare_face(portrait, detector, parser).rgb, face.rgb)  # no chance in it


def test_grabcut_without_a_face_keeps_everything(caplog):
    assert (GrabCutParser()(np.zeros((32, 32, 3), np.uint8), None) == 1).all()
    assert "the background stays" in caplog.text


@pytest.mark.parametrize("box", [(0, 0, 64, 64), (-20, -20, 90, 90), (60, 60, 64, 64), (5, 5, 6, 6), (90, 90, 99, 99)])
def test_grabcut_survives_odd_boxes(box):
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert GrabCutParser()(picture, box).shape == (64, 64)


def test_grabcut_has_no_classes_for_the_other_masks(portrait):
    with pytest.raises(WeightsError, match="--mask no-neck needs"):
        prepare_face(portrait, CascadeDetector(), GrabCutParser(), mask="no-neck")


# ------------------------------------------------------------------------------------------ with weights


@pytest.fixture(scope="module")
def antelopev2(tmp_path_factory):
    return write_antelopev2(tmp_path_factory.mktemp("antelopev2"))


@pytest.mark.parametrize("inside", ["", "models/antelopev2"])
def test_antelopev2_folder_in_either_layout(antelopev2, inside):
    detector = load_detector(antelopev2 / inside)
    assert isinstance(detector, InsightFaceDetector)
    found = sorted(detector(np.zeros((512, 512, 3), np.uint8)), key=lambda face: -face.score)
    # The picture is enlarged by 640/512 to look at; cell (6, 8) of stride 32 is at (256, 192) there.
    np.testing.assert_allclose(found[0].box, np.array([160, 96, 352, 288]) / 1.25, atol=1e-3)
    np.testing.assert_allclose(found[0].keypoints[0], np.array([224, 160]) / 1.25, atol=1e-3)
    np.testing.assert_allclose([face.score for face in found], [0.9, 0.6], atol=1e-6)
    assert len(found) == 2


def test_default_folder_is_used_when_it_is_there(antelopev2, tmp_path, caplog):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "antelopev2").symlink_to(antelopev2)
    assert isinstance(load_detector(), InsightFaceDetector)
    assert not caplog.records


def test_detector_weights_that_are_missing_or_damaged(tmp_path, antelopev2):
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path / "none", folder):
        with pytest.raises(WeightsError, match=r"--antelopv2_path .*download_models.py --only antelopev2"):
            load_detector(path)
    (folder / "glintr100.onnx").write_bytes((antelopev2 / "models/antelopev2/glintr100.onnx").read_bytes())
    with pytest.raises(WeightsError, match="no face detector .scrfd_10g_bnkps.onnx"):
        load_detector(folder)
    (folder / "scrfd_10g_bnkps.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load_detector(folder)


def test_detector_without_insightface_says_how_to_install_it(antelopev2, monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(WeightsError, match="pip install"):
        load_detector(antelopev2)


@pytest.fixture(scope="module")
def bisenet_file(tmp_path_factory):
    """A parser that calls every pixel class 17: the last layer is zero but for what its input sums to."""
    model = BiSeNet()
    state_dict = model.state_dict()
    state_dict["conv_out.conv.bn.bias"].fill_(1)  # something positive must come through the ReLU
    state_dict["conv_out.conv_out.weight"].zero_()[17] = 1
    path = tmp_path_factory.mktemp("bisenet") / "parsing_bisenet.pth"
    torch.save(state_dict, path)
    return path


def test_bisenet_file_is_loaded_and_asked(bisenet_file, portrait):
    parser = load_parser(bisenet_file)
    labels = parser(portrait, None)
    assert labels.shape == (512, 512)
    assert (labels == 17).mean() > 0.99
    face = prepare_face(portrait, CascadeDetector(), parser)
    assert (face.rgba[..., 3] == 255).mean() > 0.99
    with pytest.raises(InputError, match="nothing of a person"):  # hair only, and hair is taken away
        prepare_face(portrait, CascadeDetector(), parser, mask="face-only")


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_parser_weights_that_are_missing_damaged_or_run_code(tmp_path, bisenet_file):
    path = tmp_path / "parser.pth"
    with pytest.raises(WeightsError, match="no such file.*--only face-parsing"):
        load_parser(path)
    data = bisenet_file.read_bytes()
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", data[: len(data) // 2], b"<html>"):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="cannot be read"):
            load_parser(path)
    for state_dict in ({"other.weight": torch.zeros(1)}, [1, 2]):
        torch.save(state_dict, path)
        with pytest.raises(WeightsError, match="is not facexlib's BiSeNet"):
            load_parser(path)
    torch.save({"cp": Bomb()}, path)
    with pytest.raises(WeightsError, match="cannot be read"):
        load_parser(path)
    assert not Path("exploded").exists()


def test_default_paths_are_where_the_download_puts_the_files():
    parser, detector = (
        yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in ("face-parsing", "antelopev2")
    )
    assert Path("checkpoints", parser["dest"], parser["files"]["face_parser"]) == Path(PARSER_PATH)
    assert Path("checkpoints", detector["dest"]) == Path(DETECTOR_PATH, "models/antelopev2")


# ------------------------------------------------------------------------------------------ command line


def run(*arguments):
    command = [sys.executable, "-m", "preprocess.face", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_command_writes_the_face(tmp_path, antelopev2, bisenet_file):
    output = tmp_path / "new" / "face.png"
    result = run(
        PORTRAIT, "--output", output, "--antelopv2_path", antelopev2, "--face_parser_path", bisenet_file, "--size", 256
    )
    assert result.returncode == 0, result.stderr
    assert "2 faces found" in result.stderr
    assert read_image(output).shape == (256, 256, 3)

    again = run(PORTRAIT, "--output", output)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def test_command_without_crop(tmp_path):
    result = run(PORTRAIT, "--output", tmp_path / "whole.png", "--no_face_crop", "--size", 512)
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(read_image(tmp_path / "whole.png"), read_image(PORTRAIT))


def test_command_exit_codes(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>")
    for code, reason, arguments in (
        (3, "web page", (tmp_path / "page.jpg",)),
        (4, "--antelopv2_path", (PORTRAIT, "--antelopv2_path", tmp_path / "none")),
        (4, "--face_parser_path", (PORTRAIT, "--face_parser_path", tmp_path / "none")),
        (2, "--size", (PORTRAIT, "--size", "0")),
    ):
        result = run(*arguments, "--output", tmp_path / "face.png")
        assert result.returncode == code, result.stderr
        assert reason in result.stderr
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "face.png").exists()


def test_help_needs_no_heavy_import():
    code = "import sys, preprocess.face; print(sorted({'torch', 'cv2', 'insightface', 'PIL'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
