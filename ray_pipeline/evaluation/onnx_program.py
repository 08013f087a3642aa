"""onnxruntime as a program that a proof asks: prompts whole, answers token by token behind the graph's cache."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.convert.graph_folder import INPUTS
from model.convert.onnx_file import FILE
from ray_pipeline.evaluation.proof_programs import FolderTokenizer, of_tokens


class OnnxProgram(FolderTokenizer):
    """A folder that `model.convert.onnx_file` wrote; see `proof.Program`."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        import onnxruntime

        self.name = f"onnxruntime {version('onnxruntime')}"
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(folder / FILE, settings, providers=["CPUExecutionProvider"])
        shape = next(one.shape for one in self.session.get_inputs() if one.name == INPUTS[2])
        self.caches, self.width = int(shape[0]), int(shape[3])

    def _run(self, ids: list[int], past: NDArray[Any] | None) -> tuple[NDArray[Any], NDArray[Any]]:
        """Logits of the new tokens [new, vocab_size], and the cache with them."""
        if past is None:
            past = np.zeros((self.caches, 1, 0, self.width), np.float32)
        seen = np.ones((1, past.shape[2] + len(ids)), np.int64)
        given = dict(zip(INPUTS, (np.array([ids], np.int64), seen, past), strict=True))
        logits, present = self.session.run(None, given)
        return logits[0], present

    def logprobs(self, ids: list[int], first: int) -> Tensor:
        """As `Program.logprobs`."""
        logits, _ = self._run(ids, None)
        return torch.from_numpy(logits).log_softmax(-1)[first - 1 : -1]

    def token_logprobs(self, ids: list[int]) -> list[float | None]:
        """As `Program.token_logprobs`."""
        return of_tokens(self.logprobs(ids, 1), ids)

    def greedy(self, prompt: list[int], limit: int) -> list[int]:
        """As `Program.greedy`, with the folder's own end tokens."""
        out: list[int] = []
        new, past = prompt, None
        while len(out) < limit and not (out and self.ends_at(out[-1])):
            logits, past = self._run(new, past)
            new = [int(logits[-1].argmax())]
            out += new
        return out

    def close(self) -> None:
        """Free the weights."""
        del self.session
