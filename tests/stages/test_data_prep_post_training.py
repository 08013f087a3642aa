"""DATA_PREP for DPO, tools and reasoning-gym; and that none of it changes what the default recipe reads."""

from __future__ import annotations

import hashlib
import json

import pytest

from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.data.rows.manifest import notices_of
from ray_pipeline.data.rows.preferences import PairRows
from ray_pipeline.launch.stage_context import StageContext
from ray_pipeline.records.integrity import unsealed, verify_folder
from ray_pipeline.settings.schema import DataConfig, PipelineFields, SourceConfig, TokenizerConfig
from ray_pipeline.stages import data_prep
from ray_pipeline.tools.format import CALL_BEGIN, OUTPUT_BEGIN, OUTPUTS_END, TOOL_TOKENS
from tests.stages.test_data_prep import SHARED, SMALL, NoLauncher, prepare, ray

__all__ = ["ray"]
WITH_DPO = ["data_prep", "pretrain", "sft", "dpo", "export"]
# Of every file that the settings SMALL wrote before there were tools, preferences and further formats; rows.json lists
# sources since.
DIGEST = "26a1f70632652adcfecce4c5ed5cdcad26e2162ca48b2a8d083bf290e87d770a"
FEW = SMALL | {"builtin_documents": 60}


def prepared(folder, *, tools=False, stages=WITH_DPO, **data):
    folder.mkdir(parents=True)
    config = PipelineFields(
        data=DataConfig(**(FEW | data)), tokenizer=TokenizerConfig(tools=tools), stages=stages
    )  # fmt: skip
    result = data_prep.run(StageContext(config, "run", folder.parent, folder, {}, NoLauncher()))
    verify_folder(folder)
    return result, json.loads((folder / "manifest.json").read_text())


def lines(folder, name):
    return [json.loads(line) for line in (folder / "prompts" / f"{name}.jsonl").read_text().splitlines()]


def test_the_default_data_is_byte_for_byte_what_it_was(tmp_path):
    result = prepare(tmp_path / "dp")
    files = json.loads((result.folder / "manifest.json").read_text())["files"]
    sums = {name: entry["sha256"] for name, entry in files.items()}
    for name in sums:
        if name.endswith("rows.json"):  # without its seal
            plain = json.dumps(unsealed((result.folder / name).read_bytes()), indent=2, ensure_ascii=False) + "\n"
            sums[name] = hashlib.sha256(plain.encode()).hexdigest()
    assert hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest() == DIGEST


def test_preferences_are_prepared_for_dpo_alone_and_change_nothing_else(tmp_path):
    result, manifest = prepared(tmp_path / "with")
    _, without = prepared(tmp_path / "without", stages=["data_prep", "pretrain", "sft"])
    assert set(manifest["datasets"]) - set(without["datasets"]) == {"preferences/train", "preferences/validation"}
    assert {k: v for k, v in manifest["files"].items() if not k.startswith("preferences/")} == without["files"]
    assert not (tmp_path / "without" / "preferences").exists()
    train, held = (PairRows(result.folder / "preferences" / name, 256) for name in ("train", "validation"))
    m = result.metrics
    assert (m["preference_pairs_train"], m["preference_pairs_validation"]) == (len(train), len(held)) == (96, 24)
    assert m["preference_pairs_too_long"] == m["preference_duplicates"] == 0


