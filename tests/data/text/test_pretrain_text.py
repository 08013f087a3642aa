"""Reading and cleaning the text: how far it is told, and going on behind what is prepared already."""

from __future__ import annotations

import json

import pytest

from ray_pipeline.data.shared.decontaminate import Decontaminator
from ray_pipeline.data.text import corpus, pretrain_text
from ray_pipeline.data.text.pretrain_text import clean_corpus
from ray_pipeline.records.input_files import InputGuard
from ray_pipeline.settings.schema import DataConfig, PipelineFields, SourceConfig


class Broken(Exception):
    """Stands for a kill."""


def test_how_far_files_are_read_is_told_in_bytes_by_an_attempt_that_goes_on_too(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_CHARACTERS", 20_000)
    monkeypatch.setattr(pretrain_text, "TOLD_EVERY", 100)
    monkeypatch.setattr(pretrain_text, "map_blocks", lambda make, given, blocks: map(make(*given), blocks))
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} is a number. " * 20}) + "\n" for i in range(2000)))
    size = path.stat().st_size
    config = PipelineFields(data=DataConfig(pretrain=[SourceConfig(name=str(path))]))
    told = []

    def prepare(folder):
        told.clear()
        report = lambda *given: told.append(given)  # noqa: E731
        return clean_corpus(config, Decontaminator([], 12), folder, InputGuard({}), report, {})

    whole = prepare(tmp_path / "whole")
    reading = [given for given in told if given[0] == "reading and cleaning"]
    assert reading == sorted(reading)
    assert [given[1:] for given in (reading[0], reading[-1])] == [(0, size, "bytes"), (size, size, "bytes")]

    add = corpus.Corpus.add

    def breaking(self, number, block):
        if number == 20:
            raise Broken
        add(self, number, block)

    monkeypatch.setattr(corpus.Corpus, "add", breaking)
    with pytest.raises(Broken):
        prepare(tmp_path / "broken")
    added = []
    monkeypatch.setattr(corpus.Corpus, "add", lambda *given: added.append(len(told)) or add(*given))
    again = prepare(tmp_path / "broken")
    assert len(added) == len(whole) - 20
    before = [given[1] for given in told[: added[0]]]
    assert len(before) > 5 and before == sorted(before) and before[-1] > size // 10, "told while nothing is new yet"
    assert again.facts == whole.facts and [p.read_bytes() for p in sorted((tmp_path / "broken").glob("*.arrow"))] == [
        p.read_bytes() for p in sorted((tmp_path / "whole").glob("*.arrow"))
    ]
