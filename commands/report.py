"""A run's report.html anew: `python -m learner.report RUN`."""

from __future__ import annotations

import argparse

from commands.outcome import attempt, warner


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 2: no such run, or one whose files are damaged."""
    parser = argparse.ArgumentParser(prog="python -m learner.report", description="Make a run's report.html anew.")
    parser.add_argument("run", help="run directory or URL")
    run = parser.parse_args(arguments).run
    return attempt("report", lambda: draw(run), run)


def draw(run: str) -> None:
    from learner.config import saved_config  # here: --help and argument errors must come fast
    from records.run_folder import Records
    from records.storage import Storage
    from reports.html import FILE, render

    storage = Storage(run)
    records = Records.open(storage, warner("report"))
    storage.write(FILE, render(records, saved_config(records)))
    print(f"{storage}/{FILE}")
