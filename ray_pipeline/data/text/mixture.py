"""How much of each source goes into the training text: epochs of sources, and the documents they mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_pipeline.data.text.corpus import Corpus, block_columns, digest_array, hash_fractions
from ray_pipeline.errors import UserError
from ray_pipeline.records.input_files import left_aside
from ray_pipeline.settings.schema import DataConfig

# A source that is larger than what is asked of it is sampled in so many places.
SAMPLED_BLOCKS = 64


def epochs(sizes: Sequence[int], weights: Sequence[float | None], most: float) -> list[float]:
    """How many times each source is read.

    Without weights each source is used whole, once. Weights give the sources' shares of the bytes: the source that is
    most plentiful for its weight is used whole, once, and the others are repeated until their share is reached. None is
    repeated more than `most` times (up to four repetitions are about as good as new text: arXiv:2305.16264); where one
    would have to be, the more plentiful ones are partly left out instead. One source at least is used whole.

    Args:
        sizes: bytes of each source. weights: in any unit, of all sources or of none.
        most: at least 1.
    """
    present = [index for index, size in enumerate(sizes) if size]
    if len(present) < 2 or any(weight is None for weight in weights):
        return [1.0 if size else 0.0 for size in sizes]
    held = {index: sizes[index] / weight for index, weight in enumerate(weights) if sizes[index] and weight}
    unit = min(max(held.values()), most * min(held.values()))  # bytes for each unit of weight
    return [unit / held[index] if index in held else 0.0 for index in range(len(sizes))]


def budgets(sizes: Sequence[int], shares: Sequence[float], most: int) -> list[int]:
    """How many bytes of each source to take: `most` in all, by share; what one does not have goes to the others."""
    out = [0] * len(sizes)
    order = sorted((i for i in range(len(sizes)) if shares[i] > 0), key=lambda i: sizes[i] / shares[i])
    for place, index in enumerate(order):
        rest = sum(shares[i] for i in order[place:])
        out[index] = min(sizes[index], round(most * shares[index] / rest))
        most -= out[index]
    return out


@dataclass
class SourceUse:
    """How a source is used.

    Attributes:
        epochs: asked for by the weights. whole: times every document is used. more: so many of the first are used once
            more. train, validation: documents, each counted once. uses: training documents as often as they are used.
        bytes, used_bytes, validation_bytes: of `train`, `uses` and `validation`.
    """

    epochs: float
    whole: int = 0
    more: int = 0
    train: int = 0
    validation: int = 0
    uses: int = 0
    bytes: int = 0
    used_bytes: int = 0
    validation_bytes: int = 0


class Choice:
    """Which documents of a corpus train, how often, and which validate: decided by their place and their content.

    Attributes:
        sources: how each source is used.
    Raises:
        UserError: fewer than two documents.
    """

    def __init__(self, corpus: Corpus, data: DataConfig):
        kept, read = (sum(getattr(facts, name) for facts in corpus.facts) for name in ("kept", "read"))
        if kept < 2:
            names = ", ".join(source.name for source in data.pretrain)
            lost = {
                name: sum(getattr(f, name) for f in corpus.facts) for name in ("empty", "duplicates", "contaminated")
            }
            raise UserError(
                f"--data {names}: {kept} documents are left of {read} (empty {lost['empty']}, duplicates "
                f"{lost['duplicates']}, holding evaluation questions {lost['contaminated']}), but at least 2 are "
                "needed, one to train and one to validate. Give more text."
            )
        self.corpus, self.fraction = corpus, data.validation_fraction
        sizes, weights = [facts.bytes for facts in corpus.facts], [source.weight for source in data.pretrain]
        self.sources = [SourceUse(times) for times in epochs(sizes, weights, data.max_epochs)]
        self._block_sources = [corpus.source(number) for number in range(len(corpus))]
        self._firsts = self._firsts_of_blocks()
        self._set_uses()
        self._lowest = self._highest = -1.0
        self._force_a_split()
        self._count()

    def _firsts_of_blocks(self) -> list[int]:
        """Per block: how many kept documents of its source lie before it."""
        counts = [0] * len(self.sources)
        firsts = []
        for number, source in enumerate(self._block_sources):
            firsts.append(counts[source])
            counts[source] += int(self.corpus.kept(number).sum())
        return firsts

    def _set_uses(self) -> None:
        """Turn epochs into documents: the first are used once more until the source's share of bytes is reached."""
        left = []
        for use, facts in zip(self.sources, self.corpus.facts, strict=True):
            use.whole = int(use.epochs + 1e-9)
            left.append(round((use.epochs - use.whole) * facts.bytes))
        for number, source in enumerate(self._block_sources):
            if left[source] > 0:
                _, (sizes,) = block_columns(self.corpus.path(number), "size")
                before = np.concatenate([[0], np.cumsum(sizes.to_numpy()[self.corpus.kept(number)], dtype=np.int64)])
                taken = int(np.count_nonzero(before[:-1] < left[source]))
                self.sources[source].more += taken
                left[source] -= int(before[taken])

    def _uses(self, number: int) -> NDArray[np.int64]:
        """[documents of the block]: how often each is used; of those not kept, never."""
        kept = self.corpus.kept(number)
        use = self.sources[self._block_sources[number]]
        place = self._firsts[number] + np.cumsum(kept) - 1
        return np.where(kept, use.whole + (place < use.more), 0)

    def _fractions(self, number: int) -> NDArray[np.float64]:
        _, (digests,) = block_columns(self.corpus.path(number), "digest")
        return hash_fractions(digest_array(digests))

    def _force_a_split(self) -> None:
        """Of two documents or more at least one goes to either side: the lowest hash validates, the highest trains."""
        held = total = 0
        lowest, highest = 2.0, -1.0
        for number in range(len(self.corpus)):
            found = self._fractions(number)[self._uses(number) > 0]
            if len(found):
                held, total = held + int(np.count_nonzero(found < self.fraction)), total + len(found)
                lowest, highest = min(lowest, float(found.min())), max(highest, float(found.max()))
        if not held:
            self._lowest = lowest
        elif held == total:
            self._highest = highest

    def _held(self, number: int) -> NDArray[np.bool_]:
        """[documents of the block]: whether each is held out, if it is used at all."""
        fractions = self._fractions(number)
        return ((fractions < self.fraction) | (fractions == self._lowest)) & (fractions != self._highest)

    def _count(self) -> None:
        for number, source in enumerate(self._block_sources):
            use, uses, held = self.sources[source], self._uses(number), self._held(number)
            _, (column,) = block_columns(self.corpus.path(number), "size")
            sizes, train, validation = column.to_numpy(), (uses > 0) & ~held, (uses > 0) & held
            use.train += int(train.sum())
            use.validation += int(validation.sum())
            use.uses += int(uses[train].sum())
            use.bytes += int(sizes[train].sum())
            use.used_bytes += int((sizes * uses)[train].sum())
            use.validation_bytes += int(sizes[validation].sum())

    def train(self, number: int, repetition: int = 0) -> NDArray[np.bool_]:
        """[documents of the block]: which train in this repetition of the corpus."""
        return (self._uses(number) > repetition) & ~self._held(number)

    def validation(self, number: int) -> NDArray[np.bool_]:
        """[documents of the block]: which validate. They are never repeated."""
        return (self._uses(number) > 0) & self._held(number)

    def visits(self, *, validation: bool) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        """(block, its wanted documents) in the order of the rows: source after source, then what is repeated."""
        most = 1 if validation else max(use.whole + bool(use.more) for use in self.sources)
        for repetition in range(most):
            for number in range(len(self.corpus)):
                wanted = self.validation(number) if validation else self.train(number, repetition)
                if wanted.any():
                    yield number, wanted

    def sample(self, most: int) -> Iterator[str]:
        """Training texts of at most so many bytes, of each source its share; of a large source from all over it."""
        shares = [use.used_bytes for use in self.sources]
        for source, size in enumerate(budgets([use.bytes for use in self.sources], shares, most)):
            blocks = [number for number, of in enumerate(self._block_sources) if of == source]
            whole, left = size >= self.sources[source].bytes, size
            if not whole and len(blocks) > SAMPLED_BLOCKS:
                blocks = [blocks[i * len(blocks) // SAMPLED_BLOCKS] for i in range(SAMPLED_BLOCKS)]
            for place, number in enumerate(blocks):
                quota = left if whole else -(-left // (len(blocks) - place))
                for text in self.corpus.texts(number, self.train(number)):
                    if quota <= 0:
                        break
                    yield text
                    taken = len(text.encode())
                    quota, left = quota - taken, left - taken

    def facts(self, data: DataConfig) -> list[dict[str, Any]]:
        """For the manifest and the terminal: what was read of each source, how often it is used, what is left out."""
        out = []
        for source, facts, use in zip(data.pretrain, self.corpus.facts, self.sources, strict=True):
            out.append(
                {
                    "name": source.name,
                    "licence": source.licence,
                    "weight": source.weight,
                    "epochs": round(use.epochs, 4),
                }
                | {name: getattr(facts, name) for name in ("read", "empty", "duplicates", "contaminated")}
                | {"files_not_read": [path.name for path in left_aside(source.name)]}
                | {"left_out": facts.kept - use.train - use.validation}
            )
        return out
