"""The plan as a page of text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ray_pipeline.costs.estimate import Plan
from ray_pipeline.costs.picture import pp_layout_text
from ray_pipeline.costs.published_runs import AIM, CHANGES, Run
from ray_pipeline.costs.search import Search
from ray_pipeline.costs.timing import flops_per_token
from ray_pipeline.costs.weights import main_model
from ray_pipeline.records.units import bytes_text, count_text, scaled, time_text

MOST_STAGES = 18


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(columns))
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", header_style="dim")
    return table


def print_plan(console: Console, plan: Plan) -> None:
    """Parameters, memory, communication, time, the map of ranks, and whether it fits."""
    work = plan.work
    recipe = f"{work.stage}: {work.layout.describe()}, {'bf16' if work.bf16 else 'fp32'}, on {plan.hardware.title}"
    console.print(recipe, style="bold", highlight=False)
    peers = ", tensor-parallel peers in one cell" if work.layout.tp > 1 else ""
    sections: list[tuple[str, Table, str]] = [
        ("Parameters", _parameters(plan), ""),
        (f"Ranks{peers}", _rank_map(plan), _layers_text(plan)),
        ("Memory of a rank at its fullest", _memory(plan), _buffers_text(plan)),
        ("Sent by a rank per step", _communication(plan), "" if plan.messages() else "nothing: one rank"),
        ("Expected step", _time(plan), ""),
    ]
    for title, table, note in sections:
        console.print(f"\n{title}", style="bold", highlight=False)
        if table.row_count:
            console.print(table)
        if note:
            console.print(note, style="dim", highlight=False, markup=False)
    console.print()
    _verdict(console, plan)


def print_search(console: Console, search: Search, stage: str, device: str) -> None:
    """The layouts that were found, fastest first, and how sure it is that there is none faster."""
    if search.found:
        first = search.found[0].work
        console.print(f"{stage}: {first.layout.gpus} ranks on {device}, fastest first", style="bold", highlight=False)
        table = _table("step", "tokens/s", "MFU", "bubble", "memory", "sent", "rank hours", "layout", left=0)
        table.columns[-1].justify, table.columns[-1].overflow = "left", "fold"
        for one in search.found:
            timing = one.timing
            table.add_row(
                time_text(timing.seconds), count_text(timing.tokens_per_second), f"{timing.mfu:.1%}",
                f"{timing.bubble:.1%}", bytes_text(max(one.fit.needs)), bytes_text(one.sent()),
                count_text(one.hours()), one.flags(),
            )  # fmt: skip
        console.print(table)
    else:
        text = f"DOES NOT FIT: of {search.judged} layouts none does" if search.judged > 1 else "DOES NOT FIT"
        if search.least > search.usable:
            text += f"; the least needs {bytes_text(search.least)} a rank of {bytes_text(search.usable)} usable"
        console.print(
            text + ". `plan` without --search shows what takes the memory.", style="bold red", highlight=False
        )
    end = ", the most promising first: time ran out."
    if search.tried == search.sizes:
        end = ". No other is faster." if search.found else "."
    console.print(
        f"layouts judged: {search.judged}; sets of sizes gone through: {search.tried} of {search.sizes}{end}",
        style="dim", highlight=False,
    )  # fmt: skip


def print_published(console: Console, runs: Sequence[Run]) -> None:
    """Published runs beside the plan of each, what it is made of, and this engine's plan of the same layout."""
    kinds = {
        "products": "products", "attention": "attention", "memory": "memory", "computed again": "again",
        "messages of tp": "tp", "dispatch": "dispatch", "idle in the pipeline": "idle",
        "gradients and update": "update",
    }  # fmt: skip
    console.print("Published runs, in seconds of a step: planned by their features, and of what", style="bold")
    table = _table("run", "published", "planned", "off by", *kinds.values(), "this engine")
    for run in runs:
        shares = (f"{run.planned.shares[kind]:.1f}" for kind in kinds)
        set_by = "*" if run.sets else " "
        table.add_row(
            run.name, f"{run.seconds:.1f}", f"{run.planned.seconds:.1f}", f"{run.error:+.0%}{set_by}", *shares,
            f"{run.ours[0]:.0f}",
        )  # fmt: skip
    console.print(table)
    note = "* One share of the device's speed was set by this run. this engine: its plan of the same layout in bf16."
    console.print(note, style="dim", highlight=False)
    console.print(f"\n{AIM.name}: what features are worth, one at a time", style="bold", highlight=False)
    changed = _table("", "step")
    for text, features in CHANGES.items():
        changed.add_row(text, f"{AIM.with_features(**features):.1f} s")
    seconds, work = AIM.ours
    changed.add_row(f"this engine: {work.layout.axes()}", f"{seconds:.1f} s")
    changed.add_row("the same, dispatch in FP8", f"{AIM.ours_in_8_bits:.1f} s")
    console.print(changed)


def _layers_text(plan: Plan) -> str:
    """The flag that gives these layers; a student of another depth is always balanced."""
    work = plan.work
    other = work.main is not None and work.main.num_hidden_layers != work.model.num_hidden_layers
    return f'--pp-layout "{pp_layout_text(work)}"' if work.layout.pp > 1 and not other else ""


