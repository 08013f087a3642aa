"""From raw text to a served R1-like model: a durable Ray DAG of training stages. Importing this package is cheap.

It sees to it that `import model` gives this project's package, wherever Python is started: `python -m` and Ray's
workers put the working folder before everything that is installed, so a `model.py` of a user's would be taken for it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

__version__ = "0.1.0"
FOLDER = Path(__file__).resolve().parent.parent / "model"


def claim_model() -> None:
    """Make `model` the package beside this one; does nothing where it is what would be found anyway.

    Raises:
        ImportError: another `model` is imported already.
    """
    given = sys.modules.get("model")
    if given is not None:
        place = getattr(given, "__file__", None)
        if place is None or Path(place).resolve().parent != FOLDER:
            raise ImportError(
                f"{place}: is imported as `model`, the name of a package of this project. Rename that file or folder, "
                "or import ray_pipeline before it."
            )
        return
    found = importlib.util.find_spec("model")
    if found is not None and found.origin is not None and Path(found.origin).resolve().parent == FOLDER:
        return
    spec = importlib.util.spec_from_file_location(
        "model", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["model"] = module
    spec.loader.exec_module(module)


claim_model()
