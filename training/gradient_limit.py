"""The gradient norm that StableAvatar's training clips to. Source: its `train_1B_square.py`."""

ABNORMAL_RATIO = 5  # times the limit: from here on a gradient is an outlier
LARGEST_CUT = 10


def gradient_limit(step: int, max_norm: float, initial_ratio: float, until_step: int) -> float:
    """Largest norm of the gradient at a step: wide at first, while the new layers grow from zero, then narrowing in a
    straight line from initial_ratio · max_norm to max_norm at `until_step`. until_step 0: max_norm throughout.
    """
    done = min(step / until_step, 1) if until_step else 1
    return max_norm * (initial_ratio + (1 - initial_ratio) * done)


def tightened_limit(limit: float, norm: float, step: int, until_step: int) -> float:
    """The limit for a gradient of this norm: after `until_step`, one far above the limit is cut below it, the further
    above the more, so that an odd sample moves the weights less than an ordinary one.
    """
    if step > until_step and norm / limit > ABNORMAL_RATIO:
        return limit / min(norm / limit, LARGEST_CUT)
    return limit
