"""Precedence, refusals and round trips of the settings."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from ray_pipeline.errors import UserError
from ray_pipeline.settings.checks import warnings
from ray_pipeline.settings.layers import RECIPE_DIR, nest, parse_text
from ray_pipeline.settings.loading import config_dump, config_yaml, load_config
from ray_pipeline.settings.messages import known_keys
from ray_pipeline.settings.presets import PRESETS
from ray_pipeline.settings.schema import TRAINING_STAGES, PipelineFields

RECIPES = sorted(path.stem for path in RECIPE_DIR.glob("*.yaml"))


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | None = None, overrides: dict | None = None, env: dict | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides or {}, env or {})
    return str(caught.value)


def test_defaults_then_yaml_then_environment_then_flags(tmp_path: Path) -> None:
    default = PipelineFields().grpo.beta
    path = write(tmp_path, "grpo: {group_size: 4}")
    assert load_config(path).grpo.beta == default
    path = write(tmp_path, "grpo: {group_size: 4, beta: 0.2}")
    assert load_config(path).grpo.beta == 0.2
    env = {"RAY_PIPELINE_GRPO__BETA": "0.3", "PATH": "/bin"}
    assert load_config(path, env=env).grpo.beta == 0.3
    config = load_config(path, {"grpo.beta": "0.4"}, env)
    assert config.grpo.beta == 0.4
    assert config.grpo.group_size == 4  # a group merges key by key
    assert load_config(path, env={"RAY_PIPELINE_LOG": "debug"}).tracking.log_level == "debug", "a short name of its own"


def test_preset_is_below_the_layer_that_names_it(tmp_path: Path) -> None:
    path = write(tmp_path, "model_size: small\nmodel: {hidden_size: 64, vocab_size: 600}")
    config = load_config(path)
    assert config.model.hidden_size == 64, "a recipe's own keys win over the preset it names"
    assert config.model.num_hidden_layers == PRESETS["small"]["num_hidden_layers"]
    config = load_config(path, {"model_size": "medium"})
    assert config.model.hidden_size == PRESETS["medium"]["hidden_size"], "--model-size wins over the recipe"
    assert config.model.vocab_size == 600, "vocabulary belongs to the recipe"
    assert load_config(path, {"model_size": "medium", "model.hidden_size": 32}).model.hidden_size == 32


def test_without_a_path_the_recipe_is_tiny() -> None:
    config = load_config()
    assert config.recipe == "tiny"
    assert config == load_config(RECIPE_DIR / "tiny.yaml") == load_config(Path("tiny"))


def test_recipe_is_named_after_its_file(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "seed: 1", "cats.yaml")).recipe == "cats"
    assert load_config(write(tmp_path, "recipe: dogs", "cats.yaml")).recipe == "dogs"


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_loads_without_a_warning_and_distils_into_half_its_size(name: str) -> None:
    config = load_config(Path(name))
    assert config.recipe == name
    assert warnings(config) == []
    if "distillation" in config.stages:
        student = config.distillation.student.applied_to(config.model)
        assert student.num_params(mtp=False) * 2 <= config.model.num_params(mtp=False)


def test_v3_recipe_has_the_published_size() -> None:
    model = load_config(Path("v3-671b")).model
    assert model.num_params(mtp=False) == pytest.approx(671e9, rel=0.001)
    assert model.num_params(mtp=False, active=True) == pytest.approx(37e9, rel=0.03)


def test_mini_recipe_is_tiny_in_another_layout() -> None:
    tiny, mini = load_config(Path("tiny")), load_config(Path("mini-3gpu-pp3"))
    assert (mini.layout.gpus, mini.layout.pp_size) == (3, 3)
    assert mini.model_copy(update={"recipe": "tiny", "layout": tiny.layout}) == tiny


@pytest.mark.parametrize("name", RECIPES)
def test_dump_loads_back_to_an_equal_config(name: str, tmp_path: Path) -> None:
    config = load_config(Path(name), {"tracking.entity": "us", "run_name": "123"})
    assert load_config(write(tmp_path, config_yaml(config), "config.yaml")) == config
    assert PipelineFields.model_validate(config_dump(config)) == config


def test_all_mistakes_are_listed_with_value_origin_and_suggestion(tmp_path: Path) -> None:
    path = write(tmp_path, "grpo: {bta: 0.1}\nsft: {steps: many}")
    text = refusal(path, {"model.vocab": "3", "layout.zero_stage": "7"}, {"RAY_PIPELINE_SED": "1"})
    assert "5 settings" in text
    assert f'grpo.bta=0.1: unknown key (did you mean "grpo.beta"?) [{path}]' in text
    assert "sft.steps=many: must be a valid integer" in text
    assert 'model.vocab=3: unknown key (did you mean "model.vocab_size"?) [command line]' in text
    assert "layout.zero_stage=7: must be 0, 1, 2 or 3 [command line]" in text
    assert 'sed=1: unknown key (did you mean "seed"?) [environment RAY_PIPELINE_SED]' in text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"beta": "1"}, 'did you mean "dpo.beta" or "grpo.beta"?'),
        ({"max_calls": "1"}, 'did you mean "tools.max_calls"?'),
        ({"grpo": "3"}, "grpo=3: is a group of settings"),
        ({"grpo.beta.x": "3"}, "is a single value"),
        ({"grpo": "3", "grpo.beta": "1"}, "both set"),
        ({"backend": "cud"}, 'did you mean "cuda"'),
        ({"model_size": "smal"}, 'did you mean "small"'),
        ({"data.pretrain": "x"}, "data.pretrain=x: must be a valid list"),
        ({"data.pretrain": [{"name": "x", "wight": 1}]}, 'did you mean "data.pretrain.0.weight"'),
        ({"data.pretrain": "[]"}, "at least one source"),
        ({"data.sft": " "}, "must name a source"),
        ({"pretrain.steps": "0"}, "pretrain.steps=0: must be greater than 0"),
        ({"grpo.group_size": "1"}, "greater than or equal to 2"),
        ({"pretrain.optimizer.lr": "inf"}, "must be a finite number"),
        ({"pretrain.optimizer.betas": "[0.9, 1.5]"}, "betas.1=1.5: must be less than 1"),
        ({"data.seq_len": "4096"}, "--set model.max_position_embeddings=4096"),
        ({"grpo.max_new_tokens": "512"}, "leaves no room for the question"),
        ({"evaluation.max_new_tokens": "9999"}, "leaves no room for the question"),
        ({"evaluation.questions": "401", "data.heldout_questions": "400"}, "only data.heldout_questions=400"),
        ({"tokenizer.vocab_size": "1024"}, "so some tokens would have no embedding"),
        ({"tokenizer.vocab_size": "200"}, "at least 300"),
        ({"model.qk_rope_head_dim": "7"}, "model.qk_rope_head_dim=7: rotary features come in pairs"),
        ({"distillation.student.n_routed_experts": "1"}, "distillation.student: num_experts_per_tok"),
        ({"run_name": "a/b"}, 'run_name="a/b": names a folder'),
        ({"run_name": ".."}, "names a folder"),
        ({"data.validation_fraction": "0"}, "held out"),
        (
            {"data.pretrain": [{"name": "a.txt", "weight": 1}, {"name": "b.txt"}]},
            'data.pretrain: "b.txt" has no weight and others have. Give every source one',
        ),
        ({"model.q_lora_rank": "none"}, "set export.gguf=[]"),
        (
            {"grpo.speculative": "true", "model.num_nextn_predict_layers": "0"},
            "grpo.speculative=True: model.num_nextn_predict_layers=0 leaves no MTP module",
        ),
        ({"grpo.think_budget": "-1"}, "grpo.think_budget=-1: must be greater than or equal to 0"),
        ({"grpo.updates_per_rollout": "7"}, "must be a multiple of updates_per_rollout=7"),
        ({"pretrain.indexer_warmup_steps": "7"}, "model.attention=mla has no indexer. Omit it"),
        (
            {"pretrain.steps": "100", "pretrain.indexer_warmup_steps": "101", "model.attention": "dsa"},
            "more than pretrain.steps=100. Use at most 100",
        ),
        ({"seed": str(2**63)}, f"seed={2**63}: must be less than or equal to {2**63 - 1}"),
        ({"grpo..beta": "7"}, "a key looks like grpo.beta"),
        ({"model.rope_scaling": "{factor: 4}"}, "model.rope_scaling.original_max_position_embeddings: must be given"),
    ],
)
def test_impossible_settings_are_refused_with_the_way_out(overrides: dict, expected: str) -> None:
    assert expected in refusal(overrides=overrides)


def test_yaml_mistakes_name_the_line(tmp_path: Path) -> None:
    assert "line 3" in refusal(write(tmp_path, "seed: 1\ngrpo:\n  beta: 0.1: 2\n"))
    assert 'key "seed" is given twice' in refusal(write(tmp_path, "seed: 1\nseed: 2\n"))
    assert "holds a list" in refusal(write(tmp_path, "- 1"))
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"run_name: caf\xe9")
    assert "not UTF-8" in refusal(path)


def test_missing_recipe_lists_those_there_are(tmp_path: Path) -> None:
    text = refusal(Path("configs/tinny.yaml"))
    assert 'did you mean "tiny"' in text and "v3-671b" in text
    assert "no such file" in refusal(tmp_path / "tiny.yaml"), "a path elsewhere never means a shipped recipe"
    assert "is a folder" in refusal(tmp_path)


def test_empty_recipe_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "", "tiny.yaml")).pretrain == PipelineFields().pretrain


def test_pytorch_means_auto(tmp_path: Path) -> None:
    assert load_config(None, {"backend": "pytorch"}).backend == "auto"
    assert load_config(write(tmp_path, "backend: pytorch")).backend == "auto"


def test_max_steps_only_lowers(tmp_path: Path) -> None:
    path = write(tmp_path, "pretrain: {steps: 50}\nsft: {steps: 5}")
    config = load_config(path, max_steps=10)
    assert (config.pretrain.steps, config.sft.steps) == (10, 5)
    assert all(getattr(config, stage).steps <= 10 for stage in TRAINING_STAGES)


def test_numbers_stay_names_where_a_name_is_wanted() -> None:
    assert load_config(None, {"run_name": "007"}).run_name == "007"
    assert load_config(None, {"layout.gpus": "null"}).layout.gpus is None
    assert load_config(None, {"model.q_lora_rank": "none", "export.gguf": "[]"}).model.q_lora_rank is None
    assert load_config(None, {"pretrain.optimizer.lr": "1e-3"}).pretrain.optimizer.lr == 1e-3


def test_loading_ignores_the_processes_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_PIPELINE_SEED", "77")
    monkeypatch.setenv("SEED", "77")
    assert load_config().seed == 0


def test_warns_of_a_student_that_is_not_small() -> None:
    config = load_config(None, {"distillation.student.num_hidden_layers": 6})
    assert "more than half" in warnings(config)[0]


def test_known_keys_cover_the_model() -> None:
    assert {f"model.{field.name}" for field in fields(ModelConfig)} <= set(known_keys())
    assert "pretrain.optimizer.lr" in known_keys()


@given(st.dictionaries(st.text("abc.", min_size=1, max_size=5), st.integers(), max_size=5))
def test_nesting_loses_nothing_or_refuses(dotted: dict[str, int]) -> None:
    try:
        tree = nest(dotted)
    except UserError:
        return

    def flatten(values: dict, prefix: str = "") -> dict[str, int]:
        out: dict[str, int] = {}
        for key, value in values.items():
            out |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return out

    assert flatten(tree) == dotted


@given(st.text())
def test_any_text_value_can_be_read(text: str) -> None:
    value = parse_text(text)
    assert isinstance(value, str | list | dict | type(None) | set) or value == yaml.safe_load(text)


def test_a_rank_is_not_held_for_frozen_within_seconds() -> None:
    with pytest.raises(UserError, match=r"layout\.frozen_seconds=3.*must be 0 \(never\) or at least 10"):
        load_config(None, {"layout.frozen_seconds": 3})
    assert load_config(None, {"layout.frozen_seconds": 0}).layout.frozen_seconds == 0


def test_a_warm_up_longer_than_its_stage_is_shortened_and_told():
    config = load_config(None, {"pretrain.steps": 50, "pretrain.optimizer.warmup_steps": 80, "sft.steps": 3})
    told = [text for text in warnings(config) if "warmup_steps" in text]
    assert told[0] == (
        "pretrain.optimizer.warmup_steps=80: longer than its 50 steps, so the rate of 0.014 would never be reached. "
        "Warmed up for 5 instead."
    )
    assert told[1].startswith("sft.optimizer.warmup_steps=20: longer than its 3 steps")
    assert told[1].endswith("Warmed up for 1 instead.")
    exact = load_config(None, {"pretrain.steps": 80, "pretrain.optimizer.warmup_steps": 80})
    assert not any("warmup" in text for text in warnings(exact))
