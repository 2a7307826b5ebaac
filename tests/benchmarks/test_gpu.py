"""The GPU day on a CPU, tiny: its checks see what they are for, and whatever becomes of a part, the others are done and
what was found is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_checks, gpu_models, gpu_process, gpu_report, gpu_worker
from benchmarks.gpu import Part
from learner.objectives.by_name import OBJECTIVES

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
GB = 10**9


@pytest.fixture
def day():
    """With everything that a part says in `said`."""
    made = gpu_worker.Day(torch.device("cpu"), True, lambda message: merge(made.said, message))
    made.said = {"figures": {}, "checks": {}}
    made.begin(600)
    return made


def merge(said: dict, message: dict) -> None:
    for kind, values in message.items():
        said[kind] |= values


@pytest.fixture
def faulty(monkeypatch):
    """A day of parts of gpu_day_parts."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))

    def run(names, output, seconds=600.0, check=False):
        parts = [Part(name, f"gpu_day_parts:{name}", seconds, check) for name in names]
        return gpu.run(parts, "cpu", True, 600, output)

    return run


def passes(day, place: str) -> bool:
    return gpu_worker.run(day, place, 600)["status"] == "ok"


def test_kernels_agree_with_the_formulas(day):
    assert passes(day, "benchmarks.gpu_checks:kernels")
    assert {name.rsplit(": ", 1)[0] for name in day.said["checks"]} == {
        "ddim epsilon 1", "ddim epsilon 0.6", "ddim v_prediction 1", "flow", "flow_grpo",
    }  # fmt: skip


def test_every_objective_agrees_with_float64_and_its_check_sees_a_lower_precision(day):
    assert passes(day, "benchmarks.gpu_checks:objectives")
    assert {name.split(":")[0] for name in day.said["checks"]} == set(OBJECTIVES)
    assert all(check["value"] > 0 for name, check in day.said["checks"].items() if name.endswith("gradient"))
    gpu_checks.apart_from_exact(day, torch.bfloat16)
    found = {failure.split(":")[0] for failure in day.failures}
    assert found == set(OBJECTIVES)


def test_copies_and_collectives_change_nothing(day):
    assert passes(day, "benchmarks.gpu_process:copies") and passes(day, "benchmarks.gpu_process:group")
    assert day.said["figures"]["backend"] == "gloo" and day.said["figures"]["arrays"] == 64


@pytest.mark.long
def test_a_network_and_its_sampler_agree(day):
    assert passes(day, "benchmarks.gpu_network:network") and passes(day, "benchmarks.gpu_network:ratios")
    assert day.said["figures"]["output in bfloat16"] > 100 * day.said["checks"]["output in float32"]["value"]
    assert day.said["checks"]["float32: ratio less 1"]["value"] > 0


@pytest.fixture
def pretended(monkeypatch):
    """torch.cuda of a GPU with so much free memory, whose work is done on the CPU."""

    def make(free: float, peak: float = 5 * GB) -> None:
        for name, value in {
            "mem_get_info": (free, 80 * GB), "memory_allocated": 2 * GB, "max_memory_allocated": peak,
            "reset_peak_memory_stats": None, "empty_cache": None, "synchronize": None,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)

    return make


def test_what_does_not_fit_is_skipped_with_the_reason(day, pretended):
    day.cuda = True
    config = gpu_models.configured(day, "flux_dev_pickscore")
    pretended(free=1000)
    with pytest.raises(gpu_worker.Skipped, match=r"B parameters in bfloat16 need .* are free"):
        gpu_models.open_model(day, config)


@pytest.mark.long
def test_memory_that_is_not_given_back_is_a_failure(day, pretended, monkeypatch):
    day.cuda = True
    pretended(free=40 * GB)
    assert passes(day, "benchmarks.gpu_process:memory_fit")
    assert day.said["figures"]["learner"] == {"batch": 8, "peak_bytes": 5 * GB, "bytes_free": 40 * GB}
    left = iter([40 * GB, 30 * GB])
    monkeypatch.setattr(gpu_process, "_learner_and_scorer", lambda day: None)
    monkeypatch.setattr(gpu_process, "free", lambda day: next(left))
    assert not passes(day, "benchmarks.gpu_process:memory_fit") and "not given back is 0.25" in day.failures[0]


