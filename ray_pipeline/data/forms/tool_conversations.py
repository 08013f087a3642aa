"""Built-in questions answered by one call of a calculator."""

from __future__ import annotations

from ray_pipeline.data.forms.turns import Conversation
from ray_pipeline.data.tasks.question import Question, think

# The tool and its argument, as ray_pipeline.tools has them.
CALCULATOR, ARGUMENT = "calculator", "expression"


def tool_conversation(question: Question) -> Conversation:
    """The question, one call of the calculator, what it gives, and the answer."""
    expression = question.steps.partition("=")[0]
    call = {"type": "function", "function": {"name": CALCULATOR, "arguments": {ARGUMENT: expression}}}
    return Conversation(
        (
            {"role": "user", "content": question.prompt},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": question.answer},
            {"role": "assistant", "content": think(f"The calculator gives {question.answer}.", question.answer)},
        )
    )
