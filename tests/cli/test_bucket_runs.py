"""`--output-dir` with an address: a copy in the cache, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_pipeline.cli import main
from ray_pipeline.cli.runs import ADDRESS_FILE, folder_here, kept_run
from ray_pipeline.errors import UserError
from tests.cli.made_run import make_run


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_an_address_has_one_folder_here_which_remembers_it(cache: Path) -> None:
    folder = folder_here("memory://bucket/runs/")
    assert folder.is_relative_to(cache) and (folder / ADDRESS_FILE).read_text() == "memory://bucket/runs"
    assert folder == folder_here("memory://bucket/runs") == folder_here(Path("memory://bucket/runs"))
    assert folder != folder_here("memory://bucket/others")
    assert folder_here("runs") == Path("runs") and kept_run(Path("runs/toy")) is None


def test_verbs_read_a_run_of_a_bucket(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made = make_run(tmp_path / "runs")
    address = f"file://{tmp_path}/bucket"
    made.rename(folder_here(address) / made.name)
    kept = kept_run(folder_here(address) / made.name)
    assert kept is not None and kept.push()
    cache.rename(tmp_path / "gone")
    assert main(["status", made.name, "--output-dir", address]) == 0
    said = capsys.readouterr()
    assert "data_prep" in said.out and f"{address}/{made.name}: read in" in said.err
    cache.rename(tmp_path / "gone too")
    assert main(["generate", f"{made.name}:sft", "the cat", "--output-dir", address, "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().err.count(f"{address}/{made.name}: read in") == 1
    assert main(["status", "--output-dir", address]) == 2
    assert "name the RUN" in capsys.readouterr().err


def test_nothing_is_written_here_under_an_addresss_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("output_dir: memory://bucket/planned\n")
    assert main(["run", "--config", str(recipe), "--dry-run"]) == 0
    assert main(["run", "--output-dir", "memory://bucket/planned", "--dry-run"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml", "cache"}
    assert main(["sweep", "--config", "smoke", "--grid", "sft.steps=1,2", "--output-dir", "memory://bucket/s"]) == 2
    assert "a sweep needs a folder of this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nosuch://bucket", "Protocol not known: nosuch"),
        ("s3://", "names no place in a store"),
        ("://x", "names no place in a store"),
        ("github://x", "missing 2 required positional arguments"),
    ],
)
def test_what_is_no_store_is_refused(address: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        folder_here(address)
