"""Input files by name: which files a name means, and what they hold. Knows no formats beyond a file's ending.

A file is hashed once and not again while its size, times and inode stay what they were: in one process from memory, in
later ones from a note beside the runs.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from ray_pipeline.errors import UserError
from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.records.integrity import file_sha256, unsealed

SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
# These are compressed inside and never again.
_PACKED = (".parquet", ".arrow", ".feather")
COMPRESSED = (".gz", ".zst")
NOTE = ".inputs.json"
# Behind a source: which column is read as what.
_COLUMNS = re.compile(r":[A-Za-z_]+=[^,=:]+(?:,[A-Za-z_]+=[^,=:]+)*$")
# A file changed less than this before it was hashed may change again within the same tick of the clock.
_SETTLED_NS = 2_000_000_000


class Stamp(NamedTuple):
    """What changes when a file does; times in nanoseconds."""

    size: int
    modified: int
    changed: int
    inode: int


def stamp_of(path: Path) -> Stamp:
    """The file's stamp now (one stat).

    Raises:
        UserError: a pipe or a device: what it gives can neither be named by a digest nor read twice.
    """
    found = path.stat()
    if not S_ISREG(found.st_mode):
        raise UserError(f"{path}: is no regular file, but a pipe or a device. Write it to a file, and give that.")
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def form(path: Path) -> str:
    """What kind of file it is, by its name: ".jsonl" for a.jsonl and for a.jsonl.gz."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def is_data(path: Path) -> bool:
    """Whether the name is that of a data file."""
    return form(path) in SUFFIXES and not (path.suffix in COMPRESSED and form(path) in _PACKED)


def split_columns(name: str) -> tuple[str, str]:
    """("a.jsonl", "prompt=question") of "a.jsonl:prompt=question"; the second is empty where no column is named so."""
    found = _COLUMNS.search(name)
    return (name, "") if found is None or Path(name).exists() else (name[: found.start()], found[0][1:])


def is_pattern(name: str) -> bool:
    """Whether the name is a glob, and no file that just has such a name."""
    return glob.has_magic(name) and not Path(name).exists()


def pattern_folder(name: str) -> Path:
    """The folder of a glob: its parts before the first with a wildcard."""
    parts = Path(name).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def matches(name: str) -> list[Path]:
    """Every file a file name, folder or glob means, sorted by path; hidden ones are left out."""
    path = Path(name)
    if is_pattern(name):
        return sorted(Path(found) for found in glob.glob(name, recursive=True) if Path(found).is_file())
    if not path.is_dir():
        return [path]
    inside = (entry for entry in path.rglob("*") if entry.is_file())
    return sorted(e for e in inside if not any(part.startswith(".") for part in e.relative_to(path).parts))


def data_files(name: str) -> list[Path]:
    """The data files among `matches`, which are the shards of one source, in the order they are read in.

    A file named by itself is one, whatever its ending.

    Raises:
        UserError: a folder or glob without any.
    """
    found = matches(name)
    if not is_pattern(name) and not Path(name).is_dir():
        return found
    files = [path for path in found if is_data(path)]
    if not files:
        kinds = ", ".join(SUFFIXES)
        held = f"{len(found)} other files" if found else "nothing"
        what = "matches" if is_pattern(name) else "holds"
        raise UserError(f"{name}: {what} {held}, but no {kinds} file. Give the folder or the pattern of such files.")
    return files


def left_aside(name: str) -> list[Path]:
    """Files of a folder or glob that are not read, as they are no data files; columns may be named behind it."""
    name, _ = split_columns(name)
    return [path for path in matches(name) if not is_data(path)] if is_pattern(name) or Path(name).is_dir() else []


class Digests:
    """SHA-256 of files, each hashed once per stamp; what other processes noted beside the runs is taken over."""

    def __init__(self, folder: Path | None = None):
        """Args:
        folder: where the note lies; none: this process alone remembers.
        """
        self._noted = _read_note(folder / NOTE) if folder is not None else {}

    def sha256(self, path: Path) -> str:
        """Of the file's bytes.

        Raises:
            UserError: it changes while it is read.
            OSError: it cannot be read.
        """
        for _ in range(2):
            stamp = stamp_of(path)
            noted = self._noted.get(str(path.absolute()))
            if noted is not None and noted[0] == stamp:
                return noted[1]
            digest = _sha256_once(path.absolute(), stamp)
            if stamp_of(path) == stamp:
                return digest
        raise UserError(f"{path}: changes while it is read. Wait until it is whole, then run the same command again.")

    def of_files(self, paths: Iterable[Path]) -> str:
        """One digest for the shards of a source: their contents and forms in reading order, not their names."""
        listing = [(form(path), self.sha256(path)) for path in paths]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


@lru_cache(maxsize=100_000)
def _sha256_once(path: Path, stamp: Stamp) -> str:
    return file_sha256(path)


def _read_note(path: Path) -> dict[str, tuple[Stamp, str]]:
    """path -> (stamp, digest). A note that cannot be read costs time, nothing else: files are hashed again."""
    try:
        values = unsealed(path.read_bytes())
        return {name: (Stamp(*stamp), str(digest)) for name, (stamp, digest) in values.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def note_digests(folder: Path, paths: Iterable[Path]) -> None:
    """Remember the digests of files for later processes, in `folder`. A file that is too new is left out."""
    digests, now = Digests(folder), time.time_ns()
    noted: dict[str, tuple[Stamp, str]] = dict(_read_note(folder / NOTE))
    for path in paths:
        stamp = stamp_of(path)
        if now - max(stamp.modified, stamp.changed) > _SETTLED_NS:
            noted[str(path.absolute())] = (stamp, digests.sha256(path))
    write_sealed(folder / NOTE, noted, durable=False)


class InputGuard:
    """Tells whether files still hold what the run was accepted with.

    Compared by stamp; where a stamp is another one the file is hashed again, so that a file that was merely touched or
    copied is none that changed.
    """

    def __init__(self, files: Mapping[Path, str], digests: Digests | None = None):
        """Args:
        files: SHA-256 of each file when the run was accepted. digests: what is known of files already.
        """
        self.files = dict(files)
        self._digests = digests or Digests()
        self._stamps: dict[Path, Stamp] = {}

    def check(self, paths: Iterable[Path] | None = None) -> None:
        """Look at those of these files that the run was accepted with, or at all.

        Raises:
            UserError: naming the first that changed or is gone.
        """
        for path in list(self.files) if paths is None else paths:
            if path not in self.files:
                continue
            try:
                stamp = stamp_of(path)
                if self._stamps.get(path) == stamp:
                    continue
                found = self._digests.sha256(path)
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be read any more ({error.strerror}). Put it back, then resume."
                ) from None
            if found != self.files[path]:
                raise UserError(
                    f"{path}: changed since this run looked at it, so what is made of it would not be what the run is "
                    "named by. Run the same command again: it takes the file as it is now."
                )
            self._stamps[path] = stamp
