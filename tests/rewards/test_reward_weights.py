"""Finding and reading the files of reward models: what is missing or wrong is named, before any hub is asked."""

import json
import pickle  # noqa: TID251 (what is never to be read)
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golden import inputs
from tiny_models import (
    WRITE,
    aesthetic_state,
    clip_state,
    hpsv2_state,
    imagereward_state,
    write_aesthetic,
    write_clip_score,
    write_hpsv2,
)

from rewards import registry, weights
from rewards.clip import SAVED
from rewards.weights import Asset, BadWeights, WeightsNotFound

ONE_KEY = {
    "aesthetic": ("layers.2.weight", aesthetic_state()[0]),
    "hpsv2": ("visual.transformer.resblocks.1.attn.in_proj_weight", hpsv2_state()),
    "clip_score": ("text_projection.weight", clip_state(inputs.CLIP_SCORE_SEED)),
    "pickscore": ("vision_model.encoder.layers.1.self_attn.q_proj.weight", clip_state(inputs.PICKSCORE_SEED)),
    "imagereward": ("blip.text_encoder.encoder.layer.0.crossattention.self.key.weight", imagereward_state()),
}
MODELS = sorted(WRITE)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of folders `owner--repository` and a cache of the hub's client beside it; what was asked is listed."""
    asked: list[str] = []
    cache = tmp_path / "cache"

    def model_info(repository, timeout):
        asked.append(f"list {repository}")
        folder = tmp_path / "hub" / repository.replace("/", "--")
        names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot(repository, allow_patterns, dry_run):
        asked.append(f"{'dry run' if dry_run else 'download'} {' '.join(allow_patterns)}")
        place = cache / f"models--{repository.replace('/', '--')}"
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / "main").write_text("abc")
        for name in [] if dry_run else allow_patterns:
            (place / "snapshots" / "abc").mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "hub" / repository.replace("/", "--") / name, place / "snapshots" / "abc" / name)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


@pytest.fixture
def no_hub(hub):
    yield
    assert hub == []


def loaded(settings: dict):
    return registry.load(**settings)


def checked(settings: dict, objective=None):
    options = {key: value for key, value in settings.items() if key not in ("name", "weights")}
    registry.check(settings["name"], settings.get("weights"), options, ["a prompt"], objective)


def bad(settings: dict, said: str) -> None:
    with pytest.raises(BadWeights, match=said):
        loaded(settings)


def not_found(act, settings: dict, said: str) -> None:
    with pytest.raises(WeightsNotFound, match=said):
        act(settings)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["missing", "extra", "misshapen"])
def test_a_wrong_key_is_named_with_its_file(name, kind, tmp_path):
    key, state = ONE_KEY[name]
    written = key.replace(".", "__")
    changed, said = {
        "missing": ({written: None}, rf"1 missing: {key}$"),
        "extra": ({"surprise__weight": torch.zeros(2)}, r"1 extra: surprise.weight$"),
        "misshapen": ({written: state[key][:-1]}, rf"1 of another shape: {key} \[.*\] \(expected \["),
    }[kind]
    settings = WRITE[name](tmp_path, **changed)
    with pytest.raises(BadWeights, match=said) as error:
        loaded(settings)
    assert settings["weights"] in str(error.value)


def test_many_wrong_keys_are_counted_and_a_wrong_clip_tower_is_named(tmp_path):
    settings = write_hpsv2(tmp_path)
    settings["size"] = {**settings["size"], "text_layers": 3}
    bad(settings, r"12 missing: transformer\.resblocks\.2\.\S+, .*, \[\.\.\.\]")
    bad(write_aesthetic(tmp_path, activation="gelu"), r"config\.json: hidden_act is gelu, expected quick_gelu")
    settings = write_aesthetic(tmp_path)
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config))
    bad(settings, r"model\.safetensors: no CLIP image tower.* 16 missing: .*layers\.2\.")
    (tmp_path / "clip" / "config.json").write_text("{")
    bad(settings, "no configuration of a CLIP model")


def test_half_precision_is_computed_in_float32_and_safetensors_are_read_too(tmp_path):
    from safetensors.torch import save_file

    half = {key: value.half() for key, value in hpsv2_state().items()}
    settings = write_hpsv2(tmp_path, **{key.replace(".", "__"): value for key, value in half.items()})
    save_file({key: value.contiguous() for key, value in half.items()}, tmp_path / "hps.safetensors")
    reward, other = loaded(settings), loaded({**settings, "weights": str(tmp_path / "hps.safetensors")})
    assert {parameter.dtype for parameter in reward.network.parameters()} == {torch.float32}
    images = torch.rand(1, 3, 30, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other(images, ["the cat"]), reward(images, ["the cat"]))


