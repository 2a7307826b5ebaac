"""A run's folder from somebody else, made to do harm: whatever command is pointed at it, no code runs, no file outside
of it is read for prompts or written, and nothing is deleted."""

import importlib
import json
import os
import pickle  # noqa: TID251  # as an attacker would
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from learner.__main__ import VERBS
from learner.config import saved_config
from records import checkpoint
from records.run_folder import Records
from records.storage import Storage

EVIL = "evil_received_run"
MODULE = """
from pathlib import Path
Path(__file__).with_suffix(".ran").touch()

class Model:
    @classmethod
    def from_pretrained(cls, *arguments, **settings):
        return cls()

def score(images, prompts, **options):
    return images.mean((1, 2, 3))
"""
TERM = {"name": f"{EVIL}:score"}
REWARDS = {
    "reward": {"reward.name": TERM["name"]},
    "reward with options": {
        "reward.name": "subprocess:Popen",
        "reward.options": {"args": "touch WITNESS", "shell": True},
    },
    "term": {"reward.name": "weighted_sum", "reward.options": {"terms": [{**TERM, "weight": 1.0}]}},
    "a judge": {"reward.name": "remote", "reward.options": {"urls": "http://127.0.0.1:9", "token_env": "PATH"}},
    "held out": {"evaluation.held_out": [TERM]},
    "held out in short": {"evaluation.held_out": [TERM["name"]]},
}


class Runs:
    """Runs a command where it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return (os.system, (f"touch {self.witness}",))


@pytest.fixture
def witness(tmp_path, monkeypatch):
    """The file that is there once something ran; in the current directory, with a module that makes it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TRIBUTARY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / f"{EVIL}.py").write_text(MODULE)
    yield tmp_path / f"{EVIL}.ran"
    sys.modules.pop(EVIL, None)


def plant(run: Path, settings: dict) -> None:
    """As if the run had begun with these settings, whole and sealed."""
    storage, tree = Storage(str(run)), yaml.safe_load((run / "config.yaml").read_text())
    for key, value in settings.items():
        section, leaf = key.split(".")
        tree[section][leaf] = value
    content = yaml.safe_dump(tree).encode()
    (run / "config.yaml").write_bytes(content)
    records = Records.open(storage)
    for step in checkpoint.steps(storage):
        saved = checkpoint.load(storage, step, records.run_id)
        checkpoint.save(storage, saved.manifest, {**saved.files, "config.yaml": content})
    records.note(config_digest=saved_config(records).digest())


def do(capsys, verb: str, *arguments: object) -> str:
    """What a command says, its exit status before it."""
    capsys.readouterr()
    status = importlib.import_module(VERBS[verb][0]).main([*map(str, arguments)])
    captured = capsys.readouterr()
    assert status in (0, 1, 2) and "Traceback" not in captured.err
    return f"{status} {captured.out}{captured.err}"


def test_the_witness_would_be_seen(witness):
    importlib.import_module(EVIL)
    assert witness.exists()
    witness.unlink()
    pickle.loads(pickle.dumps(Runs(witness)))  # noqa: S301
    assert witness.exists()


@pytest.mark.parametrize("settings", REWARDS.values(), ids=REWARDS)
def test_a_reward_that_only_the_runs_settings_name_is_not_run(settings, witness, run, capsys):
    plant(run, json.loads(json.dumps(settings).replace("WITNESS", str(witness))))
    lora = run / "checkpoints/latest/lora"  # its settings are the run's that it lies in
    for verb, *names in (("evaluate", run), ("compare", run, run), ("evaluate", lora)):
        said = do(capsys, verb, *names, "--images", 4)
        assert (
            said.startswith("2 ")
            and f"only {run}/config.yaml names is not run" in said
            and "; if it is yours, give" in said
        )
    assert not witness.exists() and EVIL not in sys.modules


