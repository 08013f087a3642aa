"""Which models the engine vllm takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from model.config import ModelConfig
from ray_pipeline.errors import UserError
from ray_pipeline.serving.engines import ServedModel, choose_engine, known_engines, preference
from ray_pipeline.serving.vllm_engine import has_latent_sizes, unservable
from tests.serving.made_servers import save_model

PUBLISHED = ModelConfig(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)


@pytest.mark.parametrize(
    ("changed", "reason", "reason_on_gpu"),
    [
        ({}, None, None),
        ({"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False}, None, None),
        ({"attention": "dsa"}, "no sparse attention", None),
        ({"position": "cope"}, "no transformers class has position=cope", "position=cope"),
        ({"recursion_depth": 2}, "recursion_depth=2", "recursion_depth=2"),
        ({"kv_lora_rank": 64}, None, None),
        ({"qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 32}, None, None),
        ({"qk_nope_head_dim": 32, "qk_rope_head_dim": 8, "v_head_dim": 32}, "this model's have 40", None),
        ({"qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 64}, "v_head_dim to be at most", "at most"),
        ({"attention": "dsa", "kv_lora_rank": 64}, "no sparse", "kernels for MLA know 512, 64, 128, 128 alone"),
    ],
)
def test_what_vllm_can_run(changed, reason, reason_on_gpu):
    config = replace(PUBLISHED, **changed)
    for has_gpu, expected in ((False, reason), (True, reason_on_gpu)):
        found = unservable(config, has_gpu=has_gpu)
        assert (found is None) == (expected is None) and (expected or "") in (found or "")


def test_sizes_of_the_latent_kernels_are_the_published_ones():
    assert has_latent_sizes(PUBLISHED)
    assert not has_latent_sizes(replace(PUBLISHED, v_head_dim=64))


def test_a_refusal_says_why_and_names_an_engine_that_can(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from ray_pipeline.cli.served_model import find_served

    served = find_served(str(save_model(tmp_path / "served" / "hf")), tmp_path / "runs")
    engines, order = known_engines(), preference(has_gpu=True)
    assert order[0] == "vllm"
    with pytest.raises(
        UserError, match=r"vllm cannot serve hf: it is not installed: .* engine add vllm\. Use --engine"
    ):
        choose_engine(served, "vllm", engines, order)
    assert choose_engine(served, "auto", engines, order).name != "vllm"
    gguf = ServedModel("m", None, Path("m.gguf"), None)
    assert "not .gguf files" in (engines["vllm"].why_not(gguf) or "")
