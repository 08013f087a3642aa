"""The model card: what the folder holds, how it was made, what was measured. Text only."""

from __future__ import annotations

from collections.abc import Mapping

from model.config import ModelConfig
from model.convert.hf_config import published_family


def _table(head: tuple[str, str], rows: Mapping[str, float | str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {name} | {f'{value:.6g}' if isinstance(value, float) else value} |" for name, value in rows.items()]
    return "\n".join(lines)


def model_card(
    title: str,
    config: ModelConfig,
    *,
    licence: str,
    data: Mapping[str, str],
    recipe: Mapping[str, float | str],
    figures: Mapping[str, float | str],
    baselines: Mapping[str, float | str],
) -> str:
    """README.md of an exported model.

    Args:
        licence: of the weights, a Hugging Face licence id such as "apache-2.0" or "other".
        data: source name to its licence. recipe: settings worth knowing.
        figures: what was measured. baselines: what to hold it against.
    """
    total, active = config.num_params(), config.num_params(active=True)
    family = published_family(config)
    if family is None:
        library, tag, kind = "", str(config.attention), f"A model with attention={config.attention}"
    else:
        library, tag = "library_name: transformers\n", family.model_type
        kind = f"A {family.title} model ({family.paper})"
    sections = [
        f"---\nlicense: {licence}\n{library}pipeline_tag: text-generation\n"
        f"tags:\n- {tag}\n- mixture-of-experts\n- reasoning\n---",
        f"# {title}",
        f"{kind} of {total:,} parameters, {active:,} active per token: "
        f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.n_routed_experts} "
        f"routed experts of which {config.num_experts_per_tok} see a token, {config.n_shared_experts} shared, "
        f"{config.num_nextn_predict_layers} multi-token-prediction modules, context {config.max_position_embeddings}.",
        "It answers questions as `<think>steps</think>answer`; the tokenizer's chat template makes the prompt.",
        "## Figures\n\n" + _table(("figure", "value"), figures),
        "## Baselines\n\nWhat the figures are to be held against.\n\n" + _table(("baseline", "value"), baselines),
        "## Recipe\n\n" + _table(("setting", "value"), recipe),
        "## Data\n\n" + _table(("source", "licence"), data),
    ]
    return "\n\n".join(sections) + "\n"
