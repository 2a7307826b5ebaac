"""Sums whose parts are standardised: what the learner trains on, alone and over ranks, and what is recorded."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scored_epochs import scored_epoch
from test_process_group import Ranks

from learner import build, process_group
from learner.config import ROOT, ConfigError, load_config
from learner.objectives.by_name import OBJECTIVES, describe
from learner.objectives.needs import NEEDS
from learner.run import main
from records.run_folder import Records
from records.storage import Storage

TERMS = [{"name": "shapes_alignment", "weight": 1}, {"name": "jpeg_incompressibility", "weight": 300}]
ONE = ("train.epochs=1", "run.runner=inprocess", "evaluation.images=0")
WEIGHTS = {term["name"]: term["weight"] for term in TERMS}


def mixed(normalise: str, kind: str = "grpo", terms=TERMS) -> list[str]:
    options = {"terms": terms, "normalise": normalise}
    return [
        f"objective.kind={kind}", "reward.name=weighted_sum", f"reward.options={json.dumps(options)}",
        "flow.warmup_steps=0", "flow.fit_steps=0", "prompts.per_prompt=4",
    ]  # fmt: skip


def begun(learner, scored, monkeypatch) -> pd.DataFrame:
    """What the objective begins the epoch with, as it is trained."""
    seen, real = [], learner.objective.begin_epoch
    monkeypatch.setattr(learner.objective, "begin_epoch", lambda *given: (seen.append(given), real(*given)))
    learner.train_epoch(0, 1.0, [scored])
    ids, prompts, rewards, *_ = seen[0]
    return pd.DataFrame({"id": ids, "prompt": prompts, "reward": rewards})


def by_pandas(scored, normalise: str) -> pd.DataFrame:
    """The same from the parts of the good trajectories, another way."""
    rows = [
        {"id": number, "prompt": scores.chunk.prompts[i], **{label: part[i] for label, part in scores.parts.items()}}
        for _, scores in scored
        for i, number in enumerate(scores.chunk.trajectory_ids)
        if i not in scores.bad
    ]
    table = pd.DataFrame(rows).astype(dict.fromkeys(WEIGHTS, float))
    groups = table.groupby("prompt" if normalise == "prompt" else np.zeros(len(table)))[[*WEIGHTS]]
    parts = (table[[*WEIGHTS]] - groups.transform("mean")) / groups.transform("std", ddof=0)
    table["reward"] = (parts * pd.Series(WEIGHTS)).sum(axis=1)
    return table


@pytest.mark.parametrize(("kind", "normalise"), [("grpo", "prompt"), ("ddpo", "epoch")])
def test_the_objective_gets_the_sum_of_standardised_parts(kind, normalise, small_config, monkeypatch):
    learner = build.build_learner(config := small_config(*mixed(normalise, kind)))
    scored = scored_epoch(config, learner.published)
    made, expected = begun(learner, scored, monkeypatch), by_pandas(scored, normalise)
    assert made["id"].tolist() == expected["id"].tolist() == list(range(8)) and made["prompt"].nunique() == 2
    np.testing.assert_allclose(made["reward"], expected["reward"], rtol=1e-6)
    raw = [value for _, scores in scored for value in scores.rewards[:, -1]]
    assert np.abs(made["reward"] - raw).min() > 1
    said = "; the reward's parts are standardised within "
    assert said in describe(config, 1024) and said not in describe(small_config(*mixed("none", kind)), 1024)


def test_bad_trajectories_are_in_no_mean_and_their_stand_ins_have_their_own_parts(small_config, monkeypatch):
    learner = build.build_learner(config := small_config(*mixed("epoch")))
    (made, scores), other = scored_epoch(config, learner.published)
    parts = {label: np.where([0, 0, 0, 1], np.nan, values) for label, values in scores.parts.items()}
    spoiled = [(made, replace(scores, parts=parts, bad={3: "spoiled"})), other]
    table, expected = begun(learner, spoiled, monkeypatch), by_pandas(spoiled, "epoch").set_index("id")["reward"]
    assert table["id"].tolist() == [0, 0, 1, 2, 4, 5, 6, 7]
    np.testing.assert_allclose(table["reward"], expected[table["id"]], rtol=1e-6)


def test_without_normalise_the_raw_rewards_are_trained_on(small_config, monkeypatch):
    learner = build.build_learner(config := small_config(*mixed("none")))
    scored = scored_epoch(config, learner.published)
    raw = [value for _, scores in scored for value in scores.rewards[:, -1].tolist()]
    assert begun(learner, scored, monkeypatch)["reward"].tolist() == raw


def _advantages(config, scored) -> tuple[dict[int, float], np.ndarray]:
    """By id; and the LoRA [P] after a step along the gradient: Adam's first would have its signs alone."""
    learner = build.build_learner(config)
    learner.policy_optimizer = torch.optim.SGD(learner.policy_parameters, 1.0)
    learner.train_epoch(0, 1.0, [scored])
    return learner.objective._advantages, learner.publish(1).flat


def _rank(rank, count, address, config, scored, queue) -> None:
    torch.set_num_threads(1)
    process_group.join(address, rank, count, 60, whole_gpu=False)
    queue.put((rank, *_advantages(config, scored[rank::count])))
    torch.distributed.destroy_process_group()


