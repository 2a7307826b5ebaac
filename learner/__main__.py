"""`python -m learner` lists all commands; `python -m learner VERB ...`, `python -m learner.VERB ...` and `tributary
VERB ...` run one."""

import importlib
import sys
from pathlib import Path
from typing import NoReturn

from learner import hidden

# Verb: module with `main(arguments) -> exit status`, and what it does.
VERBS = {
    "run": ("learner.run", "train a model (--help lists every setting; --plan says what would run where)"),
    "status": ("commands.status", "how a run is doing, from its files alone"),
    "evaluate": ("commands.evaluate", "reward, held-out rewards, diversity and drift of runs and LoRAs"),
    "targets": ("commands.targets", "how near runs and LoRAs are to the exact target, attribute by attribute"),
    "compare": ("commands.compare", "several runs or LoRAs beside each other: tables, Pareto pictures"),
    "settled": ("commands.settled", "where on the way from noise to picture a reward is settled"),
    "generate": ("commands.generate", "pictures by the base model and a LoRA, at the same noise"),
    "export": ("commands.export", "a run's LoRA for diffusers, ComfyUI, A1111, or fused into the model"),
    "report": ("commands.report", "draw a run's report.html anew"),
    "upload": ("commands.upload", "send to MLflow what a run's records have and the server lacks"),
    "score": ("commands.score", "score pictures that you have with any reward"),
    "verify": ("commands.verify", "check the real weights of a reward model"),
}


def enter(verb: str, arguments: list[str] | None = None) -> NoReturn:
    """Run one command and leave the process with its exit status; 2 if a file or folder on sys.path, such as a user's
    own rewards.py, hides a package of ours."""
    if faults := hidden():
        print(*(f"learner.{verb}: {fault}" for fault in faults), sep="\n", file=sys.stderr)
        sys.exit(2)
    from cluster import signals

    signals.watch(f"learner.{verb}")  # now: what follows may take seconds to import
    signals.leave_with(lambda: importlib.import_module(VERBS[verb][0]).main(arguments))


def main() -> None:
    """The script `tributary`. Like `python -m` it finds a user's own rewards in the current directory."""
    sys.path.insert(0, str(Path.cwd()))
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in VERBS:
        enter(verb, arguments)
    lines = "\n".join(f"  {name:<10} {text}" for name, (_, text) in VERBS.items())
    text = f"usage: python -m learner VERB ...   (or: tributary VERB ...; VERB --help says more)\n\n{lines}"
    if verb not in ("-h", "--help"):
        print(f"learner: there is no command {verb!r}\n{text}", file=sys.stderr)
        sys.exit(2)
    from cluster import signals

    signals.leave_with(lambda: print(text) or 0)


if __name__ == "__main__":
    main()
