"""Datasets by name: streaming, and what is said where the hub does not help. Only the network is replaced."""

from __future__ import annotations

from unittest.mock import Mock

import datasets
import pytest

from ray_pipeline.data.files import hub
from ray_pipeline.data.files.reading import Tally
from ray_pipeline.data.sources.source_checks import check_sources
from ray_pipeline.data.sources.sources import parse_source, read_documents
from ray_pipeline.errors import UserError
from ray_pipeline.settings.schema import DataConfig, PipelineFields

ROWS = [{"text": f"story {i}", "title": f"t{i}"} for i in range(10)]


@pytest.fixture
def online(monkeypatch):
    """A hub with one dataset of the configurations "main" and "other", which records what is asked of it."""
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        if split not in ("train", "validation"):
            raise ValueError(f"Bad split: {split}. Available splits: ['train', 'validation']")
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["other", "main"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", _refused)
    return tmp_path


def _refused(self, name, timeout):
    raise OSError("Connection refused")


def test_a_dataset_is_streamed_from_its_main_configuration(online):
    texts = list(read_documents(parse_source("org/name:validation:title"), limit=3))
    assert texts == ["t0", "t1", "t2"]
    assert online == [("org/name", "main", "validation", True)]


def test_dates_beyond_pythons_do_no_harm_where_nobody_reads_them(online, monkeypatch):
    import pyarrow

    when = pyarrow.array([2**62, 0], pyarrow.timestamp("us"))
    table = datasets.Dataset(pyarrow.table({"text": ["a", "b"], "when": when})).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    assert list(read_documents(parse_source("org/name"))) == ["a", "b"]


def test_records_carry_their_place(online):
    place, record = next(hub.stream_records("org/name", "train"))
    assert (place, record) == ("org/name:train:row 1", ROWS[0])


def test_a_missing_column_names_the_row_and_the_fields(online):
    with pytest.raises(UserError, match=r'org/name:train:row 1: needs a field "story", but has "text", "title"'):
        list(read_documents(parse_source("org/name:train:story")))


def test_a_wrong_split_gets_the_nearest_one(online):
    with pytest.raises(UserError, match=r'Bad split: valid.*did you mean "validation"'):
        list(read_documents(parse_source("org/name:valid")))


def test_a_dataset_is_read_whole_unless_a_limit_is_asked_for(online, monkeypatch):
    """No set is cut at a size that nobody asked for."""
    many = 120_000
    monkeypatch.setattr(hub, "stream_records", lambda name, split: (("row", {"text": "a"}) for _ in range(many)))
    tally = Tally()
    assert sum(1 for _ in read_documents(parse_source("org/name"), tally=tally)) == tally.records == many
    assert not tally.cut
    assert sum(1 for _ in read_documents(parse_source("org/name"), 7, tally=tally)) == 7 and tally.cut
    [said] = check_sources(PipelineFields(data=DataConfig(sft="org/name")))
    assert said == "--sft-data org/name: all of its records are read. Fewer: --set data.max_documents=100000"
    assert check_sources(PipelineFields(data=DataConfig(sft="org/name", max_documents=9))) == []


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("roneneldan/TinyStories", '"python scripts/download_tinystories.py"'),
        ("org/other", '"python scripts/download_tinystories.py --name org/other"'),
    ],
)
def test_without_a_network_it_says_what_to_do(offline, name, command):
    with pytest.raises(UserError) as error:
        hub.check_reachable(name)
    message = str(error.value)
    assert message.startswith(f'"{name}": the hub cannot be reached (Connection refused)')
    assert command in message and "HF_ENDPOINT" in message and "HF_HOME" in message


def test_without_a_network_the_cache_is_used(offline, monkeypatch):
    (offline / "org___name").mkdir()
    seen = []

    def load_dataset(name, config, *, split, streaming):
        seen.append(streaming)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_documents(parse_source("org/name"), limit=2)) == ["story 0", "story 1"]
    assert seen == [False]


def test_a_refused_connection_is_a_user_error(monkeypatch, tmp_path):
    """The real client against a port where nobody listens."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    import huggingface_hub

    api = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    with pytest.raises(UserError, match="the hub cannot be reached"):
        hub.check_reachable("org/name")


@pytest.mark.parametrize("error", [TimeoutError(), ValueError()])
def test_an_error_that_says_nothing_is_told_by_its_name(online, monkeypatch, error):
    def silent(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", silent)
    with pytest.raises(UserError, match=rf'"org/name.*{type(error).__name__}'):
        list(read_documents(parse_source("org/name")))


def test_an_unknown_or_closed_dataset_is_told_apart(monkeypatch):
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    response = Mock(headers={})
    for error, message in (
        (RepositoryNotFoundError("no", response=response), "nor a dataset on the hub"),
        (GatedRepoError("no", response=response), "needs access to be granted"),
    ):

        def refuse(self, name, timeout, error=error):
            raise error

        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
        with pytest.raises(UserError, match=message):
            hub.check_reachable("org/name")