@pytest.mark.long
def test_memory_beside_what_was_counted(day, pretended):
    """Of a model that leaves a pretended GPU with 3 GB more at work than at rest."""
    from benchmarks import gpu_speed

    day.cuda = True
    pretended(free=40 * GB)
    config = gpu_models.configured(day, "flux_dev_pickscore")
    part = gpu_speed.Part("rollout", "images", 1, torch.bfloat16, list)
    found = {"rollout": gpu_speed.Measured(part, 0, [1.0], 5 * GB, 2 * GB)}
    gpu_speed.counted(day, config, found, resident=GB)
    rows = day.said["figures"]["memory"]
    assert rows["rollout"]["measured_bytes"] == 3 * GB and rows["networks"]["measured_bytes"] == GB
    assert rows["rollout"]["measured over counted"] == pytest.approx(3 * GB / rows["rollout"]["counted_bytes"])
    assert rows["rollout"]["counted_bytes"] > 0 and "measured_bytes" not in rows["decode"]


@pytest.mark.long
def test_whatever_becomes_of_a_part_the_others_are_done(faulty, tmp_path):
    names = ["fine", "raises", "without_memory", "wrong", "not_here", "dies"]
    report = faulty([*names, "fine"], tmp_path / "day.json")
    found = {name: (one["status"], one["reason"]) for name, one in report["parts"].items()}
    assert found == {
        "fine": ("ok", ""),
        "raises": ("broken", "ValueError: it is broken"),
        "without_memory": ("out of memory", "CUDA out of memory. Tried to allocate 2.00 GiB"),
        "wrong": ("failed", "bad is 0.3, more than 0.2; nothing is nan, more than 0.2"),
        "not_here": ("skipped", "no such device"),
        "dies": ("broken", "its process ended by signal 9"),
    }
    assert report["parts"]["raises"]["figures"] == {"before": "said"}
    assert report["parts"]["dies"]["figures"] == {"last": "words"}
    assert json.loads((tmp_path / "day.json").read_text())["parts"] == report["parts"]
    assert not gpu.passed({"parts": {"wrong": report["parts"]["wrong"] | {"check": True}}})


@pytest.mark.long
def test_a_part_that_hangs_is_ended_with_its_process(faulty, tmp_path):
    report = faulty(["hangs", "fine"], tmp_path / "day.json", seconds=2.0)
    hung, fine = report["parts"].values()
    assert (hung["status"], fine["status"]) == ("out of time", "ok") and hung["figures"]["before"] == "said"
    assert hung["figures"]["pid"] != fine["figures"]["pid"] and not alive(hung["figures"]["pid"])


@pytest.mark.long
def test_a_killed_script_leaves_what_it_had_and_no_process(tmp_path):
    parts = 'Part("fine", "gpu_day_parts:fine", 600, True), Part("hangs", "gpu_day_parts:hangs", 600, True)'
    code = f"from pathlib import Path; from benchmarks.gpu import *; run([{parts}], 'cpu', True, 600, Path('day.json'))"
    path = os.pathsep.join(map(str, (ROOT, HERE)))
    script = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    file = tmp_path / "day.json"
    wait(lambda: file.exists() and "pid" in json.loads(file.read_text())["parts"]["hangs"]["figures"])
    script.send_signal(signal.SIGKILL)
    script.wait(60)
    report = json.loads(file.read_text())
    assert report["parts"]["fine"]["status"] == "ok" and report["parts"]["hangs"]["status"] == "not begun"
    assert not gpu.passed(report) and "| fine | ok |" in file.with_suffix(".md").read_text()
    pid = report["parts"]["hangs"]["figures"]["pid"]
    try:
        wait(lambda: not alive(pid))
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether it runs; one whose parent has not asked yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait(condition) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it never came")


def test_without_time_nothing_is_begun(faulty, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 1e9)
    report = faulty(["fine"], tmp_path / "day.json", check=True)
    assert report["parts"]["fine"]["status"] == "not begun" and "no time was left" in report["parts"]["fine"]["reason"]
    assert not gpu.passed(report)


