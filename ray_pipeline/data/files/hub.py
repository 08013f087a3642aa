"""Datasets by name from the Hugging Face Hub, streamed; from the local cache where there is no network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray_pipeline.data.files.record_files import table_records
from ray_pipeline.errors import UserError, did_you_mean, first_line

PROBE_SECONDS = 10.0
_ROWS = 256  # that are turned into records at once
# What `datasets` chooses from when a name has several configurations and the user named none.
PREFERRED_CONFIGS = ("default", "main")


def _way_out(name: str) -> str:
    named = "" if name.lower() == "roneneldan/tinystories" else f" --name {name}"
    return (
        f'Where there is a network, "python scripts/download_tinystories.py{named}" makes a local copy to give '
        'instead; or set HF_ENDPOINT to a reachable mirror, or HF_HOME to a cache that holds it, or use "builtin".'
    )


def cached(name: str) -> bool:
    """Whether `datasets` has prepared this dataset on this machine before."""
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()


def check_reachable(name: str) -> bool:
    """True where the hub has the dataset, False where only the local cache has it.

    Raises:
        UserError: the hub does not know it or refuses it, or there is no network and no cached copy.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    # The transport error of whichever HTTP client huggingface_hub was built on.
    unreachable: tuple[Any, ...] = (HfHubHTTPError.__mro__[1], OSError)
    try:
        HfApi().dataset_info(name, timeout=PROBE_SECONDS)
    except HFValidationError:
        raise UserError(f'"{name}": not a dataset name. Names look like org/name.') from None
    except GatedRepoError:
        raise UserError(f'"{name}": needs access to be granted. Ask on its hub page, then set HF_TOKEN.') from None
    except RepositoryNotFoundError:
        raise UserError(f'"{name}": no such file, nor a dataset on the hub (a private one needs HF_TOKEN).') from None
    except unreachable as error:
        if cached(name):
            return False
        reason = str(error).partition("\n")[0][:120]
        raise UserError(f'"{name}": the hub cannot be reached ({reason}). {_way_out(name)}') from None
    return True


def _config_name(name: str) -> str | None:
    import datasets

    names = datasets.get_dataset_config_names(name)
    return next((c for c in PREFERRED_CONFIGS if c in names), names[0] if names else None)


def stream_records(name: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("name:split:row N", record) pairs, downloaded as they are read.

    Raises:
        UserError: no such dataset or split, no access, no network.
    """
    import datasets

    online = check_reachable(name)
    try:
        config = _config_name(name) if online else None
        stream = datasets.load_dataset(name, config, split=split, streaming=online)
        tables = stream.with_format("arrow").iter(batch_size=_ROWS)
        records = itertools.chain.from_iterable(map(table_records, tables))
        for number, record in enumerate(records, start=1):
            yield f"{name}:{split}:row {number}", record
    except ValueError as error:
        raise UserError(f'"{name}:{split}": {_split_problem(error, split)}') from None
    except (datasets.exceptions.DatasetsError, OSError) as error:
        raise UserError(f'"{name}": reading stopped ({first_line(error):.160}). {_way_out(name)}') from None


def _split_problem(error: ValueError, split: str) -> str:
    """What `datasets` says of a wrong split, with the nearest one there is."""
    available = str(error).partition("Available splits:")[2]
    names = [part.strip(" []'\"") for part in available.split(",")] if available else []
    return f"{first_line(error)}{did_you_mean(split, names)}. Names are org/name[:split[:column]]."
