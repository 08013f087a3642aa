"""What the page says of a run beside its curves: answers before and after each stage, data, machine, commands."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_pipeline.errors import UserError, command
from ray_pipeline.records.integrity import read_sealed
from ray_pipeline.records.metrics_file import read_samples
from ray_pipeline.records.units import bytes_text, number_text
from ray_pipeline.settings.run_folder import CONFIG_FILE, HELDOUT_FILE, MANIFEST

INPUT_FILE = "input.json"  # the held-out answers of the model that a stage started from
MOST_QUESTIONS = 12


def heldout(folder: Path, name: str = HELDOUT_FILE) -> dict[str, Any] | None:
    """How the held-out questions were answered; None where nobody asked, or the file is damaged."""
    path = folder / name
    try:
        return dict(read_sealed(path, "")) if path.exists() else None
    except UserError:
        return None


def categories(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each stage that answered held-out questions, all of them and each category, beside the stage's input.

    Returns:
        `stage`, and `rows` of `name`, `after` and `before`: `questions`, `accuracy`, `interval`; `before` may be None.
    """
    out = []
    for entry in entries:
        after = heldout(Path(entry["folder"])) if "folder" in entry else None
        if after is None:
            continue
        before = heldout(Path(entry["folder"]), INPUT_FILE) or {}
        rows = [{"name": "all", "after": after, "before": before if "accuracy" in before else None}]
        earlier = before.get("by_category", {})
        each = after.get("by_category", {})
        rows += [{"name": name or "–", "after": group, "before": earlier.get(name)} for name, group in each.items()]
        out.append({"stage": entry["stage"], "rows": rows})
    return out


def same_questions(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first held-out questions with the answer of every model of the run: `prompt`, `answer`, `category`, `said`.

    `said` holds of each model in turn `by` (before sft, after sft ...), `text` and `correct`.
    """
    questions: dict[str, dict[str, Any]] = {}
    for name, samples in _answers(entries):
        for sample in samples:
            known = questions.setdefault(
                sample["prompt"],
                {key: sample.get(key, "") for key in ("prompt", "answer", "category")} | {"said": []},
            )
            known["said"].append({"by": name, "text": sample["completion"], "correct": bool(sample.get("correct"))})
    return list(questions.values())[:MOST_QUESTIONS]


def _answers(entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Whose answers, and the answers, in the order of the stages. The input of all but the first is the one before."""
    out: list[tuple[str, list[dict[str, Any]]]] = []
    for entry in (entry for entry in entries if "folder" in entry):
        folder, stage = Path(entry["folder"]), entry["stage"]
        before = (heldout(folder, INPUT_FILE) or {}).get("shown", [])
        if before and (not out or stage == "distillation"):
            out.append((f"before {stage}", before))
        try:
            found = read_samples(folder)
        except ValueError:  # damaged, which the page says
            continue
        questions = [sample for sample in found if isinstance(sample, dict) and "completion" in sample]
        if questions:
            out.append((f"after {stage}", questions))
    return out


def other_samples(folder: Path) -> list[dict[str, Any]]:
    """Samples that are no answers to questions: what a pretrained model wrote on."""
    try:
        found = read_samples(folder)
    except ValueError:
        return []
    samples = [sample if isinstance(sample, dict) else {"text": sample} for sample in found]
    return [sample for sample in samples if "completion" not in sample][:MOST_QUESTIONS]


def data_facts(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Each dataset that DATA_PREP made, with its size and sources; what it dropped or has to say. None before."""
    entry = next((entry for entry in entries if entry["stage"] == "data_prep" and "folder" in entry), None)
    path = Path(entry["folder"]) / MANIFEST if entry is not None else None
    if path is None or not path.exists():
        return None
    try:
        manifest = read_sealed(path, "")
    except UserError as error:
        return {"sets": [], "notices": [str(error)], "tokenizer": ""}
    tokenizer = manifest.get("tokenizer", {})
    return {
        "sets": [_dataset(name, found) for name, found in manifest.get("datasets", {}).items()],
        "notices": list(manifest.get("notices", ())),
        "tokenizer": ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in tokenizer.items()),
    }


def _dataset(name: str, found: Mapping[str, Any]) -> dict[str, str]:
    counts = [f"{number_text(found[key])} {key}" for key in ("documents", "rows", "tokens") if found.get(key)]
    if found.get("bytes"):
        counts.append(f"{bytes_text(found['bytes'])} of text")
    sources = [
        source["name"]
        + (f" ({source['licence']})" if source.get("licence") else "")
        + (f", {source['epochs']:.3g} times" if source.get("epochs", 1) not in (None, 1) else "")
        for source in found.get("sources", ())
    ]
    return {"name": name, "counts": ", ".join(counts), "sources": "; ".join(sources)}


def environment(invocations: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Name and value of what the run was last worked on with."""
    if not invocations:
        return []
    last = invocations[-1]
    gpus = last.get("gpus") or []
    kinds = ", ".join(f"{gpus.count(kind)} x {kind}" for kind in dict.fromkeys(gpus)) or "none"
    facts = [
        ("machine", f"{last['host']}, {last['machine']['system']}, {last['machine']['machine']}"),
        ("processors", f"{last['cpus']} CPU cores, {last['memory_gib']} GiB; GPUs: {kinds}"),
        ("commit", last.get("commit") or "not known"),
        ("python", last["machine"]["python"]),
    ]
    return facts + list(last["versions"].items())


def commands(run_dir: Path, invocations: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """When, and what was typed; and what makes the same run again, from its stored settings."""
    typed = [
        (time.strftime("%Y-%m-%d %H:%M", time.localtime(one["time"])), f"cd {one['folder']} && {one['command']}")
        for one in invocations
        if one.get("command")
    ]
    again = command("run", "--config", run_dir / CONFIG_FILE, "--run-name", f"{run_dir.name}-again")
    return [*typed, ("the same again", again)]


def embedded(value: Any) -> str:
    """JSON that may stand in a script element, whatever texts it holds: none of them can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text
