"""What the base model is called; the rest of the card is in test_export.py."""

import pytest

from commands import export
from diffusion.lora_files import AdapterFile
from reports import model_card


def test_what_the_base_model_is_called(tmp_path):
    assert model_card.base_of("models/shapes") == model_card.Base("models/shapes", None, "apache-2.0")
    hub = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert model_card.base_of(hub) == model_card.Base(hub, hub, "creativeml-openrail-m")
    assert model_card.base_of("someone/something").license == "other"
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert model_card.base_of(str(tmp_path)) == model_card.Base(tmp_path.name, None, "mit")
    assert model_card.base_of(str(tmp_path), hub) == model_card.Base(hub, hub, "mit")
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert model_card.base_of(str(tmp_path)).license == "other"
    assert model_card.base_of("/gone/model") == model_card.Base("model", None, "other")


@pytest.mark.parametrize("generation", ["sd_v1", "sd_v2", None])
def test_stable_diffusion_is_named_in_kohyas_metadata(generation):
    about = dict.fromkeys(("base_model", "run", "step", "reward", "objective"), "x")
    adapter = AdapterFile("", 2, 3.0, {})
    kohya, plain = (export._metadata(about, form, adapter, generation) for form in ("kohya", "diffusers"))
    assert kohya.get("ss_base_model_version") == generation
    assert kohya.get("ss_v2") == {"sd_v1": "False", "sd_v2": "True"}.get(generation)
    assert not any(key.startswith("ss_") for key in plain)
