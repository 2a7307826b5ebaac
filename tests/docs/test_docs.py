"""What the documents say is there: links, anchors, keys, commands with flags, make targets, presets, files, tests."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from learner import PACKAGES as OWN
from learner.__main__ import VERBS
from learner.config import known_keys
from learner.objectives.by_name import OBJECTIVES
from learner.objectives.needs import NEEDS
from rewards.registry import MODELS, NAMES, PLAIN

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / f"{page}.md" for page in ("README", "CONTRIBUTING", "CHANGELOG")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
PACKAGES = {*OWN, "learner", "benchmarks", "examples"}
SECTIONS = {key.split(".")[0] for key in known_keys()}
FILES = ("json", "jsonl", "yaml", "txt", "py", "md", "lock", "db", "csv", "parquet", "png", "html", "sh", "pt")
FENCE = re.compile(r"^(```+|~~~+)(\w*)[^\n]*\n(.*?)^\1\s*$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(
    r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)|^\[[^\]]+\]:\s+(\S+)|<(?:img|a)\s[^>]*?(?:src|href)=\"([^\"]+)\"", re.M
)
KEY = re.compile(rf"(?<![\w./-])({'|'.join(sorted(SECTIONS))})\.([a-z_]\w*)(?![\w/(-])(\s*=)?")
# evaluation/ is also a folder of every run: only its .py files are the repository's.
FOLDERS = "|".join(
    (*(each for each in PACKAGES if each != "evaluation"), r"evaluation(?=/[\w./*{},-]*\.py\b)", "tests", "configs")
)
FILE = re.compile(rf"(?<![\w./{{}}-])((?:{FOLDERS})/[\w./*{{}},-]*[\w*}}/])")
COMMAND = re.compile(r"(?:python3? -m ([\w.]+)|(?<![\w./-])(?:\S*/)?tributary(?= [a-zA-Z-]))([^\n`]*)")
TARGET = re.compile(r"(?<![\w-])make ([a-z][\w-]*)")
TEST = re.compile(r"(?<![\w/.])(test_\w+)(\.py)?(?![\w/*.-])")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def code_of(text: str) -> list[str]:
    """Blocks, and spans in backticks, of a document."""
    blocks = [match[3].replace("\\\n", " ") for match in FENCE.finditer(text)]
    return blocks + [match[2].replace("\n", " ") for match in SPAN.finditer(FENCE.sub("", text))]


@functools.cache
def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them: lower case, only letters, digits, _ and -, a number for repeats."""
    slugs: set[str] = set()
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", FENCE.sub("", text_of(path)), re.MULTILINE):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        repeats = sum(slug == each or re.fullmatch(rf"{re.escape(slug)}-\d+", each) is not None for each in slugs)
        slugs.add(f"{slug}-{repeats}" if repeats else slug)
    return slugs


def broken_links(path: Path) -> Iterator[str]:
    prose = SPAN.sub("", FENCE.sub("", text_of(path)))
    for match in LINK.finditer(prose):
        target = match[1] or match[2] or match[3]
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists():
            yield f"{target}: no such file"
        elif anchor and (there.suffix != ".md" or anchor not in anchors(there)):
            yield f"{target}: no such heading"


def is_module(dotted: str) -> bool:
    """Of the project or of MLflow: `learner.run` and `mlflow.pyfunc` look like keys."""
    package = dotted.split(".")[0]
    if package in PACKAGES:
        return module_file(dotted) is not None
    package_of = importlib.util.find_spec(package)
    own = Path(package_of.origin).read_text(encoding="utf-8") if package_of and package_of.origin else ""
    return re.search(rf"\b{dotted.split('.')[1]}\b", own) is not None


def module_file(dotted: str) -> Path | None:
    place = ROOT.joinpath(*dotted.split("."))
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def unknown_keys(path: Path) -> Iterator[str]:
    for code in code_of(text_of(path)):
        for match in KEY.finditer(code):
            key = f"{match[1]}.{match[2]}"
            if key in known_keys() or (not match[3] and (match[2] in FILES or is_module(key))):
                continue
            yield key
    for match in FENCE.finditer(text_of(path)):
        tree = yaml.safe_load(match[3]) if match[2] == "yaml" else None
        if isinstance(tree, dict) and set(tree) <= SECTIONS:
            named = (f"{section}.{key}" for section, keys in tree.items() for key in keys)
            yield from (key for key in named if key not in known_keys())


def wrong_commands(path: Path) -> Iterator[str]:
    for code in code_of(text_of(path)):
        for match in COMMAND.finditer(code):
            module, words = match[1] or "learner", re.split(r"\s#\s|\||;|&&", match[2])[0].split()
            if module.split(".")[0] not in PACKAGES:
                if importlib.util.find_spec(module.split(".")[0]) is None:
                    yield f"python -m {module}: no such module"
                continue
            verb = words[0] if module == "learner" and words and words[0][0] not in "-(" else ""
            if verb == "VERB" or module == "learner.VERB":  # any of them
                continue
            file = command_file(module, verb)
            if file is None or "main" not in functions(file):
                yield f"python -m {module} {verb}".rstrip() + ": no such command"
                continue
            known = flags(file)
            named = [found[1] for word in words if (found := re.match(r"\[?(--[a-z][\w-]*)", word))]
            yield from (" ".join(["python -m", module, *verb.split(), flag]) for flag in named if flag not in known)


