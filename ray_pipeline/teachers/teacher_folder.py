"""The folder that `distillation.teacher` names, from its headers alone: what it holds, and whether it can teach.

A teacher whose tokens are other ones cannot be compared token by token; it can only write answers to learn from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from model.config import ModelConfig
from model.convert.folder import describe, is_native
from model.convert.hf_config import FAMILIES
from model.convert.weight_files import read_object
from model.parallel.placement import layers_by_hand
from ray_pipeline.data.chat.tokenizer import raw_tokenizer
from ray_pipeline.errors import UserError
from ray_pipeline.layout.layout import Layout
from ray_pipeline.layout.rules import refusal
from ray_pipeline.records.artifacts import read_json
from ray_pipeline.records.integrity import own_damage, verify_files
from ray_pipeline.settings.chain import is_top_k, teacher_path
from ray_pipeline.settings.run_folder import RECORD, TOKENIZER
from ray_pipeline.settings.schema import PipelineFields

KEY = "distillation.teacher"


@dataclass(frozen=True)
class TeacherFolder:
    """A model on disk.

    Attributes:
        path: of config.json and weights. config: None for an architecture that transformers runs.
        vocab_size: entries of its head. tokenizer: its folder; None where nothing tells.
    """

    path: Path
    config: ModelConfig | None
    vocab_size: int | None
    tokenizer: Path | None


def open_teacher(name: str) -> TeacherFolder:
    """Read config and headers.

    Raises:
        UserError: no such folder, no model in it, or a damaged one.
    """
    path = teacher_path(name)
    if not path.is_dir():
        raise UserError(f"{KEY}={name}: no such folder. Give a run's stage folder or a Hugging Face folder.")
    if not (path / "config.json").is_file():
        stages = sorted(found.parent.name for found in path.glob("*/model"))
        hint = f"It is a run; name one of its stages: {', '.join(stages)}." if stages else "Name a folder that has one."
        raise UserError(f"{KEY}={name}: there is no config.json in it. {hint}")
    if found := own_damage(path):
        raise UserError(f"{KEY}={name}: {found}. Run the stage that wrote it again, or give another teacher.")
    try:
        values = read_object(path / "config.json")
        own = is_native(values) or str(values.get("model_type")) in FAMILIES
        config = describe(path).config if own else None
    except ValueError as error:
        raise UserError(f"{KEY}={name}: {error}") from None
    entries = config.vocab_size if config is not None else values.get("vocab_size")
    return TeacherFolder(path, config, entries if isinstance(entries, int) else None, _tokenizer(path))


def _tokenizer(path: Path) -> Path | None:
    """Beside the weights; of a stage's model, that of the DATA_PREP which its record names."""
    if (path / "tokenizer.json").is_file():
        return path
    record = path.parent / RECORD
    if not record.is_file():
        return None
    folder = path.parent.parent / str(read_json(record)["upstream"].get("data_prep")) / TOKENIZER
    return folder if folder.is_dir() else None


def tokenizer_difference(teacher: Path, own: Path) -> str | None:
    """Why the two tokenizers do not mean the same by their ids; None where they do."""
    theirs, ours = (vocabulary(folder) for folder in (teacher, own))
    if theirs == ours:
        return None
    shared = theirs.keys() & ours.keys()
    moved = sorted(token for token in shared if theirs[token] != ours[token])
    if moved:
        token = moved[0]
        return f"{len(moved)} tokens have other ids: {token!r} is {theirs[token]} there and {ours[token]} here"
    there, here = (sorted(a.keys() - b.keys()) for a, b in ((theirs, ours), (ours, theirs)))
    example = repr((there or here)[0])
    return f"{len(there)} tokens are there alone and {len(here)} here alone, for example {example}"


def vocabulary(folder: Path) -> dict[str, int]:
    """What each id of a folder's tokenizer means: token -> id, added ones too."""
    verify_files(folder, ["tokenizer.json"])
    return dict(raw_tokenizer(folder).get_vocab(with_added_tokens=True))


def compare_tokenizers(config: PipelineFields, teacher: TeacherFolder, own: Path) -> bool:
    """Whether the teacher reads the same ids; another tokenizer is refused where ids are compared or copied.

    Raises:
        UserError: with the difference.
    """
    settings = config.distillation
    given = f"{KEY}={settings.teacher}"
    if teacher.tokenizer is None:
        raise UserError(f"{given}: there is no tokenizer.json with it, so nothing tells what its ids mean. Add it.")
    difference = tokenizer_difference(teacher.tokenizer, own)
    if difference is None:
        return True
    if settings.loss != "cross_entropy":
        raise UserError(
            f"{given}: its tokenizer is another one ({difference}), so its distribution over the next token cannot be "
            f"compared with the student's. Use --set tokenizer.name={teacher.tokenizer}, or learn from what it writes: "
            "--set distillation.loss=cross_entropy."
        )
    if settings.init == "teacher_layers":
        raise UserError(
            f"{given}: its tokenizer is another one ({difference}), so its embeddings are of other tokens. "
            "Use --set distillation.init=random."
        )
    return False


