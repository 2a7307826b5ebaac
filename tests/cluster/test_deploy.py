"""The files of cluster/deploy/ and the commands in the docs, without starting anything."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from hosts import HEALTH_CHECKS
from kuberay_fields import MANIFESTS
from ray.scripts.scripts import start as ray_start

from learner import PACKAGES
from learner.config import ROOT, load_config

DEPLOY = ROOT / "cluster" / "deploy"
WAYS = ("slurm.sh", "ray_up.yaml", "kuberay_cluster.yaml", "kuberay_job.yaml", "skypilot.yaml")
PAGES = ("README.md", "docs/operations.md", "docs/deploy.md")


def text(name: str) -> str:
    """Of a file, its continued lines joined."""
    path = DEPLOY / name
    return (path if path.exists() else ROOT / name).read_text().replace("\\\n", " ")


def blocks(page: str) -> list[str]:
    return re.findall(r"```\w*\n(.*?)```", text(page), re.S)


def uncommented(name: str) -> str:
    return "\n".join(line for line in text(name).splitlines() if not line.lstrip().startswith("#"))


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def started(way: str) -> list[str]:
    """Of a way to start: the commands that start Ray, the head's first, with what precedes them in their shell."""
    if way == "ray_up.yaml":
        return [documents(way)[0][f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")]
    return [yaml.safe_load(text(way))["run"] if way == "skypilot.yaml" else uncommented(way)]


def kuberay(way: str) -> dict:
    """Of a RayCluster or a RayJob: the cluster."""
    spec = documents(way)[1]["spec"]
    return spec.get("rayClusterSpec", spec)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_has_token_authentication_on_a_closed_dashboard_and_a_head_that_notices_a_cut_node_in_seconds(way):
    hosts = set(re.findall(r"dashboard-host[=:] ?(\S+)", uncommented(way)))
    if way.startswith("kuberay"):
        assert kuberay(way)["authOptions"] == {"mode": "token"}
        head = kuberay(way)["headGroupSpec"]
        assert hosts == {"0.0.0.0"} and head.get("serviceType", "ClusterIP") == "ClusterIP"
        container = head["template"]["spec"]["containers"][0]
        assert {item["name"]: item["value"] for item in container["env"]} == HEALTH_CHECKS
        return
    for commands in started(way):
        assert commands.index("RAY_AUTH_MODE=token") < commands.index("ray start")
    before = started(way)[0].partition("ray start --head")[0]
    assert dict(re.findall(r"(RAY_health\w+)=(\d+)", before)) == HEALTH_CHECKS and hosts == {"127.0.0.1"}


def test_every_documented_command_that_starts_a_cluster_has_token_authentication_on():
    starting = [block for page in PAGES for block in blocks(page) if re.search(r"\bray start\b", block)]
    assert starting and all(way in text("docs/deploy.md") for way in (*WAYS, "Dockerfile"))
    for block in starting:
        assert "export RAY_AUTH_MODE=token" in block[: block.index("ray start")], block
        assert len(re.findall("ray start --head", block)) == len(re.findall("--dashboard-host=127", block))
    assert not any(re.search(r"RAY_AUTH_MODE=(?!token)", text(page)) for page in PAGES)


@pytest.mark.parametrize("name", [*WAYS, "Dockerfile", *PAGES])
def test_a_token_is_made_where_only_its_owner_reads_it_and_no_secret_is_in_a_file(name):
    for line in text(name).splitlines():
        if "get-auth-token" in line or "auth_token}'" in line:
            assert line.lstrip().startswith("(umask 077;"), line
    named = r"(?i:token|secret|password)\w*[=:]\s*[\"']?[\w-]{16,}"
    assert not re.search(rf"[0-9a-f]{{32,}}|AKIA[0-9A-Z]{{16}}|hf_\w{{20,}}|PRIVATE KEY|{named}", text(name))
    for value in re.findall(r"RAY_AUTH_TOKEN\b\s*[=:]\s*(\S+)", text(name)):
        assert value in ("$(cat", "null"), value


@pytest.mark.parametrize("name", [*WAYS, *PAGES])
def test_options_of_ray_start_and_settings_of_runs_exist(name):
    known = {option for parameter in ray_start.params for option in parameter.opts}
    used = {f"--{key}" for params in re.findall(r"rayStartParams:((?:\n {6,}[\w-]+: .*)+)", text(name))
            for key in re.findall(r"\n +([\w-]+):", params)}  # fmt: skip
    for command in re.findall(r"ray start\b(?:\s+-[^|&;\n]*)+", text(name)):
        used |= set(re.findall(r"\s(--[a-z][\w-]*)", command))
    assert used <= known and (used or name in PAGES)
    lines = "\n".join(blocks(name)) if name in PAGES else text(name)
    found = re.findall(r"(?:python -m learner\.run|sbatch.*/slurm\.sh)\b([^;\n]*)", lines)
    commands = [shlex.split(words, comments=True) for words in found if "$@" not in words and " -- " not in words]
    for command in commands:
        words, path = [word for word in command if word not in ("--plan", "--help", "--config")], None
        if "--config" in command:
            path = ROOT / words.pop(command.index("--config")).removeprefix("/app/")
        load_config(path, words)
    assert commands or name == "kuberay_cluster.yaml"


def test_the_documented_labels_are_settings_and_on_nodes(tmp_path):
    fragment = next(block for block in blocks("docs/deploy.md") if "tributary.role" in block)
    (tmp_path / "labels.yaml").write_text(fragment)
    config = load_config(tmp_path / "labels.yaml")
    asked = " ".join(getattr(config, role).labels["tributary.role"] for role in ("learner", "sampler", "reward"))
    for way in WAYS:
        given = set(re.findall(r"tributary\.role[:=] ?(\w+)", uncommented(way)))
        assert set(re.findall(r"learner|sampler", asked)) <= given


def test_ray_up_keeps_to_rays_schema():
    ray_up = documents("ray_up.yaml")[0]
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(ray_up)
    kinds = ray_up["available_node_types"]
    assert ray_up["head_node_type"] in kinds
    assert sum(kind.get("max_workers", 0) for kind in kinds.values()) == ray_up["max_workers"]
    nodes = {name: kind["node_config"] for name, kind in kinds.items()}
    markets = {name: node.get("InstanceMarketOptions", {}).get("MarketType") for name, node in nodes.items()}
    assert markets == {"head": None, "a100": None, "a100_spot": "spot"}
    assert nodes["a100"]["InstanceType"] == nodes["a100_spot"]["InstanceType"] == "p4d.24xlarge"
    assert ray_up["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in ray_up["setup_commands"]


def test_kubernetes_manifests_have_only_fields_that_exist_and_the_job_has_the_cluster_that_jobs_are_submitted_to():
    claim, cluster = documents("kuberay_cluster.yaml")
    other_claim, job = documents("kuberay_job.yaml")
    for manifest in (claim, cluster, job):
        jsonschema.Draft7Validator(MANIFESTS[manifest["kind"]]).validate(manifest)
    assert claim == other_claim and cluster["spec"] == job["spec"]["rayClusterSpec"]
    spec = job["spec"]
    assert spec["submissionMode"] == "K8sJobMode" and spec["shutdownAfterJobFinishes"]
    assert spec["backoffLimit"] > 0 and spec["ttlSecondsAfterFinished"] > 0
    head = cluster["spec"]["headGroupSpec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in head["volumes"]}
    assert volumes == {"runs": claim["metadata"]["name"]}
    # A retry has another head: the run must be on the volume for it to go on.
    assert f"run.dir={mounts['runs']}/" in spec["entrypoint"]


def test_the_operators_rules_hold():
    spec = kuberay("kuberay_cluster.yaml")
    assert spec["rayVersion"] == re.search(r"^ray==(\S+)", text("constraints.txt"), re.M)[1]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        assert "labels" not in group["rayStartParams"]  # refused since KubeRay 1.6: `labels` of the group has them
        pod = group["template"]["spec"]
        assert "restartPolicy" not in pod  # the autoscaler's
        container = pod["containers"][0]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert len({group["template"]["spec"]["containers"][0]["image"] for group in groups}) == 1
    elastic = [group for group in spec["workerGroupSpecs"] if group["minReplicas"] < group["maxReplicas"]]
    assert elastic and spec["enableInTreeAutoscaling"]


def test_skypilot_reads_its_file(monkeypatch, tmp_path):
    """By SkyPilot where it is installed (it is no dependency), else the keys that it was seen to know."""
    [tree] = documents("skypilot.yaml")
    assert tree["envs"] == {"BUCKET": None} and tree["secrets"] == {"RAY_AUTH_TOKEN": None}
    assert set(tree) == {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "setup", "run"}
    assert set(tree["resources"]) == {"accelerators", "use_spot", "disk_size", "job_recovery"}
    assert set(tree["resources"]["job_recovery"]) == {"strategy", "max_restarts_on_errors"}
    for script in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=tree[script], text=True, check=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml_config(tree, [("BUCKET", "b")], [("RAY_AUTH_TOKEN", "t")])
    assert task.num_nodes == 2 and [resources.use_spot for resources in task.resources] == [True]


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in text("Dockerfile").splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_runs_as_a_user_without_rights_and_installs_what_is_depended_on_in_pinned_versions():
    project = tomllib.loads(text("pyproject.toml"))["project"]
    first, *middle, last = instructions()
    assert {word for word, _ in middle} <= {"ENV", "RUN", "WORKDIR", "COPY"} and last == ("USER", "1000")
    assert first == ("FROM", "python:3.11-slim") and project["requires-python"] == ">=3.11,<3.12"
    assert "torchvision" not in text("Dockerfile") + text("constraints.txt")
    [line] = [rest for word, rest in instructions() if word == "RUN" and "tomllib" in rest]
    script = shlex.split(line)[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    needed = done.stdout.split()
    assert needed == project["dependencies"]
    pinned = {name.lower() for name in re.findall(r"^([\w.-]+)==", text("constraints.txt"), re.M)}
    assert {re.match(r"[\w.-]+", name)[0].lower() for name in needed} <= pinned
    assert all("-c constraints.txt" in rest for word, rest in instructions() if word == "RUN" and "pip install" in rest)


@pytest.mark.long
def test_the_image_has_all_that_a_run_needs(tmp_path):
    copied = [source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]]
    ignored = text(".dockerignore").splitlines()
    assert "*" in ignored and {"learner", *PACKAGES} < set(copied) == {
        line[1:] for line in ignored if line.startswith("!")
    }
    for source in copied:
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, tmp_path / source)
    done = subprocess.run(
        [sys.executable, "-m", "learner.run", "--plan"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and str(ROOT) not in done.stdout, done.stderr[-2000:]


def test_a_job_carries_the_embedded_model_and_no_other_weights(tmp_path):
    """Ray reads .rayignore as git reads its own; what it packs may be 500 MiB."""

    def git(*arguments: str) -> list[str]:
        command = ["git", *arguments, "--exclude-from", str(ROOT / ".rayignore")]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True
        ).stdout.split()

    subprocess.run(["git", "init", "-q"], cwd=tmp_path, timeout=30, check=True)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    weights = {
        "sd15/unet/model.safetensors",
        "v1-5.ckpt",
        "clip/pytorch_model.bin",
        "runs/a/metrics.jsonl",
        ".venv/x.py",
    }
    for name in {*tracked.stdout.split(), *weights}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert set(git("ls-files", "--others", "--ignored")) == weights
