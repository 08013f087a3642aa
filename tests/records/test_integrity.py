"""A changed bit in any file of a run is named where the file is opened, and whole files are read once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.cli import main
from ray_pipeline.dag.ledger import RunFile, read_record
from ray_pipeline.errors import UserError
from ray_pipeline.records import integrity
from ray_pipeline.records.artifacts import atomic_folder, write_json, write_manifest, write_sealed
from ray_pipeline.records.integrity import (
    MANIFEST_FORMAT,
    damage,
    own_damage,
    read_sealed,
    sealed,
    unsealed,
    verify_files,
    verify_folder,
)
from ray_pipeline.settings.run_folder import MANIFEST
from tests.cli.made_run import make_run


def flip(path: Path, place: float = 0.5, bit: int = 0) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1 << bit
    path.write_bytes(data)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=4), values, max_size=4), st.floats(0, 1), st.integers(0, 7))
def test_no_flipped_bit_of_a_record_changes_what_is_read(value, place, bit):
    record = {key: entry for key, entry in value.items() if key != integrity.SEAL}
    text = bytearray(json.dumps(sealed(record), indent=2, ensure_ascii=True).encode())
    assert repr(unsealed(bytes(text))) == repr(json.loads(json.dumps(record)))
    text[int(place * (len(text) - 1))] ^= 1 << bit
    try:
        found = unsealed(bytes(text))
    except ValueError:
        return
    # The one flip that is not seen is in the name of the seal itself.
    known = {key: found[key] for key in json.loads(json.dumps(record))}
    assert repr(known) == repr(json.loads(json.dumps(record)))


def test_a_record_is_read_as_it_was_written_and_damage_has_a_way_out(tmp_path):
    path = tmp_path / "record.json"
    with pytest.raises(UserError, match=r"record\.json: no such file\. Do this\."):
        read_sealed(path, "Do this.")
    write_sealed(path, {"step": 3, "loss": float("inf")})
    assert read_sealed(path, "") == {"step": 3, "loss": float("inf")}
    path.write_text(path.read_text().replace("3,", "7,"))
    with pytest.raises(UserError, match=r"record\.json: damaged \(its contents are not those .* Do this\."):
        read_sealed(path, "Do this.")
    for text in ("[1]", "{", "[" * 100_000, "\udcff"):
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=r"record\.json: damaged"):
            read_sealed(path, "Do this.")
    write_json(path, {"step": 3})  # of an older version
    assert read_sealed(path, "") == {"step": 3}


@pytest.fixture
def folder(tmp_path):
    """Two files and their manifest, stamped."""
    place = tmp_path / "folder"
    with atomic_folder(place) as aside:
        for name in ("a.bin", "b.bin"):
            (aside / name).write_bytes(bytes(1000))
    return place


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are read, from now on; files count as settled at once."""
    found, whole = [], integrity.file_sha256
    monkeypatch.setattr(integrity, "file_sha256", lambda path: found.append(path.name) or whole(path))
    monkeypatch.setattr(integrity, "_SETTLED_SECONDS", -3600.0)
    return found


def test_a_file_is_read_once_while_it_stays_as_it_is(folder, hashed):
    assert [damage(folder), damage(folder)] == [None, None]
    assert sorted(hashed) == ["a.bin", "b.bin"]
    stat = (folder / "a.bin").stat()
    flip(folder / "a.bin")
    os.utime(folder / "a.bin", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert damage(folder) == f"{folder / 'a.bin'}: damaged: its SHA-256 is not the one in the manifest"
    assert hashed[2:] == ["a.bin"]
    flip(folder / "a.bin")
    assert damage(folder) is None
    shutil.copytree(folder, folder.with_name("copy"))
    assert damage(folder.with_name("copy")) is None
    assert sorted(hashed[4:]) == ["a.bin", "b.bin"], "a copy is another file"


def test_a_file_changed_just_now_gets_no_stamp(folder, monkeypatch):
    assert damage(folder) is None
    found, whole = [], integrity.file_sha256
    monkeypatch.setattr(integrity, "file_sha256", lambda path: found.append(path.name) or whole(path))
    assert damage(folder) is None
    assert sorted(found) == ["a.bin", "b.bin"]


def test_stamps_of_another_user_are_not_trusted(folder, hashed, monkeypatch, tmp_path):
    monkeypatch.setattr(integrity.tempfile, "tempdir", str(tmp_path))
    assert damage(folder) is None
    [store] = tmp_path.glob("ray-pipeline-*")
    store.chmod(0o777)
    assert damage(folder) is None
    assert len(hashed) == 4
    store.chmod(0o700)
    for stamps in store.iterdir():
        stamps.write_text("{{")
    assert damage(folder) is None
    assert len(hashed) == 6


def test_the_manifest_itself_is_named(folder):
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace(text[text.index('"sha256": "') + 11], "x", 1))
    found = damage(folder)
    assert found is not None and found.startswith(f"{manifest}: damaged")


