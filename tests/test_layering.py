"""Imports go downwards only, and each heavy library has its own few places. Read from the source, not by importing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("model", "ray_pipeline", "modal_gpu")

# Height of each part; a file may import from its own height or lower. The longest matching prefix counts.
HEIGHT = {
    "model": 0,
    "ray_pipeline": 1,
    "ray_pipeline.costs": 2,
    "ray_pipeline.objectives": 2,
    "ray_pipeline.data": 2,
    "ray_pipeline.reasoning": 2,
    "ray_pipeline.rewards": 2,
    "ray_pipeline.engine": 2,
    "ray_pipeline.rollouts": 2,
    "ray_pipeline.evaluation": 2,
    "ray_pipeline.evaluation.reports": 5,  # in the style of a run's report
    "ray_pipeline.tracking": 2,
    "ray_pipeline.progress": 2,
    "ray_pipeline.training": 3,
    "ray_pipeline.stages": 4,
    "ray_pipeline.stages.base": 1,
    "ray_pipeline.launcher": 4,
    "ray_pipeline.verification": 4,
    "ray_pipeline.serve": 4,
    "ray_pipeline.ledger": 5,
    "ray_pipeline.workflow_plan": 5,
    "ray_pipeline.workflow": 5,
    "ray_pipeline.workflow_view": 5,
    "ray_pipeline.stage_task": 5,
    "ray_pipeline.report": 5,
    "modal_gpu": 6,
    "ray_pipeline.cli": 7,
}

# Library -> prefixes of the modules that may import it.
OWNERS = {
    "ray": (
        "ray_pipeline.local_ray",
        "ray_pipeline.workflow",
        "ray_pipeline.launcher",
        "ray_pipeline.data.ray_",
        "ray_pipeline.rollouts.ray_engine",
        "ray_pipeline.serve",
    ),
    "deepspeed": ("ray_pipeline.engine.zero",),
    "wandb": ("ray_pipeline.tracking",),
    "modal": ("modal_gpu",),
    "click": ("ray_pipeline.cli",),
    "pydantic_settings": ("ray_pipeline.config_load",),
}

# What knows nothing of torch, so that a plan or a refusal is quick.
WITHOUT_TORCH = (
    "model.config",
    "ray_pipeline.config",
    "model.convert.folder",
    "ray_pipeline.config_load",
    "ray_pipeline.config_init_from",
    "ray_pipeline.config_checks",
    "ray_pipeline.config_errors",
    "ray_pipeline.config_sources",
    "ray_pipeline.layout",
    "ray_pipeline.layout_rules",
    "ray_pipeline.layout_choice",
    "ray_pipeline.verification.cases",
    "model.parallel.placement",
    "ray_pipeline.engine.schedule",
    "ray_pipeline.engine.schedule_simulation",
    "ray_pipeline.engine.zero_settings",
    "ray_pipeline.costs.memory",
    "ray_pipeline.costs.picture",
    "ray_pipeline.presets",
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


def height(module: str) -> int:
    parts = module.split(".")
    prefixes = (".".join(parts[:size]) for size in range(len(parts), 0, -1))
    return next(HEIGHT[prefix] for prefix in prefixes if prefix in HEIGHT)


def starts(module: str, prefix: str) -> bool:
    return module.startswith(prefix) if prefix.endswith("_") else module == prefix or module.startswith(prefix + ".")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str) -> None:
    inside = {name for name in imports(MODULES[module]) if name.split(".")[0] in PACKAGES}
    upwards = sorted(name for name in inside if height(name) > height(module))
    assert not upwards, f"{module} imports {upwards}, which stand above it"


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
