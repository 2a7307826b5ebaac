"""What makes a site of docs/ (mkdocs.yml) where plain Markdown on a code host needs nothing:

* a reference page for every module that docs/api.md links to, from its docstrings;
* pages of README, CONTRIBUTING and CHANGELOG, and of every other file outside docs/ that a page links to;
* links to all of these instead of to files that the site does not hold; every ADR in the navigation.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parents[2]
TOP = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash", ".md": "markdown"}
ADR_INDEX = "# Decisions\n\nOne page a decision that had alternatives: what, why, what it costs, what was rejected.\n\n"


def on_config(config: Any) -> Any:
    """Fill in the navigation: the modules of docs/api.md under its headings, and the ADRs."""
    for entry in config.nav:
        if "API reference" in entry:
            entry["API reference"] = ["api.md", *_modules_by_heading()]
        for inner in entry.get("Project", []):
            if "Decisions" in inner:
                inner["Decisions"] = ["adr/index.md", *(f"adr/{path.name}" for path in _adrs())]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/, and those that they link to in their turn."""
    pages = {TOP[name]: (ROOT / name).read_text(encoding="utf-8") for name in TOP}
    pages["adr/index.md"] = ADR_INDEX + "".join(f"* [{_title(path)}]({path.name})\n" for path in _adrs())
    pages |= {_reference(module): _reference_page(module) for module in _modules()}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    files.append(File.generated(config, "highlight.css", content=HtmlFormatter().get_style_defs(".highlight")))
    waiting = [(_place(file.src_uri), file.content_string) for file in files.documentation_pages()]
    while waiting:
        place, text = waiting.pop()
        for match in LINK.finditer(text):
            target = _target(place, match[2])
            if target is None or files.get_file_from_path(uri := _page_of(target)) or (ROOT / "docs" / uri).exists():
                continue
            page = _source_page(target)
            files.append(File.generated(config, uri, content=page))
            waiting.append((f"docs/{uri}", page))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at the site's own pages."""
    place = _place(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = _target(place, match[2])
        if target is None:
            return match[0]
        to = posixpath.relpath(_page_of(target), posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{to}{match[3] or ''}{match[4]}"

    return LINK.sub(moved, markdown)


def _place(uri: str) -> str:
    """Where a page of the site lies in the repository."""
    return next((name for name, page in TOP.items() if page == uri), f"docs/{uri}")


def _target(place: str, link: str) -> str | None:
    """The repository's file or folder that a link means; None: elsewhere on the web, or nothing."""
    if ":" in link:
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
    return path if (ROOT / path).exists() else None


def _page_of(path: str) -> str:
    """The site's file for a file or folder of the repository."""
    if path.startswith("docs/"):
        inside = path.removeprefix("docs/")
        return f"{inside}/index.md" if (ROOT / path).is_dir() else inside
    if path in TOP:
        return TOP[path]
    if (module := _module(path)) in _modules():
        return _reference(module)
    return f"source/{path}.md"


def _source_page(path: str) -> str:
    title = f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n"
    if (ROOT / path).is_dir():
        names = sorted(name for name in os.listdir(ROOT / path) if (ROOT / path / name).is_file())
        here = posixpath.dirname(f"docs/{_page_of(path)}")
        return title + "".join(f"* [{name}]({posixpath.relpath(f'{path}/{name}', here)})\n" for name in names)
    text = (ROOT / path).read_text(encoding="utf-8")
    return f"{title}~~~~{LANGUAGES.get(Path(path).suffix, 'text')}\n{text.rstrip()}\n~~~~\n"


def _modules_by_heading() -> list[dict[str, list[dict[str, str]]]]:
    pages: dict[str, list[dict[str, str]]] = {}
    heading = ""
    for line in (ROOT / "docs" / "api.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        for match in LINK.finditer(line):
            target = _target("docs/api.md", match[2]) or ""
            if target.endswith(".py"):
                pages.setdefault(heading, []).append({_module(target): _reference(_module(target))})
    return [{heading: links} for heading, links in pages.items()]


def _modules() -> list[str]:
    return [name for section in _modules_by_heading() for pages in section.values() for page in pages for name in page]


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _reference(module: str) -> str:
    return f"reference/{module}.md"


def _reference_page(module: str) -> str:
    return f"# {module}\n\n::: {module}\n"


def _adrs() -> list[Path]:
    return sorted((ROOT / "docs" / "adr").glob("[0-9]*.md"))


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
