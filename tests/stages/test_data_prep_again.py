"""DATA_PREP that was killed goes on where it was, and with nothing that is not its own."""

from __future__ import annotations

import json

import pytest

from ray_pipeline.data.text import corpus, text_rows
from ray_pipeline.stages import data_prep
from tests.stages.test_data_prep import prepare, ray

__all__ = ["ray"]


class Broken(Exception):
    """Stands for a kill."""


def test_a_broken_attempt_goes_on_where_it_was_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_CHARACTERS", 20_000)
    settings = {"builtin_documents": 900, "tokens_per_shard": 20_000}
    written: dict[str, list[int]] = {"add": [], "save": []}
    fatal: list[int] = []
    for owner, name in ((corpus.Corpus, "add"), (text_rows.State, "save")):
        original = getattr(owner, name)

        def noting(self, *arguments, name=name, original=original):
            original(self, *arguments)
            written[name].append(1)
            if len(written[name]) in fatal:
                raise Broken

        monkeypatch.setattr(owner, name, noting)
    whole = prepare(tmp_path / "whole", **settings)
    blocks, shards = (len(written.pop(name)) for name in ("add", "save"))
    assert min(blocks, shards) > 6
    written, fatal[:] = {"add": [], "save": []}, (2, 6)
    for _ in range(4):
        with pytest.raises(Broken):
            prepare(tmp_path / "broken", **settings)
        assert not (tmp_path / "broken" / "manifest.json").exists()
    again = prepare(tmp_path / "broken", **settings)
    one, two = (json.loads((r.folder / "manifest.json").read_text()) for r in (whole, again))
    assert one == two and whole.metrics == again.metrics
    assert (len(written["add"]), len(written["save"])) == (blocks, shards), "nothing was done twice"
    assert not (again.folder / data_prep.WORK).exists()


def test_what_a_deletion_that_broke_off_left_is_not_gone_on_with(tmp_path, monkeypatch):
    rmtree = data_prep.shutil.rmtree

    def breaking(folder, ignore_errors=False):
        if folder.name == data_prep.WORK and not ignore_errors:
            (folder / "000000.arrow").unlink()
            raise Broken
        rmtree(folder, ignore_errors=ignore_errors)

    settings = {"builtin_documents": 100, "builtin_conversations": 50}
    monkeypatch.setattr(data_prep.shutil, "rmtree", breaking)
    with pytest.raises(Broken):
        prepare(tmp_path / "dp", **settings)
    monkeypatch.undo()
    whole = json.loads((tmp_path / "dp" / "manifest.json").read_text())
    assert (tmp_path / "dp" / data_prep.WORK / "facts.json").exists()
    again = prepare(tmp_path / "dp", **settings)
    assert json.loads((again.folder / "manifest.json").read_text()) == whole


def test_what_other_settings_left_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(text_rows.State, "save", lambda *_: (_ for _ in ()).throw(Broken))
    with pytest.raises(Broken):
        prepare(tmp_path / "dp", builtin_documents=100)
    monkeypatch.undo()
    assert prepare(tmp_path / "dp", builtin_documents=120).metrics["documents"] == 120
