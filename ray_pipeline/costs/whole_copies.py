"""Whole copies of models that a rank holds beside its share of training: to start from, to sample and evaluate with, to
save. In fp32, whatever training computes in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from model.config import ModelConfig
from ray_pipeline.layout.layout import Layout
from ray_pipeline.settings.chain import is_top_k, reads_folder, reads_teacher
from ray_pipeline.settings.schema import PipelineFields

FP32 = 4  # bytes
FEWEST_ROWS, MOST_ROWS = 64, 256  # answers that one sampler decodes together (`rollouts.engine`)


@dataclass(frozen=True)
class WholeCopies:
    """Bytes by name.

    Attributes:
        device: where a rank computes, during the whole of training. sampling: there too, between training steps.
        before: there too, before training, without it.
        host: in every rank's CPU memory. once: in CPU memory of the first node, whatever its number of ranks.
    """

    device: dict[str, int] = field(default_factory=dict)
    sampling: dict[str, int] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    once: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.device or self.before or self.host or self.once)


def whole_copies(config: PipelineFields, stage: str, model: ModelConfig, layout: Layout) -> WholeCopies:
    """What training stage `stage` holds of `model`, which it trains, and of its teacher.

    With `layout.sampling: sharded` answers are written with the weights that are trained, which takes the cache alone,
    but where ZeRO 3 has to bring a rank's slices together first.
    """
    size = FP32 * model.num_params()
    host: dict[str, int] = {}
    once = {"tensor that is written": FP32 * largest_piece(model, layout.ep)}
    cut = layout.pp * layout.tp * layout.ep
    if stage == "pretrain":
        return WholeCopies(host=host | ({"given weights": size} if reads_folder(config, stage) else {}), once=once)
    sharded = config.layout.sampling == "sharded"
    if not sharded:
        host["gathered weights"] = size
    on_device = {} if sharded else {"whole model": size, "its weights for decoding": decoding_bytes(model)}
    before: dict[str, int] = {}
    if reads_folder(config, stage):  # else tensor by tensor from the stage before
        host["weights at the start"] = size
    if stage == "distillation" and reads_teacher(config) and not is_top_k(config.distillation.teacher):
        teacher = FP32 * config.model.num_params()
        if config.distillation.teacher is not None:
            host["teacher's weights"] = teacher
        if config.distillation.teacher_answers and sharded:
            before = {"teacher": -(-teacher // cut)}
        elif config.distillation.teacher_answers:
            before = {"teacher": teacher, "its weights for decoding": decoding_bytes(config.model)}
    workers = config.grpo.rollout.workers if stage == "grpo" else 0
    if workers:
        once["weights on their way to samplers"] = size
        if layout.device == "cpu":
            once["samplers"] = workers * (size + decoding_bytes(model))
    sampling = {"cache of answers": _cache_bytes(config, model)} if stage == "grpo" and not workers else {}
    if sharded:
        sampling = {name: -(-bytes_ // layout.pp) for name, bytes_ in sampling.items()}  # of its own layers
        if layout.zero_stage == 3:
            sampling["weights to answer with"] = -(-size // cut)
    return WholeCopies(on_device, sampling, before, host, once)


def largest_piece(model: ModelConfig, ep: int) -> int:
    """Numbers that are written at once: the embedding, or what an expert-parallel rank has of a layer's experts."""
    experts = 2 * model.n_routed_experts // ep * model.moe_intermediate_size
    return model.hidden_size * max(model.vocab_size, experts, model.intermediate_size)


def decoding_bytes(model: ModelConfig) -> int:
    """Weights once more, laid out for decoding: all but the embeddings and the MTP modules."""
    tables = model.vocab_size * model.hidden_size + _value_layers(model) * model.value_table_params
    return FP32 * (model.num_params(mtp=False) - tables)


def _value_layers(model: ModelConfig) -> int:
    return sum(map(model.has_value_embedding, range(model.num_hidden_layers)))


def _cache_bytes(config: PipelineFields, model: ModelConfig) -> int:
    """Keys and values, or latents, of the answers that are decoded together; prompts are taken to be as long."""
    grpo = config.grpo
    rows = min(max(grpo.prompts_per_step * grpo.group_size, FEWEST_ROWS), MOST_ROWS)
    latent = model.attention in ("mla", "dsa")
    if latent:  # and, of heads that a value embedding adds to, what it adds
        width = model.num_hidden_layers * (model.kv_lora_rank + model.qk_rope_head_dim)
        width += _value_layers(model) * model.num_attention_heads * model.v_head_dim
    else:
        width = model.num_hidden_layers * model.num_kv_heads * (model.qk_head_dim + model.value_head_dim)
    return FP32 * rows * min(config.data.seq_len, 2 * grpo.max_new_tokens) * width


def gathering_bytes(held: int, ranks: Sequence[int], *, cut: bool, zero_3: bool) -> int:
    """What a rank needs on its device while the whole model is brought together, besides what it holds.

    Args:
        held: its weights before ZeRO. ranks: whole weights of each pipeline rank. All in bytes.
        cut: tensor or expert parallelism: parts are joined among their ranks first.
    """
    largest = max(ranks)
    joined = held + 2 * largest if cut else largest if len(ranks) > 1 else 0
    return joined + (held if zero_3 else 0)
