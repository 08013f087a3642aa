"""The built-in preference task: think where there is something to work out.

Where more than one calculation is needed, the worked answer is chosen over one at a glance; where one look does, the
answer at a glance is chosen over the worked one. SFT's demonstrations mix both whatever the question, so a model
trained on them gets about half of the pairs right, and telling the two kinds of question apart is for DPO to learn.
"""

from __future__ import annotations

from random import Random

from ray_pipeline.data.tasks.question import Question, think

# Share of rejected answers at a glance that are wrong, as such answers often are.
SLIP_SHARE = 0.5


def needs_working(question: Question) -> bool:
    """Whether the question takes more than one calculation."""
    return sum("=" in step for step in question.steps.split()) > 1


def preference_answers(question: Question, seed: int) -> tuple[str, str]:
    """The chosen and the rejected answer, a pure function of the arguments.

    The question's answer must hold a digit, as those of all built-in questions do.
    """
    if not needs_working(question):
        return question.at_a_glance, question.completion
    rng = Random(f"{seed}/preference/{question.prompt}")
    if rng.random() < SLIP_SHARE:
        return question.completion, think("At a glance.", slip(question.answer, rng))
    return question.completion, question.at_a_glance


def slip(answer: str, rng: Random) -> str:
    """The answer with one digit wrong; a number keeps its length."""
    at = rng.choice([place for place, letter in enumerate(answer) if letter.isdigit()])
    first = not answer[:at][-1:].isdigit() and answer[at + 1 :][:1].isdigit()
    wrong = rng.choice([digit for digit in "0123456789"[first:] if digit != answer[at]])
    return answer[:at] + wrong + answer[at + 1 :]
