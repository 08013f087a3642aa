"""The screen of `watch`. The only file that imports textual."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from textual.app import App, ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.widgets import DataTable, Footer, Header, RichLog, Static

from ray_pipeline.dag.ledger import attempt_folder, read_status, worked_on_last
from ray_pipeline.errors import UserError
from ray_pipeline.launch.rank_errors import last_status, status_text
from ray_pipeline.records.guard_file import interventions_text
from ray_pipeline.records.mirror import Mirror
from ray_pipeline.records.progress import progress_text
from ray_pipeline.records.units import number_text, seconds_text
from ray_pipeline.report.run_view import StageView, heat, sparkline

EVERY = 1.0  # seconds between looks at the run's folder
ALIVE = 180.0  # seconds for which a run that is elsewhere, whose lock nobody sees, is believed to go on
COLOURS = {"done": "green", "running": "cyan", "interrupted": "yellow", "learned_nothing": "red", "failed": "red"}
MOST_LAYERS = 12
MOST_RANKS = 16


class Dashboard(App[None]):
    """Shows the stage that works, or the one that is chosen in the table; ends with the key q."""

    TITLE = "watch"
    BINDINGS = [("q", "quit", "end watching (the run goes on)"), ("f", "follow", "the stage that works")]  # noqa: RUF012
    CSS = """
    #stages { height: auto; max-height: 11; border: round $primary; }
    #middle { height: 1fr; }
    #left { width: 3fr; } #right { width: 2fr; }
    #curves, #experts, #ranks, #samples { border: round $primary-darken-2; height: auto; padding: 0 1; }
    #log { height: 12; border: round $primary-darken-2; }
    """

    def __init__(self, run_dir: Path, *, mirror: Mirror | None = None, screenshot: str | None = None):
        super().__init__()
        self.run_dir, self.mirror, self.screenshot = run_dir, mirror, screenshot
        self.chosen: str | None = None  # stage; None: the one that works
        self.sub_title = run_dir.name if mirror is None else mirror.name
        self._views: dict[Path, StageView] = {}
        self._shown: Path | None = None

    def compose(self) -> ComposeResult:
        yield Header()
        yield DataTable(id="stages", cursor_type="row")
        with Horizontal(id="middle"):
            with VerticalScroll(id="left"):
                yield Static(id="curves")
                yield Static(id="samples")
            with VerticalScroll(id="right"):
                yield Static(id="ranks")
                yield Static(id="experts")
        yield RichLog(id="log", max_lines=500, wrap=True)
        yield Footer()

    def on_mount(self) -> None:
        """Begin to look."""
        self.query_one("#stages", DataTable).add_columns("stage", "status", "progress", "time")
        for name, title in (("curves", "figures"), ("samples", "samples"), ("ranks", "ranks"), ("experts", "experts")):
            self.query_one(f"#{name}").border_title = title
        self.query_one("#log").border_title = "log"
        self.look()
        self.set_interval(EVERY, self.look)
        if self.screenshot is not None:
            self.set_timer(0.5, self._shoot)

    def _shoot(self) -> None:
        assert self.screenshot is not None
        self.save_screenshot(self.screenshot)
        self.exit()

    def action_follow(self) -> None:
        """Show the stage that works from now on."""
        self.chosen = None
        self.look()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Show the stage of that row."""
        self.chosen = str(event.row_key.value)
        self.look()

    def look(self) -> None:
        """Read the folder and show what it holds."""
        try:
            stages = read_status(self.run_dir)["stages"]
        except UserError as error:
            self.notify(str(error), severity="error")
            return
        if self.mirror is not None:
            self.sub_title = self.mirror.trouble or self.mirror.name
            for entry in stages:
                heard = (entry.get("progress") or {}).get("time") or entry.get("started") or 0.0
                if entry["status"] == "interrupted" and time.time() - heard < ALIVE:
                    entry["status"] = "running"
        self._show_stages(stages)
        if (entry := worked_on_last(stages, self.chosen) or worked_on_last(stages)) is not None:
            self._show(entry)

    def _show_stages(self, stages: list[dict[str, Any]]) -> None:
        table = self.query_one("#stages", DataTable)
        row = table.cursor_row
        table.clear()
        for entry in stages:
            state, seconds = entry["status"], entry.get("seconds")
            finished = state in ("done", "learned_nothing")
            shown = main_figures(entry) if finished else progress_text(entry.get("progress") or {})
            status = Text(state.replace("_", " "), style=COLOURS.get(state, "dim"))
            table.add_row(entry["stage"], status, shown, seconds_text(seconds) if seconds else "", key=entry["stage"])
        table.move_cursor(row=row)

    def _show(self, entry: dict[str, Any]) -> None:
        folder = attempt_folder(entry)
        view = self._views.setdefault(folder, StageView(folder))
        fresh, log = view.refresh(), self.query_one("#log", RichLog)
        if folder != self._shown:
            self._shown, fresh = folder, list(view.events)
            log.clear()
        for text in fresh:
            log.write(text)
        self.query_one("#curves").border_title = f"{entry['stage']}: figures"
        self.query_one("#curves", Static).update(curves(view, entry))
        self.query_one("#samples", Static).update(samples(view))
        self.query_one("#ranks", Static).update(ranks(view, folder))
        self.query_one("#experts", Static).update(experts(view))


