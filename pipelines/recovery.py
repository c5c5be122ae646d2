"""What can be changed after a failed step, so that a video goes on: another attention backend, or less memory."""

import logging

from errors import ResourceError, WeightsError
from pipelines.denoise import NonFiniteLatentsError
from pipelines.memory import is_out_of_memory
from pipelines.placement import next_mode
from pipelines.stand_in import Identities
from pipelines.wan import Wan

logger = logging.getLogger("selfsame")


def recover(wan: Wan, error: RuntimeError, identities: Identities | None = None) -> None:
    """Go on with native attention after NaN, with the next smaller memory mode after running out of memory.

    Args:
        identities: were computed by the backend that gave NaN, or lie on the device that is full: they are dropped.

    Raises:
        WeightsError: NaN with native attention.
        ResourceError: out of memory, and nothing left to try.
        RuntimeError: `error` itself, of any other kind.
    """
    if isinstance(error, NonFiniteLatentsError):
        if wan.attention_backend == "native":
            raise WeightsError(f"{error} (attention native, {wan.dtype}); try --dtype fp32") from error
        logger.warning("%s with attention backend %s; going on with native", error, wan.attention_backend)
        if identities is not None:
            identities.clear()
        wan.use_attention_backend("native")
    elif is_out_of_memory(error):
        mode = next_mode(wan.memory)
        if mode is None or wan.processes.together:
            raise ResourceError(
                f"out of memory while denoising with --memory {wan.memory}; try fewer frames or a smaller size"
            ) from error
        logger.warning("out of memory while denoising with --memory %s; going on with %s", wan.memory, mode)
        if identities is not None:
            identities.clear()
        wan.use_memory_mode(mode)
    else:
        raise error
