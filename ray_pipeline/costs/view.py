"""The plan as a page of text."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ray_pipeline.costs.picture import pp_layout_text
from ray_pipeline.costs.plan import Plan
from ray_pipeline.costs.timing import flops_per_token
from ray_pipeline.costs.weights import main_model
from ray_pipeline.progress import seconds_text

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
MOST_STAGES = 18


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    for size, letter in units:
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g} "


def count_text(value: float) -> str:
    """`671B`, `37.6B`: three digits."""
    return _scaled(value, _COUNTS).replace(" ", "")


def bytes_text(size: float) -> str:
    """`31.5 GB`"""
    return _scaled(size, _UNITS[2:]) + "B"


def time_text(seconds: float) -> str:
    """Short times with three digits, long ones as the run's own report writes them."""
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.0f} days"
    if seconds >= 60:
        return seconds_text(seconds)
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1000:.3g} ms"


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", header_style="dim")
    return table


def print_plan(console: Console, plan: Plan) -> None:
    """Parameters, memory, communication, time, the map of ranks, and whether it fits."""
    work = plan.work
    recipe = f"{work.stage}: {work.layout.describe()}, {'bf16' if work.bf16 else 'fp32'}, on {plan.hardware.title}"
    console.print(recipe, style="bold", highlight=False)
    for block in (_parameters(plan), _rank_map(plan), _memory(plan), _communication(plan), _time(plan)):
        console.print()
        console.print(block)
    console.print()
    _verdict(console, plan)


def _parameters(plan: Plan) -> Table:
    total, active = plan.parameters["total"], plan.parameters["active"]
    table = _table("Parameters", "kind", "total", "active per token")
    for kind, count in total.items():
        if kind != "MTP":
            table.add_row(kind, count_text(count), count_text(active[kind]))
    table.add_row("model", count_text(main_model(total)), count_text(main_model(active)), style="bold")
    if "MTP" in total:
        table.add_row("MTP modules, not in the model's count", count_text(total["MTP"]), count_text(active["MTP"]))
    return table


def _rank_map(plan: Plan) -> Table:
    ranks = plan.ranks
    table = _table("Ranks, tensor-parallel peers in one cell" if plan.work.layout.tp > 1 else "Ranks", "layers")
    for column in ranks.columns:
        table.add_column(column, justify="right", header_style="dim")
    for header, cells in ranks.rows:
        table.add_row(header, *cells)
    table.caption = f'--pp-layout "{pp_layout_text(plan.work)}"' if plan.work.layout.pp > 1 else None
    table.caption_justify = "left"
    return table


def _memory(plan: Plan) -> Table:
    names = list(plan.memory[0].kinds())
    table = _table("Memory of a rank at its fullest", "pipeline rank", "at", *names, "total", left=2)
    shown = range(len(plan.memory))
    hidden = range(MOST_STAGES - 2, len(plan.memory) - 2) if len(shown) > MOST_STAGES else range(0)
    for rank, memory in enumerate(plan.memory):
        if rank in hidden:
            if rank == hidden.start:
                table.add_row("…")
            continue
        sizes = [bytes_text(size) for size in memory.kinds().values()]
        style = "bold" if rank == plan.fullest and len(plan.memory) > 1 else None
        table.add_row(f"pp {rank}", memory.moment, *sizes, bytes_text(memory.total), style=style)
    fullest = plan.memory[plan.fullest]
    buffers = sorted(fullest.buffers.items(), key=lambda entry: -entry[1])
    table.caption = "buffers of the fullest: " + ", ".join(f"{name} {bytes_text(size)}" for name, size in buffers[:5])
    if fullest.host:
        table.caption += f"; offloaded to CPU memory {bytes_text(fullest.host)} a rank"
    table.caption_justify = "left"
    return table


def _communication(plan: Plan) -> Table | str:
    messages = plan.messages()
    if not messages:
        return "Communication: none, one rank"
    table = _table("Sent by a rank per step", "axis", "operation", "bytes", "time", left=2)
    for message, seconds in messages:
        table.add_row(message.axis, message.operation, bytes_text(message.bytes), time_text(seconds))
    return table


def _time(plan: Plan) -> Table:
    work, timing = plan.work, plan.timing
    table = _table("Expected step", "", "", left=2)
    table.show_header = False
    micro = f"{work.micro_batches} micro-batch{'es' if work.micro_batches > 1 else ''} per rank"
    rows = f"{work.rows} rows of {work.seq_len}, {micro} of {work.rows_at_once}"
    table.add_row("tokens", f"{count_text(work.tokens_per_step)} ({rows})")
    each = flops_per_token(work)
    total = _scaled(each * work.tokens_per_step, _UNITS)
    table.add_row("FLOPs", f"{_scaled(each, _UNITS)}FLOP per token, {total}FLOP per step")
    table.add_row("pipeline bubble", f"{timing.bubble:.1%} of the ranks' time ({work.layout.schedule})")
    table.add_row("time", time_text(timing.seconds) + f", {count_text(timing.tokens_per_second)} tokens/s")
    shares = [f"{name} {time_text(value)}" for name, value in timing.shares.items() if value > 0.001 * timing.seconds]
    table.add_row("", ", ".join(shares))
    table.add_row("MFU", f"{timing.mfu:.1%} of {_scaled(plan.hardware.peak(work.bf16), _UNITS)}FLOP/s a rank")
    table.add_row(f"{work.steps} steps", time_text(timing.seconds * work.steps))
    return table


def _verdict(console: Console, plan: Plan) -> None:
    memory, usable = plan.memory[plan.fullest], plan.usable
    needs = f"the fullest rank needs {bytes_text(memory.total)} of {bytes_text(usable)} usable"
    if plan.fits:
        console.print(f"FITS: {needs}", style="bold green", highlight=False)
        return
    console.print(f"DOES NOT FIT: {needs}", style="bold red", highlight=False)
    if plan.advice:
        console.print("What would:", highlight=False)
        for line in plan.advice:
            console.print(f"  {line}", highlight=False)
    else:
        console.print("Nothing tried on this number of ranks would: use more of them, or larger devices.")
