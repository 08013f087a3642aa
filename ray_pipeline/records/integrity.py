"""Whether files are still what was written: records that carry their own checksum, and manifests that list files'.

Every file of a run that is read again is held against its SHA-256 when it is opened. A stamp of its size and times,
kept on this machine until it starts again, saves the next process from reading it twice: each node of a cluster checks
what it opens, once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray_pipeline.errors import UserError, resume_command
from ray_pipeline.settings.run_folder import MANIFEST, RECORD

MANIFEST_FORMAT = 1  # of a manifest; one without a number is of before they had one
SEAL = "seal"  # key of a record's own SHA-256
_CHUNK = 1 << 22
_THREADS = 4  # files hashed side by side; hashing leaves Python's lock alone
# A file that changes twice within its clock's tick keeps its times: no stamp is given to one changed just now.
_SETTLED_SECONDS = 2.0
_LEVELS = 3  # folders above a file in which its manifest is looked for


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a SHA-256 of its contents under `seal`, which `read_sealed` holds it against."""
    plain = {key: entry for key, entry in json.loads(json.dumps(value)).items() if key != SEAL}
    return {**plain, SEAL: _contents_sha256(plain)}


def _contents_sha256(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_sealed(path: Path, way_out: str) -> dict[str, Any]:
    """A record that `artifacts.write_sealed` wrote, without its seal. One of an older version has none.

    Raises:
        UserError: missing, cannot be read, or damaged; with `way_out`, a sentence that says what to do.
    """
    try:
        return unsealed(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. {way_out}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {way_out}") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}). {way_out}") from None


def unsealed(text: bytes) -> dict[str, Any]:
    """The record in a file's bytes, without its seal.

    Raises:
        ValueError: no JSON object, or other contents than were sealed.
    """
    try:
        value = json.loads(text.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    seal = value.pop(SEAL, None)
    if seal is not None and seal != _contents_sha256(value):
        raise ValueError("its contents are not those its own checksum was made of")
    return value


def verify_folder(folder: Path) -> None:
    """Hold every file against the folder's manifest.

    Raises:
        UserError: naming the first file that is missing or damaged, or the manifest itself.
    """
    if found := damage(folder):
        raise UserError(f"{found}. Delete {folder} and resume: it is made again, or an older checkpoint is taken.")


def damage(folder: Path, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the first file that is not as the manifest says; None where all is well.

    Args:
        share: (index, count): look at every count-th file alone, so that several ranks can share the work.
    """
    if not (folder / MANIFEST).is_file():
        return f"{folder / MANIFEST}: missing, so {folder.name} was not written to its end"
    try:
        files = manifest_files(folder)
    except ValueError as error:
        return f"{folder / MANIFEST}: damaged ({error})"
    index, count = share
    names = sorted(files)[index::count]
    return files_damage(folder, {name: files[name] for name in names}, stamped=count == 1)


def manifest_files(folder: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 and bytes of each file that the folder's manifest lists, by relative path.

    Raises:
        ValueError: it is damaged, or is no manifest of this program's.
    """
    try:
        found = unsealed((folder / MANIFEST).read_bytes())
        if found.get("format", 1) != MANIFEST_FORMAT:
            raise ValueError(f"format {found['format']!r} is not the {MANIFEST_FORMAT} that this version reads")
        listed = found["files"]
        return {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in listed.items()}
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it lists no files: {error!r}") from None


def files_damage(folder: Path, files: Mapping[str, tuple[str, int]], *, stamped: bool = True) -> str | None:
    """What is wrong with the first of `files`, name -> (SHA-256, bytes); None where they are as they were written.

    Args:
        stamped: trust stamps of earlier readings on this machine, and leave new ones.
    """
    for name, (_, size) in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            return f"{path}: missing; the manifest lists it"
        if path.stat().st_size != size:
            return f"{path}: damaged: {path.stat().st_size} bytes, written were {size}"
    try:
        return _contents_damage(folder, files, _stamp_file(folder) if stamped else None)
    except OSError as error:
        return f"{error.filename}: cannot be read ({error.strerror})"


def _contents_damage(folder: Path, files: Mapping[str, tuple[str, int]], store: Path | None) -> str | None:
    if not _unstamped(folder, files, _read_stamps(store)):
        return None
    if store is None:
        return _first_changed(folder, files)[0]
    with store.open("a") as lock:
        # One process of this machine reads, the others wait for its stamps.
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamps = _read_stamps(store)
        changed, read = _first_changed(folder, _unstamped(folder, files, stamps))
        if read:
            with suppress(OSError):  # a full disk costs a second reading
                store.write_text(json.dumps(stamps | read), encoding="utf-8")
        return changed


def _first_changed(folder: Path, files: Mapping[str, tuple[str, int]]) -> tuple[str | None, dict[str, list[Any]]]:
    """What is wrong with the first file whose contents changed, and stamps of those whose did not."""

    def stamp(item: tuple[str, tuple[str, int]]) -> list[Any] | None:
        name, (sha256, _) = item
        before = _times(folder / name)
        return [*before, sha256] if file_sha256(folder / name) == sha256 else None

    items = sorted(files.items())
    with ThreadPoolExecutor(_THREADS) as threads:
        stamps = dict(zip((name for name, _ in items), threads.map(stamp, items), strict=True))
    changed = next((name for name, found in stamps.items() if found is None), None)
    newest = (time.time() - _SETTLED_SECONDS) * 1e9
    settled = {name: found for name, found in stamps.items() if found is not None and max(found[1:3]) < newest}
    if changed is None:
        return None, settled
    return f"{folder / changed}: damaged: its SHA-256 is not the one in the manifest", settled


def _times(path: Path) -> list[int]:
    """What changes when a file does, unless its disk lies."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _unstamped(
    folder: Path, files: Mapping[str, tuple[str, int]], stamps: Mapping[str, Any]
) -> dict[str, tuple[str, int]]:
    return {name: entry for name, entry in files.items() if stamps.get(name) != [*_times(folder / name), entry[0]]}


def _stamp_file(folder: Path) -> Path | None:
    """Where the stamps of a folder's files are; None where this machine has no place that only this user writes to."""
    store = Path(tempfile.gettempdir()) / f"ray-pipeline-{os.getuid()}"
    try:
        store.mkdir(mode=0o700, exist_ok=True)
        found = store.lstat()
    except OSError:
        return None
    if not store.is_dir() or store.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o022:
        return None
    return store / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.json"


def _read_stamps(store: Path | None) -> dict[str, Any]:
    try:
        found = json.loads(store.read_text(encoding="utf-8")) if store is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def own_damage(folder: Path) -> str | None:
    """As `damage`, of a folder that this program wrote; None where somebody else did, who kept no manifest of ours."""
    if not (folder / MANIFEST).is_file() or _is_foreign(folder / MANIFEST):
        return None
    return damage(folder)


def verify_files(folder: Path, names: Iterable[str]) -> None:
    """Hold some files of a folder against the manifest that lists them: the folder's own, or one above it.

    Files that no manifest lists are somebody else's, and taken as they are.

    Raises:
        UserError: naming the file that is missing or damaged, or the manifest; with what to do.
    """
    folder, wanted = folder.absolute(), list(names)
    for top in (folder, *list(folder.parents)[: _LEVELS - 1]):
        if not (top / MANIFEST).is_file():
            continue
        inside = folder.relative_to(top)
        try:
            files = manifest_files(top)
        except ValueError as error:
            if _is_foreign(top / MANIFEST):
                continue
            raise UserError(f"{top / MANIFEST}: damaged ({error}). {make_again(top)}") from None
        listed = {str(inside / name): files[str(inside / name)] for name in wanted if str(inside / name) in files}
        if listed:
            if found := files_damage(top, listed):
                raise UserError(f"{found}. {make_again(top)}")
            return


def _is_foreign(manifest: Path) -> bool:
    """Whether another program wrote a file of this name: nothing in it looks like a checksum of ours."""
    try:
        text = manifest.read_bytes()
    except OSError:
        return False
    return b'"files"' not in text and b'"sha256"' not in text


def make_again(folder: Path) -> str:
    """What to do about a damaged file of `folder`."""
    if (folder / RECORD).is_file():
        stage, run = folder.name.rpartition("-")[0] or folder.name, folder.parent
        return f"Make it again with `{resume_command(run, '--stage', stage)}`."
    return f"Make {folder} again, or put back a copy of the file."


def refuse_foreign_folder(folder: Path) -> None:
    """Refuse to replace anything but an empty folder, or one whose every file its own manifest lists.

    Raises:
        UserError: naming the first file that this program did not write.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: is no folder, and is not replaced by one. Give another path, or move it away.")
    found = sorted(path for path in folder.rglob("*") if not path.is_dir()) if folder.is_dir() else []
    if not found:
        return
    try:
        listed = {folder / name for name in manifest_files(folder)} | {folder / MANIFEST}
    except ValueError:
        listed = set()
    foreign = next((path for path in found if path not in listed), None)
    if foreign is not None:
        raise UserError(
            f"{folder}: holds {foreign.relative_to(folder)}, which no whole {MANIFEST} of this program there lists, so "
            "the folder is not replaced. Give another path, or move it away."
        )
