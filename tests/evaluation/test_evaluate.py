"""From questions to figures: an oracle scores all, a liar nothing, and every figure is that of what was written."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from torch import Tensor

from model.generate.decode import Completion
from ray_pipeline.data.chat.tokenizer import ChatTokenizer, load_tokenizer
from ray_pipeline.data.tasks.mixes import REGISTRY
from ray_pipeline.data.tasks.question import think
from ray_pipeline.evaluation.asking import AskSettings
from ray_pipeline.evaluation.evaluate import answers_wanted, choose_options, evaluate
from ray_pipeline.evaluation.graders import AnswerScoring
from ray_pipeline.evaluation.models import LanguageModel
from ray_pipeline.evaluation.tasks import Item, Task
from tests.evaluation.made_models import save_tokenizer


@dataclass
class Scripted:
    """Writes what it was told for each prompt; sample k of a prompt is its k-th text, in turn."""

    tokenizer: ChatTokenizer
    script: dict[str, list[str]]
    context: int = 1024
    vocab_size: int = 320
    parameters: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    favourite: str = "B"
    asked: dict[str, int] = field(default_factory=dict)

    def generate(self, prompts: list[list[int]], **options: object) -> list[Completion]:
        out = []
        for prompt in prompts:
            question = next(q for q in self.script if self.tokenizer.encode_prompt(q) == prompt)
            turn = self.asked[question] = self.asked.get(question, -1) + 1
            text = self.script[question][turn]
            tokens = [*self.tokenizer.encode(text), self.tokenizer.eos_id]
            out.append(Completion(prompt, tokens, [], finished=True))
        return out

    def logits(self, tokens: Tensor) -> Tensor:
        """The first token of the favourite is likelier than any other, everywhere."""
        out = torch.zeros(*tokens.shape, self.vocab_size)
        out[..., self.tokenizer.encode(self.favourite)[0]] = 3.0
        return out


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def model(tokenizer: ChatTokenizer, script: dict[str, list[str]], **options: object) -> LanguageModel:
    backend = Scripted(tokenizer, script, **options)
    return LanguageModel("scripted", tokenizer, frozenset({tokenizer.eos_id}), backend)


def word_problems() -> tuple[Task, dict[str, str]]:
    made = [REGISTRY["word_problem"](Random(seed), 1 + seed % 5) for seed in range(20)]
    items = [Item(str(i), q.prompt, q.answer, "word_problem", 1 + i % 5) for i, q in enumerate(made)]
    return Task("word_problems", items, AnswerScoring()), {q.prompt: think(q.steps, q.answer) for q in made}


def test_an_oracle_that_works_its_answers_out_scores_everything(tokenizer: ChatTokenizer) -> None:
    task, answers = word_problems()
    found = evaluate(model(tokenizer, {q: [a] for q, a in answers.items()}), task, AskSettings()).figures()
    assert found["accuracy"] == found["format_rate"] == found["finished_rate"] == 1.0
    assert found["steps_right_rate"] == found["verified_rate"] == 1.0 and found["reflection_rate"] == 0.0
    thinking = sum(len(tokenizer.encode(a.split("</think>")[0].removeprefix("<think>"))) for a in answers.values())
    whole = sum(len(tokenizer.encode(a)) + 1 for a in answers.values())
    assert found["mean_thinking_tokens"] == thinking / 20 and found["mean_tokens"] == whole / 20
    # Beside both marks and the end token.
    assert found["thinking_overhead"] == pytest.approx(thinking / (whole - thinking - 3 * 20))
    assert all(group["accuracy"] == 1.0 and group["questions"] == 4 for group in found["by_difficulty"].values())


def test_wrong_work_is_seen_through_a_right_answer(tokenizer: ChatTokenizer) -> None:
    task, answers = word_problems()
    guesses = {q: [think("2+2=5", a.split("</think>")[1])] for q, a in answers.items()}
    found = evaluate(model(tokenizer, guesses), task, AskSettings()).figures()
    assert (found["accuracy"], found["steps_rate"], found["steps_right_rate"]) == (1.0, 1.0, 0.0)


def test_samples_of_a_question_are_counted_together(tokenizer: ChatTokenizer) -> None:
    items = [Item("0", "one?", "1"), Item("1", "two?", "2")]
    script = {
        "one?": [think("a", "3"), think("b", "1"), think("c", "1"), think("d", "3")],
        "two?": [think("a", "2"), think("b", "2"), "<think>never ends", think("d", "5")],
    }
    settings = AskSettings(samples=4, temperature=1.0)
    task = Task("t", items, AnswerScoring())
    told: list[tuple[int, int]] = []
    result = evaluate(model(tokenizer, script), task, settings, (1, 4), lambda *done: told.append(done))
    found = result.figures()
    assert [item.share for item in result.items] == [0.5, 0.5]
    # A tie of 3 and 1 goes to the first said, which is wrong; two votes beat one and an abstention.
    assert found["maj_at_k"]["4"]["value"] == 0.5 and found["maj_at_k"]["1"]["value"] == 0.5
    assert found["pass_at_k"]["4"]["value"] == 1.0 and found["format_rate"] == 7 / 8
    assert sum(answers for answers, _ in told) == answers_wanted(task, settings) == 8
    assert sum(tokens for _, tokens in told) == sum(a.tokens for item in result.items for a in item.answers)


def test_the_likeliest_option_is_chosen_and_the_first_of_equal_ones(tokenizer: ChatTokenizer) -> None:
    items = [Item("0", "q?", "B", options=("A", "B", "C")), Item("1", "r?", "A", options=("A", "C"))]
    task = Task("choices", items, way="options")
    chosen = choose_options(model(tokenizer, {}), task)
    assert [a.completion for a in chosen] == ["B", "A"] and all(a.correct for a in chosen)
    figures = evaluate(model(tokenizer, {}, favourite="C"), task, AskSettings(samples=4)).figures()
    assert figures["accuracy"] == 0.0 and figures["questions"] == 2


def test_longer_options_are_not_at_a_disadvantage(tokenizer: ChatTokenizer) -> None:
    # Equal chances for every token: the sum prefers the shorter text, the mean per byte the one of larger tokens.
    short, long = "7", "the cat sat on the mat"
    flat = model(tokenizer, {}, favourite="Z")
    per_byte = {text: len(tokenizer.encode(text)) / len(text.encode()) for text in (short, long)}
    assert per_byte[long] < per_byte[short]
    [answer] = choose_options(flat, Task("cloze", [Item("0", "q?", long, options=(short, long))], way="options"))
    assert answer.completion == long
