"""A folder under an address that fsspec reads and writes: s3://, gs://, hf://, sftp://, ..."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from ray_pipeline.errors import UserError, first_line
from ray_pipeline.settings.run_folder import LOGS

STAGE = r"[a-z_]+-[0-9a-f]+(\.again)?"
Facts = tuple[int, object]  # of a file: bytes, and what changes when the file does


class Bucket:
    """A run's folder there.

    Raises:
        UserError: no such protocol, or its package is not installed.
    """

    def __init__(self, address: str):
        self.address, example = address.rstrip("/"), "Give an address such as s3://BUCKET/runs/RUN."
        if re.fullmatch(r"[a-z][a-z0-9+.-]*://.*[^/].*", address) is None:
            raise UserError(f"{address}: names no place in a store. {example}")
        try:
            self._system, self._folder = fsspec.core.url_to_fs(self.address, use_listings_cache=False)
        except ImportError as error:  # it names the package
            raise UserError(f"{address}: {first_line(error).rstrip('.')} (pip install it), then run again.") from None
        except ValueError as error:
            raise UserError(f"{address}: {first_line(error)}. {example}") from None
        except Exception as error:  # noqa: BLE001  of a store that wants more than an address
            raise UserError(f"{address}: {type(error).__name__}: {first_line(error)}. {example}") from None

    def files(self) -> Mapping[str, Facts]:
        """Of the folders in which something is shown alone: checkpoints are not listed."""
        found: dict[str, Facts] = {}
        folders = [""]
        for folder in folders:
            for entry in self._system.ls(f"{self._folder}/{folder}".rstrip("/"), detail=True):
                name = f"{folder}/{entry['name'].rstrip('/').rpartition('/')[2]}".lstrip("/")
                if entry["type"] == "file":
                    found[name] = int(entry["size"] or 0), _version(entry)
                elif re.fullmatch(rf"{STAGE}(/({LOGS}|errors))?", name):
                    folders.append(name)
        return found

    def read(self, name: str, start: int) -> bytes:
        return bytes(self._system.cat_file(f"{self._folder}/{name}", start=start))

    def everything(self) -> dict[str, Facts]:
        """Every file below it; empty where nothing is."""
        try:
            found = self._system.find(self._folder, detail=True)
        except FileNotFoundError:
            return {}
        start = len(self._system._strip_protocol(self._folder)) + 1
        return {path[start:]: (int(entry["size"] or 0), _version(entry)) for path, entry in found.items()}

    def get(self, name: str, target: Path) -> None:
        """Download one file."""
        self._system.get_file(f"{self._folder}/{name}", str(target))

    def put(self, source: Path, name: str) -> None:
        """Upload one file."""
        self._make_folder(name)
        self._system.put_file(str(source), f"{self._folder}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """A small file."""
        self._make_folder(name)
        self._system.pipe_file(f"{self._folder}/{name}", data)

    def delete(self, names: Iterable[str]) -> None:
        """Files that may be gone already."""
        for name in names:
            try:
                self._system.rm_file(f"{self._folder}/{name}")
            except FileNotFoundError:
                continue

    def _make_folder(self, name: str) -> None:
        """Stores of objects have none; file systems do."""
        self._system.makedirs(f"{self._folder}/{name}".rpartition("/")[0], exist_ok=True)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what a store raises, each its own, into one message.

        Raises:
            UserError: naming the address.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001
            raise UserError(f"{self.address}: {type(error).__name__}: {first_line(error)}.") from None


def _version(entry: Mapping[str, Any]) -> object:
    """What the store says of a file's state; stores have names of their own for it."""
    names = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
    return next((str(entry[name]) for name in names if entry.get(name)), None)
