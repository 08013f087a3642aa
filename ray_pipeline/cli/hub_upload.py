"""An export to the Hugging Face Hub, where `--push` names a repository: in one commit, private unless told otherwise.

What can be refused is refused before anything is exported; what is sent is held against its manifest once more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray_pipeline.errors import StageFailed, UserError, first_line
from ray_pipeline.records.artifacts import manifest
from ray_pipeline.records.integrity import manifest_files, sealed, verify_folder
from ray_pipeline.settings.run_folder import MANIFEST

FOLDERS = ("hf", "native")  # whose files lie at the top of the repository: model hubs look for config.json there


def check_push(repository: str, *, public: bool) -> None:
    """Ask the Hub who we are and what is there, before an export that would be for nothing.

    Raises:
        UserError: no repository's name, no token or one that the Hub does not take, no Hub, or a repository that
            is there already for all to see, though nobody said so.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    unnamed = UserError(f'--push "{repository}": names no repository. Names look like user/model.')
    if repository.count("/") != 1:
        raise unnamed
    if get_token() is None:
        raise UserError("--push: there is no token of the Hub. Set HF_TOKEN, or type `hf auth login`.")
    api, seen = HfApi(), False
    try:
        api.whoami()
        seen = not api.model_info(repository).private
    except HFValidationError:
        raise unnamed from None
    except RepositoryNotFoundError:
        pass
    except _unreachable() as error:
        raise UserError(
            f"--push {repository}: the Hub says {_short(error)}. Set another HF_TOKEN, or try later."
        ) from None
    if seen and not public:
        raise UserError(f"--push {repository}: is there already, for all to see. Add --public, or give another name.")


def push(out: Path, repository: str, *, public: bool) -> str:
    """Send what `export` wrote to `out`; returns the address of the commit.

    Raises:
        UserError: a file that is not as it was written.
        StageFailed: the Hub refused or broke off; `out` stays.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    verify_folder(out)
    listed = {name: entry for name, entry in manifest_files(out).items() if Path(name).name != MANIFEST}
    files = {_in_repository(name): name for name in listed}
    entries = {_in_repository(name): {"sha256": sha256, "bytes": size} for name, (sha256, size) in listed.items()}
    made = json.dumps(sealed(manifest(entries)), indent=2).encode()
    operations = [CommitOperationAdd(target, out / name) for target, name in sorted(files.items())]
    operations.append(CommitOperationAdd(MANIFEST, made))
    api = HfApi()
    # Uploads of large files wrap what went wrong in errors of Python's own kinds.
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        done: Any = api.create_commit(repository, operations, commit_message="Export with its proof")
    except (*_unreachable(), RuntimeError, ValueError) as error:
        raise StageFailed(
            f"--push {repository}: the Hub says {_short(error)}. The export is whole in {out}; send it again with the "
            f"same command."
        ) from None
    return str(done.commit_url)


def _in_repository(name: str) -> str:
    top, _, rest = name.partition("/")
    return rest if top in FOLDERS else name


def _unreachable() -> tuple[Any, ...]:
    """The transport error of whichever HTTP client huggingface_hub was built on."""
    from huggingface_hub.errors import HfHubHTTPError

    return (HfHubHTTPError.__mro__[1], OSError)


def _short(error: BaseException) -> str:
    """The first line that says something, and what it came from."""
    cause = "" if error.__cause__ is None else f" ({first_line(error.__cause__)})"
    return first_line(error)[:200] + cause[:200]