@pytest.mark.long
@pytest.mark.parametrize("normalise", ["prompt", "epoch"])
def test_two_ranks_standardise_over_what_both_have(normalise, small_config):
    """A prompt's four trajectories are in two chunks, one on each rank."""
    config = small_config(*mixed(normalise), "sampler.chunk_size=2", "prompts.per_prompt=2", "train.trajectories=8")
    learner = build.build_learner(config)
    scored = scored_epoch(config, learner.published)
    scored = [
        (replace(made, chunk=chunk), replace(scores, chunk=chunk))
        for made, scores in scored
        for chunk in [replace(scores.chunk, prompts=scored[scores.chunk.index // 2 * 2][1].chunk.prompts)]
    ]
    one, flat = _advantages(config, scored)
    with Ranks(_rank, 2, config, scored, needs="learner.build") as ranks:
        (_, first, first_flat), (_, second, second_flat) = sorted(ranks.answers(2, seconds=120), key=lambda x: x[0])
    assert first == second == one and len({*one.values()}) > 4  # to the bit
    assert np.array_equal(first_flat, second_flat)
    moved = np.linalg.norm(flat - learner.published.flat)
    assert 0 < np.abs(first_flat - flat).max() < 1e-4 * moved


@pytest.mark.long
def test_raw_sums_are_recorded_and_shares_are_of_what_is_trained_on(small_settings, tmp_path):
    said = {}
    for how in ("none", "epoch"):
        folder = tmp_path / how
        assert main([*small_settings, *mixed(how), *ONE, f"run.dir={folder}"]) == 0
        records = Records.open(Storage(str(folder)))
        table = records.trajectories(0, "reward", "reward_parts").to_pydict()
        parts = pd.DataFrame([dict(row) for row in table["reward_parts"]])
        raw = (parts * pd.Series(WEIGHTS)).sum(axis=1)
        np.testing.assert_allclose(table["reward"], raw, rtol=1e-5)
        line = records.lines[-1]
        assert line["reward_mean"] == pytest.approx(raw.mean(), rel=1e-5)
        said[how] = [line[f"reward_share/{label}"] for label in WEIGHTS]
        trained = parts if how == "none" else (parts - parts.mean()) / parts.std(ddof=0)
        trained *= pd.Series(WEIGHTS)
        whole = trained.sum(axis=1)
        assert said[how] == pytest.approx(
            [trained[k].cov(whole, ddof=0) / whole.var(ddof=0) for k in WEIGHTS], rel=1e-5
        )
        assert sum(said[how]) == pytest.approx(1)
    assert said["none"] != said["epoch"]
    loras = [(tmp_path / how / "checkpoints/latest/lora/kohya.safetensors").read_bytes() for how in said]
    assert loras[0] != loras[1]


@pytest.mark.long
@pytest.mark.parametrize("normalise", ["prompt", "epoch"])
def test_a_stopped_run_goes_on_bitwise(normalise, small_settings, tmp_path):
    """DDPO also has the prompt's last 16 rewards, which a checkpoint keeps: it has them after two epochs."""
    settings = [*small_settings, *mixed(normalise, "ddpo"), "objective.advantage=prompt", "evaluation.images=0"]
    settings += ["prompts.path=[a red circle at the right]", "run.runner=inprocess"]
    for folder, epochs in (("unbroken", 3), ("stopped", 2), ("stopped", 3)):
        assert main([*settings, f"train.epochs={epochs}", f"run.dir={tmp_path / folder}"]) == 0
    loras = [
        (tmp_path / run / "checkpoints/latest/lora/kohya.safetensors").read_bytes() for run in ("unbroken", "stopped")
    ]
    assert loras[0] == loras[1]


def test_a_part_without_spread_is_named_once(small_settings, tmp_path, monkeypatch, capsys):
    (tmp_path / "dull.py").write_text("def three(images, prompts):\n    return 3 + 0 * images.sum((1, 2, 3))\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = mixed("none", terms=[*TERMS, {"name": "dull:three", "weight": 1}])
    assert main([*small_settings, *settings, *ONE, "train.epochs=2", f"run.dir={tmp_path / 'run'}"]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "no spread" in line]
    said = "(dull:three): its scores have no spread among the pictures in epoch 0 (mean 3), so"
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: reward.options.terms[2] {said}")
    shares = [line["reward_share/dull:three"] for line in Records.open(Storage(str(tmp_path / "run"))).lines]
    assert shares == [0, 0]


def test_objectives_with_a_target_refuse_it_and_say_why(settings_of):
    open_ended = ("ddpo", "grpo")
    assert [kind for kind, needs in NEEDS.items() if needs.maximises] == [*open_ended]
    for kind in OBJECTIVES:
        settings = [*settings_of(kind), *mixed("epoch", kind)[1:3], "objective.group_size=8"]
        if kind in open_ended:
            assert "maximises" in OBJECTIVES[kind].target and load_config(overrides=settings)
            continue
        with pytest.raises(ConfigError) as caught:
            load_config(overrides=settings)
        said = [line for line in str(caught.value).splitlines() if "normalise" in line]
        assert len(said) == 1 and said[0].startswith(f"reward.options.normalise: {kind}'s target is made of r")
        assert "p_ref exp(beta r)" in said[0] and said[0].endswith("one of ddpo, grpo")
        assert load_config(overrides=[*settings, mixed("none", kind)[2]])


def test_an_unknown_way_is_refused_by_the_configuration():
    with pytest.raises(ConfigError, match=r"^reward\.options\.normalise: expected none, prompt, epoch, got 'batch'$"):
        load_config(ROOT / "configs/shapes_ddpo.yaml", overrides=mixed("batch", "ddpo"))


def test_a_prompts_only_trajectory_cannot_be_standardised():
    settings = [*mixed("prompt", "ddpo")[:-1], "prompts.per_prompt=1"]
    with pytest.raises(ConfigError, match=r"^prompts\.per_prompt: reward\.options\.normalise=prompt compares .* epoch"):
        load_config(overrides=settings)
    assert load_config(overrides=[*mixed("epoch", "ddpo")[:-1], "prompts.per_prompt=1"])