def test_a_torch_that_does_not_start_is_tried_twice(faulty, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    report = faulty(["fine", "wrong", "dies"], tmp_path / "day.json")
    reasons = [one["reason"] for one in report["parts"].values()]
    assert reasons == [*["torch did not start: its process ended: 1"] * 2, "torch did not start"]
    assert not gpu.passed(report | {"parts": {"fine": report["parts"]["fine"] | {"check": True}}})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "kernel"], "'kernel'"),
        (["--seconds", "0"], "--seconds"),
        (["--output", "no/such/folder/f.json"], "--output"),
        (["--output", "f.md"], "--output"),
        (["--device", "tpu"], "--device"),
        (["--second", "a"], "--second"),
    ],
)
def test_bad_arguments_are_said_in_one_line(arguments, said, capsys):
    assert gpu.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks.gpu: ") and said in line


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_bad_input(tmp_path, capsys):
    assert gpu.main(["--parts", "kernels", "--output", str(tmp_path / "f.json")]) == 2
    assert "torch finds none here" in capsys.readouterr().err


def test_the_tables_say_what_was_found():
    report = gpu_report.begin(["a", "b", "c"], 480, False)
    report |= {"hardware": {"gpu": "Some GPU", "memory_bytes": 24 * GB, "driver": "1.2"}, "versions": {"torch": "2.0"}}
    timed = {
        "unit": "images", "rate": 12.5, "flops_per_second": 3e12, "of_ceiling": 0.42, "peak_bytes": 9 * GB,
        "resident_bytes": 4 * GB, "seconds": [1.0],
    }  # fmt: skip
    checks = {
        "near": {"value": 0.9, "limit": 1.0, "passed": True}, "far": {"value": 0.1, "limit": 1.0, "passed": True},
    }  # fmt: skip
    report["parts"]["a"] |= {"status": "ok", "seconds": 1.26, "checks": checks}
    report["parts"]["a"]["figures"] = {"float32": {"rollout": timed}, "memory": {"rollout": {"counted_bytes": 3 * GB}}}
    bad = {"wrong": {"value": "nan", "limit": 1.0, "passed": False}}
    report["parts"]["b"] |= {"status": "failed", "reason": "so | so", "checks": bad}
    text = gpu_report.markdown(report)
    assert "Some GPU, 24.0 GB" in text and "driver 1.2, torch 2.0" in text
    for line in (
        "| a | ok |  | 1.3 | 2 passed; nearest to its limit: near 0.9 of 1 |",
        "| b | failed | so / so |  | FAILED: wrong |",
        "| c | not begun |  |  |  |",
        "| a | float32: rollout | 12.5 images | 3 | 42% | 9.00 | 5.00 |",
        "| a | memory: rollout: counted_bytes | 3 G |",
    ):
        assert line in text.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_part_runs_here_without_ray_and_mlflow(tmp_path, monkeypatch):
    for name in ("ray", "mlflow"):
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError('as if it were not installed')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    output = tmp_path / "day.json"
    assert gpu.main(["--tiny", "--device", "cpu", "--seconds", "4800", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert {name: one["status"] for name, one in report["parts"].items()} == {part.name: "ok" for part in gpu.PARTS}
    parts = {name: one["figures"] for name, one in report["parts"].items()}
    for name in ("SD1.5", "SDXL", "SD3.5-medium", "FLUX"):
        timed = ("rollout", "diffusers pipeline", "decode", "learn, batch 1")
        assert all(parts[name][one]["rate"] > 0 and parts[name][one]["of_ceiling"] > 0 for one in timed)
        assert parts[name]["fitting micro-batch"]["size"] == 8
        assert parts[name]["rollout"]["flops"] == pytest.approx(parts[name]["diffusers pipeline"]["flops"], rel=0.01)
        assert parts[name]["memory"]["learn, batch 1"]["counted_bytes"] > 0
    assert parts["service at SD1.5's size"]["times as fast"]["learner against the published one"] > 0
    assert {"reward before", "reward after", "epoch 2, seconds"} <= set(parts["demo"])
    assert parts["TF32"]["TF32"]["rollout"]["rate"] > 0
    assert parts["compiled SD3.5-medium"]["times as fast compiled"]["rollout"] > 0
    assert not list(tmp_path.glob(".*.new")) and "mean nothing" in output.with_suffix(".md").read_text()