class Code:
    def __reduce__(self):
        return print, ("this must never run",)


def test_files_that_are_no_weights_and_foreign_ones_are_refused_and_never_run(tmp_path, capsys):
    settings = write_hpsv2(tmp_path)
    for content in (b"", b"not weights", pickle.dumps(Code(), 2)):
        (tmp_path / "HPS_v2.1_compressed.pt").write_bytes(content)
        bad(settings, r"HPS_v2\.1_compressed\.pt cannot be read as weights")
    torch.save({"state_dict": {"epoch": 3}}, settings["weights"])
    bad(settings, "holds no tensors by name")
    assert "never run" not in capsys.readouterr().out
    settings = write_hpsv2(tmp_path)
    vocabulary = inputs.bpe_vocabulary("<|startoftext|>", "<|endoftext|>")
    (tmp_path / "bpe" / "vocab.json").write_text(json.dumps({**vocabulary, "<|endoftext|>": 7, "!": 300}))
    bad(settings, "last token is 7, expected CLIP's")
    settings = WRITE["imagereward"](tmp_path)
    (tmp_path / "med_config.json").write_text('{"vocab_size": 40}')
    bad(settings, r"med_config\.json is no med_config\.json of .*: KeyError: 'hidden_size'")


def test_a_text_is_read_off_at_its_end_whatever_the_configuration_calls_it(tmp_path):
    """2 in the published configurations of CLIP, where transformers takes the highest id; its true id in later ones."""
    settings = write_clip_score(tmp_path)
    images, prompts = torch.rand(2, 3, 30, 20, generator=torch.Generator().manual_seed(0)), ["the cat", "a red bird"]
    expected, file = loaded(settings)(images, prompts), tmp_path / "whole" / "config.json"
    config = json.loads(file.read_text())
    end = config["text_config"]["vocab_size"] - 1
    assert config["text_config"]["eos_token_id"] == 2 and (loaded(settings).tokens(prompts)[0][:, -1] == end).all()
    config["text_config"]["eos_token_id"] = end
    file.write_text(json.dumps(config))
    assert torch.equal(loaded(settings)(images, prompts), expected)
    config["text_config"]["eos_token_id"] = 7
    file.write_text(json.dumps(config))
    bad(settings, rf"whole: this tokenizer's last token is {end}, expected CLIP's, with 7")


@pytest.mark.parametrize("act", [loaded, checked])
@pytest.mark.parametrize("name", MODELS)
def test_a_path_that_does_not_exist_is_named_and_no_hub_asked(name, act, tmp_path, no_hub):
    settings = WRITE[name](tmp_path)
    for wrong in (tmp_path / "elsewhere.pt", "weights.safetensors", "./owner/repository", "~/nowhere/weights"):
        not_found(act, {**settings, "weights": str(wrong)}, f"reward.weights: no such file or folder: {wrong}")
    key = {"aesthetic": "clip", "clip_score": "weights"}.get(name, "tokenizer")
    places = {"a/b/c": "no such file or folder: a/b/c", str(tmp_path): f"{tmp_path} holds no "}
    (tmp_path / "file.pt").touch()
    places[str(tmp_path / "file.pt")] = ".* is a file, expected the folder"
    for place, said in places.items():
        setting = "weights" if key == "weights" else rf"options\.{key}"
        not_found(act, {**settings, key: place}, rf"reward\.{setting}: {said}")
    settings = {**write_hpsv2(tmp_path), "weights": str(tmp_path)}  # a folder stands for the published file in it
    act(settings)
    not_found(act, {**settings, "version": "v2.0"}, r"holds no HPS_v2_compressed\.pt")
    # Before another asset is sought at the hub.
    not_found(act, {"name": "hpsv2", "weights": "gone.pt"}, r"^reward\.weights: no such file or folder: gone\.pt$")


