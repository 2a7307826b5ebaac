"""What no run would show: a wait without a deadline, a load that could run code. Ruff has rules for pickles, yaml, HTTP
time-outs and Ray's private parts (pyproject.toml); these are the others. Each is tried on snippets, then on all code.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from learner import PACKAGES
from learner.config import ROOT

FOLDERS = (*PACKAGES, "learner", "benchmarks", "examples")
KEYWORD = 99  # it has none: by keyword alone

# Where the deadline stands among the positional arguments of a function, and of a method, by its name.
FUNCTIONS = {
    **dict.fromkeys(("ray.get", "ray.wait", "torch.distributed.init_process_group"), KEYWORD),
    **{f"subprocess.{name}": KEYWORD for name in ("run", "call", "check_call", "check_output")},
    "urllib.request.urlopen": 2, "socket.create_connection": 1, "select.select": 3, "http.client.HTTPConnection": 2,
    "http.client.HTTPSConnection": 2, "concurrent.futures.wait": 1, "concurrent.futures.as_completed": 1,
}  # fmt: skip
# A method is meant only with few enough arguments: str.join and dict.get have more.
METHODS = {"result": 0, "join": 0, "wait": 0, "get": 0, "communicate": 1, "acquire": 1}
SAFE = ("tokenizer", "scheduler", "config", "processor")  # no weights in them


def faults(source: str, tests: bool = False) -> list[tuple[int, str]]:
    """(line, what) of everything in `source` that must not be there. Tests have a deadline each, and load the models
    that they have made."""
    tree = ast.parse(source)
    names, polls = _imported(tree), _polls(tree)
    found = set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = _name(call.func, names)
        said = [what for what in _of_load(call, name) if not (tests and "use_safetensors" in what)]
        said += [] if tests else _of_wait(call, name, polls)
        found |= {(call.lineno, what) for what in said}
    return sorted(found)


def _of_load(call: ast.Call, name: str) -> Iterator[str]:
    named = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name == "torch.load" and named.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name == "numpy.load" and named.get("allow_pickle", "False") != "False":
        yield "numpy.load with allow_pickle"
    owner, _, method = name.rpartition(".")
    weights = method == "from_pretrained" and not any(word in owner.lower() for word in SAFE)
    if weights and named.get("use_safetensors") not in ("True", "None"):  # None has to be said, and why
        yield f"{name} without use_safetensors=True"


def _of_wait(call: ast.Call, name: str, polls: set[str]) -> Iterator[str]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if None in given or any(isinstance(argument, ast.Starred) for argument in call.args):
        return  # **options: not to be seen from here
    positional = call.args
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if name in FUNCTIONS:
        place = FUNCTIONS[name]
    elif method == "poll" and name.removesuffix(".poll") in polls:  # a process's does not wait
        place = 0
    elif method in METHODS:
        place = METHODS[method]
        first = ast.unparse((positional or [given.get("blocking") or given.get("block") or ast.Constant(None)])[0])
        if method in ("get", "acquire") and first == "False":
            return
        if method == "get":
            place = 1 if first == "True" else 0
    else:
        return
    deadline = given.get("timeout") or (positional[place] if len(positional) > place else None)
    if deadline is None or ast.unparse(deadline) == "None":
        yield f"{name or '.' + method} without a timeout"


def _name(node: ast.AST, imported: dict[str, str]) -> str:
    """Dotted name of what is called, an alias resolved; of `f().x` it is `.x`."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value, imported)}.{node.attr}"
    return imported.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _imported(tree: ast.AST) -> dict[str, str]:
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _polls(tree: ast.AST) -> set[str]:
    """Names that hold a poll object."""
    made = (node for node in ast.walk(tree) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call))
    return {
        ast.unparse(target)
        for node in made
        for target in node.targets
        if ast.unparse(node.value.func) in ("select.poll", "select.epoll", "poll", "epoll")
    }


def test_all_of_the_project():
    found = []
    for folder in (*FOLDERS, "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path == Path(__file__):
                continue
            said = faults(path.read_text(encoding="utf-8"), tests=folder == "tests")
            found += [f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in said]
    assert not found, "\n" + "\n".join(found)


CALLS = {  # everything that waits, and the place of its deadline
    **{f"import {name.rpartition('.')[0]}; {name}": place for name, place in FUNCTIONS.items()},
    **{f"x.{name}": place for name, place in METHODS.items()},
}
TRIPS = [
    *(f"{call}({'a' if place else ''})" for call, place in CALLS.items()),
    "import ray; ray.get(x, timeout=None)",
    "import ray as r; r.get(x)",
    "from ray import get; get(x)",
    "import subprocess as s; s.check_output('ls')",
    "future.result()",
    "thread.join(timeout=None)",
    "self.a.b().join()",
    "process.communicate(text)",
    "q.get(True)",
    "q.get(block=True)",
    "q.get(True, None)",
    "lock.acquire()",
    "lock.acquire(blocking=True)",
    "import select; select.select(r, [], [])",
    "import select\np = select.poll()\np.poll()",
]
LOADS = [
    "import torch; torch.load(f)",
    "import torch; torch.load(f, weights_only=False)",
    "from torch import load; load(f)",
    "import numpy as np; np.load(f, allow_pickle=True)",
    "UNet2DConditionModel.from_pretrained(p)",
    "StableDiffusionPipeline.from_pretrained(p, use_safetensors=False)",
]
FINE = [
    *(f"{call}({'a, ' * place}5)" for call, place in CALLS.items() if place != KEYWORD),
    *(f"{call}(timeout=5)" for call, place in CALLS.items() if place == KEYWORD),
    "', '.join(x)",
    "import os; os.path.join(a, b)",
    "thread.join(timeout=x)",
    "d.get('a', None)",
    "q.get(True, 1)",
    "q.get(False)",
    "q.get(block=False)",
    "q.get_nowait()",
    "from cluster.waits import get; get(x, 1, 'a', 'b')",
    "process.poll()",
    "lock.acquire(blocking=False)",
    "import select\np = select.poll()\np.poll(100)",
    "import subprocess; subprocess.run(c, **options)",
    "subprocess.Popen(c)",
    "import torch; torch.load(f, weights_only=True)",
    "import numpy as np; np.load(f)",
    *(f"{name}.from_pretrained(p)" for name in ("CLIPTokenizer", "DDIMScheduler", "AutoConfig")),
    "AutoencoderKL.from_pretrained(p, use_safetensors=True)",
]


@pytest.mark.parametrize("snippet", [*TRIPS, *LOADS])
def test_trips(snippet):
    assert len(faults(f"x = 1\n{snippet}")) == 1


@pytest.mark.parametrize("snippet", TRIPS)
def test_tests_may_wait(snippet):
    assert not faults(snippet, tests=True)


@pytest.mark.parametrize("snippet", FINE)
def test_lets_pass(snippet):
    assert not faults(snippet)


def test_says_the_line():
    assert faults("import torch\n\n\ntorch.load(f)") == [(4, "torch.load without weights_only=True")]
