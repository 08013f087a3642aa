"""200 flipped bits in the files of a real, finished run: whoever reads a file refuses it by name, or reads the same."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.data.tasks.question import prepared_questions
from ray_pipeline.engine.checkpoints.checkpoint import find_damage, list_checkpoints
from ray_pipeline.errors import UserError
from ray_pipeline.records.integrity import damage
from ray_pipeline.training.pairs import REFERENCE
from tests.fuzz.driving import SECONDS, Ending, Hung, clock, end_of, report
from tests.pipeline.driving import TOY, finish, start

pytestmark = pytest.mark.slow

FLIPS = 200
RUN = "toy"
DPO = [
    f"dpo.{key}"
    for key in ("steps=4", "batch_size=4", "eval_every=2", "checkpoint_every=2", "optimizer.warmup_steps=1")
]
NEVER_READ = ("wandb", "ray", ".lock", ".workers.lock")  # of other programs, or of a run that works


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flips") / "runs"
    dpo = ["--dpo", *(part for setting in DPO for part in ("--set", setting))]
    finish(start("run", "--config", str(TOY), "--run-name", RUN, *dpo, folder=folder), folder)
    return folder / RUN


Reading = tuple[str, str | None]
"""What a reader gave as text, and, where it refused, its words instead."""


def verb(run_dir: Path, *arguments: str) -> Callable[[], Ending]:
    return lambda: end_of([*arguments, "--output-dir", str(run_dir.parent)], seconds=3 * SECONDS)


def function(read: Callable[[], object]) -> Callable[[], Ending]:
    """A function that stages open their inputs with, as if it were a verb."""

    def called() -> Ending:
        try:
            with clock():
                found = read()
        except UserError as error:
            return Ending(2, "", str(error), None)
        except Hung:
            return Ending(None, "", "", "hung")
        except BaseException as error:  # noqa: BLE001  whatever it is, it should have been a UserError
            return Ending(None, "", "", f"{type(error).__name__}: {error}")
        return Ending(0, str(found), "", None)

    return called


def rows(folder: Path) -> str:
    stored = PackedRows(folder)
    batch = stored.slice(0, len(stored))
    tensors = (batch.tokens, batch.labels, batch.doc_ids)
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def judged(found: str | None) -> str:
    """What a stage does with the damage that it finds."""
    if found:
        raise UserError(found)
    return "whole"


def readers(run_dir: Path, path: Path) -> Iterator[tuple[str, Callable[[], Ending]]]:
    """Everything that opens a file, by a name for messages."""
    yield "status", verb(run_dir, "status", RUN, "--json")
    parts = path.relative_to(run_dir).parts
    stage = parts[0].rpartition("-")[0]
    if len(parts) == 1 or path.name in ("record.json", "manifest.json"):
        yield "resume", verb(run_dir, "resume", RUN, "--dry-run")
    if stage == "data_prep" or len(parts) == 1:
        data = next(run_dir.glob("data_prep-*"))
        for name in ("pretrain", "sft", "preferences"):
            stage_of = {"preferences": "dpo"}.get(name, name)
            yield f"inspect {name}", verb(run_dir, "inspect-batch", RUN, "--stage", stage_of, "--rows", "1")
            for split in ("train", "validation"):
                yield f"rows {name} {split}", function(lambda f=data / name / split: rows(f))
        yield "inspect grpo", verb(run_dir, "inspect-batch", RUN, "--stage", "grpo")
        for split in ("train", "heldout"):
            yield f"questions {split}", function(lambda f=data / "prompts" / f"{split}.jsonl": prepared_questions(f))
        yield "tokenizer", function(lambda: load_tokenizer(data / "tokenizer").to_json())
    if stage in ("pretrain", "sft", "dpo", "grpo", "distillation", "data_prep") or len(parts) == 1:
        asked = "sft" if stage == "data_prep" or len(parts) == 1 else stage
        given = ("--stage", asked, "--max-new-tokens", "8", "--temperature", "0", "--chat", "What is 2+2?")
        yield "generate", verb(run_dir, "generate", RUN, *given)
    for checkpoint in list_checkpoints(path.parent.parent) or list_checkpoints(path.parent):
        if checkpoint in path.parents:
            yield "checkpoint", function(lambda f=checkpoint: judged(find_damage(f)))
    if path.parent.name in ("teacher_answers", REFERENCE):
        yield path.parent.name, function(lambda: judged(damage(path.parent)))
    if stage == "export" and "gguf" not in path.suffix:
        for folder in {p.parent for p in (run_dir / parts[0]).rglob("config.json")}:
            if folder in path.parents:
                asked = ("--tasks", "arithmetic", "--limit", "1", "--max-new-tokens", "4")
                yield f"eval {folder.name}", verb(run_dir, "eval", str(folder), *asked)


def kind_of(run_dir: Path, path: Path) -> str:
    return re.sub(r"[0-9a-f]{10}|\d+", "#", str(path.relative_to(run_dir)))


def chosen_flips(run_dir: Path, count: int) -> list[tuple[Path, int]]:
    """(file, bit) in turn from every kind of file."""
    random, kinds = Random(23), defaultdict(list)
    for path in sorted(run_dir.rglob("*")):
        skipped = any(part in NEVER_READ for part in path.relative_to(run_dir).parts)
        if path.is_file() and not path.is_symlink() and path.stat().st_size and not skipped:
            kinds[kind_of(run_dir, path)].append(path)
    flips: list[tuple[Path, int]] = []
    while len(flips) < count:
        for paths in kinds.values():
            path = random.choice(paths)
            flips.append((path, random.randrange(8 * path.stat().st_size)))
    return flips[:count]


def stable(ending: Ending) -> str:
    """What was printed, without times and speeds, and without how far a stage has come, which is no result."""
    out = re.sub(r"[\d.,]+ tokens/s|in [\d.]+ s", "", ending.out)
    if not out.startswith("{"):
        return out
    facts = json.loads(out)
    for stage in facts.get("stages", []):
        stage.pop("progress", None)
    return json.dumps(facts, sort_keys=True)


def test_a_flipped_bit_is_refused_by_name_or_changes_nothing(run_dir: Path) -> None:
    before: dict[str, str] = {}
    faults: list[tuple[object, str]] = []
    refused = 0
    for path, bit in chosen_flips(run_dir, FLIPS):
        content = path.read_bytes()
        asked = dict(readers(run_dir, path))
        for name, read in asked.items():
            key = f"{path.relative_to(run_dir).parts[0] if name.startswith(('generate', 'eval')) else ''} {name}"
            if key not in before:
                ending = read()
                assert ending.code == 0, (name, ending)
                before[key] = stable(ending)
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        where = f"{path.relative_to(run_dir)} bit {bit}"
        try:
            for name, read in asked.items():
                key = f"{path.relative_to(run_dir).parts[0] if name.startswith(('generate', 'eval')) else ''} {name}"
                ending = read()
                said = ending.out + ending.err
                named = path.name in said or str(path.parent.relative_to(run_dir)) in said.replace("\n", "")
                if ending.fault is not None:
                    faults.append((f"{where}: {name}", ending.fault))
                elif stable(ending) != before[key] and not named:
                    faults.append((f"{where}: {name}", f"exit {ending.code}, unnamed: {said[-600:]}"))
                elif stable(ending) != before[key] and ending.code == 0 and "damaged" not in said:
                    faults.append((f"{where}: {name}", f"silently another result: {said[-600:]}"))
                refused += ending.code != 0
        finally:
            path.write_bytes(content)
    assert not faults, report(faults)
    assert refused > FLIPS // 4, "hardly any flip was noticed"
