"""Speech features and lip masks, against StableAvatar's pipeline, data set and lip_mask_extractor.py."""

import numpy as np

from models.audio_encoder import audio_encoder_from_tensors
from preprocess.audio import AudioTimeline, num_features, training_clip_samples
from preprocess.masks import fill_polygons
from tests.golden_checks import GoldenCase

# MediaPipe's points of the upper and the lower lip, which StableAvatar's masks are drawn with.
MEDIAPIPE_LIPS = (
    (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291),
    (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291),
)


def check_audio_features(case: GoldenCase) -> None:
    """Every window's features in inference, upstream's sample ranges among them; and those of a training clip."""
    config, samples = case.config, case.inputs["audio"].numpy()
    normalize = config["feature_extractor"]["do_normalize"]
    encoder = audio_encoder_from_tensors(case.weights(), config["wav2vec2"], normalize=normalize)
    timeline = AudioTimeline(len(samples), config["fps"], legacy=True)

    windows = case.outputs["windows"].clone()  # latent start and end, sample start and end, …
    for index, (start, end) in enumerate(windows[:, :2].tolist()):
        first, last = timeline.window_samples(start, end)
        if index == len(windows) - 1:
            last = len(samples)
        windows[index, 2:4] = windows.new_tensor([first, last])
        features = encoder.last_hidden_state(samples[first:last])
        assert features.shape[1] == num_features(last - first)
        case.check(f"hidden_{index}", features)
        if index == 0:
            case.check("input_values_0_head", encoder.input_values(samples[first:last])[:, :64])
    case.check("windows", windows)

    clip = training_clip_samples(config["train_first_frame"], config["clip_length"], config["train_fps"])
    case.check("train_range", clip)
    case.check("train_hidden", encoder.last_hidden_state(samples[slice(*clip)]))


def check_lip_mask(case: GoldenCase) -> None:
    """The drawing of lips; upstream's landmarks are MediaPipe's, as shares of the picture's sides."""
    height, width = case.config["height"], case.config["width"]
    points = case.inputs["landmarks"].numpy().astype(np.float64) * (width, height)  # (faces, 478, 2)
    lips = [face[list(lip)] for face in points for lip in MEDIAPIPE_LIPS]
    case.check("mask", fill_polygons(lips, height, width))


CHECKS = {"stableavatar_audio_features": check_audio_features, "stableavatar_lip_mask": check_lip_mask}
