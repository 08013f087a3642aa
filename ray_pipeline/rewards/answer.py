r"""Is the final answer right? Numbers are compared exactly, other answers as text without case.

A plain function of strings that never raises: a model may write anything. Finds the answer behind `</think>`, in
`\boxed{}`, after `####` (GSM8K, arXiv:2110.14168) or as the last number.
"""

from __future__ import annotations

import re
from fractions import Fraction

from ray_pipeline.data.forms.question_records import boxed
from ray_pipeline.reasoning import parse
from ray_pipeline.rewards.registry import reward
from ray_pipeline.tools.calls import own_words

# Longer "numbers" are babble; exact arithmetic on them costs time and Python refuses to parse the longest.
MAX_NUMBER_LENGTH = 200

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# A minus belongs to the number unless something that can be subtracted from stands before it.
_SIGN = r"(?:(?<![0-9A-Za-z)])-\s?)?"
_NUMBER = re.compile(rf"(?P<sign>{_SIGN})[$€£]?\s?(?P<top>{_DIGITS})(?:\s?/\s?(?P<bottom>{_DIGITS}))?")
_LATEX_WORDS = re.compile(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_WORDS = r"[^\W\d]+(?:[\s/][^\W\d]+){0,3}"
_UNIT = rf"\s?(?:%|°)|\s?{_WORDS}|\s?\({_WORDS}\)"
_WHOLE = re.compile(rf"\s*(?:[A-Za-z]\w*\s*=\s*)?(?P<number>[-$€£.0-9].*?)(?:{_UNIT})?\s*\.?\s*")
_ANSWER_IS = re.compile(r"answer(?:\s+is)?\s*[:=]?\s+(?P<answer>\S.*)", re.IGNORECASE)


def final_text(completion: str) -> str | None:
    """What follows the thinking; all of it where nothing was thought; None where the thinking never ended.

    Calls of tools and what they gave are no part of it: the model has to say the answer itself.
    """
    return parse(own_words(completion)).answer


def extract(text: str) -> str:
    r"""The stated answer: in the last `\boxed{}`, after the last `####`, after "answer is", or the text itself."""
    inside = boxed(text)
    if inside is not None:
        return inside.strip()
    if "####" in text:
        return text.rpartition("####")[2].strip()
    stated = list(_ANSWER_IS.finditer(text))
    return stated[-1]["answer"].strip() if stated else text.strip()


def _clean(text: str) -> str:
    text = text.replace("\N{MINUS SIGN}", "-").replace("\\$", "$").replace("\\%", "%").replace("\\,", "")
    return _LATEX_FRACTION.sub(r"\1/\2", _LATEX_WORDS.sub(r"\1", text))


def _fraction(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > MAX_NUMBER_LENGTH:
        return None
    top = Fraction(match["top"].replace(",", ""))
    bottom = Fraction(match["bottom"].replace(",", "")) if match["bottom"] else Fraction(1)
    if bottom == 0:
        return None
    return (-top if match["sign"] else top) / bottom


def parse_number(text: str) -> Fraction | None:
    """The value of a text that is one number, with at most a currency, a unit or `x =` around it; else None."""
    whole = _WHOLE.fullmatch(_clean(text)) if len(text) <= MAX_NUMBER_LENGTH else None
    if whole is None:
        return None
    number = _NUMBER.fullmatch(whole["number"].strip())
    return None if number is None else _fraction(number)


def last_number(text: str) -> Fraction | None:
    """The value of the last number in a text."""
    found = list(_NUMBER.finditer(_clean(text)))
    return _fraction(found[-1]) if found else None


def stated_number(text: str) -> Fraction | None:
    """The value of an answer: of the whole text where it is one number, else of the last number in it."""
    found = parse_number(text)
    return last_number(text) if found is None else found


def as_text(text: str) -> str:
    """What two answers that are no numbers have in common when they are the same: their words, without case."""
    return " ".join(_clean(text).casefold().split()).strip(" .$\"'*")


@reward("answer", isolated=False, judges=True)
def answer(prompt: str, completion: str, reference: str) -> float:
    """1.0 where the completion's answer equals the reference's, else 0.0.

    Args:
        prompt: not looked at. completion: what the model wrote. reference: the answer alone, or a worked solution
            that ends with `#### answer`.
    """
    del prompt
    final = final_text(completion)
    if final is None or not final.strip():
        return 0.0
    expected, given = extract(reference), extract(final)
    value = parse_number(expected)
    if value is None:
        return float(as_text(given) == as_text(expected) != "")
    return float(stated_number(given) == value)
