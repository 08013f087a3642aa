"""report.html while the run goes on: written anew now and then, and at the end, however it ends."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import TracebackType

from ray_pipeline.costs.prices import spent_text
from ray_pipeline.dag.ledger import read_status
from ray_pipeline.report.run_page import write_report
from ray_pipeline.settings.schema import PipelineFields

LOG = logging.getLogger(__name__)
EVERY = 10.0  # seconds between two pages, if writing one takes no time
MOST_SHARE = 0.02  # of this process's time that pages may take


class LiveReport:
    """`with LiveReport(config, run_dir) as page:`, then `page.look()` often. A page that fails disturbs no run."""

    def __init__(self, config: PipelineFields, run_dir: Path):
        self.config, self.run_dir = config, run_dir
        self._next, self._told = 0.0, False

    def __enter__(self) -> LiveReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write(over=True)

    def look(self) -> None:
        """Write the page if it is time to."""
        if time.monotonic() < self._next:
            return
        started = time.monotonic()
        self._write()
        ended = time.monotonic()
        self._next = ended + max(EVERY, (ended - started) / MOST_SHARE)

    def _write(self, *, over: bool = False) -> None:
        """over: nobody works on the run any more, so the page need not be loaded again."""
        try:
            status = read_status(self.run_dir)
            status["cost"] = spent_text(self.config, status["stages"])
            if over:
                status["worked_on_by"] = None
            write_report(self.run_dir, status)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a page, training goes on
            if not self._told:
                self._told = True
                LOG.warning("report.html: cannot be written (%s: %s); the run goes on", type(error).__name__, error)