def main_figures(entry: dict[str, Any]) -> str:
    """The first figures of a finished stage."""
    return "  ".join(
        f"{name.replace('_', ' ')} {number_text(value)}"
        for name, value in list((entry.get("metrics") or {}).items())[:3]
    )


def curves(view: StageView, entry: dict[str, Any]) -> Table:
    """Title, curve and last value of what is measured; what guards did below it."""
    table = Table.grid(padding=(0, 2))
    for title, values in view.drawn():
        table.add_row(title, Text(sparkline(values), style="cyan"), number_text(values[-1]))
    for text in interventions_text(entry.get("guards") or []):
        table.add_row("", Text(text, style="yellow", overflow="fold"), "")
    if not table.row_count:
        table.add_row(Text("nothing measured yet", style="dim"))
    return table


def samples(view: StageView) -> Text:
    """Questions, answers, and whether these are right."""
    out = Text()
    for row in view.samples():
        right = row.get("correct")
        out.append(f"{row['prompt']}\n", style="bold")
        out.append(f"{row['completion'].strip()[:400]}\n")
        out.append(
            f"{'right' if right else 'wrong'}, the answer is {row['answer']}\n", style="green" if right else "red"
        )
    return out or Text("none yet", style="dim")


def ranks(view: StageView, folder: Path) -> Table:
    """Where each rank stands, and its memory."""
    table, memory = Table.grid(padding=(0, 2)), view.memory()
    most = max((used for _, used in memory), default=1.0) or 1.0
    for rank, used in memory[:MOST_RANKS]:
        status = last_status(folder, rank)
        bar = Text("█" * max(1, round(12 * used / most)), style="magenta")
        table.add_row(f"rank {rank}", bar, f"{used:.2f} GB", "" if status is None else status_text(status))
    if len(memory) > MOST_RANKS:
        table.add_row(f"and {len(memory) - MOST_RANKS} more")
    for name in ("system/cpu_percent", "system/memory_percent"):
        if name in view.last:
            table.add_row(
                name.partition("/")[2].removesuffix("_percent"), "", f"{view.last[name]:.0f}%", "of the machine"
            )
    if not table.row_count:
        table.add_row(Text("nothing measured yet", style="dim"))
    return table


def experts(view: StageView) -> Table:
    """Tokens of each expert, a row a layer: blank without any, full at twice the mean."""
    table, loads = Table.grid(padding=(0, 2)), view.loads()
    for layer, load in loads[:MOST_LAYERS]:
        table.add_row(layer, Text(heat(load), style="yellow"), f"busiest {max(load) / (sum(load) / len(load)):.2f}x")
    if len(loads) > MOST_LAYERS:
        table.add_row(f"and {len(loads) - MOST_LAYERS} more")
    if not loads:
        table.add_row(Text("none", style="dim"))
    return table
