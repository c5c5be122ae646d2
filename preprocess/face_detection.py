"""Face detectors: any callable that takes a (H, W, 3) uint8 RGB picture and returns a list of `Face`.

detector = load_detector()                           # antelopev2 where its weights are, else OpenCV's cascade
for face in detector(picture): ...
detector = load_recogniser()                         # antelopev2 with ArcFace: every face comes with its embedding
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy

from errors import WeightsError

logger = logging.getLogger("selfsame")

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels
DETECTOR_PATH = "checkpoints/antelopev2"


@dataclass(frozen=True, eq=False)
class Face:
    """One detected face."""

    box: Box  # hairline to chin
    score: float  # 0..1
    keypoints: numpy.ndarray | None = None  # (5, 2) x, y: the eyes, the nose, the mouth's corners
    landmarks: numpy.ndarray | None = None  # (68, 2) x, y in the order of iBUG 300-W; only where they were asked for
    embedding: numpy.ndarray | None = None  # (512,) float32, ArcFace's, not normalised


Detector = Callable[[numpy.ndarray], list[Face]]


def load_detector(path: str | Path | None = None, *, landmarks: bool = False) -> Detector:
    """A face detector: (H, W, 3) uint8 RGB -> list of `Face`.

    Args:
        path: folder of antelopev2: the one that holds the .onnx files, or `<path>/models/antelopev2/` does. None takes
            `DETECTOR_PATH` where it is there, else OpenCV's cascade, with a warning.
        landmarks: whether faces get their 68 landmarks, which the cascade has not.

    Raises:
        WeightsError: `path` was given and has no weights, they are damaged, or insightface is not installed; or
            landmarks without weights.
    """
    folder = _onnx_folder(path or DETECTOR_PATH)
    if folder is None and (path is not None or landmarks):
        needed = "landmarks of faces need antelopev2: " if landmarks else ""
        raise WeightsError(
            f"{needed}--antelopv2_path {str(path or DETECTOR_PATH)!r}: no .onnx files there, nor in its "
            "models/antelopev2/; fetch them with `python download_models.py --only antelopev2`"
        )
    if folder is None:
        logger.warning(
            "no face detector weights at %s: OpenCV's cascade is used instead (frontal faces only, coarse boxes). "
            "For the real one: python download_models.py --only antelopev2", DETECTOR_PATH,
        )  # fmt: skip
        return CascadeDetector()
    return InsightFaceDetector(folder, landmarks)


def load_recognizer(path: str | Path | None = None, needed_by: str = "this") -> "InsightFaceDetector":
    """A detector whose faces carry their ArcFace embedding.

    Args:
        path: as for `load_detector`.
        needed_by: the flag or method that cannot do without, for the message.

    Raises:
        WeightsError: antelopev2 is not there (nothing stands in for it), damaged, or insightface is not installed.
    """
    folder = _onnx_folder(path or DETECTOR_PATH)
    if folder is None:
        raise WeightsError(
            f"{needed_by} needs the face models of antelopev2, which are not in {str(path or DETECTOR_PATH)!r}; "
            "fetch them with `python download_models.py --only antelopev2`"
        )
    return InsightFaceDetector(folder, embeddings=True)


def recognizer_is_there(path: str | Path | None = None) -> bool:
    """Whether `load_recognizer` has files to load."""
    return _onnx_folder(path or DETECTOR_PATH) is not None


def _onnx_folder(root: str | Path) -> Path | None:
    """Where the .onnx files are: insightface's own layout, a flat folder, or the doubly nested one of its zip."""
    for folder in ("", "models/antelopev2", "antelopev2", "models/antelopev2/antelopev2"):
        if any((Path(root) / folder).glob("*.onnx")):
            return Path(root) / folder
    return None


