"""Exports: other programs draw the sampler's own pixels from them, and their cards tell what the records do."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open

from commands import export
from diffusion import lora, lora_files, noise
from diffusion.base_model import BaseModel, Decoder
from diffusion.rollout import Sampler
from diffusion.trajectory import Chunk
from evaluation.adapters import open_trained
from evaluation.metrics import paired_interval
from learner.config import load_config
from records import checkpoint
from records.run_folder import Records
from records.storage import Storage
from reports import model_card

PROMPTS = ("a red circle on a white background", "a green ring")
FORMS = ("diffusers", "kohya", "fused")


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    folder = shutil.copytree(finished_run, tmp_path_factory.mktemp("runs") / "run", symlinks=True)
    for form in FORMS:
        assert export.main([str(folder), "--format", form]) == 0
    return folder


@pytest.fixture(scope="module")
def exports(exported):
    return {form: exported / "export" / form for form in FORMS}


def front_and_page(folder) -> tuple[dict, str]:
    _, front, page = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), page


def metadata(file) -> dict[str, str]:
    with safe_open(str(file), "pt") as opened:
        return opened.metadata()


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_plain_diffusers_draws_the_samplers_pixels(exported, exports, tiny_pipeline, tmp_path, monkeypatch):
    """As the card says to, and with the recorded noise to the pixel."""
    monkeypatch.chdir(tmp_path)
    opened, model = open_trained(str(exported), None, print), BaseModel(tiny_pipeline)
    snapshot = lora_files.attach(model, opened.adapter())
    assert snapshot.sha256 == opened.checkpoint.manifest["adapter_sha256"]
    settings = opened.config.rollout_settings()
    trajectories, _ = Sampler(model, settings).sample(Chunk(0, "evaluate", 0, 11, PROMPTS, (0, 1)), snapshot)
    ours = Decoder(tiny_pipeline)(torch.from_numpy(trajectories.states[:, -1])).permute(0, 2, 3, 1).numpy()
    normal = (noise.normal(11, noise.EVALUATION, 0, range(2), i, model.latent_shape) for i in range(5))
    initial, *draws = map(torch.from_numpy, normal)

    class Recorded(DDIMScheduler):
        def step(self, *arguments, eta=0.0, generator=None, **more):
            return super().step(*arguments, eta=eta, variance_noise=recorded.pop(0), **more)

    apart = {}
    for form, folder in {"base": None, **exports}.items():
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
        if folder:
            code = re.search("```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
            code = re.sub('from_pretrained\\("(?!path)[^"]+"', f'from_pretrained("{tiny_pipeline}"', code)
            exec(code.replace("path/to/this/folder", str(folder)), names := {})
            Path("image.png").rename(f"{form}.png")
            pipeline = names["pipe"]
        pipeline.scheduler, recorded = Recorded.from_config(pipeline.scheduler.config), list(draws)
        theirs = pipeline(list(PROMPTS), latents=initial, num_inference_steps=4, guidance_scale=settings.guidance,
                          eta=1.0, output_type="np").images  # fmt: skip
        apart[form] = float(np.abs(theirs - ours).max())
    print(f"max pixel difference {apart}")
    assert apart.pop("base") > 0.02 and max(apart.values()) < 2e-3


def test_the_files_say_where_they_come_from(exported, exports):
    about = json.loads((exported / "run.json").read_text())
    adapter = lora_files.read(exports["diffusers"])
    plain = metadata(exports["diffusers"] / lora.DIFFUSERS_FILE)
    assert lora_files.METADATA_KEY not in plain and plain["format"] == "pt" and adapter.alpha == 3
    kohya = metadata(exports["kohya"] / lora.KOHYA_FILE)
    for each in (plain, kohya):
        assert each["tributary.run_id"] == about["run_id"] and each["tributary.adapter_sha256"] == adapter.sha256
        assert each["tributary.reward"] == "shapes_alignment" and "exp(30720 x reward)" in each["tributary.objective"]
        assert each["tributary.version"] and each["tributary.base_model"] and each["tributary.step"] == "2"
    assert (kohya["ss_network_dim"], kohya["ss_network_alpha"]) == ("2", "3.0")
    assert kohya["ss_network_module"] == "networks.lora" and kohya["ss_output_name"] == about["name"]
    assert "ss_base_model_version" not in kohya  # it is no Stable Diffusion
    manifest = json.loads((exports["fused"] / "tributary.json").read_text())
    assert manifest["adapter_sha256"] == adapter.sha256 and manifest["form"] == "fused"
    assert "unet/diffusion_pytorch_model.safetensors" in manifest["files"]
    assert lora_files.read(exports["kohya"]).sha256 == adapter.sha256
    names = {lora.KOHYA_FILE, "README.md", "tributary.json", "before.png", "after.png"}
    assert set(files_of(exports["kohya"])) == names


@pytest.mark.parametrize("form", FORMS)
def test_equal_exports_are_equal_files_and_tell_no_paths(exported, exports, tmp_path, tiny_pipeline, form):
    first, mask = files_of(exports[form]), os.umask(0o022)
    for place in (["--out", str(tmp_path / "deep")], []):  # and again in its place
        assert export.main([str(exported), "--format", form, *place]) == 0
    assert files_of(tmp_path / "deep") == files_of(exports[form]) == first
    os.umask(mask)
    assert all(path.stat().st_mode & 0o077 for path in (tmp_path / "deep").rglob("*"))  # not for their owner alone
    assert sorted(path.name for path in (exported / "export").iterdir()) == sorted(FORMS)
    for content in first.values():
        assert tiny_pipeline.encode() not in content and str(exported.parent).encode() not in content


def test_the_card_has_the_runs_figures(exported, exports):
    opened = open_trained(str(exported), None, print)
    before, after = (np.array(opened.records.evaluation(epoch)["reward"]) for epoch in (-1, 1))
    low, high = paired_interval(before, after, opened.records.evaluation(1)["prompt"])
    row = f"{before.mean():.4g} | {after.mean():.4g} | {(after - before).mean():+.3g} | {low:+.3g} to {high:+.3g}"
    for form, folder in exports.items():
        front, page = front_and_page(folder)
        assert front["license"] == "other" and front["library_name"] == "diffusers" and "base_model" not in front
        assert front["pipeline_tag"] == "text-to-image" and {"gflownet", "dag-db", "tributary"} < set(front["tags"])
        assert ("lora" in front["tags"]) == (form != "fused")
        for words in (
            f"| shapes_alignment (trained on) | {row} |", "4 fixed images (noise seed 5)", "after 2 of 2 epochs",
            "# finished\n", "dag_db (corrected): target proportional to exp(30720 x reward)",
            "2 epochs, 16 trajectories", "rank 2, alpha 3, on to_k, to_out.0, to_q, to_v",
            "4 DDIM steps, eta 1, guidance 3", "shapes_placed.txt", "at the top", opened.records.run_id,
            "(before.png)", "Apache-2.0", "## Limits", "num_inference_steps=4, eta=1.0, guidance_scale=3.0",
        ):  # fmt: skip
            assert words in page
        assert "ComfyUI: put" not in page and ("For diffusers alone" in page) == (form != "fused")


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_comfyui_and_a1111_are_named_for_what_they_know(run, monkeypatch, form):
    monkeypatch.setattr(lora_files, "generation", lambda _: "sd_v1")
    export.export(open_trained(str(run), None, print), form, str(run / "out"))
    _, page = front_and_page(run / "out")
    assert ("ComfyUI: put" in page) == (form == "kohya") and ("with `--format kohya`" in page) == (form != "kohya")


def test_figures_of_an_evaluation_apart(run, tmp_path, capsys):
    figure = {"value": 0.51234, "low": 0.4, "high": 0.6, "floor": 0.005, "floor_high": 0.01}
    settings = {"images": 32, "prompts": 8, "seed": 7, "features": "pixels"}
    figures = {
        "settings": settings,
        "absent": {"distance": "no prompt has two"},
        "reward": figure | {"base": 0.3},
        "vendi": figure,
        "fid": None,
        "kid": None,
        "accuracy": figure,
    }
    for step in (0, 2, 9):
        vendi = {"vendi": figure | {"value": step + 0.5}}
        (run / f"evaluation/step-{step:06d}-32-images-ab12cd34.json").write_text(json.dumps(figures | vendi))
    assert export.main([str(run), "--format", "diffusers", "--out", str(tmp_path / "out")]) == 0
    _, page = front_and_page(tmp_path / "out")
    assert "Evaluated at step 2 (" in page  # the newest until then
    assert "on 32 images of 8 prompts, noise seed 7, features pixels" in page and "not known: no prompt has two" in page
    assert "| Reward | 0.5123 | 0.4 to 0.6 | 0.3 | 0.01 |" in page
    assert "| Vendi score | 2.5 | 0.4 to 0.6 |  | 0.01 |" in page and "| FID" not in page
    (run / "evaluation/step-000002-32-images-ab12cd34.json").write_text("{")
    assert export.main([str(run), "--format", "diffusers", "--out", str(tmp_path / "other")]) == 0
    _, page = front_and_page(tmp_path / "other")
    assert "step-000002-32-images-ab12cd34.json" in capsys.readouterr().err and "Evaluated at step 0 (" in page


def test_the_hub_id_of_a_folder_can_be_said(finished_run, tmp_path):
    hub = "CompVis/stable-diffusion-v1-4"
    for form, relation in (("diffusers", "adapter"), ("fused", "finetune")):
        out = tmp_path / form
        assert export.main([str(finished_run), "--format", form, "--base-model", hub, "--out", str(out)]) == 0
        front, page = front_and_page(out)
        assert (front["base_model"], front["base_model_relation"]) == (hub, relation)
        assert front["license"] == "creativeml-openrail-m" and hub in page
    assert metadata(tmp_path / "diffusers" / lora.DIFFUSERS_FILE)["tributary.base_model"] == hub


def test_a_run_on_an_object_store(finished_run, exports, tmp_path, refused):
    place, fs = f"/{tmp_path.name}-store", fsspec.filesystem("memory")
    for name, content in files_of(finished_run).items():
        if not name.startswith("checkpoints/latest"):
            fs.pipe_file(f"{place}/run/{name}", content)
    for _ in range(2):
        assert export.main([f"memory:/{place}/run", "--format", "kohya"]) == 0
    written = {name: fs.cat_file(f"{place}/run/export/kohya/{name}") for name in files_of(exports["kohya"])}
    assert written == files_of(exports["kohya"])
    fs.pipe_file(f"{place}/mine/notes.txt", b"mine")
    assert "notes.txt" in refused("export", finished_run, "--format", "kohya", "--out", f"memory:/{place}/mine")


def test_a_torn_checkpoint_is_passed_over_and_the_earlier_ones_figures_are_told(run, tmp_path, refused, capsys):
    (run / "checkpoints/step-000002/lora" / lora.DIFFUSERS_FILE).write_bytes(b"torn")
    assert "sha256 differs" in refused("export", run, "--format", "diffusers", "--step", "2")
    assert export.main([str(run), "--format", "diffusers", "--out", str(tmp_path / "out")]) == 0
    assert "warning" in capsys.readouterr().err
    _, page = front_and_page(tmp_path / "out")
    assert "1 epoch, 8 trajectories, 1 policy update " in page and "had not evaluated" in page
    assert not (tmp_path / "out/after.png").exists()
    saved = open_trained(str(run), 1, print).checkpoint.manifest
    assert lora_files.read(tmp_path / "out").sha256 == saved["adapter_sha256"]


def test_what_cannot_be_exported(run, tmp_path, monkeypatch, refused):
    with monkeypatch.context() as patched:
        patched.setattr(model_card, "card", lambda *_: Path("/gone").read_text())
        assert "/gone" in refused("export", run, "--format", "fused") and not (run / "export").exists()
    assert "use --format diffusers, kohya or fused" in refused("export", run, "--format", "peft")
    text = (run / "config.yaml").read_text()
    elsewhere = re.sub(r"(\n  path: )/\S+", r"\1/gone/model", text, count=1)
    Records.open(Storage(str(run))).save_settings(elsewhere.encode())
    assert "no such folder: /gone/model" in refused("export", run, "--format", "fused")
    assert export.main([str(run), "--format", "kohya", "--out", str(tmp_path / "out")]) == 0  # it needs no base model
    _, page = front_and_page(tmp_path / "out")
    assert "dag_db (corrected), beta 30." in page and "U-Net of model," in page and "/gone" not in page
    storage, kohya = Storage(str(run)), ("export", run, "--format", "kohya")
    saved = checkpoint.load(storage, 2, json.loads((run / "run.json").read_text())["run_id"])
    about = {key: value for key, value in saved.manifest.items() if key not in ("files", "format")}
    checkpoint.save(storage, {**about, "adapter_sha256": "0" * 64}, saved.files)
    assert "not the adapter that the run had" in refused(*kohya)
    shutil.rmtree(run / "checkpoints")
    assert "no checkpoint yet" in refused(*kohya)
    (run / "config.yaml").write_text("{")
    assert "config.yaml" in refused(*kohya) and not (run / "export").exists()


def test_a_run_that_somebody_sent_is_read_and_not_obeyed(run, tmp_path, refused):
    """Its words are words, a file of another kind is one line, and no link or name leads out of it."""
    Records.open(Storage(str(run))).note(name="a\n---\nlicense: mit\n# `b` | {{ 7 * 7 }}\x1b[2J")
    assert export.main([str(run), "--format", "diffusers", "--out", str(tmp_path / "out")]) == 0
    front, page = front_and_page(tmp_path / "out")
    assert front["license"] == "other" and "# a --- license: mit # 'b' \\| {{ 7 * 7 }} [2J" in page
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_text('{"epoch": 0, "trajectories": "many"}\n')
    assert "line 1 of metrics.jsonl" in refused("export", run, "--format", "kohya")
    (run / "metrics.jsonl").write_bytes(whole)
    checkpoint_folder = run / "checkpoints/step-000002"
    checkpoint_folder.rename(tmp_path / "outside")
    checkpoint_folder.symlink_to(tmp_path / "outside")
    assert "leads out" in refused("export", run, "--format", "kohya", "--step", "2")


@pytest.mark.parametrize("grid", ["ddim", "dpm_solver"])
@pytest.mark.parametrize("form", ["diffusers", "fused"])
def test_the_cards_code_adds_noise_where_the_sampler_does(grid, form, tiny_pipeline, tmp_path, monkeypatch):
    """sampler.noise=window: to the pixel, with the recorded noise; and not what noise in all steps draws."""
    settings = ["sampler.steps=5", "sampler.noise=window", "objective.window=[0, 1]", "objective.last_transition=train"]
    config = load_config(overrides=[*settings, f"sampler.grid={grid}", f"model.path={tiny_pipeline}"])
    code = model_card.usage(config, form, tiny_pipeline, tiny_pipeline)
    code = re.sub("(#|pipe.load_lora|pipe\\().*\n?", "", code)  # the base model's pictures will do
    exec(code, names := {})
    if form == "fused":  # its scheduler is the run's
        solver, about = names["pipe"].scheduler, {"ddim": model_card.DDIM, "dpm_solver": model_card.DPM_SOLVER}[grid]
        names["pipe"].scheduler = type(solver).from_config(solver.config, **about)
    model = BaseModel(tiny_pipeline)
    model.attach_lora(1, 1, seed=0)
    zeros = lora.snapshot(model.unet, 0)
    zeros = lora.Snapshot(0, zeros.flat * 0, lora.digest(zeros.flat * 0))
    own = config.rollout_settings()
    assert own.noise_steps == 2
    drawn, chunk = {}, Chunk(0, "evaluate", 0, 11, PROMPTS, (0, 1))
    for steps in (2, 5):
        made, _ = Sampler(model, replace(own, noise_steps=steps)).sample(chunk, zeros)
        drawn[steps] = Decoder(tiny_pipeline)(torch.from_numpy(made.states[:, -1])).permute(0, 2, 3, 1).numpy()
    normal = (noise.normal(11, noise.EVALUATION, 0, range(2), i, model.latent_shape) for i in range(6))
    initial, *draws = map(torch.from_numpy, normal)
    scheduler = names["pipe"].scheduler
    step = type(scheduler).step

    def recorded(self, output, timestep, sample, *, generator=None, return_dict=True, **more):
        more |= {"variance_noise": draws.pop(0), "return_dict": return_dict}
        return step(self, output, timestep, sample, generator=generator, **more)

    if grid == "ddim":

        def recorded_ddim(self, output, timestep, sample, eta=0.0, generator=None, return_dict=True):
            return recorded(self, output, timestep, sample, eta=eta, return_dict=return_dict)

    monkeypatch.setattr(type(scheduler), "step", recorded_ddim if grid == "ddim" else recorded)
    eta = {"eta": 1.0} if grid == "ddim" else {}
    theirs = names["pipe"](list(PROMPTS), latents=initial * scheduler.init_noise_sigma, num_inference_steps=5,
                           guidance_scale=own.guidance, output_type="np", **eta).images  # fmt: skip
    assert np.abs(theirs - drawn[2]).max() < 2e-3 < 0.02 < np.abs(theirs - drawn[5]).max()


def test_the_cards_code_uses_the_lora_where_the_sampler_does(tiny_pipeline, tmp_path, monkeypatch):
    """sampler.adapter=window: to the pixel; and not what the LoRA in all steps draws."""
    settings = ["sampler.steps=5", "sampler.noise=window", "objective.window=[0, 1]", "objective.last_transition=train"]
    config = load_config(overrides=[*settings, "sampler.adapter=window", f"model.path={tiny_pipeline}"])
    model = BaseModel(tiny_pipeline)
    model.attach_lora(2, 2, seed=0, targets=lora.TARGETS["all"])
    with torch.no_grad():
        for _, parameter in lora.named(model.unet):
            parameter.normal_(std=0.3)
    lora.save_files(model.unet, tmp_path)
    snapshot, own = lora.snapshot(model.unet, 1), config.rollout_settings()
    drawn, chunk = {}, Chunk(0, "evaluate", 0, 11, PROMPTS, (0, 1))
    for within in (own.adapted, None):
        made, _ = Sampler(model, replace(own, adapted=within)).sample(chunk, snapshot)
        drawn[within] = Decoder(tiny_pipeline)(torch.from_numpy(made.states[:, -1])).permute(0, 2, 3, 1).numpy()
    code = re.sub(r"pipe\(.*\n?", "", model_card.usage(config, "diffusers", tiny_pipeline, str(tmp_path)))
    exec(code, names := {})
    normal = (noise.normal(11, noise.EVALUATION, 0, range(2), i, model.latent_shape) for i in range(6))
    initial, *draws = map(torch.from_numpy, normal)
    pipe = names["pipe"]
    step = type(pipe.scheduler).step

    def recorded(self, output, timestep, sample, eta=0.0, generator=None, return_dict=True):
        more = {"variance_noise": draws.pop(0), "return_dict": return_dict}
        return step(self, output, timestep, sample, eta=eta, generator=generator, **more)

    monkeypatch.setattr(type(pipe.scheduler), "step", recorded)
    how = {"num_inference_steps": 5, "eta": 1.0, "guidance_scale": own.guidance, "output_type": "np"}
    latents = initial * pipe.scheduler.init_noise_sigma
    theirs = pipe(list(PROMPTS), latents=latents, callback_on_step_end=names["lora_within"], **how).images
    assert np.abs(theirs - drawn[0, 2]).max() < 2e-3 < 0.02 < np.abs(theirs - drawn[None]).max()
    assert "this uses it in all" in model_card.usage(config, "fused", tiny_pipeline)
