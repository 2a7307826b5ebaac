"""A model's path is checked before anything slow is imported."""

import re
import subprocess
import sys

import pytest

from diffusion.locate import HUB_SECONDS, ROOT, BaseModelError, is_unconditional, locate, part_config

CHECK = """
import sys
from diffusion.locate import is_unconditional, part_config
assert not is_unconditional("models/shapes") and is_unconditional(sys.argv[1])
assert part_config(sys.argv[1], "unet")["sample_size"] == 16
print(*{"torch", "diffusers", "transformers", "huggingface_hub"} & set(sys.modules))
import diffusion.base_model, diffusion.lora_files, diffusion.rollout
print(*{"diffusers", "transformers", "peft"} & set(sys.modules))
"""


def test_nothing_slow_is_imported_before_it_is_needed(ddpm):
    """A folder is looked at without torch; a process without a model needs neither diffusers nor PEFT."""
    checked = subprocess.run([sys.executable, "-c", CHECK, ddpm], capture_output=True, text=True, timeout=120)
    assert (checked.returncode, checked.stdout) == (0, "\n\n"), checked.stderr


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "cannot be used: model_index.json is damaged: Expecting property name"),
        ("[]", "cannot be used: model_index.json is damaged: it holds no JSON object"),
        ("{}", "has no pipeline's _class_name in its model_index.json; what can be trained: Stable"),
        ('{"_class_name": ["a", 1]}', "has no pipeline's _class_name"),  # Flax
        ('{"_class_name": "KandinskyV22Pipeline"}', "is a KandinskyV22Pipeline; what can be trained: Stable"),
        ('{"_class_name": "SanaPipeline"}', "is a SanaPipeline; what can be trained: StableDiffusionPipeline (Stable"),
    ],
)
def test_what_is_no_pipeline_of_a_supported_class_is_named_in_one_line(index, said, tmp_path):
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(BaseModelError, match=f"model.path: {re.escape(f'{tmp_path} {said}')}") as caught:
        is_unconditional(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_misspelt_folder_is_no_hub_id_and_the_hub_is_asked_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("models/shaps", str(ROOT / "models/shaps")):
        with pytest.raises(BaseModelError, match=re.escape(f"no such folder: {path}; did you mean {path[:-1]}es?")):
            locate(path)
    asked = []

    def model_info(path, timeout):
        asked.append(timeout)
        raise RuntimeError("no route to host")

    monkeypatch.setattr("huggingface_hub.model_info", model_info)
    with pytest.raises(BaseModelError, match=rf"no route to host \(asked once, for {HUB_SECONDS} s at most\)"):
        is_unconditional("someone/model")
    assert asked == [HUB_SECONDS]


def test_a_hub_id_that_cannot_be_had_is_named_with_the_command_to_get_it():
    assert locate("someone/model") == "someone/model"
    with pytest.raises(BaseModelError, match="no such folder"):
        locate("/nowhere")
    remedy = re.escape("`hf download someone/model --local-dir FOLDER`, then set model.path=")
    with pytest.raises(BaseModelError, match=remedy):
        is_unconditional("someone/model")
    with pytest.raises(BaseModelError, match="reachable on the hub"):
        part_config("someone/model", "unet")
