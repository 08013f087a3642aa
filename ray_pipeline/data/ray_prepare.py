"""Cleaning, deduplication, decontamination and tokenising of documents with Ray Data.

What is done to a document is in `cleaning` and `decontaminate`; this file only spreads it over the cluster. Results
depend neither on the number of workers nor on the order in which blocks finish: Ray Data is told to keep the order,
and document indices are checked to rise.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ray_pipeline.data.cleaning import clean_text, content_hash
from ray_pipeline.data.decontaminate import Decontaminator

# (what is being done, documents done, documents in all or None)
Progress = Callable[[str, int, int | None], None]
DOCUMENTS_PER_BLOCK = 500
# Half a CPU: a block must find a place on one core next to the driver's own work.
CPUS_PER_TASK = 0.5


@dataclass
class Corpus:
    """Clean, different documents in the object store, and what the driver must know of each.

    Attributes:
        blocks: refs of arrow tables (index, text); `index` counts the kept documents.
        sources, digests, sizes: per kept document: index of its source, content hash, bytes of UTF-8.
        read, empty, duplicates, contaminated: how many documents came in, and why some did not stay.
    """

    blocks: list[Any] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    read: int = 0
    empty: int = 0
    duplicates: int = 0
    contaminated: int = 0

    def __len__(self) -> int:
        return len(self.digests)

    def texts(self) -> Iterator[str]:
        """The kept documents in order, one block at a time."""
        for block in self.blocks:
            yield from ray.get(block)["text"].to_pylist()


def _map(blocks: list[Any], function: Callable[..., pa.Table], *arguments: Any) -> ray.data.Dataset:
    """`function(table, *arguments)` over blocks of the object store, in order, on every core."""
    # A dataset takes its settings from the context of the moment it is made.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    # Below errors it reports on its own progress, which `progress` does here.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
    return ray.data.from_arrow_refs(blocks).map_batches(
        function,
        batch_size=None,
        batch_format="pyarrow",
        fn_args=arguments,
        num_cpus=CPUS_PER_TASK,
        compute=ray.data.TaskPoolStrategy(size=min(cores, len(blocks))),
    )


def _tables(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """The blocks of a dataset as they become ready, in order."""
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert isinstance(table, pa.Table)
        yield table


def _in_blocks(documents: Iterable[tuple[int, str]]) -> Iterator[Any]:
    """Put (source, text) pairs into the object store, DOCUMENTS_PER_BLOCK at a time."""
    source = iter(enumerate(documents))
    while chunk := list(itertools.islice(source, DOCUMENTS_PER_BLOCK)):
        yield ray.put(
            pa.table(
                {
                    "index": pa.array([i for i, _ in chunk], pa.int64()),
                    "source": pa.array([s for _, (s, _) in chunk], pa.int32()),
                    "text": pa.array([t for _, (_, t) in chunk], pa.large_string()),
                }
            )
        )


def _clean_block(table: pa.Table, decontaminator: Any) -> pa.Table:
    """Add the columns digest and contaminated; clean the text."""
    finder: Decontaminator = ray.get(decontaminator)
    texts = [clean_text(text) for text in table["text"].to_pylist()]
    return pa.table(
        {
            "index": table["index"],
            "source": table["source"],
            "text": pa.array(texts, pa.large_string()),
            "digest": pa.array([content_hash(text) for text in texts]),
            "contaminated": pa.array([finder.contaminated(text) for text in texts], pa.bool_()),
        }
    )


def clean_documents(documents: Iterable[tuple[int, str]], decontaminator: Decontaminator, progress: Progress) -> Corpus:
    """Clean every document; drop the empty, the seen before and those that give evaluation questions away.

    Args:
        documents: (index of the source, text), read once, in order.
    """
    corpus = Corpus()
    blocks = []
    for block in _in_blocks(documents):
        blocks.append(block)
        progress("reading", len(blocks) * DOCUMENTS_PER_BLOCK, None)
    if not blocks:
        return corpus
    dataset = _map(blocks, _clean_block, ray.put(decontaminator))
    total = len(blocks) * DOCUMENTS_PER_BLOCK
    seen: set[str] = set()
    for table in _tables(dataset):
        _keep(corpus, table, seen)
        progress("cleaning", corpus.read, max(total, corpus.read))
    return corpus


def _keep(corpus: Corpus, table: pa.Table, seen: set[str]) -> None:
    """Sort the documents of one cleaned block into kept and dropped."""
    assert table["index"][0].as_py() == corpus.read, "Ray Data gave blocks out of order"
    corpus.read += len(table)
    kept: list[str] = []
    first = len(corpus)
    for row in table.select(["source", "text", "digest", "contaminated"]).to_pylist():
        if not row["text"]:
            corpus.empty += 1
        elif row["digest"] in seen:
            corpus.duplicates += 1
        elif row["contaminated"]:
            corpus.contaminated += 1
        else:
            seen.add(row["digest"])
            kept.append(row["text"])
            corpus.sources.append(row["source"])
            corpus.digests.append(row["digest"])
            corpus.sizes.append(len(row["text"].encode("utf-8", "surrogatepass")))
    if kept:
        index = pa.array(range(first, first + len(kept)), pa.int64())
        corpus.blocks.append(ray.put(pa.table({"index": index, "text": pa.array(kept, pa.large_string())})))


def _tokenise_block(table: pa.Table, tokenizer_json: Any, wanted: Any) -> pa.Table:
    """Columns index and ids of the wanted documents."""
    tokenizer = _tokenizer(tokenizer_json)
    chosen: NDArray[np.bool_] = ray.get(wanted)
    indices = table["index"].to_numpy()
    keep = chosen[indices]
    texts = table.filter(pa.array(keep))["text"].to_pylist()
    # One text at a time: the cores already have a block each.
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(i) for i in ids], dtype=np.int64)])
    values = np.fromiter(itertools.chain.from_iterable(ids), np.uint32, count=int(offsets[-1]))
    lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))
    return pa.table({"index": pa.array(indices[keep], pa.int64()), "ids": lists})


def _tokenizer(ref: Any) -> Tokenizer:
    """The tokenizer as plain text is encoded with: its special tokens are spelled out."""
    tokenizer = Tokenizer.from_str(ray.get(ref))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenise(
    corpus: Corpus, tokenizer_json: str, wanted: list[bool], progress: Progress
) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    """(document index, ids) of the wanted documents, in order, with no special tokens added.

    Args:
        wanted: per document of the corpus.
    """
    total = sum(wanted)
    if not total:
        return
    arguments = (ray.put(tokenizer_json), ray.put(np.asarray(wanted, np.bool_)))
    dataset = _map(corpus.blocks, _tokenise_block, *arguments)
    done, last = 0, -1
    for table in _tables(dataset):
        for chunk in table.combine_chunks().to_batches():
            offsets = chunk["ids"].offsets.to_numpy()
            values = chunk["ids"].values.to_numpy()
            for position, index in enumerate(chunk["index"].to_pylist()):
                assert index > last, "Ray Data gave blocks out of order"
                last = index
                yield index, values[offsets[position] : offsets[position + 1]]
            done += len(chunk)
        progress("tokenising", done, total)
