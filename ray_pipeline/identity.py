"""A stage's identity: the hash of what decides its result.

That is its settings, the contents of local input files, the seed, and the identities of the stages it reads. Layout,
logging, paths and names are not among it: more GPUs, or the same file elsewhere, give the same identity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray_pipeline.artifacts import file_sha256
from ray_pipeline.config import STAGES, TRAINING_STAGES, PipelineFields
from ray_pipeline.errors import UserError
from ray_pipeline.stage_chain import chain, input_stage, upstream

# Raised when a stage's code writes something else for the same settings, so that old outputs are not taken for new.
FORMATS = dict.fromkeys(STAGES, 1)
_SECTIONS: dict[str, tuple[str, ...]] = {
    "data_prep": ("data", "tokenizer"),
    "pretrain": ("model", "pretrain", "init_from"),
    "sft": ("sft", "evaluation"),
    "dpo": ("dpo", "evaluation"),
    "grpo": ("grpo", "evaluation"),
    "distillation": ("distillation", "evaluation"),
    "export": ("export",),
}
# How often something is written or measured does not change the weights; GRPO's rows come from rollouts.
_NO_RESULT = {
    f"{s}.{k}"
    for s in TRAINING_STAGES
    for k in ("eval_every", "checkpoint_every", "keep_checkpoints", "keep_best", "log_every")
}
_NO_RESULT |= {"grpo.batch_size", "grpo.rollout.workers", "grpo.scoring.processes"}
_NO_RESULT |= {"init_from.max_vocab_size", "init_from.max_file_bytes"}


@dataclass(frozen=True)
class Identity:
    """What decides a stage's result: its own settings by dotted key, and in `key` the hash of them and of upstream."""

    key: str
    decides: Mapping[str, Any]


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": [1]}} -> {"a.b.0": 1}; an empty group or list stays as it is."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    pairs = list(items)
    if not pairs:
        return {prefix: values}
    out: dict[str, Any] = {}
    for key, value in pairs:
        out |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def source_names(config: PipelineFields) -> dict[str, str]:
    """Dotted key -> name, for every setting that may name a local file or folder."""
    names = {f"data.pretrain.{index}.name": source.name for index, source in enumerate(config.data.pretrain)}
    if config.init_from.path is not None:
        names["init_from.path"] = config.init_from.path
    return names | {
        "data.sft": config.data.sft,
        "data.prompts": config.data.prompts,
        "tokenizer.name": config.tokenizer.name,
    }


def local_path(name: str) -> Path | None:
    """The existing file or folder that `name` means, without a `:column` at its end; None for anything else."""
    for candidate in (name, name.split(":")[0]):
        if candidate and candidate not in ("builtin", "train") and Path(candidate).exists():
            return Path(candidate)
    return None


def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their names.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if path.is_file():
            return file_sha256(path)
        files = sorted(entry for entry in path.rglob("*") if entry.is_file())
        listing = [(entry.relative_to(path).as_posix(), file_sha256(entry)) for entry in files]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check its rights, or give another file.") from None
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def source_digests(config: PipelineFields, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name -> digest of the local files the config reads. `known` speaks for files that are gone since."""
    out = {}
    for name in source_names(config).values():
        path = local_path(name)
        if path is not None:
            out[name] = content_digest(path)
        elif known and name in known:
            out[name] = known[name]
    return out


def identities(config: PipelineFields, digests: Mapping[str, str] | None = None) -> dict[str, Identity]:
    """The identity of each stage of the run. A pure function of the settings and the digests of local files."""
    digests = source_digests(config) if digests is None else digests
    everything = flat(config.model_dump(mode="json") | {"model": asdict(config.model)})
    if config.init_from.path is None:  # a model that starts from random weights is what it was before the key existed
        everything = {key: value for key, value in everything.items() if not key.startswith("init_from.")}
    for key, name in source_names(config).items():
        if name in digests:  # where a file lies does not matter, what it holds and how it is read does
            everything[key] = f"sha256:{digests[name]}{_reading(name)}"
    out: dict[str, Identity] = {}
    for stage in chain(config):
        sections = _SECTIONS[stage]
        if stage not in ("data_prep", "pretrain", "export") and input_stage(config, stage) is None:
            sections += ("model", "init_from")  # given weights, read by this stage itself
        heads = tuple(f"{section}." for section in sections)
        decides = {k: v for k, v in everything.items() if k.startswith(heads) and k not in _NO_RESULT}
        decides["seed"] = config.seed
        parts = [stage, FORMATS[stage], decides, {name: out[name].key for name in upstream(config, stage)}]
        text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
        out[stage] = Identity(hashlib.sha256(text.encode()).hexdigest(), decides)
    return out


def _reading(name: str) -> str:
    """What of a local source's name decides how it is read: its ending and column."""
    path, colon, column = name.partition(":")
    return Path(path).suffix + colon + column


def default_run_name(config: PipelineFields) -> str:
    """`<recipe>-<hash of what decides the result>`: the same settings find their earlier run."""
    return f"{config.recipe}-{list(identities(config).values())[-1].key[:8]}"