@pytest.mark.parametrize("act", [loaded, checked])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("aesthetic", ["reward.weights: aesthetic-model.pth of https://huggingface.co/trl-lib/ddpo-aesthetic-predictor",
                       "reward.options.clip: config.json, model.safetensors of https://huggingface.co/openai/clip-vit-l"]),
        ("imagereward", ["reward.weights: ImageReward.pt of https://huggingface.co/THUDM/ImageReward",
                         "reward.options.med_config: med_config.json of", "reward.options.tokenizer: vocab.txt"]),
        ("hpsv2", ["reward.weights: HPS_v2.1_compressed.pt of https://huggingface.co/xswu/HPSv2",
                   "`hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir FOLDER`, then set reward.weights=",
                   "reward.options.tokenizer: vocab.json, merges.txt"]),
        ("pickscore", ["reward.weights: model.safetensors of https://huggingface.co/yuvalkirstain/PickScore_v1",
                       "tokenizer: vocab.json, merges.txt of https://huggingface.co/laion/CLIP-ViT-H-14-laion2B-s32B-b79K"]),
        ("clip_score", ["reward.weights: config.json, model.safetensors, vocab.json, merges.txt of "
                        "https://huggingface.co/openai/clip-vit-large-patch14"]),
    ],
)  # fmt: skip
def test_offline_the_message_says_what_to_fetch_from_where_and_which_key_to_set(name, said, act, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsNotFound) as error:
        act({"name": name})
    message = str(error.value)
    assert all(part in message for part in (*said, "HF_HUB_OFFLINE")) and "\n" not in message


def test_without_a_network_a_hub_is_asked_once_an_asset_and_for_ten_seconds(tmp_path, monkeypatch):
    """Its client would try six times a file."""
    asked = []

    class Session:
        def get(self, url, headers, timeout, params):
            asked.append((url.rpartition("models/")[2].partition("/revision")[0], timeout))
            raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_api.get_session", Session)
    with pytest.raises(WeightsNotFound, match="no route to host"):
        checked({"name": "imagereward"})
    assert asked == [(name, 10) for name in ("THUDM/ImageReward", "THUDM/ImageReward", "bert-base-uncased")]


def test_a_hub_is_asked_until_the_cache_has_it(tmp_path, hub):
    """Checking downloads nothing, loading once: then the cache has it."""
    repository = tmp_path / "hub" / "me--mine"
    repository.mkdir(parents=True)
    settings = write_hpsv2(repository)
    (repository / "other.pt").write_bytes((repository / "HPS_v2.1_compressed.pt").read_bytes())
    for source, name in (("me/mine", "HPS_v2.1_compressed.pt"), ("me/mine:other.pt", "other.pt")):
        hub.clear()
        for act in (checked, loaded, loaded):
            act({**settings, "weights": source})
        assert hub == ["list me/mine", f"dry run {name}", "list me/mine", f"download {name}"]
    hub.clear()
    [folder] = weights.find([Asset("key", "me/mine", ("HPS_v2.1_compressed.pt", "other.pt"), folder=True)])
    assert {path.name for path in folder.iterdir()} == {"HPS_v2.1_compressed.pt", "other.pt"} and hub == []
    for source, said in (
        ("me/mine:third.pt", r"third\.pt of https://huggingface\.co/me/mine .*\(no third\.pt\)"),
        ("me/mine", r"key: vocab\.txt of https://huggingface\.co/me/mine .*\(no vocab\.txt\)"),
    ):
        with pytest.raises(WeightsNotFound, match=said):
            weights.find([Asset("key", source, ("vocab.txt",))], fetch=False)
    with pytest.raises(WeightsNotFound, match="expected the folder or repository of vocab"):
        weights.find([Asset("key", "me/mine:vocab.txt", ("vocab.txt",), folder=True)])


@pytest.mark.parametrize("name", MODELS)
def test_check_reads_no_weights_and_knows_the_options(name, tmp_path, monkeypatch, no_hub):
    settings = WRITE[name](tmp_path)
    file = Path(settings["weights"])
    (file / SAVED if file.is_dir() else file).write_bytes(b"gigabytes that nobody reads")
    for reading in ("torch.load", "safetensors.torch.load_file"):
        monkeypatch.setattr(reading, lambda *_, **__: pytest.fail("weights were read"))
    checked(settings, "nabla_db")
    wrong_options = [({"colour": 3}, rf"reward\.options: {name}: .*colour")]
    if size := {"hpsv2": "size", "imagereward": "vision", "pickscore": "size"}.get(name):
        wrong_options.append(({size: {"depth": 3}}, rf"reward\.options: {name}: .*depth"))
    if name == "hpsv2":
        wrong_options.append(({"version": "v3"}, r"reward\.options\.version: 'v3', expected v2\.0 or v2\.1"))
    for act in (checked, loaded):
        for options, said in wrong_options:
            with pytest.raises(ValueError, match=said):
                act({**settings, **options})
