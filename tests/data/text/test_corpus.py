"""Clean documents on disk equal the plain functions, whatever the blocks; which of them are used, and how often."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.shared.cleaning import clean_text, content_hash, hash_fraction, validation_members
from ray_pipeline.data.shared.decontaminate import Decontaminator
from ray_pipeline.data.text import corpus as corpus_file
from ray_pipeline.data.text import mixture
from ray_pipeline.data.text.builtin_text import document_at
from ray_pipeline.data.text.corpus import (
    Cleaner,
    Corpus,
    SourceFacts,
    block_columns,
    digest_array,
    hash_fractions,
    in_blocks,
)
from ray_pipeline.data.text.mixture import Choice, budgets
from ray_pipeline.errors import UserError
from ray_pipeline.settings.schema import DataConfig, SourceConfig

FINDER = Decontaminator(["What is 347+285?"], 12)


def documents():
    """Two sources with empty, repeated, contaminated and unclean documents among good ones."""
    for source in (0, 1):
        for index in range(60):
            text = document_at(0, index + 40 * source)  # a third of the second source's are the first one's
            yield source, text
            if index % 10 == 3:
                yield source, text.replace(" ", "\x00 ", 1) + "  \r\n"
            if index % 20 == 5:
                yield source, " \n "
            if index % 30 == 7:
                yield source, f"{text} What is 347+285? I do not know."
    yield 1, "the last one, with é and 😀"


def expected():
    """Kept (source, text) pairs and the sources' facts, by plain Python."""
    kept, seen, facts = [], set(), [SourceFacts(), SourceFacts()]
    for source, raw in documents():
        text, of = clean_text(raw), facts[source]
        of.read += 1
        if not text:
            of.empty += 1
        elif FINDER.contaminated(text):
            of.contaminated += 1
        elif text in seen:
            of.duplicates += 1
        else:
            seen.add(text)
            kept.append((source, text))
            of.kept += 1
            of.bytes += len(text.encode())
    return kept, facts


def made(folder, texts, characters=1000, parts=corpus_file.DEDUP_DOCUMENTS):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_file, "BLOCK_CHARACTERS", characters)
        patch.setattr(corpus_file, "DEDUP_DOCUMENTS", parts)
        corpus, texts = Corpus(folder), list(texts)
        for number, block in enumerate(map(Cleaner(FINDER), in_blocks(texts))):
            corpus.add(number, block)
        corpus.index(1 + max(source for source, _ in texts))
    return corpus.open()


@pytest.mark.parametrize(("characters", "parts"), [(100, 10**6), (5000, 7), (10**7, 40)])
def test_what_is_kept_equals_the_plain_functions_for_any_blocks(tmp_path, characters, parts):
    corpus = made(tmp_path, documents(), characters, parts)
    kept, facts = expected()
    found = [(corpus.source(n), t) for n in range(len(corpus)) for t in corpus.texts(n, corpus.kept(n))]
    assert found == kept
    assert corpus.facts == facts
    assert (len(corpus) > 100) == (characters == 100) and (len(corpus) == 2) == (characters == 10**7)


def test_blocks_end_by_characters_documents_and_source(monkeypatch):
    monkeypatch.setattr(corpus_file, "BLOCK_CHARACTERS", 10)
    monkeypatch.setattr(corpus_file, "BLOCK_DOCUMENTS", 3)
    texts = [(0, "x" * 10), (0, "a"), (0, "b"), (0, "c"), (0, "d"), (1, "e")]
    assert [(b.source, b.texts) for b in in_blocks(texts)] == [
        (0, ["x" * 10]), (0, ["a", "b", "c"]), (0, ["d"]), (1, ["e"]),
    ]  # fmt: skip
    assert list(in_blocks([])) == []


def test_digests_give_the_fractions_of_their_hashes(tmp_path):
    corpus = made(tmp_path, documents(), 10**7)
    _, (digests, texts) = block_columns(corpus.path(0), "digest", "text")
    hashes = [content_hash(text) for text in texts.to_pylist()]
    assert hash_fractions(digest_array(digests)).tolist() == [hash_fraction(digest) for digest in hashes]


def test_a_broken_attempt_goes_on_behind_its_last_whole_block(tmp_path):
    corpus = made(tmp_path, documents(), 2000)
    blocks, read = corpus.written()
    assert (blocks, read) == (len(corpus), len(list(documents())))
    corpus.path(3).unlink()
    assert corpus.written() == (3, sum(block_columns(corpus.path(n))[0]["read"] for n in range(3)))


def config(*weights, **values):
    return DataConfig(pretrain=[SourceConfig(name=f"s{i}", weight=w) for i, w in enumerate(weights)], **values)


def uses(choice):
    """How often each kept text trains, and which validate."""
    trained, held = {}, []
    for number, wanted in choice.visits(validation=False):
        for text in choice.corpus.texts(number, wanted):
            trained[text] = trained.get(text, 0) + 1
    for number, wanted in choice.visits(validation=True):
        held += choice.corpus.texts(number, wanted)
    return trained, held


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Corpus, list[str]]:
    """The corpus of all documents, and the texts of those that are kept."""
    return made(tmp_path_factory.mktemp("whole"), documents()), [text for _, text in expected()[0]]


