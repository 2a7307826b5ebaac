"""What the API reference takes for a docstring where there is none."""

from __future__ import annotations

import ast
import re
import textwrap
from typing import Any

import griffe

COMMENT = re.compile(r"\s#\s+(?!type:|noqa|fmt:)(.+)$")


class Docstrings(griffe.Extension):
    """A field is described by the comment behind it (`x: Tensor  # [b, C, H, W]`), a setting by its description, a
    method by the one it overrides."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if str(attr.value).startswith("Field("):
            _describe(attr)
        if attr.docstring is None and (lines := attr.source.splitlines()) and (found := COMMENT.search(lines[0])):
            attr.docstring = griffe.Docstring(found[1], parent=attr)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for module in (pkg, *_modules(pkg)):
            for kind in module.classes.values():
                if not kind.is_alias:
                    _inherit(kind)


def _modules(package: griffe.Module) -> list[griffe.Module]:
    modules = [module for module in package.modules.values() if not module.is_alias]
    return modules + [inner for module in modules for inner in _modules(module)]


def _inherit(kind: griffe.Class) -> None:
    for name, method in kind.functions.items():
        above = (base.members.get(name) for base in kind.mro())
        docstrings = (overridden.docstring for overridden in above if overridden and overridden.docstring)
        if method.docstring is None and (docstring := next(docstrings, None)):
            method.docstring = griffe.Docstring(docstring.value, parent=method)


def _describe(attr: griffe.Attribute) -> None:
    """`key: int = Field(3, ge=0, description="...")` as `key: int = 3` with a docstring."""
    line = ast.parse(textwrap.dedent(attr.source)).body[0]
    assert isinstance(line, ast.AnnAssign) and isinstance(line.value, ast.Call)
    for word in line.value.keywords:
        if word.arg == "description" and isinstance(word.value, ast.Constant):
            attr.docstring = griffe.Docstring(str(word.value.value), parent=attr)
            attr.value = ast.unparse(line.value.args[0]) if line.value.args else None
