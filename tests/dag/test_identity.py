"""A stage's identity changes exactly when something changes that decides its result."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ray_pipeline.dag.identity import (
    content_digest,
    default_run_name,
    identities,
    local_path,
    moved_name,
    source_digests,
)
from ray_pipeline.errors import UserError
from ray_pipeline.settings.chain import upstream
from ray_pipeline.settings.layers import flat
from ray_pipeline.settings.loading import load_config
from ray_pipeline.settings.schema import STAGES, PipelineFields

BASE = PipelineFields(stages=list(STAGES))
# Of the first tiny recipe: a change of it changes them, a new setting at its default must not.
BEFORE = {
    "data_prep": "be67147d24", "pretrain": "7712b46c11", "sft": "885755f126", "grpo": "3cd74d60af",
    "distillation": "f8daee4f6f", "export": "8ca66a0e48",
}  # fmt: skip
# The stage whose own settings hold the key; a key that several stages read belongs to the first of them.
OWNER = {
    "data": "data_prep", "tokenizer": "data_prep", "seed": "data_prep", "model": "pretrain", "pretrain": "pretrain",
    "init_from": "pretrain", "sft": "sft",
    "evaluation": "sft", "dpo": "dpo",
    "tools": "sft", "grpo": "grpo", "distillation": "distillation", "export": "export",
}  # fmt: skip
WITHOUT_RESULT = ("eval_every", "checkpoint_every", "keep_checkpoints", "keep_best", "log_every")
OTHER_CHOICE = {
    "schedule": "constant", "precision": "bf16", "init": "random", "source": "distillation", "dtype": "bfloat16",
    "path": "elsewhere", "teacher": "elsewhere",
}  # fmt: skip


def keys_of(config: PipelineFields) -> dict[str, str]:
    return {stage: identity.key for stage, identity in identities(config, {}).items()}


def everything(config: PipelineFields) -> dict[str, Any]:
    return flat(config.model_dump(mode="json") | {"model": asdict(config.model)})


def with_value(key: str, value: Any) -> PipelineFields:
    """BASE with one key changed, unchecked: the identity must notice whatever value there is."""
    return _changed(BASE, key.split("."), value)


def _changed(part: Any, path: list[str], value: Any) -> Any:
    head, *rest = path
    if isinstance(part, (list, tuple)):
        items = list(part)
        items[int(head)] = _changed(items[int(head)], rest, value) if rest else value
        return type(part)(items)
    if isinstance(part, dict):
        return part | {head: _changed(part[head], rest, value) if rest else value}
    new = _changed(getattr(part, head), rest, value) if rest else value
    if hasattr(part, "model_copy"):
        return part.model_copy(update={head: new})
    from dataclasses import replace

    return replace(part, **{head: new})


def other(value: Any, key: str) -> Any:
    name = key.split(".")[-1]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if name in OTHER_CHOICE:
        return OTHER_CHOICE[name]
    return 3 if value is None else f"{value}x"


def downstream(key: str, config: PipelineFields = BASE) -> set[str]:
    """The stage that a key belongs to and everything that reads it, directly or not."""
    stage = OWNER[key.split(".")[0]]
    found = {stage}
    for name in STAGES:
        if found & set(upstream(config, name)):
            found.add(name)
    if key.startswith(("model.", "evaluation.", "tools.")) and config.distillation.teacher is not None:
        found |= {"distillation", "export"}  # what the student is made from and how it is asked
    # Of the data, DPO alone reads the pairs.
    return found - {"pretrain", "sft"} if key == "data.preferences" else found


RESULT_KEYS = sorted(
    key
    for key in everything(BASE)
    if key.split(".")[0] in OWNER
    and key.split(".")[-1] not in WITHOUT_RESULT
    and key not in ("grpo.batch_size", "grpo.rollout.workers", "grpo.scoring.processes", "data.max_bad_records")
    and not key.endswith(".without_landlock")
    and key not in ("distillation.teacher_layout", "pretrain.prediction")
    and not (key.startswith("init_from.") and key != "init_from.path")
)


# Values of another type than the schema's make pydantic warn; the identity has to notice them all the same.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")


@pytest.mark.parametrize("key", RESULT_KEYS)
def test_changed_setting_changes_its_stage_and_all_after_it_and_nothing_before(key):
    changed = keys_of(with_value(key, other(everything(BASE)[key], key)))
    base = keys_of(BASE)
    assert {stage for stage in STAGES if changed[stage] != base[stage]} == downstream(key)


OTHER_KEYS = sorted(key for key in set(everything(BASE)) - set(RESULT_KEYS) if not key.startswith("stages."))


@pytest.mark.parametrize("key", OTHER_KEYS)
def test_layout_paths_names_and_logging_change_nothing(key):
    assert keys_of(with_value(key, other(everything(BASE)[key], key))) == keys_of(BASE)


def test_settings_that_came_later_leave_finished_stages_finished_where_they_change_nothing():
    found = identities(load_config(Path("configs/tiny-full.yaml"), {}), {})
    assert {stage: one.key[:10] for stage, one in found.items()} == BEFORE
    changed = load_config(Path("configs/tiny-full.yaml"), {"model.initialisation": "fan_in"})
    assert identities(changed, {})["pretrain"].key != found["pretrain"].key
    changed = load_config(Path("configs/tiny-full.yaml"), {"sft.optimizer.head_lr_factor": 2})
    assert next(s for s, one in identities(changed, {}).items() if one.key != found[s].key) == "sft"


def test_layout_and_cadence_are_among_the_keys_that_change_nothing():
    expected = {"layout.pp_size", "layout.micro_batch", "output_dir", "run_name", "tracking.wandb", "sft.log_every"}
    assert expected <= set(OTHER_KEYS)


@given(
    st.dictionaries(st.sampled_from(RESULT_KEYS), st.integers(0, 2), max_size=4),
    st.dictionaries(st.sampled_from(RESULT_KEYS), st.integers(0, 2), max_size=4),
)
@example({"distillation.teacher": 1}, {"distillation.teacher": 1, "evaluation.max_new_tokens": 1})
def test_equal_identities_mean_equal_settings_upstream(first, second):
    """The ledger never reuses a stale stage: the same key is never given to two different sets of settings."""

    def build(changes: dict[str, int]) -> PipelineFields:
        config = BASE
        for key, times in changes.items():
            value = everything(BASE)[key]
            for _ in range(times):
                value = other(value, key)
            config = _changed(config, key.split("."), value)
        return config

    one, two = build(first), build(second)
    values = everything(one), everything(two)
    for stage in STAGES:
        relevant = [key for key in RESULT_KEYS if stage in downstream(key, one) | downstream(key, two)]
        differs = any(values[0][key] != values[1][key] for key in relevant)
        assert (keys_of(one)[stage] != keys_of(two)[stage]) == differs


def test_contents_of_a_local_file_count_and_its_place_does_not(tmp_path):
    def config(name: str) -> PipelineFields:
        return PipelineFields(data={"sft": name})

    (tmp_path / "a.jsonl").write_text("one")
    (tmp_path / "b.jsonl").write_text("one")
    one, same = (config(str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl"))
    assert identities(one) == identities(same)
    before = identities(one)
    (tmp_path / "a.jsonl").write_text("two")
    assert identities(one)["data_prep"].key != before["data_prep"].key
    column = config(f"{tmp_path / 'b.jsonl'}:text")
    assert identities(column)["data_prep"].key != before["data_prep"].key, "another column is other data"


def test_file_that_is_gone_keeps_its_known_digest(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("one")
    config = PipelineFields(data={"sft": f"{path}:text"})
    known, before = source_digests(config), identities(config)
    path.unlink()
    assert identities(config, source_digests(config, known)) == before


def test_folder_is_digested_with_its_names(tmp_path):
    (tmp_path / "a").write_text("one")
    before = content_digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert content_digest(tmp_path) != before


def test_unreadable_data_is_a_user_error(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("")
    monkeypatch.setattr("ray_pipeline.records.input_files.file_sha256", refuse)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(Permission denied\)\. Check its rights"):
        content_digest(tmp_path / "a.txt")


def test_builtin_and_hub_names_are_not_files():
    assert [local_path(name) for name in ("builtin", "train", "org/name:train:text", "")] == [None] * 4


def test_default_run_name_is_the_recipe_and_a_hash_of_what_decides():
    assert default_run_name(BASE) == f"tiny-{keys_of(BASE)['export'][:8]}"
    assert default_run_name(BASE) != default_run_name(BASE.model_copy(update={"seed": 1}))


@given(st.recursive(st.integers(), lambda inner: st.dictionaries(st.text("ab", min_size=1), inner) | st.lists(inner)))
def test_flat_loses_no_leaf(value):
    def leaves(part: Any) -> int:
        items = part.values() if isinstance(part, dict) else part if isinstance(part, list) else None
        return 1 if not items else sum(map(leaves, items))

    assert len(flat({"root": value})) == leaves(value)


def test_dpo_joins_or_leaves_a_run_without_touching_what_does_not_read_its_pairs():
    without = [stage for stage in STAGES if stage != "dpo"]
    before, after = keys_of(PipelineFields(stages=without)), keys_of(BASE)
    assert {stage for stage in before if before[stage] == after[stage]} == {"pretrain", "sft"}


def test_with_a_tokenizer_and_without_pretrain_the_text_decides_nothing():
    def config(documents: int, **values: Any) -> PipelineFields:
        return PipelineFields(data={"builtin_documents": documents}, init_from={"path": "given"}, **values)

    given = {"tokenizer": {"name": "given"}, "stages": ["data_prep", "sft"]}
    assert keys_of(config(5, **given)) == keys_of(config(6, **given))
    trained = {"stages": ["data_prep", "sft"]}
    assert keys_of(config(5, **trained)) != keys_of(config(6, **trained))
    for of_text in ({"max_epochs": 2.0}, {"text_separator": None}, {"text_documents": "lines"}, {"text_characters": 9}):
        for others, same in ((given, True), (trained, False)):
            one, two = (PipelineFields(data=d, init_from={"path": "given"}, **others) for d in ({}, of_text))
            assert (keys_of(one) == keys_of(two)) == same


def test_contents_of_a_given_teacher_count_and_its_place_does_not(tmp_path):
    def key(name: str) -> str:
        return identities(PipelineFields(distillation={"teacher": name}))["distillation"].key

    for name in ("one", "two"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "config.json").write_text("{}")
    before = key(str(tmp_path / "one"))
    assert key(str(tmp_path / "two")) == before
    (tmp_path / "one" / "checkpoints").mkdir()
    (tmp_path / "one" / "checkpoints" / "step").write_text("")
    assert key(str(tmp_path / "one")) == before, "the model alone is read"
    (tmp_path / "one" / "model" / "config.json").write_text("{ }")
    assert key(str(tmp_path / "one")) != before
    assert key(f"topk:{tmp_path / 'two'}") != key(str(tmp_path / "two")), "a file of top-k is another kind of teacher"


def test_names_move_with_their_source_alone(tmp_path):
    path = Path("t")
    assert moved_name("topk:t", path, "/there") == "topk:/there"
    assert moved_name("t:text", path, "/there") == "/there:text"
