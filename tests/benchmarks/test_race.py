"""The race: when a reward is reached, what its calls cost, its tables and picture from hand-made curves, and (long) a
tiny one for real."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import race
from benchmarks.measure import count
from benchmarks.race import ENTRIES, LIMIT, PUBLISHED, USUAL, Calls, Entry, Racer, main, over, settings, size_of
from benchmarks.race_shown import Size, flops, picture, reached, rows, sizes_table, table
from commands import plan

CALLS = dict.fromkeys(Calls().counts, 0)


def curve(*points: tuple[float, float], **calls: float) -> list[dict]:
    """Of (seconds, reward); the other figures grow with the seconds."""
    spent = CALLS | {"decode": 1} | calls
    return [
        {"reward": reward, "seconds": seconds, "wall": 2 * seconds, "epochs": seconds / 10}
        | {"trajectories": 6.4 * seconds} | {kind: seconds * number for kind, number in spent.items()}
        for seconds, reward in points
    ]  # fmt: skip


def test_reached_is_read_off_the_line_to_the_first_point_that_is_there():
    found = reached(curve((0, 0.0), (10, 1.0), (20, 0.5), (30, 3.0)), 0.75)
    assert found == pytest.approx(curve((7.5, 0.75))[0])
    assert reached(curve((0, 0.0), (10, 0.5), (20, 0.4), (30, 1.4)), 0.9)["seconds"] == pytest.approx(25)
    assert reached(curve((0, 0.0), (10, 1.0)), 1.0)["seconds"] == 10
    assert reached(curve((0, 0.5), (10, 1.0)), 0.4)["seconds"] == 0
    assert reached(curve((0, 0.0), (10, 1.0)), 1.01) is None


def costs(**changes) -> Size:
    known = dict.fromkeys(plan.Costs.__dataclass_fields__, 0)
    numbers = {"unet": 1.0, "unet_train": 10.0, "decode": 100.0, "reward": 1000.0, "flow": 1e4, "flow_train": 1e5}
    return Size(plan.Costs(**(known | numbers | changes)), 2)


def test_flops_are_the_calls_at_what_they_cost():
    spent = CALLS | {"guided": 3, "single": 1, "guided_train": 2, "single_train": 1, "decode": 4, "decode_train": 1}
    spent |= {"flow": 5, "flow_train": 6}
    assert flops(spent, costs()) == (2 * 3 + 1) * 1 + (2 * 2 + 1) * 10 + (4 + 2) * 1100 + 5e4 + 6e5
    assert flops(spent, costs()._replace(passes=1)) == (3 + 1) + (2 + 1) * 10 + 6 * 1100 + 5e4 + 6e5
    assert flops(CALLS | {"decode": 1}, costs(reward=None)) == 100


SEEDS = [
    {USUAL: curve((0, 0.0), (50, 0.4), (100, 1.0)), PUBLISHED: curve((0, 0.0), (400, 0.8)),
     "good": curve((0, 0.0), (20, 2.0), guided=3)},
    {USUAL: curve((0, 0.0), (100, 2.0)), PUBLISHED: curve((0, 0.0), (200, 1.0), (400, 3.0)),
     "good": curve((0, 0.0), (30, 1.0), (40, 0.9))},
]  # fmt: skip


def test_rows_compare_seed_by_seed_and_say_what_was_not_reached():
    usual, published, good = rows(SEEDS, USUAL, PUBLISHED, costs())
    assert (usual["reached"], published["reached"], good["reached"]) == (2, 1, 1)
    assert usual["to_usual"][0] == 1 and not usual["to_usual_at_most"]
    assert good["seconds"] == (10.0, None, None)  # of the seed that is there
    assert good["to_usual"][0] == pytest.approx(0.1)
    assert good["to_published"][0] == pytest.approx(10 / 400) and good["to_published_at_most"]  # it never arrives
    assert published["seconds"][0] == 300 and published["to_published"][0] == 1
    assert published["trajectories"][0] == pytest.approx(6.4 * 300) and published["decodes"][0] == pytest.approx(300)
    mean, low, high = usual["seconds"]
    assert mean == low == high == 100
    assert good["best"] == [2.0, 1.0] and good["gflop"][0] == pytest.approx((2 * 30 + 10 * 1100) / 1e9)


def test_nothing_is_compared_with_who_was_there_before_it_began():
    there = [{USUAL: curve((0, 1.0), (100, 0.5)), "good": curve((0, 0.0), (20, 1.0))}]  # and nobody ran the published
    usual, good = rows(there, USUAL, PUBLISHED, costs())
    assert usual["seconds"][0] == 0 and usual["to_usual"] is None
    assert good["seconds"][0] == 10 and good["to_usual"] is None and good["to_published"] is None
    assert "| good | 1 of 1 | 10 |" in table([good])


def test_tables_and_picture_have_every_entry(tmp_path):
    lines = rows(SEEDS, USUAL, PUBLISHED, costs())
    text = table(lines)
    assert "| good | 1 of 2 (in 20 to 40 s) | 10 |" in text and "<= 0.025" in text and "2.00 1.00 |" in text
    sizes = sizes_table([*lines, lines[0] | {"name": "nobody", "points": [None]}], {"small": costs()})
    assert sizes.splitlines()[0] == "| PFLOP | small |" and "| nobody | - |" in sizes
    assert f"| good | {(2 * 30 + 10 * 1100) / 1e15:.3g} |" in sizes
    picture(SEEDS, USUAL).savefig(tmp_path / "race.png")
    assert len(np.unique(np.asarray(Image.open(tmp_path / "race.png")))) > 20


@pytest.mark.parametrize(
    "epochs, seconds, wanted, ended",
    [
        (9, 10, None, True),  # all of its epochs
        (3, 1e9, None, False),  # (b) is not done
        (3, 10, {"reward": 0.9, "seconds": 20.0}, True),
        (3, 10, {"reward": 1.1, "seconds": 20.0}, False),
        (3, 20 * LIMIT + 1, {"reward": 1.1, "seconds": 20.0}, True),
    ],
)
def test_an_entry_stops_at_the_reward_at_the_end_or_at_the_limit(epochs, seconds, wanted, ended):
    config = SimpleNamespace(train=SimpleNamespace(epochs=9))
    racer = SimpleNamespace(config=config, epochs=epochs, seconds=seconds, curve=curve((0, 0.0), (10, 1.0)))
    assert over(racer, wanted) == ended


def test_whoever_has_spent_least_is_next(monkeypatch, tmp_path):
    turns = []

    class Fake:
        def __init__(self, entry, config, images) -> None:
            self.name, self.seconds, self.epochs = config, 0.0, 0
            self.config, self.curve = SimpleNamespace(train=SimpleNamespace(epochs=4)), []

        def judge(self) -> None:
            self.curve += curve((self.seconds, self.epochs / 4))

        def turn(self) -> None:
            turns.append(self.name)
            self.seconds, self.epochs = self.seconds + {USUAL: 1, PUBLISHED: 3}[self.name], self.epochs + 1
            self.judge()

    monkeypatch.setattr(race, "Racer", Fake)
    monkeypatch.setattr(race, "settings", lambda name, seed, overrides: name)
    race.race(1, [USUAL, PUBLISHED], 4, [], tmp_path / "seed")
    curves = json.loads((tmp_path / "seed").read_text())
    assert turns[:5] == [USUAL, PUBLISHED, USUAL, USUAL, USUAL]
    assert [len(curves[name]) for name in (USUAL, PUBLISHED)] == [5, 5]


def test_every_entry_is_a_valid_config_of_the_same_task():
    for name in ENTRIES:
        config = settings(name, 3, [])
        assert config.run.seed == 3 and config.model.path == "models/shapes"
        assert config.reward.name.removesuffix("_soft") == race.TASK["reward.name"]
        assert config.train.trajectories % config.sampler.chunk_size == 0
    assert ENTRIES[USUAL].way == "usual_ddpo" and ENTRIES[PUBLISHED].way == "published"


def test_sizes_are_counted_with_a_log_flow():
    size = size_of("sd15_hpsv2.yaml")
    assert size.passes == 2 and size.cost.unet == pytest.approx(0.804e12, rel=0.01)
    assert size.cost.flow > 0 and size.cost.reward == plan.REWARDS["hpsv2"]


SMALL = (
    "prompts.path=[a red circle]", "sampler.steps=5", "sampler.chunk_size=4", "prompts.per_prompt=4", "lora.rank=2",
    "train.trajectories=8", "train.updates_per_epoch=2", "train.epochs=2", "learner.micro_batch=4",
)  # fmt: skip


@pytest.mark.parametrize("way", ["usual_ddpo", "published", "ours"])
def test_calls_counted_cost_what_torch_counts(small_settings, way, monkeypatch):
    """Of an epoch on the clock; judgements are not counted."""
    name = {"usual_ddpo": USUAL, "published": PUBLISHED, "ours": "ours"}[way]
    monkeypatch.setitem(ENTRIES, "ours", Entry("ours", {"objective.kind": "ddpo"}))
    path = next(each for each in small_settings if each.startswith("model.path"))
    config = settings(name, 1, [*SMALL, path])
    racer = Racer(ENTRIES[name], config, 4)
    racer.judge()
    assert set(racer.calls.counts.values()) == {0}
    racer.calls.on = True
    counted = count(lambda: racer.train(0), torch.device("cpu"))
    # The plan counts attention as one kernel, which here is 7 % of the network more.
    assert flops(racer.calls.counts, Size(plan.costs(config), 2)) == pytest.approx(counted, rel=0.09)
    assert racer.calls.counts["guided_train"] == 8 * config.objective.span(5)[1]
    assert racer.calls.counts["guided"] == 8 * 5
    assert racer.calls.counts["decode"] == {"published": 8 * (1 + 2 * 5)}.get(way, 8)


def test_a_turn_is_an_epoch_on_the_clock_with_judgements_beside_the_clock():
    """Judged by every second epoch, and at the end."""
    racer = Racer.__new__(Racer)
    racer.entry, racer.calls, racer.seconds, racer.wall, racer.epochs = Entry("ours", {}, 2), Calls(), 0.0, 0.0, 0
    racer.config, judged = SimpleNamespace(train=SimpleNamespace(epochs=3)), []
    racer.train = lambda number: racer.calls.add("decode", 10 + number)
    racer.judge = lambda: judged.append((racer.epochs, racer.seconds)) or racer.calls.add("decode", 1000)
    for _ in range(3):
        racer.turn()
    assert [epochs for epochs, _ in judged] == [2, 3] and 0 < judged[0][1] < judged[1][1]
    assert racer.calls.counts["decode_train"] == 10 + 11 + 12  # with a way back, as nobody said otherwise


@pytest.mark.long
def test_a_small_race_is_run_kept_and_reported(tmp_path, small_settings, monkeypatch, capsys):
    path = next(each for each in small_settings if each.startswith("model.path"))
    asked = ["--out", str(tmp_path), "--seeds", "1", "--images", "4", *SMALL, path]
    assert main(asked) == 0
    found = json.loads((tmp_path / "race.json").read_text())
    assert set(found["seeds"]["1"]) == set(ENTRIES) == set(found["about"]["settings"])
    for name, points in found["seeds"]["1"].items():
        assert points[0]["seconds"] == 0 and points[0]["decode"] == 0 and points[-1]["epochs"] in (1, 2)
        seconds = [point["seconds"] for point in points]
        assert seconds == sorted(seconds) and seconds[-1] > 0 and points[-1]["trajectories"] == 8 * points[-1]["epochs"]
        assert (
            points[-1]["guided"] + points[-1]["guided_train"] > 0
            and points[-1]["decode"] + points[-1]["decode_train"] > 0
        )
        assert all(np.isfinite(point["reward"]) for point in points), name
    assert found["about"]["hardware"]["cpu"] and found["about"]["git_commit"]
    text = (tmp_path / "race.md").read_text()
    assert all(f"| {name} |" in text for name in ENTRIES) and "FLUX.1-dev" in text
    assert Image.open(tmp_path / "race.png").size == (1080, 600)

    monkeypatch.setattr(race, "race", lambda *_: pytest.fail("this seed is there"))
    assert main(asked) == 0
    assert (tmp_path / "race.md").read_text() == text


def test_bad_settings_are_told_in_a_line(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "out"), "sampler.steps=0"]) == 2
    assert "sampler.steps" in (told := capsys.readouterr().err) and told.count("\n") == 1
    assert not (tmp_path / "out").exists()
