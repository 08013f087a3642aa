"""DPO's losses equal TRL's, and do not depend on how pairs lie in rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.layers.loss import IGNORE, label_logprobs
from model.transformer import Transformer
from ray_pipeline.objectives.preference import Dpo
from tests.engine.test_parity import CONFIG
from tests.objectives import batches, trl_oracles

PAIRS = sum(len(row) for row in batches.PAIR_ROWS) // 2
# Our settings -> the name of TRL's loss.
CASES = [
    ({"loss_type": "sigmoid"}, "sigmoid"),
    ({"loss_type": "ipo"}, "ipo"),
    ({"loss_type": "sigmoid_norm"}, "sigmoid_norm"),
    ({"loss_type": "sigmoid", "label_smoothing": 0.2}, "robust"),
]


@pytest.fixture(scope="module")
def model() -> Transformer:
    from model.init import init_weights

    built = Transformer(CONFIG)
    init_weights(built, CONFIG, 0)
    return built


@pytest.fixture
def hidden() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    shape = (len(batches.PAIR_ROWS), batches.SEQ, CONFIG.hidden_size)
    return torch.randn(shape, generator=generator).requires_grad_()


@pytest.mark.parametrize(("settings", "name"), CASES, ids=[name for _, name in CASES])
def test_loss_gradient_and_figures_are_trls(model, hidden, settings, name):
    batch = batches.near(batches.pairs(), model, hidden, shift=1.0)
    objective = Dpo(beta=0.3, **settings)
    values = objective(model, hidden, None, batch)
    assert objective.weight(batch) == PAIRS
    logprobs = label_logprobs(hidden, model.lm_head, batch.labels)
    smoothing = settings.get("label_smoothing", 0.0)
    want, logged = trl_oracles.dpo_loss(logprobs, batch, loss_types=[name], beta=0.3, label_smoothing=smoothing)
    torch.testing.assert_close(values[0] / PAIRS, want, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(loss, hidden, retain_graph=True)[0] for loss in (values[0] / PAIRS, want)]
    assert float(gradients[1].abs().max()) > 1e-4
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    figures = dict(zip(objective.metric_names, (values[1:] / PAIRS).tolist(), strict=True))
    assert figures["reward_accuracy"] == pytest.approx(logged["rewards/accuracies"]) and figures["reward_accuracy"] > 0
    assert figures["margin"] == pytest.approx(logged["rewards/margins"], abs=1e-5)
    assert figures["chosen_logprob"] == pytest.approx(logged["logps/chosen"], rel=1e-6)
    assert figures["rejected_logprob"] == pytest.approx(logged["logps/rejected"], rel=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_a_pair_is_preferred_by_its_whole_answers_or_by_the_mean_of_their_tokens(model, hidden, loss_type):
    batch = batches.near(batches.pairs(), model, hidden, shift=1.0)
    logprobs = label_logprobs(hidden, model.lm_head, batch.labels).detach()
    preferred = 0
    for pair in range(PAIRS):
        inside = (batch.extras.pair == pair) & (batch.labels != IGNORE)
        chosen, rejected = (logprobs[inside & (batch.extras.chosen == side)] for side in (1.0, 0.0))
        preferred += bool(chosen.sum() > rejected.sum() if loss_type == "sigmoid" else chosen.mean() > rejected.mean())
    assert Dpo(loss_type=loss_type)(model, hidden, None, batch).tolist()[1] == preferred
    assert 0 < preferred < PAIRS


@pytest.mark.parametrize(("settings", "name"), CASES, ids=[name for _, name in CASES])
def test_pairs_in_one_row_count_as_in_rows_of_their_own(model, hidden, settings, name):
    batch = batches.near(batches.pairs(), model, hidden, shift=1.0)
    alone = batches.unpacked(batch, keep=2)
    assert len(alone) == PAIRS > len(batch)
    place = [row for row, documents in enumerate(batches.PAIR_ROWS) for _ in documents[::2]]
    objective = Dpo(**settings)
    assert objective.weight(batch) == objective.weight(alone)
    packed, apart = objective(model, hidden, None, batch), objective(model, hidden[place], None, alone)
    torch.testing.assert_close(packed, apart, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(values[0], hidden)[0] for values in (packed, apart)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_micro_batches_and_rows_that_only_pad_change_nothing(model, hidden):
    batch = batches.near(batches.pairs(), model, hidden, shift=1.0)
    padded, objective = batch.pad_rows(11), Dpo()
    more = torch.cat([hidden, torch.randn(3, *hidden.shape[1:])])
    assert objective.weight(padded) == objective.weight(batch)
    whole = objective(model, hidden, None, batch)
    torch.testing.assert_close(objective(model, more, None, padded), whole)
    parts = [objective(model, more[i : i + 2], None, padded.rows(i, i + 2)) for i in range(0, 11, 2)]
    torch.testing.assert_close(sum(parts), whole)


def test_the_reference_itself_has_gained_nothing_and_loses_ln_2(model, hidden):
    batch = batches.near(batches.pairs(), model, hidden, shift=0.0)
    loss, _, gained, margin, *_ = (Dpo()(model, hidden, None, batch) / PAIRS).tolist()
    assert (gained, margin) == (0.0, 0.0)
    assert loss == pytest.approx(0.6931472)


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=8), st.floats(0.01, 0.45))
def test_robust_smoothing_is_unbiased(margins, smoothing):
    """Over pairs of which that share is the wrong way round, its mean is the plain loss."""
    delta = torch.tensor(margins, dtype=torch.float64)
    robust, plain = Dpo(beta=0.3, label_smoothing=smoothing), Dpo(beta=0.3)
    mean = (1 - smoothing) * robust._losses(delta) + smoothing * robust._losses(-delta)
    torch.testing.assert_close(mean, plain._losses(delta), rtol=1e-9, atol=1e-9)


def test_ipo_with_smoothed_labels_is_refused():
    with pytest.raises(ValueError, match=r"label_smoothing=0.1: ipo takes no label for certain"):
        Dpo(loss_type="ipo", label_smoothing=0.1)
