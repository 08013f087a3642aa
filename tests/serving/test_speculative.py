"""llama.cpp drafts with a model's MTP module: the same greedy answers; and what cannot draft is refused."""

from __future__ import annotations

import httpx
import pytest
from click.testing import CliRunner

from ray_pipeline.cli.serve import serve
from ray_pipeline.cli.served_model import find_served
from ray_pipeline.errors import UserError
from ray_pipeline.serving.engines import EngineSettings, known_engines
from tests.serving.made_servers import save_drafting, save_model, serving

pytest.importorskip("xllamacpp")


def test_drafts_by_mtp_are_made_and_change_no_greedy_answer(tmp_path):
    path = save_drafting(tmp_path, 1)
    said, drafted = [], []
    for speculative in (False, True):
        settings = EngineSettings(slots=2, threads=1, speculative=speculative)
        running = known_engines()["llamacpp"].start(find_served(str(path), tmp_path), settings)
        with serving(running) as address:
            turns = [[{"role": "user", "content": f"What is {i} + {3 * i}?"}] for i in range(8)]
            bodies = [{"messages": one, "max_tokens": 24, "temperature": 0} for one in turns]
            replies = [httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json() for body in bodies]
        said.append([reply["choices"][0]["message"] for reply in replies])
        drafted.append(sum(reply["timings"].get("draft_n", 0) for reply in replies))
    assert said[0] == said[1]
    assert drafted[0] == 0 < drafted[1]


def test_a_model_without_an_mtp_module_and_an_engine_that_does_not_draft_are_refused(tmp_path):
    served = find_served(str(save_drafting(tmp_path, 0)), tmp_path)
    with pytest.raises(UserError, match="holds no MTP module"):
        known_engines()["llamacpp"].start(served, EngineSettings(2, speculative=True))
    folder = save_model(tmp_path / "hf")
    refused = CliRunner().invoke(serve, [str(folder), "--engine", "native", "--speculative"])
    assert isinstance(refused.exception, UserError) and "Use --engine llamacpp" in str(refused.exception)