@given(st.floats(0.0, 0.9))
def test_without_weights_every_document_is_used_once_and_held_out_by_its_hash(whole, fraction):
    corpus, texts = whole
    choice = Choice(corpus, config(None, None, validation_fraction=fraction))
    trained, held = uses(choice)
    members = validation_members([content_hash(text) for text in texts], fraction)
    assert held == [text for text, member in zip(texts, members, strict=True) if member]
    assert trained == {text: 1 for text, member in zip(texts, members, strict=True) if not member}
    assert [fact["left_out"] for fact in choice.facts(config(None, None))] == [0, 0]


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_either_side_gets_a_document(tmp_path, fraction):
    corpus = made(tmp_path, [(0, "one"), (0, "two"), (0, "three")])
    trained, held = uses(Choice(corpus, config(None, validation_fraction=fraction)))
    assert (len(trained), len(held)) == ((2, 1) if fraction < 0.5 else (1, 2))


def test_a_scarce_source_is_repeated_and_a_plentiful_one_left_out_in_part(tmp_path):
    texts = [(0, f"{i} {'small' * 20}") for i in range(10)] + [(1, f"{i} {'large' * 20}") for i in range(100)]
    corpus = made(tmp_path, texts, 500)
    choice = Choice(corpus, config(1.0, 1.0, max_epochs=2.5, validation_fraction=0.01))
    trained, held = uses(choice)
    kept = [text for _, text in texts if text not in held]
    small, large = [t for t in kept if "small" in t], [t for t in kept if "large" in t]
    assert [trained[text] for text in small] == [3 if text in {t for _, t in texts[:5]} else 2 for text in small]
    used = [trained.get(text, 0) for text in large]
    assert used == sorted(used, reverse=True) and max(used) == 1 and 20 <= sum(used) <= 26
    facts = choice.facts(config(1.0, 1.0))
    assert (facts[0]["epochs"], facts[0]["left_out"]) == (2.5, 0)
    assert facts[1]["left_out"] == 100 - sum(used) - sum("large" in text for text in held) > 70
    order = [corpus.source(number) for number, _ in choice.visits(validation=False)]
    first = order[: order.index(1)]
    assert set(first) == {0} and order[len(first) :].count(0) > 0, "what is repeated comes after all sources"


def test_fewer_than_two_documents_are_refused(tmp_path):
    corpus = made(tmp_path, [(0, "one"), (0, "one"), (0, " "), (0, "What is 347+285? Well.")])
    with pytest.raises(UserError, match=r"--data s0: 1 documents are left of 4 \(empty 1, duplicates 1, .*tions 1\)"):
        Choice(corpus, config(None))


SHARES = st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0, 10.0])


@given(st.lists(st.tuples(st.integers(0, 1000), SHARES), min_size=1, max_size=5), st.integers(0, 3000))
def test_budgets_follow_shares_and_what_one_lacks_goes_to_the_others(given, most):
    sizes, shares = [size for size, _ in given], [share for _, share in given]
    found = budgets(sizes, shares, most)
    assert all(0 <= take <= size for take, size in zip(found, sizes, strict=True))
    wanted = sum(size for size, share in given if share > 0)
    assert abs(sum(found) - min(most, wanted)) <= len(given)
    free = [i for i in range(len(sizes)) if shares[i] > 0 and found[i] < sizes[i]]
    rate = sum(found[i] for i in free) / max(1e-9, sum(shares[i] for i in free))
    assert all(abs(found[i] - rate * shares[i]) <= len(given) for i in free)


def test_the_tokenizer_learns_from_every_source_by_its_share_and_from_all_over_a_large_one(tmp_path, monkeypatch):
    texts = [(0, f"a{i} " + "x" * 95) for i in range(400)] + [(1, f"b{i} " + "y" * 95) for i in range(400)]
    corpus = made(tmp_path, texts, 1000)
    choice = Choice(corpus, config(None, None, validation_fraction=0.01))
    sampled = list(choice.sample(16_000))
    of = [[text for text in sampled if text[0] == letter] for letter in "ab"]
    assert abs(len(of[0]) - len(of[1])) <= 2 and 150 <= len(sampled) <= 240
    places = [int(text.split()[0][1:]) for text in of[1]]
    assert min(places) < 20 and max(places) > 380 and np.std(places) > 90
    weighted = list(Choice(corpus, config(3.0, 1.0, validation_fraction=0.01)).sample(16_000))
    shares = [sum(len(text) for text in weighted if text[0] == letter) for letter in "ab"]
    assert abs(shares[0] / shares[1] - 3) < 0.2
    monkeypatch.setattr(mixture, "SAMPLED_BLOCKS", 4)
    assert 60 <= len(list(choice.sample(16_000))) <= 88  # all of four blocks of each source
    whole = list(choice.sample(10**9))
    trained, _ = uses(choice)
    assert whole == list(trained)
