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

from ray_pipeline.errors import UserError
from ray_pipeline.records.input_files import Digests, data_files, is_pattern, matches, pattern_folder, split_columns
from ray_pipeline.settings.chain import (
    TOP_K,
    chain,
    input_stage,
    reads_folder,
    reads_teacher,
    reads_text,
    teacher_path,
    upstream,
)
from ray_pipeline.settings.layers import flat
from ray_pipeline.settings.schema import STAGES, TRAINING_STAGES, PipelineFields

# Raised when a stage's code writes something else for the same settings, so that old outputs are not taken for new.
FORMATS = dict.fromkeys(STAGES, 1) | {
    "data_prep": 2, "pretrain": 2, "sft": 2, "dpo": 2, "grpo": 3, "distillation": 3, "export": 2,
}  # fmt: skip
_SECTIONS: dict[str, tuple[str, ...]] = {
    "data_prep": ("data", "tokenizer"),
    "pretrain": ("model", "pretrain", "init_from"),
    "sft": ("sft", "evaluation", "tools"),
    "dpo": ("dpo", "evaluation", "tools"),
    "grpo": ("grpo", "evaluation", "tools"),
    "distillation": ("distillation", "evaluation", "tools"),
    "export": ("export",),
}
# How often something is written or measured does not change the weights; GRPO's rows come from rollouts.
_NO_RESULT = {
    f"{s}.{k}"
    for s in TRAINING_STAGES
    for k in ("eval_every", "checkpoint_every", "keep_checkpoints", "keep_best", "log_every")
}
_NO_RESULT |= {"grpo.batch_size", "grpo.rollout.workers", "grpo.scoring.processes"}
_NO_RESULT |= {"grpo.scoring.without_landlock", "tools.without_landlock"}
_NO_RESULT |= {"data.max_bad_records"}  # a bound that is kept changes nothing
_NO_RESULT |= {f"pretrain.prediction{end}" for end in ("", ".loss", ".text", ".validation")}
_NO_RESULT |= {"init_from.max_vocab_size", "init_from.max_file_bytes", "distillation.teacher_layout"}
# Settings that came later, at the values of what was done before they existed: there they are no part of it, so that
# finished stages stay finished.
_AS_BEFORE: dict[str, Any] = {
    "model.initialisation": "fixed", "model.embedding_init": None, "model.head_init": None,
    "model.zero_init_outputs": False, "model.residual_scales": False, "model.value_embeddings": False,
    "export.max_shard_bytes": 5_000_000_000,
}  # fmt: skip
for _stage in TRAINING_STAGES:
    _AS_BEFORE |= {
        f"{_stage}.fp8_dispatch": False,
        f"{_stage}.optimizer.muon_iteration": "newton_schulz", f"{_stage}.optimizer.muon_equalise": False,
        f"{_stage}.optimizer.cautious_decay": False, f"{_stage}.optimizer.embedding_lr_factor": 1.0,
        f"{_stage}.optimizer.head_lr_factor": 1.0, f"{_stage}.optimizer.vector_lr_factor": 1.0,
    }  # fmt: skip
_TEACHER = "distillation.teacher"
# Of the data, these decide pretraining's rows alone, and a tokenizer that is trained; and DPO's pairs alone.
_TEXT = ("data.pretrain.", "data.builtin_documents", "data.tokens_per_shard", "data.text_", "data.max_epochs")
_PAIRS = ("data.preferences",)


@dataclass(frozen=True)
class Identity:
    """What decides a stage's result: its own settings by dotted key, and in `key` the hash of them and of upstream."""

    key: str
    decides: Mapping[str, Any]


def source_names(config: PipelineFields) -> dict[str, str]:
    """Dotted key -> name, for every setting that may name a local file or folder."""
    names = {f"data.pretrain.{index}.name": source.name for index, source in enumerate(config.data.pretrain)}
    if config.init_from.path is not None:
        names["init_from.path"] = config.init_from.path
    if config.distillation.teacher is not None:
        names[_TEACHER] = config.distillation.teacher
    if config.tokenizer.chat_template is not None:
        names["tokenizer.chat_template"] = config.tokenizer.chat_template
    return names | {
        "data.sft": config.data.sft,
        "data.prompts": config.data.prompts,
        "data.preferences": config.data.preferences,
        "tokenizer.name": config.tokenizer.name,
    }


