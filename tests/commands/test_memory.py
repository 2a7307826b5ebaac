"""Memory by role: by hand on small things, and the public models' sizes against the published ones, without a hub."""

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from golden import inputs
from huggingface_hub.errors import HfHubHTTPError
from transformers import CLIPConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

from commands import memory, plan
from commands.networks import networks
from diffusion import locate, lora
from diffusion.locate import BaseModelError, countable
from diffusion.parts import check_parts, text_encoders_without_weights, without_weights
from learner import embeddings
from learner.config import load_config
from learner.run import main
from rewards import aesthetic, clip, clip_score, pickscore
from rewards.network import score_head

CONFIGS = Path(__file__).parents[2] / "configs"
SD15, SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
SD35, FLUX = "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev"
CLIP_L, CLIP_G, T5 = 123_060_480, 694_659_840, 4_762_310_656
WITH_PROJECTION = CLIP_L + 768**2
# Parameters of the network (published: .860, 2.567, 2.243 and 11.9 billion), of the VAE, and of the text encoders.
SIZES = {
    SD15: (859_520_964, 83_653_863, [CLIP_L]),
    SDXL: (2_567_463_684, 83_653_863, [CLIP_L, CLIP_G]),
    SD35: (2_243_171_520, 83_819_683, [WITH_PROJECTION, CLIP_G, T5]),
    FLUX: (11_901_408_320, 83_819_683, [CLIP_L, T5]),
}
# Numbers a rank, of a layer inputs + outputs: U-Nets by blocks of each width, which have self- and cross-attention;
# transformers by joint attention (the last block writes no text), its dual layers, and in FLUX also feed-forward ones.
ADAPTERS = {
    SD15: ("attention", sum(n * (14 * c + 2 * 768) for n, c in ((5, 320), (5, 640), (6, 1280)))),
    SDXL: ("attention", sum(n * (14 * c + 2 * 2048) for n, c in ((10, 640), (60, 1280)))),
    SD35: ("attention", (24 * 8 - 1 + 13 * 4) * 2 * 1536),
    FLUX: ("all", 3072 * (19 * (8 * 2 + 4 * 5) + 38 * (3 * 2 + 6) + 1) + 64),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_public_models_have_the_published_sizes(name):
    path = str(locate.PUBLISHED / name)
    check_parts(path, whole=False)
    (network, vae), encoders = without_weights(path), text_encoders_without_weights(path)
    parts = (network, vae, *encoders.values())
    count, decoder, *text = (sum(p.numel() for p in part.parameters()) for part in parts)
    assert (count, decoder, text) == SIZES[name]
    targets, each = ADAPTERS[name]
    with torch.device("meta"):
        lora.attach(network, 8, 8, lora.TARGETS[targets])
    assert sum(p.numel() for _, p in lora.named(network)) == 8 * each
    with pytest.raises(BaseModelError):  # there is nothing to load
        check_parts(path)


def plan_of(preset: str, folder: Path, capsys) -> str:
    assert main(["--config", str(CONFIGS / f"{preset}.yaml"), f"run.dir={folder / 'run'}", "--plan"]) == 0
    assert not (folder / "run").exists()
    return capsys.readouterr().out


def test_the_plan_of_a_public_model_needs_no_hub_and_a_run_does(tmp_path, capsys):
    """What it prints is what its configurations give by hand."""
    said = plan_of("sd15_aesthetic", tmp_path, capsys)
    assert f"{SD15}: no hub answers; by the configurations in configs/models/{SD15}\n" in said
    assert "859.52 M parameters, LoRA 0.79718 M;" in said  # rank 4
    assert f"network in bfloat16 {2 * SIZES[SD15][0] / 1e9:.3g} GB + LoRA 0.00319 GB + its gradient 0.00319 GB" in said
    assert said.count(f"text encoders {4 * CLIP_L / 1e9:.3g} GB + network") == 2  # small ones are in every process
    assert f"aesthetic {4 * memory.REWARDS['aesthetic'] / 1e9:.3g} GB" in said
    assert main(["--config", str(CONFIGS / "sd15_aesthetic.yaml"), f"run.dir={tmp_path / 'run'}"]) == 2
    assert f"{SD15} is neither a model's folder nor reachable on the hub" in capsys.readouterr().err


PRESETS = {path.stem: load_config(path).model.path for path in CONFIGS.glob("s*_*.yaml") if path.stem[:2] == "sd"}
PRESETS["flux_dev_pickscore"] = FLUX


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=pytest.mark.slow if "sd15" in name else pytest.mark.long) for name in PRESETS]
)
def test_the_plan_of_every_preset_of_a_public_model(preset, tmp_path, capsys):
    said, name = plan_of(preset, tmp_path, capsys), PRESETS[preset]
    count, _, text = SIZES[name]
    assert f"{name}: no hub answers" in said and f"{count / 1e6:.5g} M parameters" in said
    once = f"text encoders (once, before training): {4 * sum(text) / 1e9:.3g} GB in float32; the embeddings of 46 "
    assert (once in said) == (name != SD15)
    numbers = count + (384**2 * 1536 if name == SD35 else 0)  # with its table of places
    assert said.count(f"network in bfloat16 {2 * numbers / 1e9:.3g} GB") == 2


