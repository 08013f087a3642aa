"""Starting Ray, whose processes a busy machine may not bring up at the first try."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from pathlib import Path
from typing import Any

import psutil

from ray_pipeline.errors import StageFailed, UserError

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
        others = set(psutil.Process().children(recursive=True))
        try:
            ray.init(configure_logging=False, log_to_driver=False, **options)
            return
        except Exception as error:
            if LATE not in str(error):
                raise
        # Ray leaves what it did start of itself, which would keep this machine busy through the next try.
        half = set(psutil.Process().children(recursive=True)) - others
        for process in half:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(half)
    raise StageFailed(
        f"Ray's processes did not start within 30 seconds, {TRIES} times over: this machine is too busy or short of "
        "memory. Run the same command again when less is going on."
    )


def start_local_ray() -> None:
    """A Ray of this process's own, whatever other one runs on this machine.

    Raises:
        UserError: Ray's own files cannot be written.
        StageFailed: as `start_ray`.
    """
    if not _can_keep_token(Path(os.path.expanduser("~"))):
        # Without a home there is no file to keep Ray's password in; its processes inherit this one.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # One node, which nobody drains: without its watcher every stage starts one process less.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        # "local": without an address Ray would join one that `ray start` left on this machine, and refuse num_cpus.
        start_ray(address="local", num_cpus=os.cpu_count(), include_dashboard=False)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise UserError(
            f"Ray cannot write its files{where}: {error.strerror or error}. Set RAY_TMPDIR to a folder with a short "
            "path that this user can write to."
        ) from None


def _can_keep_token(home: Path) -> bool:
    """Whether Ray can read, or write, the token file in this home folder."""
    folder = home / ".ray"
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        return False
    token = folder / "auth_token"
    return os.access(token, os.R_OK) if token.exists() else os.access(folder, os.W_OK)


def show_token() -> bool:
    """Let this process show Ray's password to the cluster that it joins next, and ask for it in its turn.

    For a cluster that asks for it alone, as one does that `ray start` made beside the password's file: the processes of
    another one have none to show, and their answers (streams of Ray Serve, references) would never arrive here. Ray
    itself does this for clusters that it finds, not for one that is named.

    Returns:
        Whether this user has a password.
    """
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    logging.getLogger("ray").setLevel(logging.ERROR)
    return bool(maybe_enable_token_auth_if_token_available(warn_if_disabled=False))


def asks_for_token(host: str, port: int, seconds: float) -> bool:
    """Whether the cluster refuses who shows no password, by a question without one that any process may ask."""
    import grpc

    with grpc.insecure_channel(f"{host}:{port}") as channel:
        question: Any = channel.unary_unary(
            "/ray.rpc.NodeInfoGcsService/GetClusterId", request_serializer=bytes, response_deserializer=bytes
        )
        try:
            question(b"", timeout=seconds)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False
