"""A run's report.html anew: `python -m learner.report RUN`."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 2: no such run, or one whose files are damaged."""
    parser = argparse.ArgumentParser(prog="python -m learner.report", description="Make a run's report.html anew.")
    parser.add_argument("run", help="run directory or URL")
    args = parser.parse_args(arguments)

    from learner.config import saved_config  # here: --help and argument errors must come fast
    from records.run_folder import Records
    from records.storage import Storage
    from reports.html import FILE, render

    try:
        storage = Storage(args.run)
        records = Records.open(storage)
        storage.write(FILE, render(records, saved_config(records)))
    except (OSError, ValueError) as error:
        print(f"learner.report: {args.run}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (AttributeError, LookupError, TypeError, ArithmeticError) as error:  # a value of another kind
        print(f"learner.report: {args.run}: its files are damaged, or of another Tributary: {error!r}", file=sys.stderr)
        return 2
    print(f"{storage}/{FILE}")
    return 0
