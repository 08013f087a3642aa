"""Which models the engine vllm takes, and what it answers with where it is installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from model.config import ModelConfig
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.errors import UserError
from ray_pipeline.serving.engines import ServedModel, choose_engine, known_engines, preference
from ray_pipeline.serving.environments import installed
from ray_pipeline.serving.vllm_engine import has_latent_sizes, unservable
from tests.serving.made_servers import save_model, serving, start

ROUNDING = 0.125  # logits from 8 to 16, as this model's are, lie 1/16 apart in bf16: two steps
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


def save_by_transformers(folder: Path) -> Path:
    """A random DeepSeek-V3 of few layers with the published head sizes, as transformers saves it."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    save_trained(train_bpe(["What is the larger of 12 and 34? Solve this and that."] * 20, 320), folder)
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=320, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=3,
        first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=128, n_routed_experts=8,
        num_experts_per_tok=2, n_group=2, topk_group=1, max_position_embeddings=256, initializer_range=0.1,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.05)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(installed("vllm") is None, reason="needs `engine add vllm`")
def test_greedy_tokens_and_log_probabilities_are_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = save_by_transformers(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = load_tokenizer(folder)
    with serving(start(folder, "vllm")) as address:
        process = psutil.Process().children(recursive=True)
        checked = 0
        for number in range(6):
            prompt = tokenizer.encode(f"What is {number} + {3 * number}? Solve")
            body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 0, "return_token_ids": True}
            answer = httpx.post(f"{address}/v1/completions", json=body, timeout=120).json()["choices"][0]
            tokens = answer["token_ids"]
            row = torch.tensor([prompt + tokens])
            with torch.no_grad():
                wanted = model(row).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            best = wanted.topk(2).values
            clear = best[:, 0] - best[:, 1] > ROUNDING
            assert torch.equal(wanted.argmax(-1)[clear], torch.tensor(tokens)[clear])
            found = torch.tensor(answer["logprobs"]["token_logprobs"])
            assert (found - wanted.gather(1, torch.tensor(tokens)[:, None])[:, 0]).abs().max() < ROUNDING
            checked += int(clear.sum())
        assert checked > 30
        chat = {"messages": [{"role": "user", "content": "What is 4 + 3?"}], "max_tokens": 8, "n": 2, "seed": 3}
        reply = httpx.post(f"{address}/v1/chat/completions", json=chat, timeout=120).json()
        assert len(reply["choices"]) == 2 and reply["usage"]["completion_tokens"] <= 16
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
        assert httpx.post(f"{address}/v1/chat/completions", json=chat | {"tools": [tool]}, timeout=120).is_success
        long = {"messages": [{"role": "user", "content": "abc " * 300}]}
        refused = httpx.post(f"{address}/v1/chat/completions", json=long, timeout=120)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    assert process and not psutil.wait_procs(process, timeout=20)[1]
