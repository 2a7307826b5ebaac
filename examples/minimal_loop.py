"""The whole of DAG-DB (arXiv 2406.00633, Eq. 8) without the service: prompts, rollout, score, loss, update.

    python examples/minimal_loop.py

It trains, bit for bit, the LoRA of `learner.train(settings=SETTINGS)`: tests/examples/test_minimal_loop.py.
"""

import torch
from torch.nn.utils import clip_grad_norm_

from diffusion import lora
from diffusion.rollout import Sampler
from learner.build import build_model, build_scorer, flow_network, prepare_process
from learner.config import Config, load_config
from learner.experience import Experience
from learner.objectives import db
from learner.objectives.base import anneal, both_ends
from learner.prompts import training_prompts
from learner.protocol.chunks import training_chunks

SETTINGS = {  # not the default preset's: the paper's loss, one update an epoch, policy and flow trained together
    "objective.penalty": "squared", "objective.transition_weight": "uniform", "objective.last_transition": "train",
    "objective.forward_looking_decay": "none", "flow.fit_steps": 0, "flow.warmup_steps": 0,
    "train.updates_per_epoch": 1, "train.epochs": 2, "train.trajectories": 32, "evaluation.images": 0,
    "run.runner": "inprocess",
}  # fmt: skip


def train(config: Config) -> lora.Snapshot:
    """The LoRA after config.train.epochs epochs."""
    prepare_process(config)
    model, scorer = build_model(config), build_scorer(config)
    sampler = Sampler(model, config.rollout_settings())
    torch.manual_seed(config.run.seed + 1)
    flow = flow_network(config, model.latent_shape, model.embedding_width)
    assert flow is not None
    networks = {"policy": [parameter for _, parameter in lora.named(model.unet)], "flow": list(flow.parameters())}
    rates = {"policy": config.learner.learning_rate, "flow": config.flow.learning_rate}
    decay = config.learner.weight_decay
    optimizers = {name: torch.optim.AdamW(networks[name], lr=rates[name], weight_decay=decay) for name in networks}
    prompts, kernel = training_prompts(config), sampler.kernel
    for epoch in range(config.train.epochs):
        beta = anneal(config.objective.beta, epoch, config.train.epochs, config.objective.anneal_fraction)
        policy, experience = lora.snapshot(model.unet, epoch), []
        for chunk in training_chunks(config, prompts, epoch):
            trajectories, clean = sampler.sample(chunk, policy)  # states from noise to image, log p_F, log p_B
            experience.append(Experience(trajectories, scorer.score(clean)))  # r(xhat(x_t)) of every state
        count = sum(len(part) for part in experience)  # transitions
        for part in experience:
            for (positions,) in part.windows(config.learner.micro_batch or 8, group=1):
                batch = part.gather(positions, model, config)
                output = model.predict(batch.x, batch.t, batch.embeddings, config.sampler.guidance)[0]
                log_pf = kernel.log_pf(output, batch.t, batch.x, batch.x_next, "mean")
                log_pb = kernel.log_pb(batch.t, batch.x, batch.x_next, "mean")
                f, f_next = both_ends(flow, batch, gradient=True)
                log_reward, psi_next = beta * batch.reward_terminal, beta * batch.reward_next
                log_flow_next = db.next_log_flow(f_next, psi_next, log_reward, batch.terminal, detach=True)
                delta = f + beta * batch.reward + log_pf - log_pb - log_flow_next
                (delta.square().mean() * (len(delta) / count)).backward()
        for name, optimizer in optimizers.items():
            clip_grad_norm_(networks[name], config.learner.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        rewards = torch.cat([torch.from_numpy(part.scores.rewards[:, -1]) for part in experience])
        print(f"epoch {epoch + 1}: reward {rewards.mean():.3f} of {len(rewards)} pictures")
    return lora.snapshot(model.unet, config.train.epochs)


if __name__ == "__main__":
    train(load_config(overrides=[f"{key}={value}" for key, value in SETTINGS.items()]))