def student_base(config: PipelineFields, teacher: TeacherFolder, *, same_tokenizer: bool) -> ModelConfig:
    """The architecture that `distillation.student` changes: the teacher's where it is one of ours, else the run's.

    Raises:
        UserError: settings that need more of the teacher than there is.
    """
    settings, given = config.distillation, f"{KEY}={config.distillation.teacher}"
    if teacher.config is not None and same_tokenizer:
        return teacher.config
    if settings.init == "teacher_layers":
        raise UserError(
            f"{given}: its architecture is not one of this project's, so no layer of it can be copied. "
            "Use --set distillation.init=random."
        )
    needs_head = settings.loss != "cross_entropy"
    if needs_head and teacher.vocab_size is not None and teacher.vocab_size != config.model.vocab_size:
        raise UserError(
            f"{given}: its head has {teacher.vocab_size} entries and model.vocab_size={config.model.vocab_size}. "
            f"Use --set model.vocab_size={teacher.vocab_size}."
        )
    return config.model


def check_teacher(config: PipelineFields, layout: Layout) -> None:
    """Everything that can be known of the teacher before anything runs.

    Raises:
        UserError: what is wrong with it, or with the layout for it or its student.
    """
    name = config.distillation.teacher
    if name is None:
        check_teacher_layout(config, config.model, layout)
        return
    if is_top_k(name):
        from ray_pipeline.teachers.top_k import read_manifest

        read_manifest(teacher_path(name))
        return
    teacher, same = open_teacher(name), True
    own = Path(config.tokenizer.name)
    if own.is_dir():  # else DATA_PREP makes it, and the stage compares
        same = compare_tokenizers(config, teacher, own)
    base = student_base(config, teacher, same_tokenizer=same)
    student = config.distillation.student.applied_to(base)
    try:
        student.validate()
    except ValueError as error:
        raise UserError(f"distillation.student: {error}") from None
    if config.distillation.loss == "hidden" and teacher.config is not None:
        check_widths(student.hidden_size, teacher.config.hidden_size)
    layout = replace(layout, pp_layout=layers_by_hand(layout.pp_layout, config.model, base))
    own_teacher = config.distillation.model_copy(update={"teacher": None})
    alone = config.model_copy(
        update={"model": base, "stages": ["data_prep", "distillation"], "distillation": own_teacher}
    )
    if (broken := refusal(alone, layout)) is not None:
        raise UserError(f"{KEY}={name}: {broken[1]}")
    check_teacher_layout(config, teacher.config, layout)


def check_teacher_layout(config: PipelineFields, teacher: ModelConfig | None, layout: Layout) -> None:
    """Hold `distillation.teacher_layout` against the rules of layouts, for the teacher alone.

    Raises:
        UserError: the rule it breaks, or a teacher that has no layout.
    """
    given = config.distillation.teacher_layout
    if given is None:
        return
    key = "distillation.teacher_layout"
    if teacher is None:
        raise UserError(f"{key}: a teacher that transformers runs is whole on every rank. Leave it out.")
    if layout.min_gpus is not None:
        raise UserError(f"{key}: fewer ranks (min_gpus={layout.min_gpus}) could not hold it. Leave out one of the two.")
    asked = replace(
        layout, pp=given.pp_size, tp=given.tp_size, sp=given.sp_size, ep=given.ep_size, zero_stage=0,
        schedule="1f1b", pp_layout=None, offload_optimizer=False,
        dp=given.dp_size or max(1, layout.gpus // (given.pp_size * given.tp_size * given.sp_size)),
    )  # fmt: skip
    alone = config.model_copy(update={"model": teacher, "stages": ["data_prep"]})
    if (broken := refusal(alone, asked)) is not None:
        raise UserError(f"{key}: {broken[1]}")


def check_widths(student: int, teacher: int) -> None:
    """Raise UserError where final hidden states cannot be compared."""
    if student != teacher:
        raise UserError(
            f"distillation.loss=hidden: the student's hidden_size={student} and the teacher's {teacher} cannot be "
            "compared. Leave distillation.student.hidden_size out, or use another loss."
        )
