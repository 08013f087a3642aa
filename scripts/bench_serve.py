#!/usr/bin/env python3
"""Tokens a second and time to the first text of `serve` beside `transformers serve`, same weights, interleaved.

python scripts/bench_serve.py                      # 1, 8 and 32 clients
python scripts/bench_serve.py --mtp MODEL.gguf     # instead: llama.cpp with and without drafts by a trained MTP module
python scripts/bench_serve.py --quick              # does it run?

Nothing is timed before all servers give the same greedy answers, but for ties. Each has a process of its own; those
that are not asked are halted meanwhile. The peer is `transformers serve` as it is: with --continuous-batching it (5.23)
fails on DeepseekV3, as its cache is made for heads of qk_rope_head_dim.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.parallel_bench.results import provenance, spread  # noqa: E402
from scripts.serve_bench import plot  # noqa: E402
from scripts.serve_bench.clients import answers, measure, tie  # noqa: E402
from scripts.serve_bench.servers import Server, ours, theirs  # noqa: E402
from scripts.serve_bench.task import NAME, TEXTS, Task, prepare  # noqa: E402

PEER = "transformers serve"
TIE = 1e-4  # nats: of two tokens as likely as that, what rounds differently may take either


def start_all(folder: Path, task: Task) -> list[Server]:
    hf, gguf = prepare(folder, task)
    slots, threads = max(task.clients), task.threads
    commands = {
        "native": (NAME, ours("native", hf, slots, threads)),
        "llamacpp": (NAME, ours("llamacpp", gguf, slots, threads)),
        PEER: (str(hf), theirs(hf)),
    }
    return [Server(name, model, words, folder / f"{name}.log", threads) for name, (model, words) in commands.items()]


def start_mtp(folder: Path, task: Task, model: str) -> list[Server]:
    """llama.cpp with and without drafts; `model` is named as `serve` takes it."""
    name = Path(model).stem if model.endswith(".gguf") else model
    plain = ours("llamacpp", Path(model), 1, task.threads)
    commands = {"llamacpp": plain, "llamacpp --speculative": [*plain, "--speculative"]}
    return [Server(who, name, words, folder / f"mtp {who}.log", task.threads) for who, words in commands.items()]


def compare(servers: Sequence[Server], task: Task, model: str, peer: str) -> list[dict[str, Any]]:
    """Every server at every number of clients, in turns.

    Raises:
        RuntimeError: a server failed, or two of them answer differently.
    """
    said = {}
    for server in servers:
        server.go_on()
        server.wait()
        said[server.name] = answers(server, task)
        server.halt()
    first = said[servers[0].name]
    servers[0].go_on()
    for name, found in said.items():
        for number, (one, other) in enumerate(zip(first, found, strict=True)):
            if one != other and (sure := tie(servers[0], task, number, other)) > TIE:
                raise RuntimeError(
                    f"{name}: answers {other!r}, not {one!r} as {servers[0].name}, which is {sure:g} nats surer there"
                )
    servers[0].halt()
    out, asked = [], 0
    for clients in task.clients:
        turns: dict[str, list[dict[str, Any]]] = {server.name: [] for server in servers}
        for round_ in range(-1, task.rounds):  # the first warms up
            for server in servers if round_ % 2 else servers[::-1]:
                server.go_on()
                turn = measure(server, task, clients, asked)
                server.halt()
                if round_ >= 0:
                    turns[server.name].append(turn)
            asked += clients * task.each
        out.append(summary(turns, model, clients, peer))
        print("\n".join(lines(out[-1])), flush=True)
    return out


def summary(turns: dict[str, list[dict[str, Any]]], model: str, clients: int, peer: str) -> dict[str, Any]:
    """Medians and spread of every server, and each one's speed over the peer's, in all and round by round."""
    rows: dict[str, Any] = {
        name: {
            "tokens_per_second": spread([turn["tokens_per_second"] for turn in taken]),
            "first_ms": spread([1e3 * value for turn in taken for value in turn["first"]]),
            "drafted": sum(turn["drafted"] for turn in taken),
            "accepted": sum(turn["accepted"] for turn in taken),
        }
        for name, taken in turns.items()
    }
    for name, row in rows.items():
        row["speed_vs_peer"] = row["tokens_per_second"]["median"] / rows[peer]["tokens_per_second"]["median"]
        pairs = zip(turns[name], turns[peer], strict=True)
        row["speed_vs_peer_by_round"] = spread([a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs])
    return {"model": model, "clients": clients, "peer": peer, "servers": rows}


def lines(found: dict[str, Any]) -> list[str]:
    """A row for every server."""
    out = []
    for name, row in found["servers"].items():
        speed, by_round = row["tokens_per_second"], row["speed_vs_peer_by_round"]
        drafts = f", {row['accepted']} of {row['drafted']} drafts accepted" if row["drafted"] else ""
        out.append(
            f"{found['model']:10} {found['clients']:3} clients  {name:42} {speed['median']:8.1f} tokens/s "
            f"({speed['p10']:.1f}-{speed['p90']:.1f}), first text {row['first_ms']['median']:8.1f} ms, "
            f"{row['speed_vs_peer']:.2f}x (by round {by_round['median']:.2f})"
            f"{drafts}"
        )
    return out


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="tiny", choices=["tiny", "14m"])
    parser.add_argument("--rounds", type=int, default=None, help="turns of every server; default: 5, quick: 1")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--mtp", default=None, help="measure drafts alone, by this model's MTP module: a run, RUN:STAGE, a .gguf file"
    )
    parser.add_argument("--quick", action="store_true", help="1 and 4 clients, short answers")
    parser.add_argument("--out", type=Path, default=None, help="folder; default: scripts/results/HARDWARE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    task = Task(shape=given.shape, threads=given.threads, rounds=given.rounds or 5)
    if given.quick:
        task = replace(task, clients=(1, 4), tokens=16, rounds=given.rounds or 1, checked=2)
    where = provenance(ROOT, "cpu")
    where["versions"] |= {name: metadata.version(name) for name in ("transformers", "xllamacpp")}
    servers: list[Server] = []
    with tempfile.TemporaryDirectory(prefix="bench_serve-") as name:
        try:
            if given.mtp is not None:
                servers += start_mtp(Path(name), task, given.mtp)
                task = replace(task, clients=(1,), each=8)
                results = [
                    found
                    for kind in TEXTS
                    for found in compare(servers, replace(task, kind=kind), kind, "llamacpp")
                ]  # fmt: skip
            else:
                servers += start_all(Path(name), task)
                results = compare(servers, task, task.shape, PEER)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            for server in servers:
                server.close()
    out = given.out or ROOT / "scripts" / "results" / where["hardware"]
    out.mkdir(parents=True, exist_ok=True)
    where["load_average_at_end"] = os.getloadavg()[0]
    benchmark = "bench_serve" if given.mtp is None else "bench_drafts"
    data = {"benchmark": benchmark, **where, "task": asdict(task), "results": results}
    table, picture = out / f"{benchmark}.json", out / f"{benchmark}.svg"
    table.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    picture.write_text(plot.speeds(data), encoding="utf-8")
    print(f"Results: {table}, {picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
