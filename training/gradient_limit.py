"""The gradient norm that StableAvatar's training clips to. Source: its `train_1B_square.py`."""


def gradient_limit(step: int, max_norm: float, initial_ratio: float, until_step: int) -> float:
    """Largest norm of the gradient at a step: wide at first, while the new layers grow from zero, then narrowing in a
    straight line from initial_ratio · max_norm to max_norm at `until_step`.
    """
    done = min(step / until_step, 1)
    return max_norm * (initial_ratio + (1 - initial_ratio) * done)
