"""What became of a source's records: which cannot be used, what of the others was not read, and where reading ended."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from ray_pipeline.data.files.fields import BadRecord, Record, Watched
from ray_pipeline.errors import UserError
from ray_pipeline.settings.schema import DataConfig

T = TypeVar("T")
# Records that are looked at for more faults after the first one, where that ends the run.
LOOKED_ON = 20_000
_PLACES = 3  # of a kind of bad records that are named
_KINDS = 5  # of bad records that one message tells
_WAY_OUT = "--set data.on_bad_record=skip"


@dataclass
class BadKind:
    """Records with the same fault. Attributes: example: what is wrong with the first. places: of the first ones."""

    example: str
    count: int = 0
    places: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        more = f" ({self.count} like it: {', '.join(self.places)}" + (", ...)" if self.count > _PLACES else ")")
        return f"{self.places[0]}: {self.example}" + (more if self.count > 1 else "")


@dataclass
class Tally:
    """Counts of one source.

    Attributes:
        skip: leave bad records out, up to the share `most` of all.
        checked: fields that are not read were told before the run.
        records: how many were read, bad ones included.
        unread: fields that hold something and were not read -> in how many records.
        bad: kind of fault -> the records that have it. cut: whether a limit ended the reading.
    """

    skip: bool = False
    most: float = 0.0
    checked: bool = False
    records: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    bad: dict[str, BadKind] = field(default_factory=dict)
    cut: bool = False

    @classmethod
    def of(cls, data: DataConfig, *, checked: bool = False) -> Tally:
        """With the settings' rule for bad records."""
        return cls(data.on_bad_record == "skip", data.max_bad_records, checked)

    def stored(self) -> dict[str, Any]:
        """All of it, for a file; `restored` reads it."""
        bad = {kind: asdict(entry) for kind, entry in self.bad.items()}
        return {**vars(self), "unread": dict(self.unread), "bad": bad}

    @classmethod
    def restored(cls, facts: dict[str, Any]) -> Tally:
        """What was stored."""
        bad = {kind: BadKind(**entry) for kind, entry in facts["bad"].items()}
        return cls(**facts | {"unread": Counter(facts["unread"]), "bad": bad})

    @property
    def num_bad(self) -> int:
        """Records that cannot be used."""
        return sum(kind.count for kind in self.bad.values())

    def add_bad(self, place: str, error: BadRecord) -> None:
        """Count a record that cannot be used."""
        # Numbers, values and the parser's remarks tell records apart, not faults.
        kind = re.sub(r"\d+", "#", re.split(r", but |, not | \(", str(error), maxsplit=1)[0])
        entry = self.bad.setdefault(kind, BadKind(str(error)))
        entry.count += 1
        if len(entry.places) < _PLACES:
            entry.places.append(place)

    def settle(self) -> None:
        """Raise UserError where the records that cannot be used are more than may be."""
        bad = self.num_bad
        if not bad or (self.skip and bad <= self.most * self.records):
            return
        if self.skip:
            raise UserError(
                f"{bad} of {self.records} records cannot be used, more than data.max_bad_records={self.most:g}: "
                f"{self._kinds()}. Fix them, or allow more."
            )
        if bad == 1:
            raise UserError(f"{self._kinds()}. Fix or remove it, or leave such records out with {_WAY_OUT}.")
        raise UserError(
            f"{self._kinds()}. In all {bad} of {self.records} records looked at cannot be used. Fix or remove them, "
            f"or leave them out with {_WAY_OUT}."
        )

    def _kinds(self) -> str:
        kinds = sorted(self.bad.values(), key=lambda kind: -kind.count)
        others = sum(kind.count for kind in kinds[_KINDS:])
        return "; ".join(map(str, kinds[:_KINDS])) + (f"; and {others} for other reasons" if others else "")

    def notices(self) -> list[str]:
        """What the user should know of a source that was read, a sentence each."""
        out = []
        if self.unread and not self.checked:
            listed = ", ".join(f'"{name}" (in {count:,})' for name, count in self.unread.most_common())
            out.append(f"not read of its {self.records:,} records: {listed}")
        if self.bad:
            out.append(f"{self.num_bad:,} of {self.records:,} records are left out: {self._kinds()}")
        if self.cut:
            out.append(f"read no further than data.max_documents, {self.records:,} records")
        return out

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        bad = [{"reason": kind.example, "records": kind.count, "first": kind.places} for kind in self.bad.values()]
        return {"records": self.records, "not_read": dict(self.unread), "left_out": bad, "cut": self.cut}


def converted(
    records: Iterable[tuple[str, Record | BadRecord]], convert: Callable[[Record], T], tally: Tally
) -> Iterator[T]:
    """The records as `convert` makes them, without those that cannot be used.

    Where a bad record ends the run, nothing is given after the first one, and reading goes on a while for the others.
    """
    ends_at = None
    for place, record in records:
        if tally.records == ends_at:
            return
        tally.records += 1
        try:
            if isinstance(record, BadRecord):
                raise record
            watched = Watched(record)
            value = convert(watched)
        except BadRecord as error:
            tally.add_bad(place, error)
            if not tally.skip and ends_at is None:
                ends_at = tally.records + LOOKED_ON
            continue
        tally.unread.update(watched.unread())
        if ends_at is None:
            yield value


def limited(values: Iterable[T], limit: int | None, tally: Tally) -> Iterator[T]:
    """The first `limit` values, all without one; settles the tally at the end."""
    for number, value in enumerate(values):
        if number == limit:
            tally.cut = True
            break
        yield value
    tally.settle()
