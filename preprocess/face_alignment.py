"""A face turned upright and cut out by its five points, as ConsisID was trained with.

    image = limit_size(read_image("photo.jpg"))
    aligned = align_face(image, face.keypoints)          # (512, 512, 3) uint8: eyes level, in the middle
    face = white_background(aligned, parser(aligned))

Source: ConsisID `models/consisid_utils.py:process_face_embeddings` over facexlib's FaceRestoreHelper.
"""

import numpy

SIZE = 512
LONG_SIDE = 1024
# Where eyes, nose and corners of the mouth come to lie: facexlib's template for 512x512.
TEMPLATE = numpy.array(
    [
        (192.98138, 239.94708),
        (318.90277, 240.1936),
        (256.63416, 314.01935),
        (201.26117, 371.41043),
        (313.08905, 371.15118),
    ]
)
BORDER = (132, 133, 135)  # RGB, where the crop leaves the photo
# The parser's classes that are not the face: background, cloth, hat, ears, earring, neck, necklace. Hair stays.
NOT_FACE = (0, 16, 18, 7, 8, 9, 14, 15)
LUMINANCE = (0.299, 0.587, 0.114)


def limit_size(image: numpy.ndarray, long_side: int = LONG_SIDE) -> numpy.ndarray:
    """(H, W, 3) uint8, made smaller where its longer side exceeds `long_side`; never enlarged."""
    import cv2

    height, width = image.shape[:2]
    if max(height, width) <= long_side:
        return image
    scale = long_side / max(height, width)
    return cv2.resize(image, (int(width * scale), int(height * scale)), interpolation=cv2.INTER_LANCZOS4)


def similarity_transform(points: numpy.ndarray) -> numpy.ndarray:
    """The rotation, scale and shift that bring five points (5, 2) nearest to `TEMPLATE`, (2, 3), by least median."""
    import cv2

    return cv2.estimateAffinePartial2D(numpy.asarray(points), TEMPLATE, method=cv2.LMEDS)[0]


def align_face(image: numpy.ndarray, points: numpy.ndarray) -> numpy.ndarray:
    """(H, W, 3) uint8 RGB and the face's five points (5, 2) -> (512, 512, 3) uint8."""
    import cv2

    return cv2.warpAffine(
        image, similarity_transform(points), (SIZE, SIZE), borderMode=cv2.BORDER_CONSTANT, borderValue=BORDER
    )


def white_background(aligned: numpy.ndarray, labels: numpy.ndarray) -> numpy.ndarray:
    """(S, S, 3) float32 in [0, 1]: white where the parser saw anything but the face."""
    return numpy.where(numpy.isin(labels, NOT_FACE)[..., None], numpy.float32(1), aligned.astype(numpy.float32) / 255)


def grey(face: numpy.ndarray) -> numpy.ndarray:
    """(S, S, 3) float -> its luminance three times."""
    return numpy.repeat((face @ numpy.float32(LUMINANCE))[..., None], 3, axis=-1)


def to_uint8(face: numpy.ndarray) -> numpy.ndarray:
    """[0, 1] -> 0..255, truncated."""
    return (face * 255).astype(numpy.uint8)