@pytest.mark.long
def test_one_that_the_command_names_too_is(witness, run, capsys):
    plant(run, REWARDS["reward"] | REWARDS["held out"])
    given = [f"reward.name={EVIL}:score", f'evaluation.held_out=[{{"name": "{EVIL}:score"}}]']
    assert f"evaluation.held_out: code that only {run}" in do(capsys, "evaluate", run, "--images", 4, given[0])
    assert not witness.exists()
    assert do(capsys, "evaluate", run, "--images", 4, *given, "run.runner=inprocess").startswith("0 ")
    assert witness.exists()


@pytest.mark.long
def test_no_verb_runs_what_a_run_names(witness, run, small_settings, capsys):
    """Every command, pointed at a run whose rewards, model and prompts are planted."""
    model = shutil.copytree(small_settings[-1].partition("=")[2], run.parent / "model")
    custom_component(model)
    secret = run.parent / "secret"
    secret.write_text("the token\n")
    planted = {"model.path": str(model), "evaluation.prompts": str(secret), **REWARDS["reward"], **REWARDS["held out"]}
    plant(run, planted)
    (run.parent / "pictures").mkdir()
    shutil.copy(run / "before.png", run.parent / "pictures")
    images, settings = ["--images", 4], [f"model.path={model}", "run.dir=run", "run.runner=inprocess"]
    lines = {
        "run": [*small_settings, *settings, "reward.name=shapes_alignment"], "status": [run], "report": [run],
        "evaluate": [run, *images], "compare": [run, run, *images], "export": [run, "--format", "fused"],
        "generate": ["--lora", run, "--images", 1, "--prompt", "a red ring"], "upload": [run], "verify": ["beauty"],
        "score": ["--reward", "jpeg_compressibility", "pictures"], "settled": [run],
        "targets": [run, *images, "--beta", 1],
    }  # fmt: skip
    assert lines.keys() == VERBS.keys()
    statuses = {verb: do(capsys, verb, *arguments)[0] for verb, arguments in lines.items()}
    refused = {"run", "evaluate", "compare", "generate", "export", "verify", "settled", "targets"}
    assert statuses == {verb: "2" if verb in refused else "0" for verb in VERBS}
    assert not witness.exists() and EVIL not in sys.modules
    kept = [file for file in run.parent.rglob("*") if file.is_file() and file != secret]
    assert not [file for file in kept if b"the token" in file.read_bytes()]


def custom_component(model: Path, place: str = "unet", module: str = EVIL) -> None:
    """The class of a part is in a file beside its weights."""
    index = json.loads((model / "model_index.json").read_text())
    index[place] = [module, "Model"]
    (model / "model_index.json").write_text(json.dumps(index))
    (model / place / f"{EVIL}.py").write_text(MODULE)


