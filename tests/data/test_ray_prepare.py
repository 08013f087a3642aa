"""Ray Data gives what the plain functions give, whatever the number of workers."""

from __future__ import annotations

import pytest

from ray_pipeline.data import ray_prepare
from ray_pipeline.data.cleaning import clean_text, content_hash
from ray_pipeline.data.decontaminate import Decontaminator
from ray_pipeline.data.ray_prepare import clean_documents, tokenise
from ray_pipeline.data.text import document_at
from ray_pipeline.data.tokenizer_files import save_trained, train_bpe
from ray_pipeline.local_ray import start_ray

FINDER = Decontaminator(["What is 347+285?"], 12)


@pytest.fixture(scope="module")
def ray():
    import ray

    if ray.is_initialized():
        ray.shutdown()
    start_ray(num_cpus=2, include_dashboard=False)
    yield ray
    ray.shutdown()


def documents():
    """Two sources with empty, repeated, contaminated and unclean documents among good ones."""
    for index in range(120):
        text = document_at(0, index)
        yield 0, text
        if index % 10 == 3:
            yield 0, text.replace(" ", "\x00 ", 1) + "  \r\n"
        if index % 20 == 5:
            yield 1, " \n "
        if index % 30 == 7:
            yield 1, f"{text} What is 347+285? I do not know."
    yield 1, "the last one, with é and 😀"


def expected():
    """The same by plain Python."""
    kept, seen = [], set()
    for source, raw in documents():
        text = clean_text(raw)
        if text and text not in seen and not FINDER.contaminated(text):
            seen.add(text)
            kept.append((source, text))
    return kept


def silent(phase, done, total):
    pass


@pytest.mark.parametrize("per_block", [7, 1000])
def test_cleaning_equals_the_plain_functions_for_any_blocks(ray, monkeypatch, per_block):
    monkeypatch.setattr(ray_prepare, "DOCUMENTS_PER_BLOCK", per_block)
    corpus = clean_documents(documents(), FINDER, silent)
    kept = expected()
    assert list(corpus.texts()) == [text for _, text in kept]
    assert corpus.sources == [source for source, _ in kept]
    assert corpus.digests == [content_hash(text) for _, text in kept]
    assert corpus.sizes == [len(text.encode()) for _, text in kept]
    assert (corpus.read, corpus.empty, corpus.duplicates, corpus.contaminated) == (143, 6, 12, 4)


def test_tokenising_equals_the_tokenizer_and_reports_progress(ray, monkeypatch, tmp_path):
    monkeypatch.setattr(ray_prepare, "DOCUMENTS_PER_BLOCK", 16)
    calls = []
    corpus = clean_documents(documents(), FINDER, lambda *call: calls.append(call))
    texts = list(corpus.texts())
    tokenizer = save_trained(train_bpe(texts, 400), tmp_path)
    wanted = [i % 3 != 1 for i in range(len(corpus))]
    found = list(tokenise(corpus, tokenizer.to_json(), wanted, lambda *call: calls.append(call)))
    assert [i for i, _ in found] == [i for i, want in enumerate(wanted) if want]
    assert [ids.tolist() for _, ids in found] == [tokenizer.encode(texts[i]) for i, _ in found]
    assert list(dict.fromkeys(phase for phase, _, _ in calls)) == ["reading", "cleaning", "tokenising"]
    assert calls[-1] == ("tokenising", sum(wanted), sum(wanted))


def test_no_documents_make_an_empty_corpus(ray):
    corpus = clean_documents(iter([]), FINDER, silent)
    assert len(corpus) == corpus.read == 0
    assert list(tokenise(corpus, "{}", [], silent)) == []
