"""Token ids of marked conversations (`control_text`): what is only spelled stays text, and answers begin with a token
of their own.

A model goes on from the tokens of its prompt, so training must see the same tokens: where the text as a whole would be
cut otherwise ("Assistant: " + "Yes" has one token " Yes" across the border), the prompt and what follows it are encoded
each by itself. Everywhere else the ids are those of the whole text, as transformers gives them.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from ray_pipeline.data.chat.control_text import NONCHARACTERS, ControlStrings, Span, Unmarked, read_marks
from ray_pipeline.errors import UserError


class Tokens(NamedTuple):
    """Token ids, and the characters that each one stands for."""

    ids: list[int]
    offsets: list[Span]


class Encoded(NamedTuple):
    """A marked text as tokens.

    Attributes:
        starts: the number of tokens before each border, by its place in the text.
    """

    read: Unmarked
    tokens: Tokens
    starts: dict[int, int]


class MarkedEncoder:
    """Encodes marked texts.

    Args:
        controls: id of each control token by its name.
        after: a control token that any text may follow.
    """

    def __init__(self, tokenizer: Tokenizer, controls: Mapping[str, int], after: str):
        self.tokenizer, self.after = tokenizer, after
        self.names = ControlStrings(controls)
        self._controls, self.control_ids = dict(controls), frozenset(controls.values())
        self._without: dict[str, tuple[Tokenizer, dict[int, int]]] = {}

    def encode(self, marked: Sequence[str]) -> list[Encoded]:
        """Many texts on all cores.

        Raises:
            UserError: a text that cannot be spelled or cut with this tokenizer.
        """
        read = [read_marks(text) for text in marked]
        spelled = [self.names.spans(one.text, one.spelled) for one in read]
        tokens = self._encode([one.text for one in read], spelled)
        tails: dict[str, list[int]] = {}
        return [
            self._with_borders(one, spans, whole, tails)
            for one, spans, whole in zip(read, spelled, tokens, strict=True)
        ]

    def continued(self, text: str, *, keep: Sequence[str] = ()) -> list[int]:
        """Ids of a text that follows others; control tokens in it are spelled, those of `keep` excepted."""
        one = read_marks(self.names.mark(text, keep))
        before = Tokens([self._controls[self.after]], [(0, len(self.after))])
        return self._continuation(one.text, self.names.spans(one.text, one.spelled), before, self.after).ids

    def _encode(self, texts: Sequence[str], spelled: Sequence[list[Span]]) -> list[Tokens]:
        # Names that are only spelled are hidden from the tokenizer at first, so that what it finds is meant.
        hidden = [_hidden(text, spans) for text, spans in zip(texts, spelled, strict=True)]
        found = self.tokenizer.encode_batch(hidden, add_special_tokens=False)
        tokens = [Tokens(list(one.ids), list(one.offsets)) for one in found]
        return [
            self._spelled(text, spans, one) if spans else one
            for text, spans, one in zip(texts, spelled, tokens, strict=True)
        ]

    def _spelled(self, text: str, spans: list[Span], hidden: Tokens) -> Tokens:
        """The tokens with those parts between control tokens encoded anew in which a name is spelled."""
        ids: list[int] = []
        offsets: list[Span] = []
        places = [i for i, token in enumerate(hidden.ids) if token in self.control_ids]
        for left, right in pairwise([-1, *places, len(hidden.ids)]):
            start = hidden.offsets[left][1] if left >= 0 else 0
            stop = hidden.offsets[right][0] if right < len(hidden.ids) else len(text)
            part = Tokens(hidden.ids[left + 1 : right], hidden.offsets[left + 1 : right])
            inside = _moved([span for span in spans if start <= span[0] < stop], -start)
            if inside:
                part = _shifted(self._as_text(text[start:stop], inside, begins=left < 0), start)
            ids += part.ids + hidden.ids[right : right + 1]
            offsets += part.offsets + hidden.offsets[right : right + 1]
        return Tokens(ids, offsets)

    def _as_text(self, text: str, spans: list[Span], *, begins: bool) -> Tokens:
        """Tokens of a text without control tokens; `begins`: nothing stands before it."""
        anchor = next((letter for letter in NONCHARACTERS if letter not in text), "")
        if anchor not in self._without:
            self._without[anchor] = self._without_controls(anchor)
        tokenizer, own_ids = self._without[anchor]
        found = tokenizer.encode(text if begins else anchor + text, add_special_tokens=False)
        skipped = int(not begins)
        ids = [own_ids.get(i, i) for i in found.ids[skipped:]]
        if not anchor or self.control_ids.intersection(ids):
            names = ", ".join(sorted({text[a:b] for a, b in spans}))
            raise UserError(
                f"a message holds {names}, which this tokenizer cannot write but as a control token. Take it out "
                "of the data, or use another tokenizer."
            )
        return _shifted(Tokens(ids, list(found.offsets[skipped:])), -skipped)

    def _without_controls(self, anchor: str) -> tuple[Tokenizer, dict[int, int]]:
        """A copy that knows no control token but the anchor, and the right ids of the added tokens that it keeps."""
        made = json.loads(self.tokenizer.to_str())
        kept = [token for token in made["added_tokens"] if token["content"] not in self._controls]
        _hide(made["model"], self._controls, anchor)
        copy = Tokenizer.from_str(json.dumps(made | {"added_tokens": kept, "post_processor": None}))
        copy.add_special_tokens([AddedToken(anchor, special=True, normalized=False)])
        own_ids = {copy.token_to_id(token["content"]): int(token["id"]) for token in kept}
        return copy, {given: own for given, own in own_ids.items() if given is not None}

    def _with_borders(self, read: Unmarked, spans: list[Span], whole: Tokens, tails: dict[str, list[int]]) -> Encoded:
        starts: dict[int, int] = {}
        moved = []
        for place in sorted(set(read.borders)):
            start = self._start(read.text, spans, whole, place, tails)
            if start is None:
                moved.append(place)
            else:
                starts[place] = start
        if not moved:
            return Encoded(read, whole, starts)
        return self._cut(read, spans, moved, tails)

    def _start(
        self, text: str, spans: list[Span], whole: Tokens, place: int, tails: dict[str, list[int]]
    ) -> int | None:
        """How many of the tokens are what the text before `place` alone gives; None where they are others."""
        ids, offsets = whole
        at = bisect_left(offsets, place, key=lambda span: span[0])
        if at and ids[at - 1] in self.control_ids and offsets[at - 1][1] == place:
            return at  # a control token ends here, and what stands before one depends on nothing behind it
        # Control tokens cut a text before anything else does, so what stands before the last one is as it would be.
        last = next((i for i in range(at - 1, -1, -1) if ids[i] in self.control_ids and offsets[i][1] <= place), None)
        at, tail_start = (0, 0) if last is None else (last, offsets[last][0])
        tail = text[tail_start:place]
        inside = _moved([span for span in spans if tail_start <= span[0] and span[1] <= place], -tail_start)
        if inside or tail not in tails:
            [found] = self._encode([tail], [inside])
            expected = found.ids
            if not inside:
                tails[tail] = expected
        else:
            expected = tails[tail]
        end = at + len(expected)
        same = ids[at:end] == expected and (not expected or offsets[end - 1][1] <= place)
        return end if same and (end == len(ids) or offsets[end][0] >= place) else None

    def _cut(self, read: Unmarked, spans: list[Span], moved: list[int], tails: dict[str, list[int]]) -> Encoded:
        """The text encoded in parts that begin at the places `moved`; every other border stays where it was."""
        text = read.text
        whole = Tokens([], [])
        starts = {}
        for start, stop in pairwise([0, *moved, len(text)]):
            inside = _moved([span for span in spans if start <= span[0] < stop], -start)
            if start:
                starts[start] = len(whole.ids)
                part = self._continuation(text[start:stop], inside, whole, text[:start])
            else:
                [part] = self._encode([text[:stop]], [inside])
            borders = [place - start for place in read.borders if start < place < stop]
            for border in borders:
                within = self._start(text[start:stop], inside, part, border, tails)
                if within is None:
                    raise self._no_border(text, start + border)
                starts[start + border] = len(whole.ids) + within
            part = _shifted(part, start)
            whole = Tokens(whole.ids + part.ids, whole.offsets + part.offsets)
        return Encoded(read, whole, starts)

    def _continuation(self, text: str, spans: list[Span], before: Tokens, before_text: str) -> Tokens:
        """Tokens of a text that follows others, without the space that some tokenizers put before a text.

        Raises:
            UserError: none of the ways to encode it gives the text back.
        """
        ways = []
        for given in ("", self.after, "\n", before_text[-1:]):
            [found] = self._encode([given + text], [_moved(spans, len(given))])
            skipped = bisect_left(found.offsets, len(given), key=lambda span: span[0])
            if all(stop <= len(given) for _, stop in found.offsets[:skipped]):
                ways.append(_shifted(Tokens(found.ids[skipped:], found.offsets[skipped:]), -len(given)))
        written = [self._decoded(before.ids + way.ids) for way in ways]
        if before_text + text in written:
            return ways[written.index(before_text + text)]
        # A tokenizer that changes texts (to lower case, say) must change this one as it does the whole.
        [joined] = self._encode([before_text + text], [_moved(spans, len(before_text))])
        if self._decoded(joined.ids) in written:
            return ways[written.index(self._decoded(joined.ids))]
        raise self._no_border(before_text + text, len(before_text))

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    @staticmethod
    def _no_border(text: str, place: int) -> UserError:
        return UserError(
            f"the answer {text[place : place + 40]!r} cannot be cut from its prompt, which ends with "
            f"{text[max(0, place - 40) : place]!r}: this tokenizer has no tokens that stand for the two. End the chat "
            "template's generation prompt with a control token, or use --set tokenizer.name=train."
        )


def _hide(model: dict[str, Any], names: Collection[str], anchor: str) -> None:
    """Rename entries of a vocabulary that a text could spell, whatever is in the list of added tokens."""
    if isinstance(model["vocab"], list):  # unigrams: [name, score], the id is the place
        for entry in model["vocab"]:
            entry[0] = f"{anchor}{anchor}{entry[0]}" if entry[0] in names else entry[0]
        return
    merges = {"".join(merge if isinstance(merge, list) else merge.split(" ")) for merge in model.get("merges", ())}
    model["vocab"] = {
        f"{anchor}{anchor}{name}" if name in names and name not in merges else name: number
        for name, number in model["vocab"].items()
    }


def _hidden(text: str, spans: list[Span]) -> str:
    for start, stop in spans:
        text = text[:start] + "x" * (stop - start) + text[stop:]
    return text


def _moved(spans: list[Span], by: int) -> list[Span]:
    return [(a + by, b + by) for a, b in spans]


def _shifted(tokens: Tokens, by: int) -> Tokens:
    return Tokens(tokens.ids, _moved(tokens.offsets, by))
