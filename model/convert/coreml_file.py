"""A model as a Core ML package with its tokenizer beside it, converted and inspected on any machine.

`coremltools` converts the graph of `graph_decoder`; nothing but macOS and iOS runs the result.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.convert.graph_decoder import GraphDecoder
from model.convert.graph_folder import INPUTS, OUTPUTS, dynamic_sizes, example, graph_notes, quiet, save_beside
from model.transformer import Transformer

PACKAGE = "model.mlpackage"
_SETTING = "weights have 32 bits and are multiplied in fp32"
_LEAST = (
    "two new tokens and two old ones at least, as torch.export leaves sizes free: fill up with tokens whose "
    "attention_mask is 0, before the others"
)


class NotConvertible(ValueError):
    """coremltools has no form of an operation; the message says of which."""


def coreml_missing() -> str | None:
    """What has to be installed before a package can be written; None where nothing is missing."""
    found = importlib.util.find_spec("coremltools") is not None
    return None if found else "coremltools: pip install 'ray-pipeline[coreml]'"


def converter() -> str:
    """What converts, with its version."""
    return f"coremltools {version('coremltools')}"


def save_coreml(folder: Path, model: Transformer, *, tokenizer_folder: Path, model_card: str) -> list[str]:
    """Fill `folder` with model.mlpackage, config, tokenizer and model card, and inspect the package.

    Args:
        model: on the CPU in fp32.
    Returns:
        What one has to know of the package, a sentence each.
    Raises:
        NotConvertible: an architecture that coremltools cannot express.
        RuntimeError: the package does not hold what was converted.
    """
    with quiet("coremltools"):
        import coremltools

        rows = [{axis: free for axis, free in sizes.items() if axis > 0} for sizes in dynamic_sizes()]
        rows[2].pop(1)  # one conversation
        exported = torch.export.export(
            GraphDecoder(model).eval(), example(model.config, batch=1), dynamic_shapes=tuple(rows)
        )
        try:
            converted = coremltools.convert(
                exported.run_decompositions({}),
                outputs=[coremltools.TensorType(name=name) for name in OUTPUTS],
                minimum_deployment_target=coremltools.target.iOS18,
                compute_precision=coremltools.precision.FLOAT32,
            )
        except NotImplementedError as error:
            raise NotConvertible(f"{converter()} cannot express this architecture: {error}") from None
        converted.save(str(folder / PACKAGE))
        inspect(folder / PACKAGE, model)
    save_beside(folder, model.config, tokenizer_folder, model_card)
    return [*graph_notes(model.config), _SETTING, _LEAST, *_untested()]


def inspect(package: Path, model: Transformer) -> None:
    """Read a package back as far as another machine than a Mac can.

    Raises:
        RuntimeError: other inputs, outputs or weights than the model's.
    """
    import coremltools

    spec = coremltools.models.MLModel(str(package), skip_model_load=True).get_spec()
    found = tuple(one.name for one in spec.description.input), tuple(one.name for one in spec.description.output)
    if found != (INPUTS, OUTPUTS):
        raise RuntimeError(f"{package.name} has inputs and outputs {found}, not {(INPUTS, OUTPUTS)}")
    held = _constants(package, spec)
    ours = {"p_model_" + name.replace(".", "_"): value for name, value in model.state_dict().items()}
    if "p_model_lm_head_weight" not in held:
        raise RuntimeError(f"{package.name} does not hold the output matrix by its name")
    for name in held.keys() & ours.keys():
        if not torch.equal(held[name], ours[name]):
            raise RuntimeError(f"{package.name}: {name} is not the model's")


def _constants(package: Path, spec: Any) -> dict[str, Tensor]:
    from coremltools.converters.mil.frontend.milproto.load import load

    weights = package / "Data" / "com.apple.CoreML" / "weights"
    program = load(spec, spec.specificationVersion, str(weights))
    constants = program.functions["main"].find_ops(op_type="const")
    return {
        one.outputs[0].name: torch.from_numpy(one.outputs[0].val.copy())
        for one in constants
        if getattr(one.outputs[0].val, "ndim", 0) > 0
    }


def _untested() -> list[str]:
    from coremltools import _deps

    newest = str(getattr(_deps, "_TORCH_MAX_VERSION", ""))
    tested = newest and torch.__version__.split("+")[0] == newest
    return [] if tested else [f"{converter()} was tested with torch up to {newest}, this is {torch.__version__}"]
