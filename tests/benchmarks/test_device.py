"""The benchmark at a tiny size: every figure is there, and what is derived is derived from what was measured."""

import json
from statistics import median

import pytest
import torch

from benchmarks import device, parts
from benchmarks.measure import CEILING, Part, measure, ratio
from learner.objectives.by_name import OBJECTIVES

TINY = (
    "--sd15", "tiny", "--device", "cpu", "--repeats", "2", "--cheap-from", "2", "sampler.steps=3",
    "sampler.chunk_size=2", "prompts.per_prompt=1", "reward.options={tiny: true}", "flow.widths=[8,16]", "lora.rank=2",
)  # fmt: skip
KINDS = ("dag_db", "residual_nabla_db")


@pytest.mark.long
def test_every_part_is_measured_in_every_round_and_is_the_work_asked_for_and_so_say_ratios_and_table(tmp_path):
    file = tmp_path / "figures.json"
    assert device.main([*TINY, "--output", str(file), "--objectives", *KINDS]) == 0
    report = json.loads(file.read_text())
    expected = {
        f"{CEILING} float32", parts.ROLLOUT, parts.ROLLOUT_BASE, parts.PIPELINE, parts.SCORE, parts.SCORE_CHEAP,
        parts.SCORE_TINY, parts.SCORE_HALF, parts.SCORE_HALF_TINY, parts.LEARN_HALF, parts.LEARN,
        parts.PUBLISHED_SAMPLE, parts.PUBLISHED_LEARN, *map(parts.learning, KINDS),
    }  # fmt: skip
    assert set(report["parts"]) == expected and report["not_measured"] == {}
    for part in report["parts"].values():
        assert len(part["seconds"]) == 2 and min(part["seconds"]) > 0
        assert part["rate"] == pytest.approx(part["amount"] / median(part["seconds"]))
        assert part["flops_per_second"] == pytest.approx(part["flops"] / median(part["seconds"]))
        assert part["of_ceiling"] > 0
        assert "peak_bytes" not in part  # the CPU's is the process's alone
    assert report["process_peak_bytes"] > 1e8
    assert report["hardware"]["cpu"] and report["versions"]["torch"] and report["date"] and report["git_commit"]

    amounts = {name: part["amount"] for name, part in report["parts"].items()}
    assert amounts[parts.ROLLOUT] == amounts[parts.PIPELINE] == amounts[parts.PUBLISHED_SAMPLE] == 2
    assert amounts[parts.LEARN] == amounts[parts.PUBLISHED_LEARN] == amounts[parts.learning("dag_db")] == 2 * 3
    assert (amounts[parts.SCORE], amounts[parts.SCORE_CHEAP]) == (2 * 4, 2 * 2)
    assert amounts[parts.LEARN_HALF] == 2 * 2 and amounts[parts.SCORE_HALF] <= amounts[parts.SCORE]

    # Rollouts are guided: two passes a step; the base model's values cost a third.
    flops = {name: part["flops"] for name, part in report["parts"].items()}
    assert flops[parts.ROLLOUT_BASE] / flops[parts.ROLLOUT] == pytest.approx(1.5, rel=0.02)
    assert flops[parts.PIPELINE] / flops[parts.ROLLOUT] == pytest.approx(1, rel=0.05)
    assert flops[parts.SCORE] / flops[parts.SCORE_CHEAP] == pytest.approx(2)
    # The published learner looks forward from both ends of 6 transitions: 12 conditional passes, 12 decodes and
    # rewards; a rollout has 12 passes.
    extra = flops[parts.ROLLOUT] + 12 * flops[parts.SCORE] / report["parts"][parts.SCORE]["amount"]
    assert flops[parts.PUBLISHED_LEARN] - flops[parts.LEARN] == pytest.approx(extra, rel=0.02)

    assert set(report["ratios"]) == set(device.RATIOS)
    for name, (above, below) in device.RATIOS.items():
        given = report["ratios"][name]
        for i in range(2):
            slow, fast = (sum(report["parts"][part]["seconds"][i] for part in some) for some in (above, below))
            assert given["each"][i] == pytest.approx(slow / fast)
        assert given["median"] == pytest.approx(median(given["each"]))
        work = (sum(report["parts"][part]["flops"] for part in some) for some in (above, below))
        assert given["of_flops"] == pytest.approx(next(work) / next(work))

    said = device.table(report)
    assert all(name in said for name in [*report["parts"], *report["ratios"]])
    gone = {name: part for name, part in report["parts"].items() if name != parts.PUBLISHED_LEARN}
    less = {**report, "parts": gone, "ratios": {}, "not_measured": {parts.PUBLISHED_LEARN: "out of memory"}}
    lines = [line for line in device.table(less).splitlines() if parts.PUBLISHED_LEARN in line]
    assert lines == [f"not measured: {parts.PUBLISHED_LEARN}: out of memory"]


def test_a_part_without_memory_is_left_out_of_everything():
    def fail() -> None:
        raise torch.OutOfMemoryError("too much")

    cpu = torch.device("cpu")
    fine, greedy = (Part(name, "things", 1, torch.float32, run) for name, run in (("a", list), ("b", fail)))
    found, missing = measure([fine, greedy], 2, cpu, lambda text: None)
    assert list(found) == ["a"] and missing == {"b": "out of memory: too much"}
    assert ratio(found, ["a"], ["b"]) is None
    assert "flops" not in found["a"].figures(None)  # it has none to count


def test_objectives_that_do_not_go_with_the_config_say_why():
    configs, missing = parts.objective_configs(None, ["sampler.transitions=random"], list(OBJECTIVES), False)
    assert {"dag_db", "dag_kl", "ddpo", "rdb", "grpo"} == set(configs)
    assert "not differentiable" in missing[parts.learning("nabla_db")]
    configs, missing = parts.objective_configs(None, ["objective.group_size=7"], ["dag_kl"], True)
    assert not configs and "group_size" in missing[parts.learning("dag_kl")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--repeats", "0"], "--repeats"),
        (["--trajectories", "7"], "sampler.chunk_size"),
        (["--objectives", "dag_dbb"], "dag_dbb"),
        (["--objectives", "nabla_db", "--sd15", "tiny", "reward.name=jpeg_compressibility"], "not differentiable"),
        (["--cheap-from", "51", "sampler.steps=50"], "--cheap-from"),
        (["--output", "no/such/folder/f.json"], "--output"),
        (["--config", "none.yaml"], "none.yaml"),
        (["reward.name=nothing"], "nothing"),
        (["sampler.stepz=3"], "sampler.steps"),
        (["model.path=nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_said_in_one_line(arguments, said, capsys):
    assert device.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("benchmarks.device: ")]
    assert len(lines) == 1 and said in lines[0]
