"""3,000 generated recipes, environments and flags: each is taken, or refused in one message, within ten seconds."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest

from ray_pipeline.cli.options import FLAG_KEYS
from ray_pipeline.settings.layers import RECIPE_DIR
from ray_pipeline.settings.loading import config_yaml, load_config
from ray_pipeline.settings.messages import known_keys
from tests.fuzz.driving import end_of, report

pytestmark = pytest.mark.slow

CASES = 3000
VALUES = (
    "0", "1", "2", "3", "7", "-1", "16", "64", "1000", "1e3", "1e15", "-1e15", "9" * 30, "9" * 5000, "0.5", "1e-320",
    "nan", "inf", "-inf", ".inf", "true", "false", "null", "none", "~", "", "  ", "[]", "{}", "[1, 2]", "[0.9, 0.95]",
    "{a: 1}", "[" * 3000, "[[[]]]", "'", '"', "é", "\u2028", "\ud800", "x" * 300, "x" * 70000, "a/b", "builtin", "0x10",
    "1_000", "1:30", "2024-13-45", "!!int abc", "!!python/name:os.system", "&a [*a]", "%s%s%n", "{0}", "$HOME", "*",
    "train", "mla", "dsa", "mha", "sliding", "cope", "dyt", "cpu", "cuda", "1f1b", "zbv", "adamw", "E+4|4|4+H", "sft",
    "grpo", "[data_prep, sft]", "{answer: 1, format: 0.1}", "{python: {}}", "reasoning_gym:", "mod:func", "topk:x",
    "[{name: builtin}]", "[{name: x, weight: -1}]", "[calculator]", "{factor: 2, original_max_position_embeddings: 64}",
)  # fmt: skip
# Paths are made in the test's own folder; a run is never pointed elsewhere.
PLACES = ("output_dir", "run_name", "init_from.path", "data.sft", "data.prompts", "data.preferences", "tokenizer.name")
SIZES = ("gpus", "pp_size", "dp_size", "tp_size", "ep_size", "sp_size", "zero_stage", "batch_size", "seq_len", "seed")


class Maker:
    """Draws command lines, recipes and environments. `places`: paths of odd things that are really there."""

    def __init__(self, seed: int, places: list[str], folder: Path):
        self.random, self.places, self.folder = Random(seed), places, folder
        self.keys = sorted(known_keys())
        self.recipes = [path.read_text(encoding="utf-8") for path in sorted(RECIPE_DIR.glob("*.yaml"))]
        self.recipes.append(config_yaml(load_config()))

    def value(self) -> str:
        """A value as somebody might write it, or nobody would."""
        kind = self.random.random()
        if kind < 0.7:
            return self.random.choice(VALUES)
        if kind < 0.8:
            return str(self.random.randint(-10, 1 << self.random.randint(1, 70)))
        if kind < 0.9:
            return repr(self.random.uniform(-1, 1) * 10.0 ** self.random.randint(-40, 40))
        return "".join(chr(self.random.choice((32, 45, 58, 91, 123, 34, 233, 0x4E2D, 0x1F600))) for _ in range(9))

    def key(self) -> str:
        """A dotted key, mostly one there is; never where runs are written."""
        key = self.random.choice(self.keys)
        if self.random.random() < 0.1:
            place = self.random.randrange(len(key) + 1)
            key = key[:place] + self.random.choice((".", "x", "..", "_", "é")) + key[place:]
        return "seed" if key == "output_dir" else key

    def place(self) -> str:
        return self.random.choice((*self.places, "builtin", "nowhere", "x" * 300, ""))

    def flags(self) -> list[str]:
        """Flags, mostly of sizes, and a few `--set`."""
        given: list[str] = []
        for _ in range(self.random.randint(0, 4)):
            draw = self.random.random()
            if draw < 0.45:
                option = self.random.choice(SIZES)
                number = self.random.choice(("1", "2", "3", "4", "8", self.value()))
                given += [f"--{option.replace('_', '-')}={number}"]
            elif draw < 0.6:
                option = self.random.choice([name for name in FLAG_KEYS if name not in ("output_dir", "wandb")])
                given += [f"--{option.replace('_', '-')}={self.value()}"]
            elif draw < 0.7:
                option = self.random.choice(("data", "sft-data", "prompt-data", "preference-data", "init-from"))
                given += [f"--{option}={self.place()}"]
            else:
                given += ["--set", f"{self.key()}={self.value()}"]
        if self.random.random() < 0.2:
            given += [f"--skip={self.random.choice(('sft', 'pretrain', 'grpo', self.value()))}"]
        return given

    def recipe(self, number: int) -> Path:
        """A shipped recipe after some accidents."""
        lines = self.random.choice(self.recipes).split("\n")
        for _ in range(self.random.randint(1, 6)):
            place = self.random.randrange(len(lines))
            accident = self.random.randrange(7)
            if accident == 0:
                del lines[place]
            elif accident == 1:
                lines.insert(place, self.random.choice(lines))
            elif accident == 2 and ":" in lines[place]:
                lines[place] = f"{lines[place].partition(':')[0]}: {self.value()}"
            elif accident == 3:
                lines[place] = " " * self.random.randint(0, 6) + lines[place].lstrip()
            elif accident == 4:
                lines.insert(place, f"{self.key().split('.')[0]}: {{{self.key().rpartition('.')[2]}: {self.value()}}}")
            elif accident == 5 and lines[place]:
                at = self.random.randrange(len(lines[place]))
                lines[place] = (
                    lines[place][:at] + self.random.choice("{}[]:,&*!|>'\"%@`#\t\x00é") + lines[place][at + 1 :]
                )
            else:
                lines.insert(
                    place, self.random.choice(("<<: *a", "a: &a {<<: *a}", "---", "...", "? x", "&b", "- x", "\ufeff"))
                )
            lines = lines or [""]
        path = self.folder / f"{number % 8}.yaml"
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        return path


def odd_places(folder: Path) -> list[str]:
    """Paths of things that are no data: a pipe, a folder, nothing, noise."""
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "noise.parquet").write_bytes(Random(1).randbytes(500))
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    return [
        str(folder / name) for name in ("pipe.jsonl", "empty.jsonl", "noise.parquet", "folder", "loop", "absent.txt")
    ]


def test_generated_settings_are_taken_or_refused_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = Maker(17, odd_places(tmp_path), tmp_path)
    faults = []
    codes = {0: 0, 1: 0, 2: 0}
    for number in range(CASES):
        arguments = maker.flags()
        if maker.random.random() < 0.5:
            arguments += ["--config", str(maker.recipe(number))]
        verb = maker.random.choices((["config-show"], ["run", "--dry-run"], ["plan"]), (6, 3, 1))[0]
        if verb[0] != "plan":
            arguments += ["--output-dir", str(tmp_path / "runs")]
        with monkeypatch.context() as patch:
            if maker.random.random() < 0.2:
                name = f"RAY_PIPELINE_{maker.key().upper().replace('.', '__')}"
                patch.setenv(name.encode("ascii", "ignore").decode(), maker.value().replace("\ud800", ""))
            ending = end_of([*verb, *arguments])
        if ending.fault is not None:
            faults.append(([*verb, *arguments], ending.fault))
        elif ending.code is not None:
            codes[ending.code] += 1
        assert len(faults) < 40, report(faults)
    assert not faults, report(faults)
    assert min(codes[0], codes[2]) > CASES // 20, f"exit codes {codes}: one kind is hardly tried"
    assert not (tmp_path / "runs").exists(), "a dry run wrote something"
