"""What the parts of one process share."""

from learner.inprocess import InProcessRunner
from learner.protocol.runner import Hooks


def test_sampler_and_learner_have_one_frozen_network_and_two_adapters(small_config):
    runner = InProcessRunner(small_config("run.runner=inprocess"), None, Hooks())
    sampler, learner = (dict(part.model.unet.named_parameters()) for part in (runner.sampler, runner.learner))
    shared = {name for name in sampler if sampler[name].data_ptr() == learner[name].data_ptr()}
    assert shared == {name for name in sampler if "lora_" not in name} and len(shared) < len(sampler)
    embedded = [part.model.embed(["a red circle", ""]) for part in (runner.sampler, runner.learner)]
    assert (embedded[0] == embedded[1]).all() and "texts" not in vars(runner.learner.model)
