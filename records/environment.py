"""What a run was made with: kept in run.json, shown in the report and as MLflow tags."""

import json
import os
import platform
import subprocess
from importlib.metadata import distributions
from pathlib import Path

PACKAGES = ("tributary", "torch", "diffusers", "peft", "transformers", "ray")
GIT_SECONDS = 5
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it in a submitted job's entrypoint


def in_submitted_job() -> bool:
    return JOB_VARIABLE in os.environ


def facts() -> dict[str, str]:
    """Versions, git commit (empty where there is no repository; with + where files were changed), the package that a
    submitted Ray job's code came in (its name is a hash of the content), machine."""
    import torch  # here: whoever only asks for in_submitted_job must start fast

    job = json.loads(os.environ.get(JOB_VARIABLE) or "{}")
    return {name: next((found.version for found in distributions(name=name)), "") for name in PACKAGES} | {
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "working_dir": (job.get("runtime_env") or {}).get("working_dir") or "",
        "host": platform.node(),
        "machine": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }


def _git_commit() -> str:
    describe = ("describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+")
    command = ["git", "-C", str(Path(__file__).parent), *describe]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
