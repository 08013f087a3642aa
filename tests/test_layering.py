"""Imports go downwards only, and each heavy library has its own few places. Read from the source, not by importing."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("model", "ray_pipeline", "modal_gpu")

MOST_ROOMS = 30
MOST_LINES, FEWEST_LINES = 300, 40

# A verb, a reward and a formula have a file each, however short; so do these.
SHORT = {
    # one mechanism, as its paper has it
    "model.attention.sliding": "arXiv:2004.05150",
    "model.layers.feed_forward": "arXiv:2002.05202",
    "model.recursion": "arXiv:2510.04871",
    "model.layers.residual": "arXiv:2402.02622",
    # one device's form of one operation: `model.kernels.operations` lists them
    "model.kernels.cpu.fast_softmax": "softmax_loss",
    "model.kernels.cuda.fused_attention": "attention",
    "ray_pipeline.engine.zero_settings": "numbers that the engine and `plan` share, without torch",
    "ray_pipeline.isolation.judge": "its text alone is sent to the confined process that runs tests",
}

# Library -> prefixes of the modules that may import it.
OWNERS = {
    "ray": (
        "ray_pipeline.dag.workflow",
        "ray_pipeline.dag.sweeps.suggestions",
        "ray_pipeline.dag.sweeps.tuning",
        "ray_pipeline.launch",
        "ray_pipeline.data.text.ray_prepare",
        "ray_pipeline.rollouts.ray_engine",
        "ray_pipeline.serving.ray_replicas",
    ),
    "deepspeed": ("ray_pipeline.engine.zero",),
    "wandb": ("ray_pipeline.records.trackers.wandb_tracker",),
    "trackio": ("ray_pipeline.records.trackers.trackio_tracker",),
    "tensorboardX": ("ray_pipeline.records.trackers.tensorboard_tracker",),
    "mlflow": ("ray_pipeline.records.trackers.mlflow_tracker",),
    "textual": ("ray_pipeline.cli.dashboard",),
    "optuna": ("ray_pipeline.dag.sweeps.suggestions",),
    "modal": ("modal_gpu",),
    "click": ("ray_pipeline.cli",),
    "pydantic_settings": ("ray_pipeline.settings.loading",),
}

# What knows nothing of torch, so that a plan or a refusal is quick.
WITHOUT_TORCH = (
    "model.config",
    "ray_pipeline.settings.schema",
    "model.convert.folder",
    "ray_pipeline.settings.loading",
    "ray_pipeline.settings.init_from",
    "ray_pipeline.settings.checks",
    "ray_pipeline.settings.messages",
    "ray_pipeline.settings.layers",
    "ray_pipeline.layout.layout",
    "ray_pipeline.layout.rules",
    "ray_pipeline.layout.choice",
    "ray_pipeline.verification.cases",
    "model.parallel.grid",
    "model.parallel.placement",
    "ray_pipeline.engine.pipeline.schedule",
    "ray_pipeline.engine.pipeline.schedule_simulation",
    "ray_pipeline.engine.zero_settings",
    "ray_pipeline.costs.memory",
    "ray_pipeline.costs.picture",
    "ray_pipeline.settings.layout_config",
    "ray_pipeline.settings.presets",
    "ray_pipeline.errors",
)


def modules() -> dict[str, Path]:
    out = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


MODULES = modules()


def imports(path: Path, *, at_run_time: bool = True) -> set[str]:
    """Modules a file imports anywhere in it; what stands under TYPE_CHECKING counts only with at_run_time=False."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden: set[int] = set()
    for node in ast.walk(tree):
        if at_run_time and isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            hidden |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            # `from model import config` names a module too
            found |= {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in MODULES}
    return found


