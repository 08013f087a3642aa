"""Accuracy counts right answers, whole or in slices."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from model.generate.decode import Decoder
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.evaluation.accuracy import EvalResult, evaluate_questions, wilson_interval

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    n_routed_experts=4,
    max_position_embeddings=24,
    initializer_range=0.4,
)


class Letters:
    """Ids are letters of the alphabet from 'a' at 2; 0 starts, 1 ends."""

    eos_id = 1

    def encode_prompt(self, question: str, tools: Sequence[object] = (), /) -> list[int]:
        return [0, *(2 + ord(c) - ord("a") for c in question)]

    def decode(self, ids: list[int], /) -> str:
        return "".join(chr(ord("a") + i - 2) if 2 <= i < 28 else "?" for i in ids)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    model = Transformer(CONFIG)
    init_weights(model, CONFIG, seed=3)
    return Decoder(model)


PROMPTS = ["ab", "cab", "b", "zz", "abc", "q"]


def questions_with_right_answers(decoder: Decoder, wrong: set[int]) -> list[dict]:
    blank = [{"prompt": p, "answer": "-"} for p in PROMPTS]
    said = evaluate_questions(decoder, Letters(), blank, max_new_tokens=6).samples
    return [
        {
            "prompt": s["prompt"],
            "answer": "no" if i in wrong else s["completion"].upper(),
            "category": "xy"[i % 2],
            "difficulty": i // 2,
        }
        for i, s in enumerate(said)
    ]


def test_accuracy_by_category_and_difficulty(decoder):
    result = evaluate_questions(decoder, Letters(), questions_with_right_answers(decoder, {0, 2}), max_new_tokens=6)
    assert result.correct == [False, True, False, True, True, True]
    assert result.accuracy == pytest.approx(4 / 6)
    assert result.by_category == {"x": pytest.approx(1 / 3), "y": 1.0}
    assert result.by_difficulty == {0: 0.5, 1: 0.5, 2: 1.0}
    assert result.format_rate == 0.0
    assert 1 <= result.mean_tokens <= 6


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_slices_merge_to_the_whole(decoder, ranks):
    questions = questions_with_right_answers(decoder, {1})
    whole = evaluate_questions(decoder, Letters(), questions, max_new_tokens=6)
    size = len(questions) // ranks
    parts = [
        evaluate_questions(decoder, Letters(), questions[r * size : (r + 1) * size], max_new_tokens=6)
        for r in range(ranks)
    ]
    assert EvalResult.merge(parts) == whole


def test_a_question_longer_than_the_context_counts_as_wrong(decoder):
    result = evaluate_questions(
        decoder, Letters(), [{"prompt": "a" * 40, "answer": ""}, {"prompt": "b", "answer": "x"}], max_new_tokens=3
    )
    assert result.too_long == 1
    assert result.correct[0] is False


def test_no_questions_give_an_empty_result(decoder):
    result = evaluate_questions(decoder, Letters(), [], max_new_tokens=3)
    assert (result.accuracy, result.interval) == (0.0, (0.0, 1.0))


def test_wilson_matches_published_values():
    # Newcombe (1998), table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_wilson_holds_the_proportion_inside_zero_and_one(a, b):
    correct, total = min(a, b), max(a, b)
    low, high = wilson_interval(correct, total)
    assert 0.0 <= low <= high <= 1.0
    if total:
        assert low - 1e-12 <= correct / total <= high + 1e-12


def test_wilson_refuses_more_right_than_asked():
    with pytest.raises(ValueError, match="correct=3 of total=2"):
        wilson_interval(3, 2)