class InsightFaceDetector:
    """SCRFD-10G of antelopev2 through insightface; where they are asked for with its landmarks (1k3d68) and embeddings
    (ArcFace-R100).
    """

    def __init__(self, folder: str | Path, landmarks: bool = False, embeddings: bool = False):
        try:
            import onnxruntime
            from insightface.app import FaceAnalysis
        except ImportError as error:
            raise WeightsError(
                f"the face detector in {str(folder)!r} needs insightface and onnxruntime ({error}); "
                "install them with `pip install -r requirements.txt`"
            ) from error
        import torch

        # onnxruntime-gpu lists CUDA on machines without a GPU too, and then fails loudly; torch knows better.
        providers = ["CPUExecutionProvider"]
        if torch.cuda.is_available():
            if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
                providers.insert(0, "CUDAExecutionProvider")
            else:
                logger.info(
                    "onnxruntime has no CUDA: faces are detected on the CPU (requirements.txt says how to change it)"
                )
        further = {"landmark_3d_68": landmarks, "recognition": embeddings}
        modules = ["detection", *(name for name, wanted in further.items() if wanted)]
        try:
            self.analysis = FaceAnalysis(name=str(folder), providers=providers, allowed_modules=modules)
        except AssertionError as error:  # its way of saying that no file is a detector
            raise WeightsError(
                f"no face detector (scrfd_10g_bnkps.onnx) among the .onnx files in {str(folder)!r}; "
                "fetch them again with `python download_models.py --only antelopev2`"
            ) from error
        except Exception as error:  # onnx and onnxruntime raise their own kinds on a damaged file
            raise WeightsError(
                f"the face detector in {str(folder)!r} cannot be loaded ({str(error).strip()[:160]}); "
                "fetch it again with `python download_models.py --only antelopev2`"
            ) from error
        names = {"landmark_3d_68": "landmark model (1k3d68.onnx)", "recognition": "face recogniser (glintr100.onnx)"}
        for module, name in names.items():
            if further[module] and module not in self.analysis.models:
                raise WeightsError(
                    f"no {name} among the .onnx files in {str(folder)!r}; "
                    "fetch them again with `python download_models.py --only antelopev2`"
                )
        # Its own use of a scikit-image function that will be gone one day is nothing a user can mend.
        warnings.filterwarnings("ignore", category=FutureWarning, module="insightface")
        # Without a size insightface 2.1 merges two scales, and finds other boxes than the original did.
        self.analysis.prepare(ctx_id=0 if len(providers) > 1 else -1, det_size=(640, 640))

    def __call__(self, image: numpy.ndarray) -> list[Face]:
        found = self.analysis.get(numpy.ascontiguousarray(image[..., ::-1]))  # it wants BGR
        return [
            Face(
                tuple(float(v) for v in face.bbox),
                float(face.det_score),
                face.kps,
                None if face.landmark_3d_68 is None else face.landmark_3d_68[:, :2],
                face.embedding,
            )
            for face in found
        ]

    def embed(self, image: numpy.ndarray, keypoints: numpy.ndarray) -> numpy.ndarray:
        """ArcFace's embedding (512,) of a face that another detector found, from its five points (5, 2)."""
        from insightface.app.common import Face as InsightFace

        bgr = numpy.ascontiguousarray(image[..., ::-1])
        return self.analysis.models["recognition"].get(bgr, InsightFace(kps=numpy.asarray(keypoints, numpy.float32)))


class CascadeDetector:
    """OpenCV's Haar cascades for frontal faces: need no download, and miss many faces."""

    MAX_SIDE = 640  # larger pictures only bring false finds

    def __init__(self):
        import cv2

        if not hasattr(cv2, "CascadeClassifier"):  # gone in OpenCV 5
            raise WeightsError(
                "this OpenCV has no face cascade; fetch the detector with "
                "`python download_models.py --only antelopev2`, or `pip install opencv-python==4.14.0.94`"
            )
        # Each of the two sees faces in sleeves and hands now and then, but rarely in the same place.
        names = "haarcascade_frontalface_default.xml", "haarcascade_frontalface_alt2.xml"
        self.cascade, self.second_opinion = (cv2.CascadeClassifier(cv2.data.haarcascades + name) for name in names)

    def __call__(self, image: numpy.ndarray) -> list[Face]:
        import cv2

        height, width = image.shape[:2]
        scale = max(height, width, self.MAX_SIDE) / self.MAX_SIDE
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        if scale > 1:
            small = max(round(width / scale), 1), max(round(height / scale), 1)
            grey = cv2.resize(grey, small, interpolation=cv2.INTER_AREA)
        boxes, _, weights = self.cascade.detectMultiScale3(grey, 1.1, 5, outputRejectLevels=True)
        others = self.second_opinion.detectMultiScale(grey, 1.1, 5)
        faces = []
        for (x, y, w, h), weight in zip(boxes, numpy.ravel(weights), strict=True):
            center = numpy.array([x + w / 2, y + h / 2])
            if not any(numpy.abs(center - (ox + ow / 2, oy + oh / 2)).max() < 0.2 * w for ox, oy, ow, oh in others):
                continue
            # The cascade's square runs from brows to mouth, the boxes the crop is made for from hairline to chin.
            x1, y1, x2, y2 = (float(v * scale) for v in (x, y - 0.2 * h, x + w, y + 1.3 * h))
            box = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
            faces.append(Face(box, float(1 - numpy.exp(-weight / 3))))  # the weight is about 4 to 6 on a clear face
        return faces
