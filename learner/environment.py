"""What a run was made with: kept in run.json, shown in the report and as MLflow tags."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from learner.config import ROOT

PACKAGES = ("tributary", "torch", "diffusers", "peft", "transformers", "ray")
GIT_SECONDS = 5


def facts() -> dict[str, str]:
    """Versions, git commit (empty where there is no repository; with + where files were changed), machine."""
    found = {name: _version(name) for name in PACKAGES}
    commit = _git("rev-parse", "HEAD")
    changed = "+" if commit and _git("status", "--porcelain", "--untracked-files=no") else ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return found | {
        "python": platform.python_version(),
        "git_commit": commit + changed,
        "host": platform.node(),
        "machine": platform.processor() or platform.machine(),
        "gpu": gpu,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
