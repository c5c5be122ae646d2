"""ConsisID's way from a photo to a face: which face, by whose points, and the networks' own rules."""

import numpy as np
import pytest
import torch

from errors import InputError, WeightsError
from models.identity.eva_clip import EvaVisionTower, load_eva_tower, tower_from_tensors
from pipelines.consis_id.face import choose, choose_as_upstream, clip_pixels
from preprocess.face_alignment import (
    NOT_FACE,
    TEMPLATE,
    align_face,
    grey,
    limit_size,
    similarity_transform,
    to_uint8,
    white_background,
)
from preprocess.face_detection import Face, load_recognizer
from preprocess.face_paste import intersection_over_union
from preprocess.retinaface import (
    RetinaFace,
    RetinaFaceDetector,
    anchors,
    decode,
    load_retinaface,
    non_maximum_suppression,
)
from tests.tiny_consis_id import randomise
from tests.tiny_face import write_antelopev2

PICTURE = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
# Two people: the larger at the left, the other in the middle of the picture.
LARGE, CENTRAL = (20, 100, 200, 300), (260, 150, 340, 250)
POINTS = np.array([(0.3, 0.4), (0.7, 0.4), (0.5, 0.6), (0.35, 0.8), (0.65, 0.8)], np.float32)


def face(box, embedding=None):
    """With points that tell whose detection they are: a little apart for a detector that gives no embedding."""
    x1, y1, x2, y2 = box
    points = POINTS * (x2 - x1, y2 - y1) + (x1, y1) + (embedding is None)
    return Face(tuple(map(float, box)), 0.99, points.astype(np.float32), embedding=embedding)


class Recognizer:
    """antelopev2's answers; `embed` notes the points it is asked about."""

    def __init__(self, *boxes):
        self.faces = [face(box, np.full(512, index, np.float32)) for index, box in enumerate(boxes)]
        self.asked = []

    def __call__(self, image):
        return self.faces

    def embed(self, image, keypoints):
        self.asked.append(keypoints)
        return np.full(512, 9, np.float32)


def retinaface(*boxes):
    return lambda image: [face(box) for box in boxes]


# ------------------------------------------------------------------------------------------------------ which face


def test_both_detectors_see_two_people_and_one_person_is_taken():
    """Upstream takes the largest for the identity and the most central for the picture: two people."""
    recognizer, shifted = Recognizer(LARGE, CENTRAL), tuple(v + 8 for v in LARGE)
    chosen = choose(PICTURE, recognizer, retinaface(CENTRAL, shifted), None, "family.jpg")
    assert chosen.embedding[0] == 0
    assert np.array_equal(chosen.landmarks, face(shifted).keypoints)
    other = choose(PICTURE, recognizer, retinaface(CENTRAL, shifted), 1, "family.jpg")
    assert other.embedding[0] == 1
    assert np.array_equal(other.landmarks, face(CENTRAL).keypoints)


def test_upstreams_rule_mixes_them_and_says_so(caplog):
    chosen = choose_as_upstream(PICTURE, Recognizer(LARGE, CENTRAL), retinaface(LARGE, CENTRAL), "family.jpg")
    assert chosen.embedding[0] == 0
    assert np.array_equal(chosen.landmarks, face(CENTRAL).keypoints)
    assert "family.jpg differ: two people are mixed" in caplog.text


def test_detectors_see_different_people(caplog):
    """The face that antelopev2 knows is not among RetinaFace's: its own points align it."""
    chosen = choose(PICTURE, Recognizer(LARGE), retinaface(CENTRAL), None, "me.jpg")
    assert chosen.embedding[0] == 0
    assert np.array_equal(chosen.landmarks, chosen.keypoints)
    assert "RetinaFace sees another face, not one in me.jpg where antelopev2 sees" in caplog.text


def test_only_one_detector_sees_a_face(caplog):
    recognizer = Recognizer()
    chosen = choose(PICTURE, recognizer, retinaface(CENTRAL), None, "me.jpg")
    assert chosen.embedding[0] == 9
    assert np.array_equal(recognizer.asked[0], chosen.landmarks)
    assert "antelopev2 finds no face in me.jpg, RetinaFace does" in caplog.text
    caplog.clear()
    chosen = choose(PICTURE, Recognizer(CENTRAL), retinaface(), None, "me.jpg")
    assert np.array_equal(chosen.landmarks, chosen.keypoints)
    assert "RetinaFace sees nothing in me.jpg" in caplog.text


