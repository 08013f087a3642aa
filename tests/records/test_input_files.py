"""Input files by name, hashed once, and held against what the run was accepted with."""

from __future__ import annotations

import json
import os
import time

import pytest

from ray_pipeline.dag.identity import absolute_name, identities, local_path, moved_name, stage_files
from ray_pipeline.errors import UserError
from ray_pipeline.records import input_files
from ray_pipeline.records.input_files import Digests, InputGuard, data_files, left_aside, note_digests, stamp_of
from ray_pipeline.records.integrity import file_sha256, sealed, unsealed
from ray_pipeline.settings.schema import PipelineFields


@pytest.fixture
def hashed(monkeypatch):
    """Paths in the order they were hashed in, from now on."""
    found = []
    whole = input_files.file_sha256
    monkeypatch.setattr(input_files, "file_sha256", lambda path: found.append(path.name) or whole(path))
    input_files._sha256_once.cache_clear()
    return found


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl.gz", "deep/c.txt.zst", "README.md", ".hidden.jsonl", "d.parquet.gz"):
        (folder / name).write_text(name)
    return folder


def test_a_folder_and_a_pattern_mean_their_data_files_in_order(shards):
    names = [path.relative_to(shards).as_posix() for path in data_files(str(shards))]
    assert names == ["a.jsonl.gz", "b.jsonl", "deep/c.txt.zst"]
    for columns in ("", ":text=story"):
        assert [path.name for path in left_aside(f"{shards}{columns}")] == ["README.md", "d.parquet.gz"]
    assert [path.name for path in data_files(str(shards / "**" / "*c*"))] == ["c.txt.zst"]
    assert data_files(str(shards / "README.md")) == [shards / "README.md"]


def test_a_file_with_a_name_like_a_pattern_is_that_file(tmp_path):
    path = tmp_path / "a[1].jsonl"
    path.write_text("{}")
    (tmp_path / "a1.jsonl").write_text("{}")
    assert data_files(str(path)) == [path]


@pytest.mark.parametrize(("name", "verb"), [("*", "matches"), ("", "holds")])
def test_a_folder_without_data_is_refused(tmp_path, name, verb):
    (tmp_path / "README").write_text("x")
    with pytest.raises(UserError, match=rf"{verb} 1 other files, but no \.txt, .* Give the folder or the pattern"):
        data_files(str(tmp_path / name))


def test_each_file_is_hashed_once_while_it_stays(tmp_path, hashed):
    path = tmp_path / "a.txt"
    path.write_text("one")
    config = PipelineFields(output_dir=tmp_path, data={"sft": str(path), "prompts": str(path)})
    before = identities(config)
    for _ in range(4):
        assert identities(config) == before and stage_files(config, "data_prep").keys() == {path}
    assert hashed == ["a.txt"]
    path.write_text("two")
    assert identities(config)["data_prep"].key != before["data_prep"].key
    assert hashed == ["a.txt"] * 2


def test_another_process_reads_the_note_and_does_not_hash(tmp_path, hashed, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one")
    monkeypatch.setattr(input_files, "_SETTLED_NS", 0)
    time.sleep(0.02)
    note_digests(tmp_path, [path])
    input_files._sha256_once.cache_clear()  # as in another process
    assert Digests(tmp_path).sha256(path) == Digests().sha256(path)
    assert hashed == ["a.txt"] * 2  # for the note, and by the one that had none
    stat = path.stat()
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time of change
    assert Digests(tmp_path).sha256(path) == file_sha256(path)
    assert hashed == ["a.txt"] * 3


def test_a_file_that_is_too_new_is_not_noted_and_a_damaged_note_is_none(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    note_digests(tmp_path, [path])
    assert unsealed((tmp_path / ".inputs.json").read_bytes()) == {}
    (tmp_path / ".inputs.json").write_text("[3")
    assert Digests(tmp_path).sha256(path) == Digests().sha256(path)
    wrong = json.dumps(sealed({str(path): [stamp_of(path), "0" * 64]}))
    (tmp_path / ".inputs.json").write_text(wrong.replace("0" * 64, "1" + "0" * 63))  # one bit of the digest
    assert Digests(tmp_path).sha256(path) == Digests().sha256(path)


def test_a_file_that_never_rests_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one")
    whole = input_files.file_sha256

    def growing(found):
        digest = whole(found)
        found.write_text(found.read_text() + "more")
        return digest

    monkeypatch.setattr(input_files, "file_sha256", growing)
    with pytest.raises(UserError, match=r"a\.txt: changes while it is read\. Wait"):
        Digests().sha256(path)


def test_the_guard_names_the_file_that_changed_and_lets_a_touched_one_pass(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("1")
    two.write_text("2")
    guard = InputGuard({path: Digests().sha256(path) for path in (one, two)})
    guard.check()
    os.utime(one, (1, 1))
    guard.check()
    two.write_text("3")
    guard.check([one, tmp_path / "unknown"])
    with pytest.raises(UserError, match=r"two\.txt: changed since this run looked at it.*Run the same command again"):
        guard.check()
    one.unlink()
    with pytest.raises(UserError, match=r"one\.txt: cannot be read any more \(No such file.*Put it back, then resume"):
        guard.check([one])


def test_identity_of_shards_is_their_content_in_order(shards, tmp_path):
    def key(name):
        return identities(PipelineFields(data={"pretrain": [{"name": str(name)}]}))["data_prep"].key

    before = key(shards)
    assert key(shards / "**" / "*.*") == before, "the pattern and the folder mean the same files"
    (shards / "README.md").write_text("other")
    assert key(shards) == before, "what is not read decides nothing"
    (shards / "b.jsonl").write_text("other")
    assert key(shards) != before


def test_a_pattern_has_a_place_and_moves_with_it(shards, monkeypatch):
    pattern = str(shards / "*.jsonl")
    assert local_path(pattern) == shards
    assert moved_name(pattern, shards, "/there/shards") == "/there/shards/*.jsonl"
    monkeypatch.chdir(shards)
    assert absolute_name("*.jsonl") == pattern and absolute_name("deep/*") == str(shards / "deep" / "*")
    assert local_path(str(shards / "*.csv")) is None
