"""What can go wrong between here and Modal, each as one message that says what to type next."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import modal
from modal.config import config as modal_settings

from ray_pipeline.errors import UserError, command, first_line

# Raised where nobody knows how things stand there.
UNANSWERED = (modal.exception.ServiceError, modal.exception.ConnectionError, modal.exception.InternalError)
SILENCE = 10.0  # seconds without an answer after which something is said
T = TypeVar("T")
OAUTH = ("oauth_refresh_token", "oauth_client_id", "oauth_client_secret")
NO_CREDENTIALS = (
    "no Modal credentials here. Make a free account at https://modal.com, then run `modal token new` (or set "
    "MODAL_TOKEN_ID and MODAL_TOKEN_SECRET)."
)


def check_credentials() -> None:
    """Refuse to start without an account: a token, or OAuth's three parts, in the environment or Modal's file.

    Raises:
        UserError: how to get a token.
    """
    has_token = modal_settings.get("token_id") and modal_settings.get("token_secret")
    if not has_token and not all(modal_settings.get(name) for name in OAUTH):
        raise UserError(f"--backend modal: {NO_CREDENTIALS} Without an account use --backend auto.")


def check_reachable() -> None:
    """Ask Modal for an answer.

    Raises:
        UserError: none within 10 seconds, or the credentials are refused.
    """
    url = urlsplit(str(modal_settings.get("server_url")))
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if url.hostname and not proxied:
        try:
            port = url.port or (443 if url.scheme == "https" else 80)
            socket.create_connection((url.hostname, port), timeout=SILENCE / 2).close()
        except OSError as error:
            raise _unreachable(first_line(error)) from None
    with explained():
        within(SILENCE / 2, lambda: modal.Client.from_env().hello())


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` gives, in a thread so that Ctrl-C is answered at once.

    Raises:
        UserError: it took longer.
    """
    found: list[T] = []
    failed: list[BaseException] = []

    def body() -> None:
        try:
            found.append(call())
        except BaseException as error:  # noqa: BLE001  it is raised again in the thread that asked
            failed.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise _unreachable(f"no answer within {seconds:.0f} s")
    if failed:
        raise failed[0]
    return found[0]


def _unreachable(why: str) -> UserError:
    return UserError(
        f"Modal cannot be reached ({why}). Nothing was started. Look at the network and https://status.modal.com, or "
        "use --backend auto."
    )


@contextmanager
def explained(doing: str = "", *, secret: str = "wandb") -> Iterator[None]:
    """Turn what Modal raises into one message.

    Args:
        doing: what was tried, for the message. secret: the name of W&B's secret, which is what is mostly missing.
    """
    try:
        yield
    except modal.exception.AuthError as error:
        raise UserError(f"Modal refused the credentials ({first_line(error)}). Run `modal token new` again.") from None
    except modal.exception.NotFoundError as error:
        text = first_line(error)
        if "secret" in text.lower() or "key" in text.lower():
            raise UserError(
                f"Modal: {text}. Nothing was started. Make it with `modal secret create {secret} WANDB_API_KEY=...`, "
                "or export WANDB_API_KEY here, or run with --no-wandb."
            ) from None
        raise UserError(f"Modal: {text}.{doing}") from None
    except modal.exception.PermissionDeniedError as error:
        raise UserError(f"Modal does not allow it: {first_line(error)}.{doing}") from None
    except modal.exception.ResourceExhaustedError as error:
        raise UserError(f"Modal has a limit: {first_line(error)}.{doing} Look at https://modal.com/settings.") from None
    except modal.exception.ImageBuildError as error:
        raise UserError(f"Modal could not build the image: {first_line(error)}.{doing}") from None
    except modal.exception.ConnectionError as error:
        raise UserError(
            f"Modal cannot be reached ({first_line(error)}).{doing} Look at the network and https://status.modal.com."
        ) from None
    except modal.exception.Error as error:
        raise UserError(f"Modal failed: {type(error).__name__}: {first_line(error)}.{doing}") from None


def way_on(run: str, *options: Any) -> str:
    """The commands for a run that may go on without this program."""
    return f"Look with `{command('modal', 'status', run)}`, stop it with `{command('modal', 'stop', run)}`."