def starts(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def inside(module: str) -> set[str]:
    """Modules of this project that one imports when it runs, in functions too; a package's own name is none."""
    found = {name for name in imports(MODULES[module]) if name in MODULES}
    return {name for name in found if not any(other.startswith(name + ".") for other in found)}


def room(module: str) -> str:
    """The folder below a package; a file that lies in the package itself counts as a room of its own here."""
    parts = module.split(".")
    return parts[0] if parts[0] == "modal_gpu" else ".".join(parts[:2])


def leaf_room(module: str) -> str:
    """The innermost folder; a file beside folders counts as a room of its own."""
    folder, _, _ = module.rpartition(".")
    mixed = folder in PACKAGES or any(name.startswith(folder + ".") and name.count(".") > folder.count(".") + 1
                                      for name in MODULES)  # fmt: skip
    return module if mixed or MODULES[module].name == "__init__.py" else folder


def arrows(name_of: Callable[[str], str]) -> dict[str, set[str]]:
    """Room -> rooms it imports from."""
    out: dict[str, set[str]] = {}
    for module in MODULES:
        to = {name_of(name) for name in inside(module)} - {name_of(module)}
        out.setdefault(name_of(module), set()).update(to)
    return out


def mapped_rooms() -> list[str]:
    """The rooms in the order of the README's map."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Map of the code")[2].split("```")[1]
    out, package = [], ""
    for line in text.strip().splitlines():
        names = re.findall(r"^ *([a-z_]+)/ (?:([a-z_]+)/ )?", line)[0]
        if line.startswith(" "):
            out += [f"{package}.{name}" for name in names if name]
        else:
            package = names[0]
    return out


@pytest.mark.parametrize("name_of", [room, leaf_room])
def test_no_circle_of_rooms(name_of: Callable[[str], str]) -> None:
    waiting = arrows(name_of)
    while free := [name for name, to in waiting.items() if not to & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert not waiting, f"a circle: { ({name: sorted(to & waiting.keys()) for name, to in waiting.items()}) }"


def test_the_map_has_every_room_and_imports_go_down_it() -> None:
    order = mapped_rooms()
    folders = {room(name) for name, path in MODULES.items() if name.count(".") > 1 or path.name == "__init__.py"}
    assert set(order) == {name for name in folders if "." in name}
    assert len(order) + 1 <= MOST_ROOMS  # and modal_gpu
    upwards = [
        (name, other)
        for name, to in arrows(room).items()
        for other in to
        if name in order and other in order and order.index(other) < order.index(name)
    ]
    assert not upwards


def test_a_package_holds_folders_and_few_files_of_its_own() -> None:
    assert len(list((ROOT / "ray_pipeline").glob("*.py"))) <= 3


def test_files_are_neither_long_nor_over_split() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}
    homes = ("ray_pipeline.cli", "ray_pipeline.rewards", "ray_pipeline.objectives")  # verbs, rewards, formulas
    short = {name for name, count in lines.items() if count < FEWEST_LINES and MODULES[name].name != "__init__.py"}
    assert {name for name in short if not any(starts(name, home) for home in homes)} == SHORT.keys()


def test_no_two_files_share_a_name() -> None:
    stems: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        if path.name not in ("__init__.py", "__main__.py"):
            stems.setdefault(path.stem, []).append(name)
    allowed = ("ray_pipeline.cli", "ray_pipeline.stages")  # a verb and what it shows, a stage and its objective
    shared = {stem: names for stem, names in stems.items() if len([n for n in names if not n.startswith(allowed)]) > 1}
    assert not shared


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("model")])
def test_the_model_knows_nothing_of_the_pipeline(module: str) -> None:
    roots = {name.split(".")[0] for name in imports(MODULES[module], at_run_time=False)}
    assert not roots & {"ray_pipeline", "modal_gpu", "ray", "deepspeed", "wandb"}


@pytest.mark.parametrize("library", OWNERS)
def test_a_heavy_library_is_imported_by_its_owners_alone(library: str) -> None:
    users = {module for module, path in MODULES.items() if any(starts(name, library) for name in imports(path))}
    strangers = sorted(module for module in users if not any(starts(module, owner) for owner in OWNERS[library]))
    assert not strangers, f"{library} is imported by {strangers}"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_settings_do_not_import_torch(module: str) -> None:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in MODULES:
            continue
        seen.add(name)
        found = imports(MODULES[name])
        assert not {part.split(".")[0] for part in found} & {"torch", "ray", "transformers"}, f"{module} through {name}"
        waiting += found


def test_every_package_folder_is_a_package() -> None:
    folders = {path.parent for path in MODULES.values()}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