def command_file(module: str, verb: str = "") -> Path | None:
    """The file with the main() of `python -m MODULE [VERB]`; what MODULE is may only be an entry to it."""
    if verb:
        return module_file(VERBS[verb][0]) if verb in VERBS else None
    file = ROOT / "learner" / "__main__.py" if module == "learner" else module_file(module)
    for node in ast.walk(ast.parse(text_of(file))) if file else ():
        if isinstance(node, ast.ImportFrom) and "main" in {alias.name for alias in node.names}:
            return module_file(node.module or "")
        match node:
            case ast.Call(func=ast.Name(id="enter"), args=[ast.Constant(value=own), *_]):
                return module_file(VERBS[own][0])
    return file


@functools.cache
def functions(file: Path) -> set[str]:
    tree = ast.parse(text_of(file))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@functools.cache
def flags(file: Path) -> set[str]:
    """That the module, or one of the project's that it imports, gives to a parser."""
    tree = ast.parse(text_of(file))
    short = re.findall(r"(\w+) = [\w.]*\.add_argument$", text_of(file), re.MULTILINE)  # add = parser.add_argument
    options = {
        word.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and (getattr(node.func, "attr", "") == "add_argument" or getattr(node.func, "id", "") in short)
        for word in node.args
        if isinstance(word, ast.Constant) and str(word.value).startswith("--")
    }
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for module in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                inner = module_file(module) if module.split(".")[0] in PACKAGES else None
                if inner and inner != file and "parser" in functions(inner):
                    options |= flags(inner)
    return options | {"--help"}


def missing_targets(path: Path) -> Iterator[str]:
    there = set(re.findall(r"^([a-z][\w-]*):", text_of(ROOT / "Makefile"), re.MULTILINE))
    for code in code_of(text_of(path)):
        yield from (f"make {target}" for target in TARGET.findall(code) if target not in there)


def braces(pattern: str) -> list[str]:
    """`a_{b,c}.yaml` as a_b.yaml and a_c.yaml."""
    choice = re.search(r"\{([^{}]*)\}", pattern)
    if not choice:
        return [pattern]
    return [each for word in choice[1].split(",") for each in braces(pattern.replace(choice[0], word, 1))]


def missing_files(path: Path) -> Iterator[str]:
    """Files and folders of the repository, also as `a/*.py`, `a_{b,c}.py` and `a_KIND.yaml`."""
    for code in code_of(text_of(path)):
        for match in FILE.finditer(code):
            for pattern in braces(match[1]):
                wild = re.sub(r"(?<![A-Za-z])[A-Z]{2,}(?![A-Za-z])", "*", pattern)
                if not (ROOT / pattern).exists() and not any(ROOT.glob(wild.rstrip("/"))):
                    yield pattern


@functools.cache
def known_tests() -> tuple[set[str], set[str]]:
    """Names of test files and of test functions."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    return {file.name for file in files}, {each for file in files for each in functions(file)}


def missing_tests(path: Path) -> Iterator[str]:
    files, names = known_tests()
    for code in code_of(text_of(path)):
        for match in TEST.finditer(code):
            if match[0] not in (files if match[2] else names):
                yield match[0]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
@pytest.mark.parametrize(
    "faults",
    [broken_links, unknown_keys, wrong_commands, missing_targets, missing_files, missing_tests],
    ids=lambda each: each.__name__,
)
def test_what_is_named_is_there(path, faults):
    assert list(faults(path)) == []


def test_documents_stay_short_and_the_page_of_settings_is_the_schemas():
    assert {name(path): len(text_of(path).splitlines()) for path in DOCUMENTS if text_of(path).count("\n") > 400} == {}
    spec = importlib.util.spec_from_file_location("settings_page", ROOT / "docs" / "site" / "settings.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "write it anew: python docs/site/settings.py"


def test_reference_and_tables_have_every_objective_and_reward():
    """Whoever adds an objective or a reward adds its line, in the tables of the readme and of the pages on them too."""
    listed = set(re.findall(r"\]\(\.\./([\w/]+\.py)\)", text_of(ROOT / "docs" / "api.md")))
    objectives = {name(file) for file in (ROOT / "learner" / "objectives").glob("*.py")}
    rewards = {f"rewards/{place.split(':')[0]}.py" for place in (MODELS | PLAIN).values()}
    assert objectives | rewards <= listed
    assert set(OBJECTIVES) == set(NEEDS)
    for page, names in (("README.md", {*NEEDS, *NAMES}), ("docs/algorithms.md", NEEDS), ("docs/rewards.md", NAMES)):
        first_cells = " ".join(re.findall(r"^\|([^|]+)\|", text_of(ROOT / page), re.MULTILINE))
        assert set(names) - set(re.findall(r"`(\w+)`", first_cells)) == set(), page


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    for module in ("mkdocs", "mkdocstrings", "mkdocstrings_handlers"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: `make docs` installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for picture in (ROOT / "docs" / "pictures").iterdir():
        assert (tmp_path / "site" / "pictures" / picture.name).read_bytes() == picture.read_bytes()
    page = (tmp_path / "site" / "reference" / "learner.objectives.db.html").read_text(encoding="utf-8")
    assert "next_log_flow" in page and "arXiv 2406.00633" in page