def test_a_hub_that_answers_is_believed(monkeypatch, tmp_path):
    def answers(path, timeout):
        raise HfHubHTTPError("404 Client Error", response=mock.Mock(headers={}))

    assert countable(SD35) == str(locate.PUBLISHED / SD35) and countable("someone/model") == "someone/model"
    monkeypatch.setattr("huggingface_hub.model_info", answers)
    assert countable(SD35) == SD35
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    monkeypatch.setattr("huggingface_hub.model_info", lambda path, timeout: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda path, file: str(tmp_path / file))
    assert countable(SD35) == SD35


def test_prompts_that_only_a_hub_has_are_as_many_made_up_ones(tmp_path, capsys, small_settings, monkeypatch):
    monkeypatch.setattr(embeddings, "LARGE", 0)
    settings = [*small_settings, "reward.name=jpeg_compressibility", f"run.dir={tmp_path / 'run'}", "--plan"]
    assert main([*settings, "prompts.path=hpdv2:photo+paintings"]) == 0
    captured = capsys.readouterr()
    assert "the embeddings of 1,601 prompts" in captured.out  # with the empty one
    assert "warning: prompts.path: hpdv2:photo+paintings is neither" in captured.err
    assert main([*settings, "prompts.path=hpdv2:phto"]) == 2
    assert "'hpdv2:phto' is no prompt set" in capsys.readouterr().err


def test_a_plan_warns_of_a_reward_that_no_hub_gives_and_refuses_a_wrong_path(
    tmp_path, capsys, small_settings, monkeypatch
):
    settings = [*small_settings, "reward.name=hpsv2", f"run.dir={tmp_path / 'run'}"]
    assert main([*settings, "--plan"]) == 0
    assert "warning: reward.weights: HPS_v2.1_compressed.pt of" in capsys.readouterr().err
    assert main(settings) == 2
    assert main([*settings, "--plan", "reward.weights=./nowhere.pt"]) == 2
    assert "no such file or folder: ./nowhere.pt" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.model_info", lambda path, timeout: mock.Mock(siblings=()))
    assert main([*settings, "--plan"]) == 2  # it answers, and has no such file
    assert "the hub did not give it (no HPS_v2.1_compressed.pt)" in capsys.readouterr().err


def test_what_is_alive_at_once_by_hand():
    """Three layers sin(h w) of 1000 x 10 numbers. Without gradients a layer holds its input, the product and the sine;
    with them every product and sine is kept, and on the way back the cosine and its product with the gradient."""
    with torch.device("meta"):
        x, layers = torch.zeros(1000, 10), [torch.zeros(10, 10, requires_grad=True) for _ in range(3)]
    for layer in layers:
        layer.grad = torch.zeros_like(layer)

    def forward() -> torch.Tensor:
        h = x
        for layer in layers:
            h = (h @ layer).sin()
        return h

    each = 4 * x.numel()
    assert memory.peak(forward) == 3 * each
    assert memory.peak(forward, backward=True) == pytest.approx((2 * 3 + 2) * each, rel=0.001)  # and the sum's number


