"""The same DeepSeek-V3 with the same weights, ours and transformers', as functions to be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.convert.names import to_published
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.settings.schema import OptimizerConfig

LR = 1e-4
OPTIMIZER = OptimizerConfig(lr=LR, warmup_steps=0, weight_decay=0.1, grad_clip=1.0)
# The balancing bias moves in ours alone: at rate 0 both stay the same model over several steps.
SHAPES = {
    # The default recipe's model with its vocabulary.
    "tiny": ModelConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_attention_heads=8,
        q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=4,
        num_nextn_predict_layers=0, initializer_range=0.09, router_bias_update_rate=0.0,
    ),
    # 13.7M parameters, 5.7M active.
    "14m": ModelConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=640, moe_intermediate_size=128, num_attention_heads=4,
        q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=16,
        num_experts_per_tok=4, num_nextn_predict_layers=0, max_position_embeddings=2048, router_bias_update_rate=0.0,
    ),
}  # fmt: skip
Step = Callable[[Tensor], float]


def load_libraries(ours: bool) -> None:
    """What `ours_step` or `their_step` would import, so that its memory is not taken for the model's."""
    if ours:
        import ray_pipeline.engine.engine
        import ray_pipeline.objectives.cross_entropy  # noqa: F401
    else:
        from transformers import DeepseekV3ForCausalLM  # noqa: F401


def make_tokens(config: ModelConfig, rows: int, seq_len: int, seed: int) -> Tensor:
    """Random tokens [rows, seq_len]: other ones, and so another routing, at every step."""
    return torch.randint(3, config.vocab_size, (rows, seq_len), generator=torch.Generator().manual_seed(seed))


def build(config: ModelConfig, *, spread: float = 1.0) -> Transformer:
    """The model on the CPU. `spread` widens the weights, so that greedy choices do not hang on rounding."""
    model = Transformer(config)
    init_weights(model, replace(config, initializer_range=config.initializer_range * spread), seed=0)
    return model


def ours_step(config: ModelConfig, precision: str, rows: int, device: str) -> Step:
    """A training step of the engine: tokens [rows, seq_len] -> loss."""
    from model.parallel.mesh import Mesh, MeshSizes
    from ray_pipeline.data.rows.batch import Batch
    from ray_pipeline.engine.engine import Engine
    from ray_pipeline.engine.options import EngineOptions
    from ray_pipeline.objectives.cross_entropy import CrossEntropy

    options = EngineOptions(optimizer=OPTIMIZER, precision=precision, micro_batch=rows, device=torch.device(device))
    engine = Engine(config, Mesh(MeshSizes()), options, initial=build(config).state_dict())
    objective = CrossEntropy()

    def step(tokens: Tensor) -> float:
        labels = torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), -100)], 1)
        return engine.train_step(Batch(tokens, labels, torch.zeros_like(tokens)), objective, LR).loss

    return step


def theirs(config: ModelConfig, model: Transformer, attention: str, experts: str) -> Any:
    """transformers' DeepseekV3 with the model's weights."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from model.convert.hf_config import to_hf

    values = {key: value for key, value in to_hf(config).items() if key not in ("architectures", "model_type")}
    settings = DeepseekV3Config(**values, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    settings._attn_implementation = attention
    peer = DeepseekV3ForCausalLM(settings)
    peer.set_experts_implementation(experts)
    state = peer.state_dict()
    ours = model.state_dict()
    published = to_published(config, ours, mtp=False)
    with torch.no_grad():
        for name, tensor in state.items():
            stacked = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
            tensor.copy_(ours[name.removeprefix("model.")] if stacked else published[name])
    return peer


def their_step(config: ModelConfig, precision: str, attention: str, experts: str, device: str) -> Step:
    """The same step as a plain loop: autocast in bf16, clipped, fused AdamW that decays matrices alone."""
    peer = theirs(config, build(config), attention, experts).to(device).train()
    named = dict(peer.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in named.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, fused=True)

    def step(tokens: Tensor) -> float:
        tokens = tokens.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = peer(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), OPTIMIZER.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def ours_decode(config: ModelConfig, dtype: torch.dtype, new: int, device: str) -> Callable[[Tensor], Tensor]:
    """Greedy continuation: prompts [rows, n] -> tokens [rows, new]."""
    from model.generate.decode import Decoder, generate

    model = build(config, spread=3.0).to(device).eval()
    for parameter in model.parameters():  # not `.to(dtype)`, which would make the complex rotary table real
        parameter.data = parameter.data.to(dtype)
    decoder = Decoder(model)

    def decode(prompts: Tensor) -> Tensor:
        done = generate(decoder, prompts.tolist(), max_new_tokens=new, eos_ids=set(), temperature=0.0)
        return torch.tensor([completion.tokens for completion in done])

    return decode


def their_decode(
    config: ModelConfig, dtype: torch.dtype, new: int, attention: str, experts: str, device: str
) -> Callable[[Tensor], Tensor]:
    """transformers' own `generate`."""
    peer = theirs(config, build(config, spread=3.0), attention, experts).to(device, dtype).eval()

    def decode(prompts: Tensor) -> Tensor:
        prompts = prompts.to(device)
        out = peer.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, eos_token_id=None, pad_token_id=2,
        )  # fmt: skip
        return out[:, prompts.shape[1] :].cpu()

    return decode
