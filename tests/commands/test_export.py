"""Exports: other programs draw the sampler's own pixels from them, and their cards tell what the records do."""

import json
import os
import re
import shutil
import subprocess
import sys

import fsspec
import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

from commands import export
from diffusion import lora, lora_files, noise
from diffusion.base_model import BaseModel, Decoder
from diffusion.rollout import Sampler
from diffusion.trajectory import Chunk
from evaluation import finished_run
from evaluation.metrics import paired_interval
from learner.run import main as run_main
from records import checkpoint
from records.storage import Storage
from reports import model_card

PROMPTS = ("a red circle on a white background", "a green ring")
LEARNING = ("lora.alpha=3", "learner.learning_rate=0.05", "run.runner=inprocess")

# Runs in a fresh process, with nothing of ours imported: each export as its card says, fed the recorded noise.
PLAIN_DIFFUSERS = """
import json, os, re, sys, numpy as np, torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

base, recorded, out, folders = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
torch.set_num_threads(1)
data = np.load(recorded)

class Recorded(DDIMScheduler):
    def step(self, *args, eta=0.0, generator=None, **kwargs):
        return super().step(*args, eta=eta, variance_noise=noise.pop(0), **kwargs)

images = {}
for form, folder in {"base": None, **folders}.items():
    code = "pipe = StableDiffusionPipeline.from_pretrained(BASE)"
    if folder:
        code = re.search("```python\\n(.*?)```", open(f"{folder}/README.md").read(), re.S)[1]
        code, call = code.rsplit("\\npipe(", 1)
        code = re.sub('from_pretrained\\("(?!path)[^"]+"', "from_pretrained(BASE", code)
        code = code.replace("path/to/this/folder", folder)
    names = {"BASE": base, "StableDiffusionPipeline": StableDiffusionPipeline}
    exec(code, names)
    pipe = names["pipe"]
    if folder:
        os.chdir(os.path.dirname(out))
        exec("pipe(" + call, names)
        os.rename("image.png", f"{form}.png")
    pipe.scheduler = Recorded.from_config(pipe.scheduler.config)
    noise = [torch.from_numpy(step) for step in data["noise"]]
    images[form] = pipe(
        list(data["prompts"]), latents=torch.from_numpy(data["initial"]), num_inference_steps=len(noise),
        guidance_scale=3.0, eta=1.0, output_type="np",
    ).images
np.savez(out, **images)
"""