def custom_pipeline(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    index["_class_name"] = [EVIL, "Model"]
    (model / "model_index.json").write_text(json.dumps(index))
    (model / f"{EVIL}.py").write_text(MODULE)


def imported_module(model: Path) -> None:
    """The class of a part is in a module that Python would find."""
    custom_component(model)
    (model / "unet" / f"{EVIL}.py").unlink()


def custom_code_of_transformers(model: Path) -> None:
    file = model / "text_encoder/config.json"
    tree = json.loads(file.read_text())
    tree |= {"auto_map": {"AutoModel": f"{EVIL}.Model"}, "architectures": ["Model"]}
    file.write_text(json.dumps(tree))
    (model / "text_encoder" / f"{EVIL}.py").write_text(MODULE)


def pickled(part: str):
    def plant(model: Path) -> None:
        for file in (model / part).glob("*.safetensors"):
            file.unlink()
            name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
            file.with_name(name).write_bytes(pickle.dumps(Runs(model.parent / f"{EVIL}.ran")))

    return plant


MODELS = {
    "component": custom_component, "scheduler": lambda model: custom_component(model, "scheduler"),
    "tokenizer": lambda model: custom_component(model, "tokenizer"), "pipeline": custom_pipeline,
    "module": imported_module, "transformers": custom_code_of_transformers, "unet": pickled("unet"),
    "text encoder": pickled("text_encoder"), "vae": pickled("vae"),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("change", MODELS.values(), ids=MODELS)
def test_no_code_of_a_model_runs(change, witness, run, tiny_pipeline, capsys):
    model = Path(shutil.copytree(tiny_pipeline, run.parent / "model"))
    change(model)
    plant(run, {"model.path": str(model)})
    for verb, *arguments in (
        ("generate", "--lora", run, "--images", 1, "--prompt", "a red ring"), ("export", run, "--format", "fused"),
        ("evaluate", run, "--images", 4, "run.runner=inprocess"),
    ):  # fmt: skip
        do(capsys, verb, *arguments)
        assert not witness.exists() and EVIL not in sys.modules, verb


@pytest.mark.long
def test_pickled_weights_of_a_model_without_text_are_tensors_or_nothing(witness, ddpm, tmp_path, capsys):
    model = Path(shutil.copytree(ddpm, tmp_path / "model"))
    pickled("unet")(model)
    assert do(capsys, "generate", "--base", model, "--images", 1).startswith("2 ") and not witness.exists()


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "adapter_model.bin", "pytorch_lora_weights.safetensors"])
def test_no_pickled_lora_is_read(name, witness, tmp_path, capsys):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / name).write_bytes(pickle.dumps(Runs(witness)))
    for verb, *arguments in (("generate", "--prompt", "a", "--lora", "lora"), ("evaluate", "lora", "--images", 4)):
        assert do(capsys, verb, *arguments).startswith("2 ") and not witness.exists()


@pytest.mark.parametrize("key", ["prompts.path", "evaluation.prompts"])
def test_no_file_is_read_for_prompts_but_the_runs_own(key, witness, run, capsys):
    secret = run.parent / "secret"
    secret.write_text("the token\n")
    plant(run, {key: str(secret)})
    said = do(capsys, "evaluate", run, "--images", 4)
    assert f"{key}: {secret} does not hold the prompts that the run began with; give --prompts FILE" in said
    assert said.startswith("2 ") and "the token" not in said


def test_links_in_a_folder_lead_nobody_out_of_it(witness, run, small_settings, capsys):
    """What would be written lies in the folder, or is refused; a link itself may be replaced."""
    mine = run.parent / "mine"
    mine.mkdir()
    (mine / "pytorch_lora_weights.json").write_text("mine")
    (mine / "notes").write_text("mine")
    (run / "report.html").unlink()
    (run / "report.html").symlink_to(mine / "notes")
    (run / "export").mkdir()
    (run / "export/diffusers").symlink_to(mine / "empty")
    (mine / "empty").mkdir()
    (run / "run.lock").unlink(missing_ok=True)
    (run / "run.lock").symlink_to(mine / "notes")
    assert do(capsys, "report", run).startswith("0 ") and not (run / "report.html").is_symlink()
    assert "a link that leads out of" in do(capsys, "export", run, "--format", "diffusers")
    settings = ["run.runner=inprocess", "lora.alpha=3", "evaluation.seed=5", f"run.dir={run}", "train.epochs=3"]
    assert "cannot write run.lock" in do(capsys, "run", *small_settings, *settings)
    lora = run.parent / "lora"
    shutil.copytree(run / "checkpoints/latest/lora", lora)
    (lora / "evaluation").symlink_to(mine)
    given = ["--base", saved_config(Records.open(Storage(str(run)))).model.path, "--images", 16, "run.runner=inprocess"]
    assert "a link that leads out of" in do(capsys, "evaluate", lora, *given)
    assert sorted(path.name for path in mine.iterdir()) == ["empty", "notes", "pytorch_lora_weights.json"]
    assert all(path.read_text() == "mine" for path in mine.iterdir() if path.is_file()) and not any(
        (mine / "empty").iterdir()
    )
