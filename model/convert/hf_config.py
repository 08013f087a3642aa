"""config.json of the published DeepSeek architectures: which one a model is, and reading and writing it. No torch.

| model_type | papers | attention | router |
|---|---|---|---|
| deepseek_v2 | arXiv:2405.04434 | MLA | softmax, greedy or group-limited greedy, not normalised |
| deepseek_v3 (R1, V3.1 too) | arXiv:2412.19437 | MLA | sigmoid, noaux_tc |
| deepseek_v32 | arXiv:2512.02556 | DSA | sigmoid, noaux_tc |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from model.config import ModelConfig, RopeScaling
from model.convert.json_values import list_of_text, number, object_of, short

# What this code does not do: other values would load and be silently wrong.
_ALWAYS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "moe_layer_freq": (1,),
}
_V3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "first_k_dense_replace": 3, "num_attention_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "max_position_embeddings": 4096, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
}  # fmt: skip
_V2_DEFAULTS: dict[str, Any] = _V3_DEFAULTS | {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "moe_intermediate_size": 1407,
    "num_hidden_layers": 32, "first_k_dense_replace": 0, "num_attention_heads": 32, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": None, "n_group": None, "topk_group": None, "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "max_position_embeddings": 2048,
}  # fmt: skip
_INDEXER = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
_NOAUX: dict[str, tuple[Any, ...]] = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}


@dataclass(frozen=True)
class Family:
    """One published architecture.

    Attributes:
        title, paper: for the model card.
        allowed: per key the values this code honours; the first is what an absent key means.
        defaults: what transformers' config class takes for absent keys.
        mtp: whether its checkpoints carry multi-token prediction modules.
    """

    model_type: str
    architecture: str
    title: str
    paper: str
    attention: str
    allowed: Mapping[str, tuple[Any, ...]]
    defaults: Mapping[str, Any]
    mtp: bool = True


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "deepseek_v2", "DeepseekV2ForCausalLM", "DeepSeek-V2", "arXiv:2405.04434", "mla",
            {
                "scoring_func": ("softmax",),
                "topk_method": ("greedy", "group_limited_greedy"),
                # DeepSeek's own code normalises and then does not scale; transformers never normalises.
                "norm_topk_prob": (False,),
            },
            _V2_DEFAULTS, mtp=False,
        ),
        Family(
            "deepseek_v3", "DeepseekV3ForCausalLM", "DeepSeek-V3", "arXiv:2412.19437", "mla",
            {**_NOAUX, "rope_interleave": (True,)}, _V3_DEFAULTS,
        ),
        Family(
            "deepseek_v32", "DeepseekV32ForCausalLM", "DeepSeek-V3.2", "arXiv:2512.02556", "dsa", _NOAUX,
            _V3_DEFAULTS | _INDEXER | {"max_position_embeddings": 163840},
        ),
    )
}  # fmt: skip


def unpublished_reason(config: ModelConfig) -> str | None:
    """Why no published class can hold this architecture; None where one can."""
    for key, common in (("attention", ("mla", "dsa")), ("position", ("rope",)), ("norm", ("rmsnorm",))):
        if getattr(config, key) not in common:
            return f"no transformers class has {key}={getattr(config, key)}"
    if config.recursion_depth > 1:
        return f"no transformers class has recursion_depth={config.recursion_depth}"
    if config.residual_scales:
        return "no transformers class has residual_scales"
    if config.value_embeddings:
        return "no transformers class has value_embeddings"
    router = (config.scoring_func, config.topk_method)
    if router == ("sigmoid", "noaux_tc"):
        return None
    named = f"scoring_func={router[0]} with topk_method={router[1]}"
    if router[0] != "softmax" or router[1] == "noaux_tc":
        return f"no transformers class has {named}"
    if config.attention == "dsa":
        return f"no transformers class has attention=dsa and {named}"
    if config.norm_topk_prob:
        return f"transformers' DeepseekV2 has {named} only with norm_topk_prob=false"
    if config.hidden_size % config.num_attention_heads:
        return (
            f"transformers' DeepseekV2 refuses hidden_size={config.hidden_size}, which is no multiple of "
            f"num_attention_heads={config.num_attention_heads}"
        )
    return None


def published_family(config: ModelConfig) -> Family | None:
    """The published architecture that this model is; None where there is none."""
    if unpublished_reason(config) is not None:
        return None
    if config.attention == "dsa":
        return FAMILIES["deepseek_v32"]
    return FAMILIES["deepseek_v3" if config.topk_method == "noaux_tc" else "deepseek_v2"]


def _published_keys(family: Family) -> set[str]:
    """Keys of ModelConfig that mean the same in config.json."""
    names = {f.name for f in fields(ModelConfig) if f.metadata.get("hf", True)}
    names -= {"rope_scaling", "rope_theta", "num_key_value_heads"}
    if family.attention != "dsa":
        names -= _INDEXER.keys()
    return names if family.mtp else names - {"num_nextn_predict_layers"}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The keys that transformers, vLLM and llama.cpp's converter read from config.json.

    Raises:
        ValueError: no published class has this architecture.
    """
    family = published_family(config)
    if family is None:
        raise ValueError(f"{unpublished_reason(config)}: there is no config.json for it")
    out = {key: value for key, value in asdict(config).items() if key in _published_keys(family)}
    out["rope_theta"] = config.rope_theta
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = asdict(config.rope_scaling)
        out["rope_scaling"] = {"type": "yarn", "rope_type": "yarn", **scaling}
        rope = {"rope_type": "yarn", "rope_theta": config.rope_theta, **scaling}
    if family.model_type == "deepseek_v3":
        out["rope_interleave"] = True
    return out | {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "num_key_value_heads": config.num_attention_heads,
        "num_local_experts": config.n_routed_experts,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """config.json of a DeepSeek-V2, V3 or V3.2 model -> ModelConfig; absent keys take the published class's value.

    Raises:
        ValueError: naming the first key this code cannot honour.
    """
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        known = ", ".join(map(repr, FAMILIES))
        raise ValueError(f"config.json: model_type={short(values.get('model_type'))} is not supported, only {known}")
    _check_values(values, {**_ALWAYS, **family.allowed})
    _check_layer_types(values)
    keys = _published_keys(family)
    firsts = {key: allowed[0] for key, allowed in family.allowed.items()}
    kept = {key: value for key, value in {**firsts, **family.defaults, **values}.items() if key in keys}
    for key, without in (("n_shared_experts", 0), ("n_group", 1), ("topk_group", 1)):
        kept[key] = without if kept[key] is None else kept[key]
    if family.mtp:
        kept["num_nextn_predict_layers"] = values.get("num_nextn_predict_layers") or 0
    else:
        kept["num_nextn_predict_layers"] = 0
    for key in sorted(keys - {"q_lora_rank"}):
        if kept.get(key, 0) is None:
            raise ValueError(f"config.json: {key} is not given, and {family.title} has no default for it")
    check_types(kept)
    config = ModelConfig(**kept, **_rope(values), attention=family.attention)  # type: ignore[arg-type]
    config.validate()
    return config


def _check_values(values: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, choices in allowed.items():
        if values.get(key, choices[0]) not in choices:
            only = " or ".join(map(repr, choices))
            raise ValueError(f"config.json: {key}={short(values[key])} is not supported, only {only}")
    quantised = object_of(values, "quantization_config")
    if quantised and quantised.get("quant_method") != "fp8":
        method = short(quantised.get("quant_method"))
        raise ValueError(f"config.json: quantization_config of quant_method={method} is not supported, only 'fp8'")


def check_types(kept: Mapping[str, Any]) -> None:
    """Numbers are numbers: Python would compute with a true, and compare a text only much later.

    Raises:
        ValueError: naming the first key of ModelConfig whose value is of another type.
    """
    hints = get_type_hints(ModelConfig)
    for key, value in kept.items():
        kinds = get_args(hints[key]) or (hints[key],)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is None and type(None) in kinds:
            continue
        if bool in kinds and not isinstance(value, bool):
            raise ValueError(f"config.json: {key}={short(value)}: must be true or false")
        if int in kinds and not whole:
            raise ValueError(f"config.json: {key}={short(value)}: must be a whole number")
        if float in kinds and not whole and not isinstance(value, float):
            raise ValueError(f"config.json: {key}={short(value)}: must be a number")
        if (str in kinds or isinstance(kinds[0], str)) and not isinstance(value, str):
            raise ValueError(f"config.json: {key}={short(value)}: must be a name")


def _check_layer_types(values: Mapping[str, Any]) -> None:
    """V3.2's own lists must say what the other keys say: dense layers first, an indexer in all."""
    kinds = list_of_text(values, "mlp_layer_types")
    if kinds:
        dense = values.get("first_k_dense_replace", _V3_DEFAULTS["first_k_dense_replace"])
        number("first_k_dense_replace", dense)
        if any((kind == "dense") != (layer < dense) for layer, kind in enumerate(kinds)):
            raise ValueError(f"config.json: mlp_layer_types={short(kinds)} contradicts first_k_dense_replace={dense}")
    others = sorted(set(list_of_text(values, "layer_types")) - {"indexed_attention"})
    if others:
        raise ValueError(f"config.json: layer_types of {short(others)} are not supported, only 'indexed_attention'")


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling from either spelling: keys of their own, or transformers 5's `rope_parameters`."""
    rope = object_of(values, "rope_parameters")
    theta = float(number("rope_theta", values.get("rope_theta", rope.get("rope_theta", 10000.0))))
    scaling = object_of(values, "rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else {})
    if not scaling:
        return {"rope_theta": theta, "rope_scaling": None}
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind != "yarn":
        raise ValueError(f"config.json: rope_scaling of type {short(kind)} is not supported, only 'yarn'")
    if scaling.get("attention_factor") is not None:
        raise ValueError(
            f"config.json: rope_scaling.attention_factor={short(scaling['attention_factor'])} is not supported; "
            "DeepSeek gives mscale and mscale_all_dim instead"
        )
    for key in ("factor", "original_max_position_embeddings"):
        if not isinstance(scaling.get(key), int | float):
            raise ValueError(f"config.json: rope_scaling needs {key}, a number, but has {short(scaling.get(key))}")
    # Without `mscale_all_dim` DeepSeek leaves the softmax scale alone; 0 means the same.
    defaults: dict[str, Any] = {"mscale": 1.0, "mscale_all_dim": 0.0}
    names = {f.name for f in fields(RopeScaling)}
    kept = {k: v for k, v in (defaults | dict(scaling)).items() if k in names and v is not None}
    for key, value in kept.items():
        number(f"rope_scaling.{key}", value)
    return {"rope_theta": theta, "rope_scaling": RopeScaling(**kept)}


def special_token_ids(tokenizer_folder: Path) -> dict[str, int]:
    """`{bos,eos,pad}_token_id` of a tokenizer folder, those it has."""
    settings = json.loads((tokenizer_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = dict(tokenizer["model"]["vocab"]) | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    out = {}
    for name in ("bos", "eos", "pad"):
        token = settings.get(f"{name}_token")
        content = token["content"] if isinstance(token, dict) else token
        if content is not None:
            out[f"{name}_token_id"] = ids[content]
    return out
