"""A model as one GGUF file, which llama.cpp runs: names in `gguf_tensors`, types in `gguf_mix`, tokenizer beside it.

The `gguf` package is imported when a file is written, llama.cpp's quantiser when a kind needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig
from model.convert.export_kinds import KINDS, GgufKind
from model.convert.ggml import check_quantiser, quantise
from model.convert.gguf_mix import Mixture
from model.convert.gguf_rules import check_gguf, gguf_architecture
from model.convert.gguf_tensors import gguf_tensors, mtp_modules
from model.convert.gguf_tokenizer import GgufTokenizer, read_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

Importance = Mapping[str, NDArray[np.float32]]  # name of a tensor in the file -> [matrices, features of a row]


@dataclass(frozen=True)
class GgufReport:
    """What became of a model in a GGUF file.

    Attributes:
        bits: of file per weight. types: GGML type -> tensors of it.
        fallbacks: tensors whose rows do not divide into the blocks of their type: (type meant, type it has) -> how
            many. unweighted: matrices that were rounded without importance, though there was some.
        left_out: what the file does not hold.
    """

    bits: float
    types: dict[str, int]
    fallbacks: dict[tuple[str, str], int]
    unweighted: int
    left_out: tuple[str, ...]

    def notes(self) -> list[str]:
        """A sentence for each thing that is not as asked."""
        out = [
            f"{count} matrices are {found}, not {meant}: their rows do not divide into its blocks"
            for (meant, found), count in self.fallbacks.items()
        ]
        if self.unweighted:
            out.append(f"{self.unweighted} matrices were rounded without importance: the text did not reach them")
        return out + list(self.left_out)


def _add_architecture(w: GGUFWriter, config: ModelConfig) -> None:
    from gguf import ExpertGatingFuncType, RopeScalingType

    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_block_count(config.num_hidden_layers + mtp_modules(config))
    if mtp_modules(config):
        w.add_nextn_predict_layers(mtp_modules(config))
    w.add_feed_forward_length(config.intermediate_size)
    w.add_vocab_size(config.vocab_size)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    # Absorbed MLA is multi-query attention over the latent; the *_mla keys keep the widths of the unabsorbed heads.
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(1)
    w.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    w.add_value_length(config.kv_lora_rank)
    w.add_key_length_mla(config.qk_head_dim)
    w.add_value_length_mla(config.v_head_dim)
    w.add_kv_lora_rank(config.kv_lora_rank)
    if config.q_lora_rank is not None:
        w.add_q_lora_rank(config.q_lora_rank)
    w.add_leading_dense_block_count(min(config.first_k_dense_replace, config.num_hidden_layers))
    w.add_expert_feed_forward_length(config.moe_intermediate_size)
    w.add_expert_count(config.n_routed_experts)
    w.add_expert_used_count(config.num_experts_per_tok)
    w.add_expert_shared_count(config.n_shared_experts)
    w.add_expert_weights_scale(config.routed_scaling_factor)
    w.add_expert_weights_norm(config.norm_topk_prob)
    # Unstated, llama.cpp takes softmax and is silently wrong for V3.
    w.add_expert_gating_func(ExpertGatingFuncType[config.scoring_func.upper()])
    if config.n_group > 1 and config.topk_method == "noaux_tc":
        w.add_expert_group_count(config.n_group)
        w.add_expert_group_used_count(config.topk_group)
    if config.attention == "dsa":
        w.add_indexer_head_count(config.index_n_heads)
        w.add_indexer_key_length(config.index_head_dim)
        w.add_indexer_top_k(config.index_topk)
    w.add_rope_dimension_count(config.qk_rope_head_dim)
    w.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        w.add_rope_scaling_type(RopeScalingType.YARN)
        w.add_rope_scaling_factor(scaling.factor)
        w.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        w.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        w.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
        w.add_rope_scaling_yarn_log_mul(0.1 * scaling.mscale_all_dim)


def _add_tokenizer(w: GGUFWriter, tokenizer: GgufTokenizer, end_ids: Sequence[int]) -> None:
    """`end_ids`: further tokens that end an answer. GGUF has no list, but two more places that llama.cpp stops at."""
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(tokenizer.pre)
    w.add_token_list(tokenizer.tokens)
    w.add_token_types(tokenizer.types)
    w.add_token_merges(tokenizer.merges)
    for name, add in (("bos", w.add_bos_token_id), ("eos", w.add_eos_token_id), ("pad", w.add_pad_token_id)):
        if name in tokenizer.special:
            add(tokenizer.special[name])
    for end, add in zip(end_ids, (w.add_eot_token_id, w.add_eom_token_id), strict=False):
        add(end)
    w.add_add_bos_token(tokenizer.add_bos)
    if tokenizer.chat_template is not None:
        w.add_chat_template(tokenizer.chat_template)


def _add_tensor(w: GGUFWriter, name: str, tensor: Tensor, kind: str, importance: NDArray[np.float32] | None) -> None:
    from gguf import GGMLQuantizationType, quants

    values: NDArray[Any] = np.ascontiguousarray(tensor.detach().to("cpu", torch.float32).numpy())
    if kind == "F32":
        w.add_tensor(name, values)
    elif kind == "F16":
        w.add_tensor(name, values.astype(np.float16))
    elif kind in ("BF16", "Q8_0"):  # exact in numpy, too, which needs no llama.cpp
        made = quants.quantize(values, GGMLQuantizationType[kind])
        w.add_tensor(name, made, raw_dtype=GGMLQuantizationType[kind])
    else:
        w.add_tensor(name, quantise(values, kind, importance), raw_dtype=GGMLQuantizationType[kind])


def save_gguf(
    path: Path,
    config: ModelConfig,
    state: dict[str, Tensor],
    *,
    kind: GgufKind,
    tokenizer_folder: Path,
    name: str,
    licence: str,
    importance: Importance | None = None,
    end_ids: Sequence[int] = (),
) -> GgufReport:
    """Write `path`, which the caller moves into place when this returns.

    Args:
        kind: see `export_kinds.KINDS`. Norms and the router stay fp32.
        importance: from `importance.importance_matrix`; kinds that are not `weighted` take no notice of it.
        end_ids: tokens that end an answer; the tokenizer's own is added if it is not among them.
    Raises:
        ValueError: from `check_gguf`, no quantiser for the kind, or a tokenizer that llama.cpp would split differently.
    """
    from gguf import GGUFWriter, LlamaFileType

    check_gguf(config)
    weighted = KINDS[kind].weighted
    if weighted:
        check_quantiser()
    tokenizer = read_tokenizer(tokenizer_folder, config.vocab_size)
    others = [i for i in dict.fromkeys(end_ids) if i != tokenizer.special.get("eos")]
    mixture = Mixture(kind, config.num_hidden_layers + mtp_modules(config), config.n_routed_experts)
    types: Counter[str] = Counter()
    weights = unweighted = 0
    w = GGUFWriter(path, gguf_architecture(config))
    try:
        w.add_name(name)
        w.add_license(licence)
        w.add_file_type(LlamaFileType[KINDS[kind].file_type])
        w.add_quantization_version(2)
        _add_architecture(w, config)
        _add_tokenizer(w, tokenizer, others)
        for tensor_name, tensor in gguf_tensors(config, state).items():
            made = mixture.type_of(tensor_name, tensor.shape)
            given = (importance or {}).get(tensor_name)
            _add_tensor(w, tensor_name, tensor, made, given)
            types[made] += 1
            weights += tensor.numel()
            taken = weighted and importance is not None and made not in ("F32", "F16")
            if taken and tensor_name not in ("token_embd.weight", "output.weight"):  # which have none by design
                matrices = 1 if tensor.dim() == 2 else len(tensor)
                unweighted += matrices if given is None else int((~given.any(-1)).sum())
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
    finally:
        w.close()
    fallbacks = Counter(mixture.fallbacks.values())
    bits = 8 * path.stat().st_size / weights
    return GgufReport(bits, dict(types), dict(fallbacks), unweighted, tuple(_left_out(config, others)))


def _left_out(config: ModelConfig, end_ids: Sequence[int]) -> list[str]:
    out = []
    if (without := config.num_nextn_predict_layers - mtp_modules(config)) > 0:
        out.append(f"{without} of {config.num_nextn_predict_layers} MTP modules are left out: llama.cpp has no place")
    if len(end_ids) > 2:
        out.append(f"end tokens {', '.join(map(str, end_ids[2:]))} are left out: a GGUF file has three places for them")
    return out