def with_source_names(config: PipelineFields, names: Mapping[str, str]) -> PipelineFields:
    """The settings with other names for the sources in `names`, old to new."""
    data, start, teacher = config.data, config.init_from.path, config.distillation.teacher
    pretrain = [s.model_copy(update={"name": names.get(s.name, s.name)}) for s in data.pretrain]
    single = {key: names.get(getattr(data, key), getattr(data, key)) for key in ("sft", "prompts", "preferences")}
    template = config.tokenizer.chat_template
    tokenizer = {
        "name": names.get(config.tokenizer.name, config.tokenizer.name),
        "chat_template": template and names.get(template, template),
    }
    return config.model_copy(
        update={
            "data": data.model_copy(update={"pretrain": pretrain, **single}),
            "tokenizer": config.tokenizer.model_copy(update=tokenizer),
            "init_from": config.init_from.model_copy(update={"path": start and names.get(start, start)}),
            "distillation": config.distillation.model_copy(update={"teacher": teacher and names.get(teacher, teacher)}),
        }
    )


def local_path(name: str) -> Path | None:
    """The existing file or folder that `name` means, without `topk:` before it or a `:column` at its end, or the folder
    of a glob; None for anything else."""
    name, _ = split_columns(name.removeprefix(TOP_K))
    if is_pattern(name) and matches(name):
        return pattern_folder(name)
    for candidate in (name, name.split(":")[0]):
        if candidate and candidate not in ("builtin", "train") and Path(candidate).exists():
            return Path(candidate)
    return None


def absolute_name(name: str) -> str:
    """The same source by its absolute path, where it is a local one."""
    path = local_path(name)
    return name if path is None else moved_name(name, path, str(path.absolute()))


def moved_name(name: str, path: Path, place: str) -> str:
    """The name of the source at `path` when it lies at `place`: what stands before and behind the path stays."""
    before, name = (TOP_K if name.startswith(TOP_K) else ""), name.removeprefix(TOP_K)
    files, columns = split_columns(name)
    if is_pattern(files):
        return before + str(Path(place) / Path(files).relative_to(path)) + (f":{columns}" if columns else "")
    return before + name.replace(str(path), place, 1)


def content_digest(path: Path, digests: Digests | None = None) -> str:
    """SHA-256 of a file, or of all files of a folder with their names.

    Raises:
        UserError: it cannot be read.
    """
    digests = digests or Digests()
    try:
        if path.is_file():
            return digests.sha256(path)
        listing = [(entry.relative_to(path).as_posix(), digests.sha256(entry)) for entry in _files_of(path)]
    except OSError as error:
        raise _unreadable(path, error) from None
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}). Check its rights, or give another file.")


def _files_of(path: Path) -> list[Path]:
    """The file, or all files of the folder."""
    return [path] if path.is_file() else sorted(entry for entry in path.rglob("*") if entry.is_file())


def _source_files(key: str, name: str, path: Path) -> list[Path]:
    """The files that are read of a local source: of a folder or glob of data its shards alone."""
    if key == _TEACHER:  # of a stage's folder the model alone is read
        return _files_of(teacher_path(name))
    files, _ = split_columns(name)
    if key.startswith("data.") and (is_pattern(files) or path.is_dir()):
        return data_files(files)
    return _files_of(path)


def _source_digest(key: str, name: str, path: Path, digests: Digests) -> str:
    if key == _TEACHER:
        return content_digest(teacher_path(name), digests)
    if not key.startswith("data.") or path.is_file():
        return content_digest(path, digests)
    try:
        return digests.of_files(data_files(split_columns(name)[0]))
    except OSError as error:
        raise _unreadable(path, error) from None