def test_attention_makes_no_matrix_of_all_pairs():
    with torch.device("meta"):
        query = torch.zeros(1, 8, 1024, 64, dtype=torch.bfloat16)
    assert memory.peak(lambda: F.scaled_dot_product_attention(query, query, query)) == query.nbytes + 4 * 8 * 1024


def test_saved_activations_are_within_the_peak_and_checkpointing_trades_them_for_work(small_config):
    """The lower bound is counted another way: what autograd says that it keeps."""
    plain, again = small_config(), small_config("learner.gradient_checkpointing=true")
    parts, kept = networks(plain), {}
    own = {p.untyped_storage()._cdata for p in parts.unet.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        parts.output()
    saved = sum(storage.nbytes() for storage in kept.values())
    (less, more_work), (more, less_work) = ((c.held.train, c.unet_train) for c in map(plan.costs, (again, plain)))
    assert 0.5 * saved < more < 2 * saved  # kernels differ: attention in one, and in two
    assert less < 0.8 * more and 1.2 * less_work < more_work < 1.6 * less_work


def test_roles_are_sums_of_what_they_hold(small_config):
    gb = 10**9
    held = memory.Memory(
        encoders=20 * gb, embedding=gb // 10, network=10 * gb, lora=gb, flow=2 * gb, decoders=gb, forward=gb // 4,
        train=3 * gb, flow_train=gb // 2, decode=gb // 2, reward=None,
    )  # fmt: skip
    base = ("sampler.guidance=3", "learner.micro_batch=2", "flow.fit_steps=0", "flow.warmup_steps=0")
    config = small_config(*base)
    prompts = len(embeddings.prompts(config))
    encoders, sampler, learner, actor, _ = memory.lines(config, held)
    assert f"20 GB in float32; the embeddings of {prompts} prompts" in encoders
    assert encoders.endswith(f"{prompts / 10:.3g} GB")
    assert sampler.startswith("sampler: 13 GB = network in float32 10 GB + LoRA 1 GB + 4 samples forward, twice")
    # Gradient 1, moments 2, the flow network's four 8; 2 transitions of 2 x 3 and of 2 x 0.5.
    assert learner.startswith("learner rank: 36 GB") and learner.endswith("forward and back, twice for guidance 14 GB")
    assert actor.startswith("reward actor: 1.5 GB") and "shapes_alignment's own size is not known" in actor
    fits = memory.lines(small_config(*base, "flow.fit_steps=2", "flow.batch=64"), held)[2]
    assert fits.endswith("64 transitions in a flow-only step 64 GB")
    single = memory.lines(small_config("sampler.guidance=1", "learner.micro_batch=null", *base[2:]), held)
    assert "1 transition forward and back 4 GB; micro-batches are what free memory holds" in single[2]


def test_parts_hold_what_their_tensors_do(small_config):
    """And a prompt's embedding is of 4 bytes a number, whatever the network's."""
    small, half = (plan.costs(small_config(f"model.dtype={dtype}")) for dtype in ("float32", "bfloat16"))
    assert small.held.network == 4 * small.parameters == 2 * half.held.network
    assert small.held.lora == half.held.lora == 4 * small.lora
    assert small.held.embedding == half.held.embedding and small.held.encoders == half.held.encoders
    assert small.held.flow == 4 * small.flow_parameters
    assert 2 * half.held.forward == pytest.approx(small.held.forward, rel=0.2)


def test_reward_models_hold_what_their_networks_do():
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, patch_size=14, projection_dim=768))
        made = {
            "aesthetic": aesthetic.Network(tower, score_head(768)),
            "clip_score": clip_score.Network(CLIPConfig(**inputs.PUBLISHED_CLIP)),
            "hpsv2": clip.Network(clip.vit_h()),
            "pickscore": pickscore.Network(clip.vit_h()),
        }
    for name, network in made.items():
        assert memory.REWARDS[name] == sum(p.numel() for p in network.parameters())
