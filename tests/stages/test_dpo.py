"""DPO as a stage: what is chosen becomes the likelier, and a broken stage ends with the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.rows.preferences import PairRows
from ray_pipeline.errors import UserError
from ray_pipeline.launch.launchers import InlineLauncher, ProcessLauncher
from ray_pipeline.launch.stage_context import StageResult
from ray_pipeline.objectives.preference import answer_lengths
from ray_pipeline.records.artifacts import load_model, weights_digest
from ray_pipeline.settings.schema import PipelineFields
from ray_pipeline.stages import dpo
from ray_pipeline.stages.verdict import judge_preferences
from ray_pipeline.training import pairs as preference
from ray_pipeline.training.pairs import REFERENCE, PairSource, with_reference
from tests.training.dpo_run import PAIRS, SEQ_LEN, context, folder_of, preference_run

ANSWERS = ("the cat sat on the mat", "the moon sat on the owl")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preference_run(tmp_path_factory.mktemp("runs"))


def learn(run_dir: Path, name: str, *, ranks: int = 1, **settings: Any) -> StageResult:
    launcher = InlineLauncher() if ranks == 1 else ProcessLauncher(ranks)
    return dpo.run(context(run_dir, launcher, name, **settings))


def weights(run_dir: Path, name: str) -> dict[str, torch.Tensor]:
    return load_model(run_dir / name / "model").state_dict()


LEARNING: dict[str, Any] = {"steps": 15, "checkpoint_every": 50, "optimizer": {"warmup_steps": 0, "lr": 2e-2}}


@pytest.fixture(scope="module")
def both_ways(tmp_path_factory: pytest.TempPathFactory) -> list[StageResult]:
    """Two answers of about the same length, either of which is the chosen one."""
    runs = [preference_run(tmp_path_factory.mktemp("runs"), *answers) for answers in (ANSWERS, ANSWERS[::-1])]
    return [learn(run, "learned", **LEARNING) for run in runs]


def test_what_is_chosen_becomes_the_likelier_answer(both_ways):
    before = [result.baselines["input_preference_accuracy"] for result in both_ways]
    assert sum(before) == 1, "what the untrained model prefers is chosen in one of the runs"
    for result in both_ways:
        metrics = result.metrics
        assert result.learned and metrics["preference_accuracy"] == metrics["reward_accuracy"] == 1.0
        assert metrics["preference_pairs"] == PAIRS // 5 == 6
        bounds = [metrics[f"preference_accuracy_{end}"] for end in ("low", "high")]
        assert bounds == pytest.approx((0.6097, 1.0), abs=1e-4), "Wilson's of 6 out of 6"
        assert metrics["margin"] > 0 and {"accuracy", "format_rate", "train_loss"} <= metrics.keys()
        assert set(result.baselines) == {"input_preference_accuracy", "input_accuracy", "chance_reward_accuracy"}


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm"])
def test_losses_of_the_mean_token_prefer_by_the_mean_token(run_dir, loss_type):
    result = learn(run_dir, loss_type, loss_type=loss_type, **LEARNING)
    assert result.metrics["preference_accuracy"] == 1.0 == result.metrics["reward_accuracy"]


def test_a_long_answer_that_gained_was_learned_though_it_stays_the_less_likely_one(tmp_path):
    result = learn(preference_run(tmp_path, "an owl and the moon " * 2, "the cat"), "long", **LEARNING)
    assert result.metrics["preference_accuracy"] == 0.0 == result.baselines["input_preference_accuracy"]
    assert result.metrics["reward_accuracy"] == 1.0 and result.learned


def test_the_reference_is_the_input_model_pair_by_pair(run_dir):
    learn(run_dir, "reference", steps=1)
    model = load_model(folder_of(run_dir, "sft") / "model").eval()
    tokenizer = load_tokenizer(folder_of(run_dir, "data_prep") / "tokenizer")
    found = preference.load_file(run_dir / "reference" / REFERENCE / "pairs.safetensors")
    for name, values in found.items():
        rows = PairRows(folder_of(run_dir, "data_prep") / "preferences" / name)
        assert values.shape == (len(rows), 2)
        for index in range(len(rows)):
            torch.testing.assert_close(values[index], by_hand(model, rows, index), rtol=1e-5, atol=1e-4)
    assert tokenizer.decode(rows.slice(0, 1).tokens[0].tolist()).count("mat") == 2


def by_hand(model: Transformer, rows: PairRows, index: int) -> torch.Tensor:
    batch, out = rows.take([index]), []
    for side in (1.0, 0.0):
        inside = (batch.extras.chosen[0] == side) & (batch.extras.pair[0] == 0)
        tokens, labels = batch.tokens[:, inside], batch.labels[0, inside]
        with torch.no_grad():
            logprobs = model(tokens)[0].log_softmax(-1)
        counted = labels >= 0
        out.append(logprobs[counted].gather(1, labels[counted].unsqueeze(1)).sum())
    return torch.stack(out)


def test_the_references_share_of_an_answer_is_its_log_probability(run_dir):
    rows = PairRows(folder_of(run_dir, "data_prep") / "preferences" / "train")
    reference = -torch.arange(1.0, 9.0).view(4, 2)
    batch = with_reference(rows.take([3, 0, 7, 1]), reference)
    for pair in range(4):
        for side, chosen in enumerate((1.0, 0.0)):
            inside = (batch.extras.pair == pair) & (batch.extras.chosen == chosen)
            assert batch.extras.ref_logprobs[inside].sum().item() == pytest.approx(reference[pair, side].item())
    assert answer_lengths(batch).min() > 0
    assert not batch.extras.ref_logprobs[batch.labels < 0].any()


def test_killed_it_resumes_to_the_same_weights_and_measures_the_reference_once(run_dir, monkeypatch):
    learn(run_dir, "unbroken")
    real, measured, struck = preference.answer_logprobs, [], []

    def dies(self, step):
        if step == 5 and not struck:
            struck.append(step)
            raise ZeroDivisionError
        return batch(self, step)

    batch = PairSource.batch
    monkeypatch.setattr(PairSource, "batch", dies)
    monkeypatch.setattr(preference, "answer_logprobs", lambda *a: measured.append(a) or real(*a))
    with pytest.raises(ZeroDivisionError):
        learn(run_dir, "broken")
    resumed = learn(run_dir, "broken")
    assert struck and len(measured) == 2, "train and validation, once"
    assert weights_digest(run_dir / "broken" / "model") == weights_digest(run_dir / "unbroken" / "model")
    assert resumed.baselines == learn(run_dir, "unbroken").baselines


def test_a_damaged_reference_is_measured_again(run_dir):
    learn(run_dir, "damaged", steps=2)
    file = run_dir / "damaged" / REFERENCE / "pairs.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\0\0\0\0")
    learn(run_dir, "damaged", steps=2)
    assert file.read_bytes() == whole


LAYOUTS = [{"sp_size": 2}, {"pp_size": 2}, {"tp_size": 2}, {"dp_size": 2}, {"dp_size": 2, "ep_size": 2}]


@pytest.mark.parametrize(
    "layout", [LAYOUTS[0], *(pytest.param(layout, marks=pytest.mark.slow) for layout in LAYOUTS[1:])], ids=str
)
def test_any_layout_learns_the_same(run_dir, layout):
    one = learn(run_dir, "one", optimizer={"name": "sgd", "warmup_steps": 0, "lr": 1e-2})
    name = "-".join(layout)
    two = learn(run_dir, name, ranks=2, layout=layout, optimizer={"name": "sgd", "warmup_steps": 0, "lr": 1e-2})
    assert two.baselines == one.baselines
    assert two.metrics["preference_loss"] == pytest.approx(one.metrics["preference_loss"], rel=1e-5)
    expected = weights(run_dir, "one")
    for key, value in weights(run_dir, name).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k} {m}")


@pytest.mark.parametrize(
    ("after", "surely_gained", "learned"),
    [(0.5, 0.4, False), (0.509, 0.509, False), (0.52, 0.4, True), (0.4, 0.52, True)],
)
def test_a_gain_below_the_least_is_none(after, surely_gained, learned):
    given: Any = SimpleNamespace(folder=Path("dpo"), config=PipelineFields())
    figures = {"preference_accuracy": after, "accuracy": 0.9, "reward_accuracy_low": surely_gained}
    before = {"input_preference_accuracy": 0.5, "input_accuracy": 0.1}
    result = judge_preferences(given, figures | before)
    assert (result.learned, result.metrics) == (learned, figures)
    assert result.baselines == before | {"chance_reward_accuracy": 0.5}


def test_rows_of_another_length_are_refused(run_dir):
    given = context(run_dir, InlineLauncher(), "longer")
    shorter = given.config.model_copy(update={"data": given.config.data.model_copy(update={"seq_len": 64})})
    with pytest.raises(UserError, match=f"rows hold {SEQ_LEN} tokens, not the 64 asked for"):
        dpo.run(replace(given, config=shorter))
