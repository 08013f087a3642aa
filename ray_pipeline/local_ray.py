"""Starting Ray, whose processes a busy machine may not bring up at the first try."""

from __future__ import annotations

import logging
from typing import Any

from ray_pipeline.errors import StageFailed

TRIES = 3
LATE = "timed out during startup"  # in Ray's message when its own 30 seconds, which no setting changes, are over


def start_ray(**options: Any) -> None:
    """`ray.init`, quietly.

    Raises:
        StageFailed: Ray's processes did not come up, several times. Other errors are `ray.init`'s own.
    """
    import ray

    # Ray tells on every start that its token authentication is on; nothing is to be done about that.
    logging.getLogger("ray").setLevel(logging.ERROR)
    for _ in range(TRIES):
        try:
            ray.init(configure_logging=False, log_to_driver=False, **options)
            return
        except Exception as error:
            if LATE not in str(error):
                raise
    raise StageFailed(
        f"Ray's processes did not start within 30 seconds, {TRIES} times over: this machine is too busy or short of "
        "memory. Run the same command again when less is going on."
    )