def test_antelopev2_alone_is_no_disagreement(caplog):
    chosen = choose(PICTURE, Recognizer(CENTRAL), None, None, "me.jpg")
    assert np.array_equal(chosen.landmarks, chosen.keypoints)
    assert not caplog.records


@pytest.mark.parametrize("rule", [lambda *a: choose(*a[:3], None, a[3]), choose_as_upstream])
def test_no_face_is_one_clear_line(rule):
    with pytest.raises(InputError, match=r"^no face found in wall.jpg \(600x400\); ConsisID needs a photo"):
        rule(PICTURE, Recognizer(), retinaface(), "wall.jpg")


def test_a_face_without_a_detection_is_recognised_by_its_points(tmp_path):
    """The same points give the embedding that a detection there would have."""
    recognizer = load_recognizer(write_antelopev2(tmp_path / "two"))
    found = recognizer(PICTURE)[0]
    np.testing.assert_allclose(recognizer.embed(PICTURE, found.keypoints), found.embedding, rtol=1e-6)
    blind = load_recognizer(write_antelopev2(tmp_path / "blind", faces=()))
    assert blind(PICTURE) == []
    np.testing.assert_allclose(blind.embed(PICTURE, found.keypoints), found.embedding, rtol=1e-6)


def test_overlap():
    assert intersection_over_union((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert intersection_over_union((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert intersection_over_union((0, 0, 1, 1), (2, 2, 3, 3)) == 0


# ------------------------------------------------------------------------------------------------------- alignment


def test_points_come_to_lie_on_the_template():
    """A face that is the template turned, scaled and shifted is brought back exactly."""
    angle = np.radians(20)
    turn = 0.5 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = TEMPLATE @ turn.T + (70, 30)
    matrix = similarity_transform(points.astype(np.float32))
    np.testing.assert_allclose(points @ matrix[:, :2].T + matrix[:, 2], TEMPLATE, atol=1e-2)


def test_aligned_picture_has_the_border_outside_the_photo():
    photo = np.full((512, 512, 3), (10, 20, 30), np.uint8)
    aligned = align_face(photo, TEMPLATE + (200, 0))  # the face is at the right: the crop leaves the photo there
    assert aligned.shape == (512, 512, 3)
    assert tuple(aligned[256, 100]) == (10, 20, 30)
    assert tuple(aligned[256, 500]) == (132, 133, 135)


def test_large_photos_become_smaller_and_small_ones_stay():
    assert limit_size(np.zeros((1500, 2001, 3), np.uint8)).shape == (767, 1024, 3)
    small = np.zeros((300, 200, 3), np.uint8)
    assert limit_size(small) is small


def test_background_is_white_and_hair_stays():
    labels = np.arange(19).reshape(1, 19)
    picture = white_background(np.full((1, 19, 3), 51, np.uint8), labels)
    assert sorted(np.flatnonzero((picture[0] == 1).all(axis=-1))) == sorted(NOT_FACE)
    assert picture[0, 17] == pytest.approx((0.2, 0.2, 0.2))
    assert to_uint8(np.float32([[[0.999, 1, 0]]])).tolist() == [[[254, 255, 0]]]


def test_grey_and_clip_pixels():
    picture = np.zeros((64, 64, 3), np.float32) + np.float32((1, 0.5, 0))
    assert grey(picture)[5, 5] == pytest.approx([0.299 + 0.2935] * 3)
    pixels = clip_pixels(picture, 28)
    expected = (torch.tensor([1, 0.5, 0]) - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    torch.testing.assert_close(pixels[0].mean(dim=(1, 2)), expected, rtol=0, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- networks


def test_anchors_cover_the_picture_from_fine_to_coarse():
    """100x70 pixels: 13x9, 7x5 and 4x3 cells of two anchors each; the first is 16 pixels at (4, 4)."""
    rows = anchors(height=100, width=70)
    assert len(rows) == 2 * (13 * 9 + 7 * 5 + 4 * 3)
    torch.testing.assert_close(rows[0], torch.tensor([4 / 70, 4 / 100, 16 / 70, 16 / 100]))
    torch.testing.assert_close(rows[2], torch.tensor([12 / 70, 4 / 100, 16 / 70, 16 / 100]))  # along the row first
    torch.testing.assert_close(rows[-1], torch.tensor([80 / 70, 112 / 100, 512 / 70, 512 / 100]))


def test_offsets_of_zero_are_the_anchor():
    count = len(anchors(64, 64))
    boxes, points = decode(torch.zeros(count, 4), torch.zeros(count, 10), 64, 64)
    assert boxes[0].tolist() == [-4, -4, 12, 12]
    assert points[0].tolist() == [4, 4] * 5


def test_of_overlapping_boxes_the_best_stays():
    boxes = np.array([(0, 0, 10, 10), (1, 1, 11, 11), (20, 20, 30, 30), (0, 0, 10, 4)], np.float32)
    assert non_maximum_suppression(boxes, 0.4) == [0, 2, 3]  # the last covers four tenths, not more
    assert non_maximum_suppression(boxes, 0.3) == [0, 2]
    assert non_maximum_suppression(boxes[:0], 0.4) == []


def test_detector_reports_faces_best_first(tmp_path):
    class Network(torch.nn.Module):
        def forward(self, x):
            count = len(anchors(*x.shape[2:]))
            scores = torch.zeros(1, count, 2)
            scores[0, 20, 1], scores[0, 100, 1], scores[0, 50, 1] = 0.98, 0.99, 0.96
            return torch.zeros(1, count, 4), scores, torch.zeros(1, count, 10)

    faces = RetinaFaceDetector(Network())(np.zeros((160, 160, 3), np.uint8))
    assert [f.score for f in faces] == pytest.approx([0.99, 0.98])
    assert faces[0].keypoints.shape == (5, 2)


def test_released_file_loads_with_its_prefix_and_another_does_not(tmp_path):
    model = RetinaFace()
    torch.save({f"module.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "right.pth")
    loaded = load_retinaface(tmp_path / "right.pth").model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(WeightsError, match="is not facexlib's RetinaFace: .*; fetch it"):
        load_retinaface(tmp_path / "wrong.pth", refetch="fetch it")


def test_vision_tower_reads_the_released_layout_strictly(tmp_path):
    """Text half and tables of angles beside it; every other key has to fit."""
    tower = randomise(EvaVisionTower(width=64, num_layers=9, hidden_dim=80, embed_dim=12, grid=2)).eval()
    tensors = {f"visual.{name}": tensor.half() for name, tensor in tower.state_dict().items()}
    extra = {"logit_scale": torch.ones(()), "visual.blocks.0.attn.rope.freqs_cos": torch.zeros(4, 64)}
    torch.save(tensors | extra, tmp_path / "eva.pt")
    loaded = load_eva_tower(tmp_path / "eva.pt")
    assert loaded.image_size == 28
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    embedding, hidden = loaded(pixels)
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding, tower(pixels)[0], rtol=0.02, atol=0.02)
    assert [states.shape for states in hidden] == [(1, 5, 64)] * 2  # into blocks 4 and 8
    del tensors["visual.blocks.3.attn.q_bias"]
    with pytest.raises(WeightsError, match=r"1 missing \(blocks.3.attn.q_bias"):
        tower_from_tensors(tensors)
    with pytest.raises(WeightsError, match="not the weights of EVA02-CLIP's vision tower"):
        tower_from_tensors({"text.proj": torch.zeros(1)})


def test_positions_turn_patches_and_not_the_class_token():
    """Moving the picture's content by a patch changes the result only through positions; without them it would not."""
    tower = randomise(EvaVisionTower(width=64, num_layers=1, hidden_dim=80, embed_dim=12, grid=2)).eval()
    tower.pos_embed.data.zero_()
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    rolled = pixels.roll(14, dims=3)
    assert not torch.allclose(tower(pixels)[0], tower(rolled)[0], atol=1e-4)