def test_another_programs_manifest_is_none_of_ours(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "my web app"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    assert own_damage(tmp_path) is None
    verify_files(tmp_path, ["tokenizer.json"])
    (tmp_path / "manifest.json").write_text('{"files": ')
    assert own_damage(tmp_path) is not None
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        verify_files(tmp_path, ["tokenizer.json"])


def test_an_unreadable_file_is_named(folder, monkeypatch):
    def broken(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(integrity, "file_sha256", broken)
    assert damage(folder) == f"{folder / 'a.bin'}: cannot be read (Input/output error)"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs"))


# What opens each kind of file: end of its path -> verb and arguments.
READERS = {
    "config.yaml": ("inspect-batch", "--stage", "sft"),
    "run.json": ("status",),
    "record.json": ("status",),
    "data_prep-*/manifest.json": ("generate", "the cat", "--max-new-tokens", "1"),
    "tokenizer/*": ("generate", "the cat", "--max-new-tokens", "1"),
    "prompts/train.jsonl": ("inspect-batch", "--stage", "grpo"),
    "prompts/heldout.jsonl": ("inspect-batch", "--stage", "grpo", "--validation"),
    "pretrain/train/*": ("inspect-batch", "--stage", "pretrain"),
    "pretrain/validation/*": ("inspect-batch", "--stage", "pretrain", "--validation"),
    "data_prep-*/sft/train/*": ("inspect-batch", "--stage", "sft"),
    "data_prep-*/sft/validation/*": ("inspect-batch", "--stage", "sft", "--validation"),
    "pretrain-*/model/*": ("generate", "the cat", "--stage", "pretrain", "--max-new-tokens", "1"),
    "sft-*/model/*": ("generate", "the cat", "--stage", "sft", "--max-new-tokens", "1"),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_flipped_bit_is_named_where_the_file_is_opened(kind, run_dir, tmp_path, capsys):
    verb, *arguments = READERS[kind]
    place = tmp_path / "runs"
    shutil.copytree(run_dir.parent, place)
    paths = sorted(path for path in (place / "toy").rglob("*") if path.is_file() and path.match(kind))
    assert paths
    for number, path in enumerate(paths):
        whole = path.read_bytes()
        flip(path, (0.3 + 0.37 * number) % 1, number % 8)
        code = main([verb, "toy", *arguments, "--output-dir", str(place)])
        captured = capsys.readouterr()
        assert code == 2 and str(path) in captured.err, (path, captured)
        path.write_bytes(whole)
    assert main([verb, "toy", *arguments, "--output-dir", str(place)]) == 0


def test_every_kind_of_file_of_a_run_has_a_reader_above(run_dir):
    paths = [path for path in run_dir.rglob("*") if path.is_file()]
    paths = [path for path in paths if not path.name.endswith("lock") and path.parent.name != "logs"]
    assert [path for path in paths if not any(path.match(kind) for kind in READERS)] == []


def test_what_to_do_about_damaged_data_does_it(run_dir, tmp_path):
    place = tmp_path / "runs"
    shutil.copytree(run_dir.parent, place)
    [path] = (place / "toy").glob("data_prep-*/tokenizer/tokenizer.json")
    flip(path)
    command = rf"python -m ray_pipeline\.cli resume toy --output-dir {place} --stage data_prep"
    with pytest.raises(UserError, match=f"Make it again with `{command}`"):
        verify_files(path.parent, [path.name])


@pytest.mark.parametrize(("field", "value"), [("status", "dome"), ("seconds", "x"), ("metrics", [1])])
def test_a_record_of_an_older_version_with_impossible_values_is_named(tmp_path, field, value):
    record = {"stage": "sft", "identity": "a", "status": "done", field: value}
    write_json(tmp_path / "record.json", record)
    with pytest.raises(UserError, match=r"record\.json: damaged .* Delete it and resume"):
        read_record(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"uid": 3}', '{"uid": "a", "stages": []}'])
def test_a_run_file_that_is_none_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json: damaged .* Delete it and resume"):
        RunFile(tmp_path)


def test_a_manifest_of_a_newer_format_is_refused(tmp_path):
    (tmp_path / "a").write_text("x")
    write_manifest(tmp_path)
    found = unsealed((tmp_path / MANIFEST).read_bytes())
    assert found["format"] == MANIFEST_FORMAT and found["made_by"].startswith("ray-pipeline ")
    write_sealed(tmp_path / MANIFEST, found | {"format": MANIFEST_FORMAT + 1})
    with pytest.raises(UserError, match=r"manifest\.json: damaged \(format 2 is not the 1 that this version reads\)"):
        verify_folder(tmp_path)
