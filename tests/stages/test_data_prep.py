"""DATA_PREP as a whole, inline: files, manifest, metrics, determinism."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.data.shared.decontaminate import Decontaminator
from ray_pipeline.data.text import corpus
from ray_pipeline.errors import UserError
from ray_pipeline.launch.local_ray import start_ray
from ray_pipeline.launch.stage_context import StageContext
from ray_pipeline.records.input_files import Digests, InputGuard
from ray_pipeline.records.integrity import verify_folder
from ray_pipeline.settings.schema import DataConfig, PipelineFields, SourceConfig, TokenizerConfig
from ray_pipeline.stages import data_prep

SHARED = Path(__file__).parents[3] / "shared" / "data"
SMALL = {"builtin_documents": 400, "builtin_conversations": 300, "builtin_prompts": 80, "heldout_questions": 40}


class NoLauncher:
    """DATA_PREP starts no ranks."""

    def run(self, name, function, arguments):
        raise AssertionError("data_prep must not launch ranks")


@pytest.fixture(scope="module", autouse=True)
def ray():
    import ray

    if ray.is_initialized():
        ray.shutdown()
    start_ray(num_cpus=1, include_dashboard=False)
    yield
    ray.shutdown()


def prepare(folder, *, seed=0, tokenizer="train", guard=None, **data):
    folder.mkdir(parents=True, exist_ok=True)
    config = PipelineFields(seed=seed, data=DataConfig(**(SMALL | data)), tokenizer=TokenizerConfig(name=tokenizer))
    return data_prep.run(
        StageContext(config, "run", folder.parent, folder, {}, NoLauncher(), guard=guard or InputGuard({}))
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "data_prep"
    return prepare(folder)


def lines(folder, name):
    return [json.loads(line) for line in (folder / "prompts" / f"{name}.jsonl").read_text().splitlines()]


def test_the_folder_is_whole_and_its_manifest_true(prepared):
    folder = prepared.folder
    verify_folder(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    names = {f"{stage}/{part}" for stage in ("pretrain", "sft") for part in ("train", "validation")}
    assert set(manifest["datasets"]) == names | {"prompts/train", "prompts/heldout"}
    for name in names:
        rows = PackedRows(folder / name, seq_len=256)
        entry = manifest["datasets"][name]
        assert (entry["rows"], entry["targets"]) == (len(rows), rows.manifest.targets)
        assert entry["sources"][0]["name"] == "builtin" and entry["sources"][0]["licence"] == "Apache-2.0"
        assert len(entry["files"]) == 4
    assert manifest["datasets"]["prompts/train"]["rows"] == len(lines(folder, "train")) == 80
    assert manifest["datasets"]["prompts/heldout"]["rows"] == len(lines(folder, "heldout")) == 40


def test_metrics_add_up(prepared):
    m = prepared.metrics
    assert m["documents"] == 400
    dropped = m["empty"] + m["duplicates"] + m["contaminated"]
    assert m["train_documents"] + m["validation_documents"] == 400 - dropped
    assert m["validation_documents"] >= 1
    assert m["conversations"] == 300
    assert 0.4 < m["tokens_per_byte"] < 1
    assert 3 < m["unigram_entropy"] < 6.24
    assert prepared.learned is None


def test_unigram_entropy_is_that_of_the_stored_targets(prepared):
    import numpy as np

    from ray_pipeline.data.rows.manifest import unigram_entropy

    rows = PackedRows(prepared.folder / "pretrain" / "train")
    labels = rows.slice(0, len(rows)).labels.numpy()
    counts = np.bincount(labels[labels >= 0])
    assert prepared.metrics["unigram_entropy"] == pytest.approx(unigram_entropy(counts))


def test_no_question_is_in_two_places(prepared):
    folder = prepared.folder
    train, heldout = ({q["prompt"] for q in lines(folder, name)} for name in ("train", "heldout"))
    tokenizer = load_tokenizer(folder / "tokenizer")
    asked = set()
    for part in ("train", "validation"):
        rows = PackedRows(folder / "sft" / part)
        for row in rows.slice(0, len(rows)).tokens:
            asked |= set(
                re.findall(r"<｜User｜>(.*?)<｜Assistant｜>", tokenizer.decode(row.tolist(), keep_special=True))
            )
    assert len(asked) > 250 and len(train) == 80 and len(heldout) == 40
    assert not train & heldout and not asked & train and not asked & heldout


def test_pretraining_text_gives_no_evaluation_question_away(prepared):
    folder = prepared.folder
    finder = Decontaminator((q["prompt"] for q in lines(folder, "heldout")), 12)
    tokenizer = load_tokenizer(folder / "tokenizer")
    rows = PackedRows(folder / "pretrain" / "train")
    for row in rows.slice(0, len(rows)).tokens:
        for text in tokenizer.decode(row.tolist(), keep_special=True).split("<｜end▁of▁sentence｜>"):
            assert not finder.contaminated(text)


def test_the_same_settings_give_the_same_bytes(prepared, tmp_path):
    again = prepare(tmp_path / "again")
    one, two = (json.loads((r.folder / "manifest.json").read_text())["files"] for r in (prepared, again))
    assert one == two


def test_another_seed_gives_other_data(prepared, tmp_path):
    other = prepare(tmp_path / "other", seed=1)
    one, two = (json.loads((r.folder / "manifest.json").read_text())["files"] for r in (prepared, other))
    assert one["pretrain/train/00000.tokens.bin"] != two["pretrain/train/00000.tokens.bin"]
    assert one["prompts/heldout.jsonl"] != two["prompts/heldout.jsonl"]


def test_progress_ends_finished_and_leftovers_of_a_broken_attempt_go(tmp_path):
    stale = tmp_path / "dp" / "sft" / "train" / "99999.tokens.bin"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"old")
    prepare(tmp_path / "dp", builtin_documents=50, builtin_conversations=50)
    progress = json.loads((tmp_path / "dp" / "progress.json").read_text())
    assert (progress["stage"], progress["phase"]) == ("data_prep", "finished")
    assert not stale.exists()


def test_a_pretrained_tokenizer_is_taken_over(prepared, tmp_path):
    source = prepared.folder / "tokenizer"
    result = prepare(tmp_path / "dp", tokenizer=str(source), builtin_documents=50, builtin_conversations=50)
    assert (result.folder / "tokenizer" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_sources_are_mixed_by_weight_and_named(tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("\n\n".join(f"Paragraph {i}: " + "the sea is wide. " * 80 for i in range(60)))
    sources = [SourceConfig(name="builtin", weight=3.0), SourceConfig(name=str(text), weight=1.0, licence="CC0")]
    result = prepare(tmp_path / "dp", pretrain=sources)
    entry = json.loads((result.folder / "manifest.json").read_text())["datasets"]["pretrain/train"]
    builtin, own = entry["sources"]
    assert (own["licence"], own["weight"]) == ("CC0", 1.0)
    assert builtin["bytes"] / own["bytes"] == pytest.approx(3, rel=0.1)  # before documents are held out
    assert builtin["epochs"] == pytest.approx(2.5, abs=0.3) and (own["epochs"], own["left_out"]) == (1.0, 0)
    assert builtin["uses"] > 2 * builtin["documents"] > 700
    held = PackedRows(result.folder / "pretrain" / "validation")
    assert [source.name for source in held.manifest.sources] == ["builtin", "own"]
    assert sum(source.rows for source in held.manifest.sources) == len(held)
    tokenizer = load_tokenizer(result.folder / "tokenizer")
    of_own = held.slice(held.manifest.sources[0].rows, len(held)).tokens
    assert all("the sea is wide" in tokenizer.decode(row.tolist()) for row in of_own)


def test_several_sources_without_weights_are_used_whole(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for name, count in (("small", 31), ("large", 269)):
        texts = [f"{name} {i}: " + "the sea is wide. " * 8 for i in range(count)]
        (shards / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (shards / "README").write_text("not read")
    sources = [SourceConfig(name=str(shards / f"{name}.jsonl")) for name in ("small", "large")]
    result = prepare(tmp_path / "dp", pretrain=sources)
    m = result.metrics
    assert m["train_documents"] + m["validation_documents"] == 300 and m["documents_left_out"] == 0
    entry = json.loads((result.folder / "manifest.json").read_text())["datasets"]["pretrain/train"]
    assert [(s["read"], s["epochs"], s["left_out"]) for s in entry["sources"]] == [(31, 1.0, 0), (269, 1.0, 0)]
    small, large = json.loads((result.folder / "manifest.json").read_text())["notices"]
    assert re.search(
        r"small\.jsonl: of 31 documents \d+ are trained on \(1 epochs, [\d,]+ tokens\); left out 0$", small
    )
    assert "large.jsonl: of 269 documents" in large
    folder = [SourceConfig(name=str(shards))]  # the same shards as one source, in order of their names
    sources.reverse()
    one, two = (prepare(tmp_path / "dps" / n, pretrain=p).metrics for n, p in (("a", folder), ("b", sources)))
    assert one["tokens"] == two["tokens"] == m["tokens"]
    assert (one["files_left_out"], two["files_left_out"]) == (1, 0)
    (notice,) = json.loads((tmp_path / "dps" / "a" / "manifest.json").read_text())["notices"]
    assert notice.endswith("left out 0, 1 files that are no data not read: README")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_CHARACTERS", 2000)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} is a number of some kind"}) + "\n" for i in range(500)))
    guard = InputGuard({path: Digests().sha256(path)})
    add = corpus.Corpus.add

    def changing(self, number, block):
        add(self, number, block)
        with path.open("a") as file:
            file.write('{"text": "more"}\n')

    monkeypatch.setattr(corpus.Corpus, "add", changing)
    with pytest.raises(UserError, match=r"a\.jsonl: changed since this run looked at it"):
        prepare(tmp_path / "dp", guard=guard, pretrain=[SourceConfig(name=str(path))])
    assert not (tmp_path / "dp" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"pretrain": "one"}, "--data .*1 documents are left of 1 .*at least 2"),
        ({"seq_len": 12}, "--sft-data builtin: .* conversations fit into seq_len=12 .*--seq-len"),
        ({"prompts": "long"}, "--prompt-data .*: none of the .* questions fits into 128 tokens, .*--seq-len"),
    ],
)
def test_data_that_cannot_work_is_refused(tmp_path, data, message):
    (tmp_path / "one.txt").write_text("only this")
    endless = [{"question": f"{i} and {i} is? " * 60, "answer": "0"} for i in range(4)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, endless)))
    if "pretrain" in data:
        data = {"pretrain": [SourceConfig(name=str(tmp_path / "one.txt"))]}
    if "prompts" in data:
        data = {"prompts": str(tmp_path / "long.jsonl")}
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "dp", **data)
    assert not (tmp_path / "dp" / "manifest.json").exists()


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="the shared data is not here")
def test_shakespeare_and_gsm8k_are_prepared(tmp_path):
    questions = str(SHARED / "gsm8k" / "test.jsonl")
    sources = [SourceConfig(name=str(SHARED / "tinyshakespeare" / "input.txt"), licence="public domain")]
    result = prepare(tmp_path / "dp", pretrain=sources, sft=questions, prompts=questions)
    m = result.metrics
    assert m["documents"] > 400 and m["tokens"] > 400_000
    assert m["heldout_questions"] + m["heldout_questions_too_long"] == 40
    assert m["conversations_contaminated"] >= 40
    assert m["conversations"] > 100 and m["train_questions"] > 100
    tokenizer = load_tokenizer(result.folder / "tokenizer")
    row = PackedRows(result.folder / "sft" / "train").slice(0, 1)
    text = tokenizer.decode(row.tokens[0].tolist())
    assert "<think>" in text and "</think>" in text and "<<" not in text
