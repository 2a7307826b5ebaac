"""Shared fixtures: one thread, a tiny Stable-Diffusion-shaped pipeline made on the spot, small configs."""

import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")

# Tests of signals need them, and a shell's background job or `nohup`, as which this may run, ignores one, and so would
# all runs in it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import filelock
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from learner.config import ROOT, Config, load_config
from learner.objectives.needs import NEEDS
from learner.run import main
from models.shapes import train, world

torch.set_num_threads(1)

# A run of the shapes preset small enough for a test: 2 epochs of 8 trajectories of 4 steps.
SMALL = (
    "sampler.steps=4", "sampler.chunk_size=4", "prompts.per_prompt=2", "train.trajectories=8", "train.epochs=2",
    "train.updates_per_epoch=1", "evaluation.images=4", "learner.ranks=1", "learner.micro_batch=4",
    "flow.warmup_steps=2", "flow.fit_steps=2", "flow.batch=8", "lora.rank=2", "mlflow.enabled=false",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """`make test` runs two tests at a time, a file's together; all that start Ray after each other, since a cluster
    fills the machine, and first, since they take longest."""
    for item in items:
        ray = item.get_closest_marker("ray") is not None
        item.add_marker(pytest.mark.xdist_group("ray" if ray else str(item.path)))
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)  # keeps the order otherwise


def pytest_collection_finish(session):
    """With pytest 9.2 and pytest-xdist 3.8 groups are silently ignored (pytest-xdist issue 1386)."""
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("--dist loadgroup has no effect here: install what constraints.txt says")


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id):
    """`shared(name, make)`: the folder `name`, made once for all pytest workers by `make(folder)`; read-only then."""
    base = tmp_path_factory.getbasetemp()
    root = base if worker_id == "master" else base.parent

    def share(name: str, make) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with filelock.FileLock(root / f"{name}.lock", timeout=300):
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return share


@pytest.fixture(scope="module")
def cluster():
    """One local Ray for a module's runs, each of which kills its own actors. Workers find benchmarks/ and what is
    injected."""
    from cluster.session import Session

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests/faults'}", prepend=os.pathsep)
        session = Session(1)
        yield session
        session.close()


@pytest.fixture(scope="session")
def tiny_pipeline(shared) -> str:
    """A randomly initialised pipeline of the embedded model's own classes: for plumbing, not for pictures."""

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models/shapes/tokenizer")  # one built anew is never the same
        vae, unet, text_encoder = train.build_vae(), train.build_unet(), train.build_text_encoder(tokenizer)
        train.save_pipeline(folder, vae, tokenizer, unet, text_encoder)

    return str(shared("tiny", make))


def small_clip() -> tuple[CLIPTokenizer, CLIPTextConfig]:
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models/shapes/tokenizer")
    return tokenizer, CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_sdxl(shared) -> str:
    """A Stable Diffusion XL pipeline's classes with random weights, over the embedded model's VAE."""

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        tokenizer, config = small_clip()
        unet = UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4), norm_num_groups=8,
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=16 + 6 * 8,
            cross_attention_dim=32,
        )  # fmt: skip
        scheduler = EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading",
            steps_offset=1,
        )  # fmt: skip
        StableDiffusionXLPipeline(
            unet=unet, scheduler=scheduler, vae=train.build_vae(), text_encoder=CLIPTextModel(config),
            tokenizer=tokenizer, text_encoder_2=CLIPTextModelWithProjection(config), tokenizer_2=tokenizer,
        ).save_pretrained(folder)  # fmt: skip

    return str(shared("sdxl", make))


def small_t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{word}", -1.0) for word in world.vocabulary())]
    config = T5Config(
        vocab_size=len(pieces), d_model=40, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5Tokenizer(vocab=pieces, extra_ids=0), T5EncoderModel(config)


@pytest.fixture(scope="session")
def tiny_flux(shared) -> str:
    """A FLUX.1-dev pipeline's classes with random weights, over a VAE of the embedded model's shape."""

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        tokenizer, config = small_clip()
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=40, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        vae = train.build_vae()
        vae.register_to_config(shift_factor=0.1)
        words, t5 = small_t5()
        FluxPipeline(
            transformer=transformer, vae=vae, text_encoder=CLIPTextModel(config), tokenizer=tokenizer,
            text_encoder_2=t5, tokenizer_2=words,
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
                max_image_seq_len=4096, shift=3.0,
            ),
        ).save_pretrained(folder)  # fmt: skip

    return str(shared("flux", make))


@pytest.fixture(scope="session")
def tiny_sd3(shared) -> str:
    """A Stable Diffusion 3 pipeline's classes, without T5, with random weights, over the embedded model's VAE."""

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        tokenizer, config = small_clip()
        transformer = SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=40, caption_projection_dim=32, pooled_projection_dim=32,
            pos_embed_max_size=16, qk_norm="rms_norm", dual_attention_layers=(0,),
        )  # fmt: skip
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)  # else it would predict nothing
        encoders = [CLIPTextModelWithProjection(config) for _ in range(2)]
        vae = train.build_vae()
        vae.register_to_config(shift_factor=0.0)
        StableDiffusion3Pipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
            text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer,
            text_encoder_3=None, tokenizer_3=None,
        ).save_pretrained(folder)  # fmt: skip

    return str(shared("sd3", make))


@pytest.fixture(scope="session")
def ddpm(shared) -> str:
    """A pixel-space DDPM of google/ddpm-cifar10-32's classes, with random weights."""

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=16, layers_per_block=1, block_out_channels=(16, 16), norm_num_groups=8, attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=1000)).save_pretrained(folder)

    return str(shared("ddpm", make))


@pytest.fixture(scope="session")
def small_settings(tiny_pipeline) -> list[str]:
    """Overrides that make a run of the preset small."""
    return [*SMALL, f"model.path={tiny_pipeline}"]


@pytest.fixture(scope="session")
def finished_run(shared, small_settings) -> Path:
    """A small run, finished in process. Whoever changes it takes a copy."""

    def make(folder: Path) -> None:
        settings = ["run.runner=inprocess", "lora.alpha=3", "evaluation.seed=5", f"run.dir={folder}"]
        assert main([*small_settings, *settings]) == 0

    return shared("finished", make)


@pytest.fixture(scope="session")
def settings_of():
    """Overrides that make a small run one of objective.kind, with whatever state it can have in use."""

    def make(kind: str) -> list[str]:
        settings = [
            f"objective.kind={kind}", "reward.name=shapes_alignment_soft", "objective.group_size=6",
            "flow.widths=[8,16]", "flow.stem_stride=1",
        ]  # fmt: skip
        if NEEDS[kind].flow != "log_flow":
            settings += ["flow.warmup_steps=0", "flow.fit_steps=0"]
        if not NEEDS[kind].uses_ratio:
            settings += ["train.replay_updates=1", "train.replay_epochs=2"]
        return settings + (["objective.advantage=prompt"] if kind == "ddpo" else [])

    return make


@pytest.fixture
def small_config(small_settings):
    """Factory of small configs over the random pipeline: small_config("run.seed=1", ...)."""

    def make(*overrides: str) -> Config:
        return load_config(overrides=[*small_settings, *overrides])

    return make
