"""A model as an ONNX graph with its tokenizer beside it: what onnxruntime runs on machines without torch.

`torch.onnx` writes the graph of `graph_decoder`, one for prompts and for single tokens. Its weights keep the names of
our modules and every bit, so that they can be read back.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from model.convert.graph_decoder import GraphDecoder
from model.convert.graph_folder import INPUTS, OUTPUTS, dynamic_sizes, example, graph_notes, quiet, save_beside
from model.transformer import Transformer

FILE = "model.onnx"
OPSET = 20  # of 2024; every onnxruntime since 1.17 runs it
_PREFIX = "model."  # of the decoder's parameters in the graph
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def onnx_missing() -> str | None:
    """What has to be installed before a graph can be written and run; None where nothing is missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)}: pip install 'ray-pipeline[onnx]'" if missing else None


def save_onnx(folder: Path, model: Transformer, *, tokenizer_folder: Path, model_card: str) -> list[str]:
    """Fill `folder` with model.onnx (weights beside it in model.onnx.data), config, tokenizer and model card.

    Args:
        model: on the CPU in fp32.
    Returns:
        What is in the file otherwise than in the model, a sentence each.
    """
    config = model.config
    with quiet("torch.onnx"):
        program = torch.onnx.export(
            GraphDecoder(model).eval(), example(config), input_names=list(INPUTS), output_names=list(OUTPUTS),
            dynamic_shapes=dynamic_sizes(), dynamo=True, opset_version=OPSET,
            optimize=False,  # it would fold weights into others; onnxruntime does so when it loads them
        )  # fmt: skip
    assert program is not None
    program.save(folder / FILE, external_data=True)
    save_beside(folder, config, tokenizer_folder, model_card)
    return graph_notes(config)


def read_onnx(folder: Path) -> dict[str, Tensor]:
    """The weights in the file, under the names of our modules."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(folder / FILE).graph
    return {
        one.name.removeprefix(_PREFIX): torch.from_numpy(numpy_helper.to_array(one).copy())
        for one in graph.initializer
        if one.name.startswith(_PREFIX)
    }
