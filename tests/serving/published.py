"""Random models of the published classes, saved by transformers, whose routers' choices are clear, and its answers.

In bf16 a token whose best experts score nearly alike may go to another one than in fp32, which moves a log-probability
by nats and says nothing of an engine. With random routers that happens in most answers. So the routers of these models
read a few features that only the embedding writes: which experts a token goes to differs from token to token, needs the
balancing bias, and is decided by margins far above what bf16 moves. The margins are computed with transformers itself
(`margin`), and the test asserts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.convert.folder import describe
from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe

VOCAB = 320
# DeepSeek-V3's own heads (config.json of deepseek-ai/DeepSeek-V3), few and small layers.
V3: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 64,
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "q_lora_rank": 128, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1, "n_group": 4, "topk_group": 2,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True, "max_position_embeddings": 256, "initializer_range": 0.08,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
    "rope_scaling": {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
# V3.2's indexer with as many heads as GGUF wants of it; it reads 16 tokens, fewer than the prompts have.
V32: dict[str, Any] = V3 | {"index_n_heads": 16, "index_head_dim": 128, "index_topk": 16}
ROUTER_SCALE = 16.0
OVERLOOKED = 5  # an expert whom nobody's score would choose
ANSWER = 12  # tokens
LENGTH = 24  # tokens of a prompt
CLEAR = 0.02  # nats between the two likeliest tokens; fp32 in another order moves them by thousandths at most


def save_published(folder: Path, model_type: str, values: dict[str, Any]) -> ChatTokenizer:
    """Random weights, as transformers writes them, with a tokenizer; balancing biases are away from zero.

    Rows of the head are zero for tokens that are no ASCII text: such a logit is 0, below the likeliest ones, so that
    every answer can be compared as text.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = save_trained(train_bpe(["What is the larger of 12 and 34? Solve this and that."] * 20, VOCAB), folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values)).float().eval()
    with torch.no_grad():
        make_choices_clear(model)
        model.lm_head.weight[[i for i in range(VOCAB) if not is_text(tokenizer, i)]] = 0.0
    model.save_pretrained(folder)
    return tokenizer


def make_choices_clear(model: Any) -> None:
    """Feature e of a token's embedding says how much it wants expert e; routers read that, and no layer writes it.

    Of the pairs that are groups, (4, 5) is kept for everybody, by the bias of 5. A token wants one expert of another
    pair, and either that one's neighbour or 4.
    """
    experts = model.config.n_routed_experts
    generator = torch.Generator().manual_seed(1)
    wanted = torch.full((VOCAB, experts), -1.0)
    for row in wanted:
        first = int(torch.tensor([0, 1, 2, 3, 6, 7])[torch.randint(6, (), generator=generator)])
        neighbour, row[first] = first ^ 1, 1.0
        row[neighbour], row[4] = (0.3, -0.3) if torch.rand((), generator=generator) < 0.5 else (-0.3, 0.3)
    model.model.embed_tokens.weight[:, :experts] = 0.2 * wanted
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[:experts] = 0.0
        mlp = layer.mlp
        for down in [mlp] if hasattr(mlp, "down_proj") else [mlp.shared_experts]:
            down.down_proj.weight[:experts] = 0.0
        if hasattr(mlp, "gate"):
            mlp.experts.down_proj[:, :experts] = 0.0
            mlp.gate.weight.zero_()
            mlp.gate.weight[:, :experts] = ROUTER_SCALE * torch.eye(experts)
            mlp.gate.e_score_correction_bias[OVERLOOKED] = 1.5  # chosen by its bias alone, with next to no weight


def is_text(tokenizer: ChatTokenizer, token: int) -> bool:
    """Whether a token is printable ASCII by itself."""
    text = tokenizer.decode([token], keep_special=True)
    return token > 6 and text.isascii() and text.isprintable() and bool(text.strip()) and "<" not in text


@dataclass(frozen=True)
class Reference:
    """transformers' greedy answer to one prompt.

    Attributes:
        logprobs, rounded: [ANSWER, vocab_size], in fp32 and, along the same tokens, in 16 bits.
        margin: of the closest choice of a router along prompt and answer. moved: what 16 bits move a router's score by
            at most.
    """

    prompt: list[int]
    answer: list[int]
    logprobs: Tensor
    rounded: Tensor
    margin: float
    moved: float


def references(folder: Path, tokenizer: ChatTokenizer, count: int) -> list[Reference]:
    """transformers' answers to the first `count` of seeded prompts whose likeliest tokens are nowhere nearly a tie.

    Sparse attention also chooses what it reads, 16 tokens of each query, so often that some choice is always close in
    bf16. Its prompts are those along which the choice survives fp16, as transformers itself computes it: the log-
    probabilities stay where they are. (An engine that keeps keys in fp16 rounds less than that.)
    """
    from transformers import AutoModelForCausalLM

    sparse = describe(folder).config.attention == "dsa"
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for dtype in (torch.float32, torch.float16 if sparse else torch.bfloat16)
    )
    texts = [token for token in range(VOCAB) if is_text(tokenizer, token)]
    generator, out = torch.Generator().manual_seed(0), list[Reference]()
    while len(out) < count:
        prompt = [texts[i] for i in torch.randint(len(texts), (LENGTH,), generator=generator).tolist()]
        found = _reference(exact, rounded, prompt)
        best = found.logprobs.topk(2).values
        kept = not sparse or float((found.logprobs - found.rounded).abs().max()) < CLEAR
        if kept and float((best[:, 0] - best[:, 1]).min()) > CLEAR:
            out.append(found)
    return out


@torch.inference_mode()
def _reference(exact: Any, rounded: Any, prompt: list[int]) -> Reference:
    ids = torch.tensor([prompt])
    whole = exact.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False
    )
    (logprobs, scores), (nearly, moved) = run(exact, whole), run(rounded, whole)
    answered = slice(len(prompt) - 1, -1)
    return Reference(
        prompt, whole[0, len(prompt) :].tolist(), logprobs[answered], nearly[answered],
        min(margin(score, exact.config) for score in scores),
        max(float((a - b).abs().max()) for a, b in zip(scores, moved, strict=True)),
    )  # fmt: skip


def run(model: Any, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities [tokens, vocab_size], and what each router chooses by: [tokens, experts]."""
    scores: list[Tensor] = []
    gates = [m for name, m in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [
        gate.register_forward_hook(
            lambda gate, _, out: scores.append(out[0].float().sigmoid() + gate.e_score_correction_bias.float())
        )
        for gate in gates
    ]
    logits = model(ids).logits[0].float()
    for hook in hooks:
        hook.remove()
    return logits.log_softmax(-1), scores


def margin(scores: Tensor, config: Any) -> float:
    """The least distance, over tokens, between what is chosen and what is not: of groups (halved: a group's score is a
    sum of two) and of experts."""
    grouped = scores.unflatten(-1, (config.n_group, -1))
    groups = grouped.topk(2).values.sum(-1)
    order = groups.sort(descending=True)
    k = config.topk_group
    least = (order.values[:, k - 1] - order.values[:, k]).min() / 2
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order.indices[:, :k], True)
    allowed = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1).sort(descending=True).values
    k = config.num_experts_per_tok
    return float(torch.minimum(least, (allowed[:, k - 1] - allowed[:, k]).min()))