def source_digests(config: PipelineFields, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name -> digest of the local files the config reads. `known` speaks for files that are gone since."""
    out, digests = {}, Digests(config.output_dir)
    for key, name in source_names(config).items():
        path = local_path(name)
        if path is not None:
            out[name] = _source_digest(key, name, path, digests)
        elif known and name in known:
            out[name] = known[name]
    return out


def stage_files(config: PipelineFields, stage: str) -> dict[Path, str]:
    """SHA-256 of every local file that the stage reads beside what other stages wrote."""
    out: dict[Path, str] = {}
    digests = Digests(config.output_dir)
    for key, name in source_names(config).items():
        path = local_path(name)
        if path is not None and _reads(config, stage, key):
            out |= {file: digests.sha256(file) for file in _source_files(key, name, path)}
    return out


def _reads(config: PipelineFields, stage: str, key: str) -> bool:
    if key == "init_from.path":
        return stage in chain(config) and reads_folder(config, stage)
    return stage == ("distillation" if key == _TEACHER else "data_prep")


def identities(config: PipelineFields, digests: Mapping[str, str] | None = None) -> dict[str, Identity]:
    """The identity of each stage of the run. A pure function of the settings and the digests of local files."""
    digests = source_digests(config) if digests is None else digests
    everything = flat(config.model_dump(mode="json") | {"model": asdict(config.model)})
    hidden = ["distillation.teacher_layout."]
    if config.init_from.path is None:  # a model that starts from random weights is what it was before the key existed
        hidden.append("init_from.")
    if not reads_text(config):
        hidden += _TEXT
    if config.data.on_bad_record == "fail":  # nothing was left out, as before the key existed
        hidden.append("data.on_bad_record")
    everything = {
        key: value
        for key, value in everything.items()
        if not key.startswith(tuple(hidden)) and not (key in _AS_BEFORE and value == _AS_BEFORE[key])
    }
    for key, name in source_names(config).items():
        if (
            name in digests and key in everything
        ):  # where a file lies does not matter, what it holds and how it is read does
            everything[key] = f"sha256:{digests[name]}{_reading(name)}"
    out: dict[str, Identity] = {}
    for stage in chain(config):
        heads = tuple(f"{section}." for section in _sections(config, stage))
        decides = {k: v for k, v in everything.items() if k.startswith(heads) and k not in _NO_RESULT}
        decides["seed"] = config.seed
        if stage == "data_prep":
            # DPO may be added to a run, or left out, without training again what does not read its pairs.
            others = {k: v for k, v in decides.items() if k not in _PAIRS}
            decides = decides if "dpo" in config.stages else others
            shared, whole = _key(stage, others, {}), _key(stage, decides, {})
            out[stage] = Identity(whole, decides)
            continue
        read = {name: out[name].key for name in upstream(config, stage)}
        read["data_prep"] = whole if stage == "dpo" else shared
        out[stage] = Identity(_key(stage, decides, read), decides)
    return out


def _sections(config: PipelineFields, stage: str) -> tuple[str, ...]:
    """The groups of settings that a stage reads."""
    if stage in ("data_prep", "pretrain", "export") or input_stage(config, stage) is not None:
        return _SECTIONS[stage]
    if stage == "distillation" and (config.distillation.teacher is not None or not reads_teacher(config)):
        # A teacher that is no model of this project's, or none, leaves the student's architecture to `model`.
        return (*_SECTIONS[stage], "model")
    return (*_SECTIONS[stage], "model", "init_from")  # given weights, read by this stage itself


def _key(stage: str, decides: Mapping[str, Any], read: Mapping[str, str]) -> str:
    text = json.dumps([stage, FORMATS[stage], decides, read], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _reading(name: str) -> str:
    """What of a local source's name decides how it is read: its ending and column."""
    files, columns = split_columns(name)
    if is_pattern(files):
        return f":{columns}" if columns else ""  # each file has its own ending, which is in their digest
    before = TOP_K if name.startswith(TOP_K) else ""
    path, colon, column = name.removeprefix(TOP_K).partition(":")
    return before + Path(path).suffix + colon + column


def default_run_name(config: PipelineFields) -> str:
    """`<recipe>-<hash of what decides the result>`: the same settings find their earlier run."""
    return f"{config.recipe}-{list(identities(config).values())[-1].key[:8]}"