def test_the_tools_task_is_prepared_with_tool_tokens(tmp_path):
    data = {"sft": "builtin_tools", "prompts": "builtin_tools"}
    result, manifest = prepared(tmp_path / "dp", tools=True, stages=["data_prep", "pretrain", "sft", "grpo"], **data)
    tokenizer = load_tokenizer(result.folder / "tokenizer")
    assert all(len(tokenizer.encode(token)) == 1 for token in TOOL_TOKENS)
    rows = PackedRows(result.folder / "sft" / "train")
    batch = rows.slice(0, len(rows))
    read = tokenizer.decode(batch.tokens.flatten().tolist(), keep_special=True)
    trained = tokenizer.decode(batch.labels[batch.labels >= 0].tolist(), keep_special=True)
    assert read.count(CALL_BEGIN) == read.count(OUTPUT_BEGIN) == trained.count(CALL_BEGIN) > 250
    assert OUTPUT_BEGIN not in trained and OUTPUTS_END not in trained
    assert manifest["datasets"]["sft/train"]["sources"][0]["licence"] == "Apache-2.0"
    assert len(lines(result.folder, "heldout")) == 40 and {q["category"] for q in lines(result.folder, "train")} == {
        "long_product", "long_sum", "stock"
    }  # fmt: skip
    assert result.metrics["conversations_too_long"] == 0


def test_reasoning_gym_questions_carry_their_whole_entry(tmp_path):
    pytest.importorskip("reasoning_gym")
    result, _ = prepared(tmp_path / "dp", stages=["data_prep", "pretrain"], prompts="reasoning_gym:chain_sum:50")
    held, train = (lines(result.folder, name) for name in ("heldout", "train"))
    entry = json.loads(held[0]["answer"])
    assert entry["question"] == held[0]["prompt"] and entry["metadata"]["source_dataset"] == "chain_sum"
    assert 8 <= len(held) <= 10 and len(train) + len(held) <= 50


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "preference").is_dir(), reason="the shared data is not here")
def test_the_shared_preferences_and_tool_conversations_are_prepared(tmp_path):
    tools, pairs = SHARED / "tools" / "glaive_toolcall_en_demo.json", SHARED / "preference" / "dpo_en_demo.json"
    data = {"sft": str(tools), "preferences": str(pairs), "seq_len": 2048}
    result, _ = prepared(tmp_path / "dp", tools=True, stages=["data_prep", "pretrain", "sft", "dpo"], **data)
    m = result.metrics
    assert m["conversations"] + m["conversations_too_long"] + m["conversation_duplicates"] == 300
    assert m["conversations"] > 200
    kept = m["preference_pairs_train"] + m["preference_pairs_validation"]
    assert kept + m["preference_pairs_too_long"] + m["preference_ties"] + m["preference_duplicates"] == 300
    assert kept > 100 and m["preference_pairs_validation"] == kept // 5


def test_what_is_left_out_and_not_read_stands_in_the_manifest(tmp_path):
    chats = [{"prompt": f"How much is {i}+{i}?", "response": str(2 * i), "id": i} for i in range(60)]
    chats[7]["response"] = ""
    call = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 4}}]}
    refused = {"messages": [{"role": "user", "content": "2+4?"}, call, {"role": "assistant", "content": "6"}]}
    sft = tmp_path / "sft.jsonl"
    sft.write_text("\n".join(map(json.dumps, [*chats, refused])))
    texts = tmp_path / "text.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"line {i} of a text", "url": "x"}) for i in range(60)))
    _, manifest = prepared(
        tmp_path / "dp", stages=["data_prep", "pretrain", "sft"], sft=str(sft), on_bad_record="skip",
        pretrain=[SourceConfig(name=str(texts))],
    )  # fmt: skip
    read = manifest["reading"][f"--sft-data {sft}"]
    assert (read["records"], read["not_read"], read["cut"]) == (61, {"id": 59}, False)
    assert [entry["first"] for entry in read["left_out"]] == [[f"{sft}:8"], ['conversation 60 ("2+4?")']]
    assert manifest["datasets"]["sft/train"]["documents"] + manifest["datasets"]["sft/validation"]["documents"] == 59
    assert manifest["reading"][f"--data {texts}"]["not_read"] == {"url": 60}
    assert [text.partition(": ")[2][:30] for text in manifest["notices"]] == ["2 of 61 records are left out: "]
    assert notices_of(tmp_path / "dp") == manifest["notices"] and notices_of(tmp_path) == []