def _parameters(plan: Plan) -> Table:
    total, active = plan.parameters["total"], plan.parameters["active"]
    table = _table("kind", "total", "active per token", left=1)
    for kind, count in total.items():
        if kind != "MTP":
            table.add_row(kind, count_text(count), count_text(active[kind]))
    table.add_row("model", count_text(main_model(total)), count_text(main_model(active)), style="bold")
    if "MTP" in total:
        table.add_row("MTP modules, not in the model's count", count_text(total["MTP"]), count_text(active["MTP"]))
    return table


def _rank_map(plan: Plan) -> Table:
    table = _table("layers", *plan.ranks.columns)
    for header, cells in plan.ranks.rows:
        table.add_row(header, *cells)
    return table


def _memory(plan: Plan) -> Table:
    table = _table("pipeline rank", "at", *plan.memory[0].kinds(), "total", left=2)
    hidden = range(MOST_STAGES - 2, len(plan.memory) - 2) if len(plan.memory) > MOST_STAGES else range(0)
    for rank, memory in enumerate(plan.memory):
        if rank in hidden:
            if rank == hidden.start:
                table.add_row("…")
            continue
        sizes = [bytes_text(size) for size in memory.kinds().values()]
        style = "bold" if rank == plan.fullest and len(plan.memory) > 1 else None
        table.add_row(f"pp {rank}", memory.moment, *sizes, bytes_text(memory.total), style=style)
    return table


def _buffers_text(plan: Plan) -> str:
    fullest = plan.memory[plan.fullest]
    buffers = sorted(fullest.buffers.items(), key=lambda entry: -entry[1])
    text = "buffers of the fullest: " + ", ".join(f"{name} {bytes_text(size)}" for name, size in buffers[:5])
    host = sorted(fullest.host.items(), key=lambda entry: -entry[1])
    held = ", ".join(f"{name} {bytes_text(size)}" for name, size in host)
    once = ", ".join(f"{name} {bytes_text(size)}" for name, size in plan.work.copies.once.items())
    text += f"\nin CPU memory of every rank: {held}" if held else ""
    return text + (f"\nin CPU memory of the first node, once: {once}" if once else "")


def _communication(plan: Plan) -> Table:
    table = _table("axis", "operation", "bytes", "time", left=2)
    for message, seconds in plan.messages():
        table.add_row(message.axis, message.operation, bytes_text(message.bytes), time_text(seconds))
    return table


def _time(plan: Plan) -> Table:
    work, timing = plan.work, plan.timing
    table = _table("", "", left=2)
    micro = f"{work.micro_batches} micro-batch{'es' if work.micro_batches > 1 else ''} per rank"
    rows = f"{work.rows} rows of {work.seq_len}, {micro} of {work.rows_at_once}"
    table.add_row("tokens", f"{count_text(work.tokens_per_step)} ({rows})")
    if plan.reading is not None:
        read = plan.reading
        text = f"{bytes_text(read.rank)} a rank, {bytes_text(read.node)} a node. Before the step: "
        text += f"{time_text(read.storage)} of a node's storage, {time_text(read.making)} of a core"
        table.add_row("rows read", text)
    each = flops_per_token(work)
    total = scaled(each * work.tokens_per_step)
    table.add_row("FLOPs", f"{scaled(each)}FLOP per token, {total}FLOP per step")
    table.add_row("pipeline bubble", f"{timing.bubble:.1%} of the ranks' time ({work.layout.schedule})")
    table.add_row("time", time_text(timing.seconds) + f", {count_text(timing.tokens_per_second)} tokens/s")
    shares = [f"{name} {time_text(value)}" for name, value in timing.shares.items() if value > 0.001 * timing.seconds]
    table.add_row("", ", ".join(shares))
    table.add_row("MFU", f"{timing.mfu:.1%} of {scaled(plan.hardware.peak(work.bf16))}FLOP/s a rank")
    table.add_row(f"{work.steps} steps", time_text(timing.seconds * work.steps))
    return table


def way_out(plan: Plan) -> str:
    """What helps where no setting of the layout does."""
    if not plan.fits_device and plan.work.copies.device:
        return (
            "--set layout.sampling=sharded, larger devices or a smaller model: every rank holds a copy of the whole "
            "model to write answers, however many ranks there are"
        )
    return "nodes with more CPU memory, or a smaller model" if plan.fits_device else "more ranks, or larger devices"


def needs_text(plan: Plan) -> str:
    """What there has to be, and what there is."""
    text = f"the fullest rank needs {bytes_text(plan.needs[plan.fullest])} of {bytes_text(plan.usable)} usable"
    if plan.host_usable:
        text += f", a node {bytes_text(plan.host)} of {bytes_text(plan.host_usable)} CPU memory"
    return text


def _verdict(console: Console, plan: Plan) -> None:
    needs = needs_text(plan)
    if plan.fits:
        console.print(f"FITS: {needs}", style="bold green", highlight=False)
        return
    console.print(f"DOES NOT FIT: {needs}", style="bold red", highlight=False)
    if plan.advice:
        console.print("What would:", highlight=False)
        for line in plan.advice:
            console.print(f"  {line}", highlight=False)
    else:
        console.print(f"Nothing tried on this number of ranks would: use {way_out(plan)}.", highlight=False)
