"""The full-size run with tiny models: every branch but the size."""

import json
import os
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import full_size, random_models
from benchmarks.random_models import MODELS, build
from diffusion.parts import check_parts, part_config


@pytest.mark.ray
@pytest.mark.slow
def test_the_service_runs_goes_on_exports_and_is_reloaded_and_the_plan_stands_beside(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert full_size.main(["--tiny", "--folder", str(tmp_path), "--output", str(file)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]  # weights and run are gone
    shown = json.loads(file.read_text())["tiny"]
    roles = {"sampler", "reward actor", "learner rank"}
    assert set(shown["planned_bytes"]) == roles and min(shown["planned_bytes"].values()) > 0
    assert roles | {"driver", full_size.OTHERS} <= set(shown["peak_bytes"])
    assert all(1e8 < shown["peak_bytes"][role] < shown["peak_bytes_together"] for role in roles)
    assert shown["object_store_bytes"] > 0 and shown["checkpoint_bytes"] > 0 < shown["change_by_lora"]
    assert len(shown["rewards"]) == len(shown["seconds"]["sampling a trajectory"]) == 2 * full_size.EPOCHS
    assert len(shown["seconds"]["training an epoch"]) == full_size.EPOCHS
    said = capsys.readouterr().out
    assert all(f"| {role} |" in said for role in roles)


@pytest.mark.parametrize("name", MODELS)
def test_a_built_pipeline_is_the_published_one_with_drawn_weights(name, tmp_path):
    model = MODELS[name]
    folder = build(model, tmp_path / "a", tiny=True)
    check_parts(str(folder))  # every tensor is there, in its shape
    network = next(iter(model.tiny))
    published = json.loads((random_models.PUBLISHED / model.path / network / "config.json").read_text())
    kept = published.keys() - model.tiny[network].keys()
    assert kept and all(part_config(str(folder), network)[key] == published[key] for key in kept)
    file = f"{network}/diffusion_pytorch_model.safetensors"
    tensors, again = load_file(folder / file), load_file(build(model, tmp_path / "b", tiny=True) / file)
    assert all(torch.equal(tensor, again[key]) for key, tensor in tensors.items())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    sizes = [
        t.float().std() * t[0].numel() ** 0.5 for key, t in tensors.items() if t.numel() > 2000 and "embed" not in key
    ]
    assert sizes and all(size == pytest.approx(1, rel=0.1) for size in sizes)


def test_what_is_planned_is_read_from_the_plan_and_compared_with_what_stands_without_weights():
    plan = (
        "actors                     1 sampler, each 0.5 CPU\n"
        "memory                     text encoders (once, before training): 3.3 GB in float32; the embeddings of 2 GB\n"
        "                           sampler: 2 GB = network in bfloat16 1.5 GB + LoRA 0.5 GB\n"
        "                           learner rank: 0.5 GB = network in bfloat16 0.5 GB\n"
    )
    found = full_size.planned(plan)
    assert found == {"text encoders": 3.3e9, "sampler": 2e9, "learner rank": 0.5e9}
    tiny = {"peak_bytes": {"sampler": 5e8, "driver": 1e8}}
    peaks = {"peak_bytes": {"sampler": 3e9, "driver": 2e8}, "peak_bytes_without_files": {"sampler": 1e9, "driver": 1e8}}
    full = {"planned_bytes": found, "peak_bytes_together": 4e9, **peaks}
    lines = full_size.table({"tiny": tiny, "full": full}).splitlines()
    assert "| sampler | 2.00 GB | 2.50 GB | 3.00 GB | +20% | 1.00 GB |" in lines
    assert "| driver |  |  | 0.20 GB |  | 0.10 GB |" in lines


def test_a_command_that_fails_says_what_it_said():
    with pytest.raises(full_size.Failed, match="exit status 3\nhear this"):
        full_size.command("-c", "print('hear this'); raise SystemExit(3)")


def test_memory_of_a_process_before_it_had_its_name_is_its_roles():
    """Ray's workers load their models under the name of an idle one."""

    def wait_for(condition):
        deadline = time.monotonic() + 60
        while not any(condition(*peak) for peak in list(watch._peaks.values())):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    large = "x=$(head -c 60000000 /dev/zero | tr '\\0' a); read line; exec -a ray::SamplerActor cat"
    with (
        full_size.Watch(os.getpid()) as watch,
        subprocess.Popen(["bash", "-c", large], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process,
    ):
        wait_for(lambda role, most, alone: role == full_size.OTHERS and alone > 6e7)
        process.stdin.write(b"\n")
        process.stdin.flush()
        wait_for(lambda role, most, alone: role == "sampler")
        process.stdin.close()
    assert watch.most["sampler"] >= watch.alone["sampler"] > 6e7 and watch.together > 6e7