@pytest.fixture(scope="module")
def run(small_settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run_main([*small_settings, *LEARNING, f"run.dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def exports(run):
    """Folder by format, where they go by default."""
    for form in ("diffusers", "kohya", "fused"):
        assert export.main([str(run), "--format", form]) == 0
    return {form: run / "export" / form for form in ("diffusers", "kohya", "fused")}


@pytest.fixture
def copied(run, tmp_path):
    """A run that may be changed."""
    shutil.copytree(run, tmp_path / "run", symlinks=True, ignore=shutil.ignore_patterns("export"))
    return tmp_path / "run"


def front_and_page(folder) -> tuple[dict, str]:
    _, front, page = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), page


def metadata(file) -> dict[str, str]:
    with safe_open(str(file), "pt") as opened:
        return opened.metadata()


def refused(capsys, *arguments) -> str:
    """What is said on stderr of a command that ends with status 2."""
    capsys.readouterr()
    assert export.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("learner.export: ") and captured.err.count("\n") == 1
    return captured.err


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_plain_diffusers_draws_the_samplers_pixels(run, exports, tiny_pipeline, tmp_path):
    """As the card says to, and with the recorded noise to the pixel."""
    opened = finished_run.open_trained(str(run), None, print)
    model = BaseModel(tiny_pipeline)
    snapshot = lora_files.attach(model, opened.adapter())
    assert snapshot.sha256 == opened.checkpoint.manifest["adapter_sha256"]
    settings = opened.config.rollout_settings()
    trajectories, _ = Sampler(model, settings).sample(Chunk(0, "evaluate", 0, 11, PROMPTS, (0, 1)), snapshot)
    ours = Decoder(tiny_pipeline)(torch.from_numpy(trajectories.states[:, -1])).permute(0, 2, 3, 1).numpy()
    draws = [noise.normal(11, noise.EVALUATION, 0, range(2), i, model.latent_shape) for i in range(5)]
    recorded, out, script = tmp_path / "recorded.npz", tmp_path / "images.npz", tmp_path / "plain.py"
    np.savez(recorded, initial=draws[0], noise=np.stack(draws[1:]), prompts=np.array(PROMPTS))
    script.write_text(PLAIN_DIFFUSERS)
    folders = json.dumps({form: str(folder) for form, folder in exports.items()})
    subprocess.run(
        [sys.executable, script, tiny_pipeline, recorded, out, folders], check=True, timeout=300, capture_output=True
    )
    theirs = np.load(out)
    moved = np.abs(theirs["base"] - ours).mean()
    apart = {form: float(np.abs(theirs[form] - ours).max()) for form in exports}
    print(f"max pixel difference {apart}; the LoRA moves pixels by {moved:.3f} on average")
    assert moved > 0.02
    assert max(apart.values()) < 2e-3
    assert all((tmp_path / f"{form}.png").stat().st_size for form in exports)


def test_the_files_say_where_they_come_from(run, exports):
    about = json.loads((run / "run.json").read_text())
    adapter = lora_files.read(exports["diffusers"])
    found = metadata(exports["diffusers"] / lora.DIFFUSERS_FILE)
    assert json.loads(found[lora.METADATA_KEY])["unet.lora_alpha"] == 3 and found["format"] == "pt"
    kohya = metadata(exports["kohya"] / lora.KOHYA_FILE)
    for each in (found, kohya):
        assert each["tributary.run_id"] == about["run_id"] and each["tributary.adapter_sha256"] == adapter.sha256
        assert each["tributary.reward"] == "shapes_alignment" and "exp(30720 x reward)" in each["tributary.objective"]
        assert each["tributary.version"] and each["tributary.base_model"] and each["tributary.step"] == "2"
    assert (kohya["ss_network_dim"], kohya["ss_network_alpha"]) == ("2", "3.0")
    assert kohya["ss_network_module"] == "networks.lora" and kohya["ss_output_name"] == "run"
    assert "ss_base_model_version" not in kohya  # it is no Stable Diffusion
    manifest = json.loads((exports["fused"] / "tributary.json").read_text())
    assert manifest["adapter_sha256"] == adapter.sha256 and manifest["form"] == "fused"
    assert "unet/diffusion_pytorch_model.safetensors" in manifest["files"]
    assert lora_files.read(exports["kohya"]).sha256 == adapter.sha256
    assert set(files_of(exports["kohya"])) == {
        lora.KOHYA_FILE, "README.md", "tributary.json", "before.png", "after.png"
    }  # fmt: skip


@pytest.mark.parametrize("form", ["diffusers", "kohya", "fused"])
def test_equal_exports_are_equal_files_and_tell_no_paths(run, exports, tmp_path, tiny_pipeline, form):
    first = files_of(exports[form])
    for i in range(3 if form != "fused" else 1):
        out = tmp_path / f"deep/{i}"
        assert export.main([str(run), "--format", form, "--out", str(out)]) == 0
        assert files_of(out) == first
        assert all(path.stat().st_mode & 0o077 for path in out.rglob("*"))  # not for their owner alone
    assert export.main([str(run), "--format", form]) == 0  # again in its place
    assert files_of(exports[form]) == first
    assert sorted(path.name for path in (run / "export").iterdir()) == ["diffusers", "fused", "kohya"]
    for content in first.values():
        assert tiny_pipeline.encode() not in content and str(run.parent).encode() not in content


def test_the_card_has_the_runs_figures(run, exports):
    opened = finished_run.open_trained(str(run), None, print)
    before, after = (np.array(opened.records.evaluation(epoch)["reward"]) for epoch in (-1, 1))
    low, high = paired_interval(before, after)
    row = [f"{before.mean():.4g}", f"{after.mean():.4g}", f"{(after - before).mean():+.3g}"]
    for form, folder in exports.items():
        front, page = front_and_page(folder)
        assert f"| shapes_alignment (trained on) | {' | '.join(row)} | {low:+.3g} to {high:+.3g} |" in page
        assert "4 fixed images" in page and "after 2 of 2 epochs" in page
        assert front["license"] == "other" and front["library_name"] == "diffusers" and "base_model" not in front
        assert front["pipeline_tag"] == "text-to-image" and {"gflownet", "dag-db", "tributary"} < set(front["tags"])
        assert ("lora" in front["tags"]) == (form != "fused")
        for words in (
            "# run\n", "dag_db (corrected): target proportional to exp(30720 x reward)", "2 epochs, 16 trajectories",
            "rank 2, alpha 3, on to_k, to_out.0, to_q, to_v", "4 DDIM steps, eta 1, guidance 3", "shapes_placed.txt",
            "at the right", opened.records.run_id, "(before.png)", "Apache-2.0", "## Limits",
            "num_inference_steps=4, eta=1.0, guidance_scale=3.0",
        ):  # fmt: skip
            assert words in page
        assert ("ComfyUI: put" in page) == (form == "kohya")


def test_an_earlier_step_has_the_figures_of_its_time(run, tmp_path):
    assert export.main([str(run), "--format", "diffusers", "--step", "1", "--out", str(tmp_path / "1")]) == 0
    _, page = front_and_page(tmp_path / "1")
    assert "1 epochs, 8 trajectories, 1 policy updates" in page and "had not evaluated" in page
    assert not (tmp_path / "1" / "after.png").exists()
    saved = checkpoint.load(Storage(str(run)), 1, json.loads((run / "run.json").read_text())["run_id"])
    assert lora_files.read(tmp_path / "1").sha256 == saved.manifest["adapter_sha256"]


def test_figures_of_an_evaluation_apart(copied, tmp_path, capsys):
    figure = {"value": 0.51234, "low": 0.4, "high": 0.6, "floor": 0.01}
    figures = {"reward": figure | {"base": 0.3}, "vendi": figure, "fid": None, "kid": None, "accuracy": figure}
    places = {step: copied / f"evaluation/step-{step:06d}.json" for step in (0, 2, 9)}
    for step, place in places.items():
        place.write_text(json.dumps(figures | {"vendi": figure | {"value": step + 0.5}}))
    assert export.main([str(copied), "--format", "diffusers", "--out", str(tmp_path / "out")]) == 0
    _, page = front_and_page(tmp_path / "out")
    assert "Evaluated at step 2" in page  # the newest until then
    assert "| Reward | 0.5123 | 0.4 to 0.6 | 0.3 | 0.01 |" in page
    assert "| Vendi score | 2.5 | 0.4 to 0.6 |  | 0.01 |" in page and "| FID" not in page
    places[2].write_text("{")
    assert "step-000002.json" in refused(capsys, copied, "--format", "diffusers", "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_hub_id_of_a_folder_can_be_said(run, tmp_path):
    hub = "CompVis/stable-diffusion-v1-4"
    for form, relation in (("diffusers", "adapter"), ("fused", "finetune")):
        out = tmp_path / form
        assert export.main([str(run), "--format", form, "--base-model", hub, "--out", str(out)]) == 0
        front, page = front_and_page(out)
        assert (front["base_model"], front["base_model_relation"]) == (hub, relation)
        assert front["license"] == "creativeml-openrail-m" and hub in page
    assert metadata(tmp_path / "diffusers" / lora.DIFFUSERS_FILE)["tributary.base_model"] == hub


def test_a_run_on_an_object_store(run, exports, capsys):
    url = f"memory://{run.name}-store/run"
    fs = fsspec.filesystem("memory")
    for name, content in files_of(run).items():
        if not name.startswith(("export/", "checkpoints/latest")):
            fs.pipe_file(f"/{run.name}-store/run/{name}", content)
    for _ in range(2):
        assert export.main([url, "--format", "kohya"]) == 0
    here = {name: fs.cat_file(f"/{run.name}-store/run/export/kohya/{name}") for name in files_of(exports["kohya"])}
    assert here == files_of(exports["kohya"])
    fs.pipe_file(f"/{run.name}-store/mine/notes.txt", b"mine")
    assert "notes.txt" in refused(capsys, run, "--format", "kohya", "--out", f"memory://{run.name}-store/mine")


def test_a_torn_checkpoint_is_passed_over(copied, tmp_path, capsys):
    (copied / "checkpoints/step-000002/lora" / lora.DIFFUSERS_FILE).write_bytes(b"torn")
    assert "sha256 differs" in refused(capsys, copied, "--format", "diffusers", "--step", "2")
    assert export.main([str(copied), "--format", "diffusers", "--out", str(tmp_path / "out")]) == 0
    assert "warning" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/tributary.json").read_text())["step"] == "1"


def test_another_adapter_than_the_runs_is_refused(copied, capsys):
    storage = Storage(str(copied))
    saved = checkpoint.load(storage, 2, json.loads((copied / "run.json").read_text())["run_id"])
    about = {key: value for key, value in saved.manifest.items() if key not in ("files", "format")}
    checkpoint.save(storage, {**about, "adapter_sha256": "0" * 64}, saved.files)
    assert "not the adapter that the run had" in refused(capsys, copied, "--format", "kohya")
    assert not (copied / "export").exists()


def test_what_is_no_run_or_has_no_checkpoint(copied, tmp_path, capsys):
    assert "use --format diffusers, kohya or fused" in refused(capsys, copied, "--format", "peft")
    assert "there is no run.json" in refused(capsys, tmp_path / "nothing", "--format", "fused")
    assert "there are 0, 1, 2" in refused(capsys, copied, "--format", "fused", "--step", "7")
    shutil.rmtree(copied / "checkpoints")
    assert "no checkpoint yet" in refused(capsys, copied, "--format", "fused")
    (copied / "config.yaml").write_text("{")
    assert "config.yaml" in refused(capsys, copied, "--format", "fused")


def test_a_base_model_that_is_gone(copied, tmp_path, capsys):
    """Only the fused form needs it."""
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(re.sub(r"(\n  path: )/\S+", r"\1/gone/model", text, count=1))
    assert "no such folder: /gone/model" in refused(capsys, copied, "--format", "fused")
    assert not (copied / "export").exists() or not list((copied / "export").iterdir())
    assert export.main([str(copied), "--format", "kohya", "--out", str(tmp_path / "out")]) == 0
    _, page = front_and_page(tmp_path / "out")
    assert "dag_db (corrected), beta 30." in page and "U-Net of model," in page and "/gone" not in page


def test_folders_are_written_whole_and_never_over_anothers(run, exports, tmp_path, monkeypatch, capsys):
    """The rest is in test_export_folder.py."""
    assert "not as an export wrote it" in refused(capsys, run, "--format", "kohya", "--out", run)
    first = files_of(exports["kohya"])

    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(model_card, "card", fail)
    assert "no space left" in refused(capsys, run, "--format", "kohya")
    assert files_of(exports["kohya"]) == first
    assert "no space left" in refused(capsys, run, "--format", "fused", "--out", tmp_path / "other")
    assert not list(tmp_path.iterdir())


LIGHT = """
import sys
from commands import export
status = export.main(sys.argv[1:])
heavy = {"torch", "diffusers", "transformers", "ray", "mlflow"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else status)
"""


@pytest.mark.parametrize("arguments", [("NOTHING", "--format", "fused"), ("RUN", "--format", "fused", "--step", "7")])
def test_what_it_refuses_it_refuses_at_once(run, tmp_path, arguments):
    """One line, and not transformers' of torchvision, which it does without on purpose."""
    quiet = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    given = [{"NOTHING": str(tmp_path), "RUN": str(run)}.get(one, one) for one in arguments]
    done = subprocess.run([sys.executable, "-c", LIGHT, *given], capture_output=True, text=True, env=quiet, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("learner.export: ") and done.stderr.count("\n") == 1


def test_a_run_that_somebody_sent_is_read_and_not_obeyed(copied, tmp_path, capsys):
    """Its words are words, a file of another kind is one line, and no link or name leads out of it."""
    about = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps(about | {"name": "a\n---\nlicense: mit\n# `b` | {{ 7 * 7 }}\x1b[2J"}))
    out = tmp_path / "out"
    assert export.main([str(copied), "--format", "diffusers", "--out", str(out)]) == 0
    front, page = front_and_page(out)
    assert front["license"] == "other" and "# a --- license: mit # 'b' \\| {{ 7 * 7 }}[2J" in page
    (copied / "metrics.jsonl").write_text('{"epoch": 0, "trajectories": "many"}\n')
    assert "its files are damaged" in refused(capsys, copied, "--format", "kohya")
    checkpoint_folder = copied / "checkpoints/step-000002"
    checkpoint_folder.rename(tmp_path / "outside")
    checkpoint_folder.symlink_to(tmp_path / "outside")
    assert "leads out" in refused(capsys, copied, "--format", "kohya", "--step", "2")
