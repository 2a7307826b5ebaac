"""`make mutate`: faults that once passed unseen, or would cost most, put into a copy of the tree one by one; for each,
the tests named beside it must fail. A row whose old text is gone is itself a failure (`tests/test_house.py` looks too).

    python tests/mutations.py [WORD ...]     only the rows whose file or replacement has one of these words
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import benchmark_mutations
import reward_mutations

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 900  # of a row's tests: a hang is told from a failure, and neither from a busy machine
KERNELS, SLOW = "tests/diffusion/test_kernels.py", "tests/learner/objectives/test_slow_loops.py"
DB, GRADIENTS = "tests/learner/objectives/test_db.py", "tests/learner/objectives/test_gradients.py"
TARGETS, GATHER = "tests/learner/objectives/test_targets.py", "tests/learner/test_experience.py"
UPDATE, HELD, EVERY = (f"tests/learner/test_{name}.py" for name in ("update", "regulariser", "every_objective"))
ROLLOUT, COLLAPSE = "tests/diffusion/test_rollout.py", "tests/evaluation/test_collapse.py"
CERTIFICATE, LAWS = "tests/evaluation/test_certificate.py", "tests/evaluation/test_target_laws.py"
METRICS, OPEN = "tests/evaluation/test_evaluation_metrics.py", "tests/learner/test_open_run.py -k somebody_elses"
RECEIVED, JUDGED = "tests/commands/test_received_runs.py", "tests/commands/test_evaluate.py"
PATHS = "tests/learner/objectives/test_trajectories.py"
QUARANTINE = "tests/learner/protocol/test_quarantine.py"
ADJOINT, NATURAL = "tests/learner/objectives/test_adjoint_matching.py", "tests/learner/test_natural.py"
SQUARES = "tests/learner/test_least_squares.py"
MIXED = "tests/learner/test_mixtures.py"
DAMAGED = "tests/learner/test_damaged_files.py"
FLOW_KERNELS, SD3 = "tests/diffusion/test_flow_kernels.py", "tests/diffusion/test_sd3.py"
SDXL, FLUX = "tests/diffusion/test_sdxl.py", "tests/diffusion/test_flux.py"
EMBEDDED = "tests/learner/test_embeddings.py"
INPROCESS = "tests/learner/test_inprocess.py"
FITS, HOURS = "tests/commands/test_fits.py", "tests/commands/test_hours.py"
MEMORY, PLAN = "tests/commands/test_memory.py", "tests/commands/test_plan.py"
SLOPES = "tests/rewards/test_reward_gradients.py"
PROMPTS = "tests/learner/test_prompts.py"
COLUMNS = "tests/learner/test_metadata.py -k resumed"
SHAPES_FLOW, STEP_KERNELS = "tests/models/test_shapes_flow.py", "tests/diffusion/test_step_kernels.py"
REHEARSAL, SINGLE_FILES = "tests/diffusion/test_rehearsal.py", "tests/diffusion/test_single_files.py"
FITTED, RIDGE = "tests/learner/objectives/test_fitted_nabla_db.py", "tests/learner/test_kernel_ridge.py"


# By file: old text (there once), new text, tests that must fail.
ROWS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "diffusion/kernels.py": (
        ("sigma2 = eta**2 *", "sigma2 = eta *", KERNELS),
        ("if eta > 1:", "if eta > 9:", KERNELS),
        ('"noising": 1 - abar / after', '"noising": 1 - abar', KERNELS),
        ("return flat.sum(1) if reduction", "return flat.mean(1) if reduction", KERNELS),
        ('self._at("root_noise_next", t, x) * self.eps', 'self._at("root_direction", t, x) * self.eps', KERNELS),
        ('return -self._at("root_shrink"', 'return self._at("root_shrink"', SLOW),
    ),
    "diffusion/rollout.py": (
        ("settings.noise_steps, kernel.noisy_steps)", "settings.noise_steps, n)", SD3),
        ("log_pf.append(kernel.log_pf(guided", "log_pf.append(kernel.log_pf(conditional", ROLLOUT),
        ("needed[:, 1:] |= chosen[:, :-1]", "needed[:, 1:] |= chosen[:, 1:]", ROLLOUT),
        ("draw(i + 1)).to(store).float()", "draw(i + 1)).float()", ROLLOUT),
        ("if i < noisy:", "if i <= noisy:", f"{ROLLOUT} -k behind"),
        ("log_ref.append(kernel.log_pf(reference", "log_ref.append(kernel.log_pf(guided", f"{ROLLOUT} -k references"),
        ("selected = settings.first + noise", "selected = noise", f"{ROLLOUT} -k windows"),
    ),
    "diffusion/flow_kernels.py": (
        ("posterior = after.square() * noising / square", "posterior = after.square() * noising", FLOW_KERNELS),
        ("alpha / alpha_next * alpha * after.square()", "alpha * after.square()", FLOW_KERNELS),
        ("* _by_label(spread.to(torch.float64)) * (after > 0)", "* _by_label(spread.to(torch.float64))", FLOW_KERNELS),
        ("noisy_steps=count - 1", "noisy_steps=count", FLOW_KERNELS),
        ("low + (tokens - first) * (high - low)", "low + tokens * (high - low)", FLOW_KERNELS),
        ("inside = torch.where(sigma == 1, sigma[-2], sigma)", "inside = sigma.clamp(max=0.999)", FLOW_KERNELS),
    ),
    "learner/prompts.py": (
        ("if metadata else prompts\n", "if False else prompts\n", COLUMNS),
        ("if field.name == column or _is_json(field.type)]", "]", PROMPTS),
        ("Prompt, (str(self), self.metadata)", "Prompt, (str(self), {})", PROMPTS),
    ),
    "learner/protocol/chunks.py": (
        ("parents, at, metadata))", "parents, at))", PROMPTS),
        ("tuple(map(str, part)), ids, metadata=", "tuple(part), ids, metadata=", PROMPTS),
    ),
    "diffusion/open_model.py": ((", pixels, text_tokens, emb", ", None, None, emb", SD3),),
    "diffusion/base_model.py": (
        ("given = self._embedded.get(prompt)", "given = None", EMBEDDED),
        ("            return self._lender._rows(prompt)", "            pass", INPROCESS),
        ("        vae.enable_gradient_checkpointing()", "        pass", f"{SLOPES} -k large"),
    ),
    "commands/counts.py": (("2 * self.version + self.checkpoint", "self.version", f"{PLAN} -m long -k ddpo"),),
    "commands/plan.py": (("config.kept_epochs * kept", "kept", f"{PLAN} -m long -k dag_db"),),
    "commands/generate.py": (("if config.uncalibrated:", "if False:", STEP_KERNELS),),
    "learner/embeddings.py": (
        ("*evaluation_prompts(config)", "", EMBEDDED),
        ("model.device, model.text_tokens]", "model.device]", EMBEDDED),
        (">= LARGE", "> 1e99", EMBEDDED),
        ("content.program(), pipeline_index(path), ", "content.program(), ", EMBEDDED),
        (" and np.isfinite(rows).all()", "", EMBEDDED),
    ),
    "diffusion/calibration.py": (
        ("model.kernel(max(STEPS, settings.num_steps))", "model.kernel(settings.num_steps)", STEP_KERNELS),
        ("deviation * draw(step)", "deviation * draw(noise.INITIAL_STATE)", STEP_KERNELS),
    ),
    "learner/config/load.py": (
        ("if config.uncalibrated and spread:", "if False:", STEP_KERNELS),
        ('get("backend") == "native"', 'get("backend") == "none"', "tests/learner/config/test_config.py -k package"),
    ),
    "models/shapes_flow/train.py": (("bias[:, -1] = math.log(times)", "bias[:, -1] = times", SHAPES_FLOW),),
    "diffusion/parts.py": (
        ("text_tokens or family_of(path).t5_tokens", "10**6", PROMPTS),
        ("if _today(key) not in there and id(parameters.get(key)) in held:", "if False:", FLUX),
        ("if pixels % step:", "if False:", FLUX),
        ('name == "scheduler" and isinstance(found, str)', "isinstance(found, str)", f"{REHEARSAL} -k must_not_say"),
        ("if not tokens - 128 < known <= tokens:", "if False:", REHEARSAL),
        ('return entry[1] if entry[0] == library else f"{entry[0]}.{entry[1]}"', "return entry[1]", REHEARSAL),
        ("{**parts, **text_encoders_without_weights(path)}", "parts", SD3),
    ),
    "learner/inprocess.py": (("        self.learner.model.borrow(self.sampler.model)\n", "", INPROCESS),),
    "actors/learner_group.py": (
        ("gpus if self.crew.config.train.max_staleness else ", "", "tests/actors/test_learner_group.py -k rest"),
    ),
    "commands/fits.py": (
        ("USED * max(0.0, size - fixed)", "max(0.0, size - fixed)", FITS),
        ('beside.append("learner rank")', "pass", FITS),
        ("CONTEXT * processes\n", "0\n", FITS),
        ("moments = 0 if", "moments = 0 if True or", FITS),
    ),
    "commands/hours.py": (
        ("math.ceil(chunks / share.count) * share.count / chunks", "1.0", HOURS),
        ("at_once(2) + mine[2]", "max(at_once(2), mine[2])", HOURS),
        ("sharing / shared", "0.0", HOURS),
        ("at_once * cost.unet_train", "cost.unet_train", HOURS),
    ),
    "commands/memory.py": (
        ("self.now -= count", "pass", f"{MEMORY} -k by_hand"),
        ("2 * held.lora", "held.lora", f"{MEMORY} -k roles"),
    ),
    "diffusion/locate.py": (("NoHub if isinstance(error, ConnectionError) else", "NoHub or", f"{MEMORY} -k answers"),),
    "diffusion/rehearsal.py": (
        (".hidden_states[-2]", "", REHEARSAL),
        ("            lora.attach(network, 1, 1)\n", "", REHEARSAL),
    ),
    "diffusion/single_files.py": (
        ("' '.join(min(names, default='none').split())", "min(names, default='none')", SINGLE_FILES),
        ('if file.suffix != ".safetensors":', "if False:", SINGLE_FILES),
        ("if any(name.startswith(WHOLE) for name in names):", "if True:", SINGLE_FILES),
    ),
    "learner/api.py": (
        ("config.objective.span(sampler.steps)[1] > kernel.noisy_steps", "False", SD3),
        ('config.objective.window != "auto"', "True", SD3),
        ("family.distilled and looking", "False and looking", FLUX),
    ),
    "reports/model_card.py": (
        ("((1 - t) / (1 - s) * s) ** 2", "((1 - t) * s) ** 2", SD3),
        ("[*sampler.spread[:noisy], *[0.0] * (sampler.steps - noisy)]", "[*sampler.spread]", SD3),
        ("eta if i < {sampler.steps - 1} else 0.0", "eta", SD3),
        ("{sampler.eta!r} if i < {config.noise_steps}", "{sampler.eta!r} if i <= {config.noise_steps}", SD3),
    ),
    "diffusion/sd3.py": (
        ("embeddings[:, :POOLED], pooled, time", "embeddings, pooled, time", SD3),
    ),
    "diffusion/sdxl.py": (
        ("        if not prompt:\n            rows, pooled = empty_rows, empty_pooled\n", "", SDXL),
        ("[size, size, 0, 0, size, size]", "[0, 0, 0, 0, size, size]", SDXL),
    ),
    "diffusion/flux.py": (
        ("permute(0, 2, 4, 1, 3, 5)", "permute(0, 4, 2, 1, 3, 5)", FLUX),
        ("torch.full((count,), guidance, device=x.device)", "torch.ones(count, device=x.device)", FLUX),
    ),
    "learner/fitted_flow.py": (
        ("[:, ::-1] - spent  #", "[:, ::-1]  #", FITTED),
        ("gradient + fit.slope * rewards", "gradient + rewards", FITTED),
        ("clip(max=MOST_WEIGHT)", "clip(max=99.0)", FITTED),
    ),
    "learner/kernel_ridge.py": (
        ("* (2 / self.width)", "* (1 / self.width)", RIDGE),
        ("1.0 if one == other else 0.5", "1.0", RIDGE),
    ),
    "learner/objectives/fitted_nabla_db.py": (
        ("variance * batch.prepared[\"log", "variance.sqrt() * batch.prepared[\"log", FITTED),
        ('weights * batch.prepared["target_weight"]', "weights", FITTED),
    ),
    "learner/config/checks.py": (
        ("if config.needs.noising_kernel and", "if 0 and", f"{TARGETS} -k every_sampler"),
        ('("prompt", "epoch") and not needs.maximises', '("prompt", "epoch") and False', f"{MIXED} -k refuse_it"),
    ),
    "learner/objectives/base.py": (
        ("variance / self.kernel.variance(self.kernel.timesteps, batch.x.dtype).mean()", "variance", SLOW),
        ('abar.sqrt() if decay == "sqrt_abar" else abar', "abar", SLOW),
        ("torch.cat([batch.t, batch.t_next])", "torch.cat([batch.t, batch.t])", SLOW),
        ("torch.maximum(-advantage", "torch.minimum(-advantage", SLOW),
        ("min(1.0, epoch / ramp)", "min(1.0, (epoch + 1) / ramp)", DB),
    ),
    "learner/objectives/db.py": (
        ("self.psi(batch.t_next, batch.reward_next", "self.psi(batch.t, batch.reward_next", SLOW),
        ("self.psi(batch.t_next, batch.reward_next", "self.psi(batch.t_next, batch.reward", SLOW),
        ("(f_next.detach() if detach else f_next)", "f_next", GRADIENTS),
        ("torch.where(terminal, log_reward, ahead)", "ahead", SLOW),
        ("noise.square() * (norm", "(norm", SLOW),
        ("self.settings.span(self.kernel.num_steps)[1]", "self.kernel.num_steps", DB),
    ),
    "learner/objectives/ddpo.py": (("(rewards.std() + 1e-8)", "(rewards.std(ddof=1) + 1e-8)", SLOW),),
    "learner/objectives/trajectory.py": (
        ("ratio.detach() + self.weights(batch)", "0 * ratio + self.weights(batch)", f"{PATHS} -k test_traj"),
        ("self.group * (moved", "(moved", f"{PATHS} -k micro"),
        ("loss.detach().repeat_interleave(self.group) / self.group", "loss.detach().repeat_interleave(self.group)",
         f"{PATHS} -k micro"),
        ("batch.prepared[\"flow_slope\"] * (log_flow", "batch.prepared[\"slope\"] * (log_flow", f"{PATHS} -k micro"),
        ("log_flow if flow_gradient else log_flow.detach()", "log_flow", f"{GRADIENTS} -k sub_traj"),
        ('batch.log_ref if reduction == "sum" else', 'batch.log_ref if "s" else', f"{PATHS} -k residual_db"),
    ),
    "learner/objectives/trajectory_balance.py": (
        ("(mean * len(rows) - values[rows]) / (len(rows) - 1)", "mean", f"{PATHS} -k test_trajectory_balance"),
        ("log_z_rate * (mean - before)", "log_z_rate * mean", f"{PATHS} -k learned"),
        ("else each.mean(1)", "else each.sum(1)", f"{PATHS} -k test_trajectory_balance"),
        ("torch.where(first, prior, torch.zeros_like(prior))", "prior", f"{PATHS} -k test_trajectory_balance"),
        ("log_q[:, first] += 0.5", "log_q[:, first] -= 0.5", f"{EVERY} -k log_ratios"),
    ),
    "learner/objectives/sub_trajectory_balance.py": (
        ("ratio.flip(1).cumsum(1).flip(1)", "ratio.cumsum(1)", f"{PATHS} -k sub_traj"),
        ("** (stop - start - 1)", "** (stop - 1)", f"{PATHS} -k sub_traj"),
        ("log_flow.detach() if self.settings.detach_next_flow else log_flow", "log_flow", f"{GRADIENTS} -k segment"),
        ("nats[:, ::-1].cumsum(1, dtype=np.float64)[:, ::-1]", "nats.cumsum(1, dtype=np.float64)",
         f"{PATHS} -k sub_traj"),
        ("+ self.psi(batch.t, batch.reward, beta) + self.known", "+ self.known", f"{PATHS} -k sub_traj"),
        ("return known_log_flow(self.kernel, end, batch.x, batch.t)", "return torch.zeros_like(batch.reward)",
         f"{PATHS} -k sub_traj"),
    ),
    "learner/objectives/residual_db.py": (
        ("return torch.zeros(len(x), dtype=x.dtype, device=x.device)", "return super().known(x, t)",
         f"{PATHS} -k residual_db"),
        ("return log_reference(batch, self.settings.log_prob_reduction)", "return super().log_other(batch)",
         f"{PATHS} -k residual_db"),
    ),
    "learner/objectives/adjoint_matching.py": (
        ("adjoints.append(adjoint)", "adjoints.append(gradient)", ADJOINT),
        ("variance * beta * batch", "variance * batch", ADJOINT),
        ("self.kernel.mean if step < noisy else self.kernel.without_noise", "self.kernel.mean", ADJOINT),
    ),
    "learner/least_squares.py": (
        (" - (1 - kept) / ridge", "", SQUARES),
        ("gain.mean() > SURE", "gain.mean() > 0 * SURE", SQUARES),
        ("information.clamp(min=least).rsqrt()", "information.clamp(min=least).sqrt()", SQUARES),
        ("errors - gram @ best.coefficients", "errors", SQUARES),
    ),
    "learner/natural.py": (
        ("if found >= best:", "if 0:", f"{NATURAL} -k explains_move_nothing"),
        ("scale[part].square() *", "scale[part] *", f"{NATURAL} -k scales"),
        ("epoch, prompt), len(numbers))", "0, prompt), 0)", f"{NATURAL} -k share_a_constant"),
    ),
    "learner/rows.py": (
        ("len(values), each.shape[1]).sum(0)", "len(values), each.shape[1])[0]", f"{NATURAL} -k rows"),
    ),
    "learner/objectives/grpo.py": (
        ("rows[prompt].append(row)", "rows[0].append(row)", f"{PATHS} -k grpo"),
        ("self.settings.reference_kl * parts", "parts", f"{PATHS} -k grpo"),
        ("own.std() + 1e-4", "own.std(ddof=1) + 1e-4", f"{PATHS} -k grpo"),
    ),
    "learner/objectives/by_name.py": (
        ("if balanced and first > 0:", "if 0:", f"{TARGETS} -k window"),
        ("rollout.noise_steps != end", "0", f"{TARGETS} -k window"),
    ),
    "learner/protocol/quarantine.py": (
        ("trajectories.log_ref[rows]", "trajectories.log_ref", f"{QUARANTINE} -k densities"),
        ("values[rows] for label", "values for label", f"{MIXED} -k stand_ins"),
    ),
    "learner/config/schema.py": (
        ('self.objective.window == "all" and self.needs.inner_rewards', 'self.objective.window == "all"',
         f"{EVERY} -k no_residual"),
    ),
    "learner/objectives/kl.py": (
        ("weight = self.settings.beta if", "weight = beta if", SLOW),
        ("(squared.sum(1, keepdim=True) - squared) / others", "squared.mean(1, keepdim=True)", SLOW),
        ("log_pf.detach(), flow, beta", "log_pf, flow, beta", GRADIENTS),
    ),
    "learner/objectives/nabla_db.py": (
        ("self.gamma(batch.t_next, h.dtype)", "self.gamma(batch.t, h.dtype)", SLOW),
        ('settings.reverse_transitions == "inner"', "settings.reverse_transitions", SLOW),
        ("h_next.detach() if settings", "h_next if settings", GRADIENTS),
    ),
    "learner/objectives/residual_nabla_db.py": (("pretrained_strength * batch", "beta * batch", SLOW),),
    "learner/experience.py": (
        ("reward_next=tensor(rewards[row, step + 1])", "reward_next=tensor(rewards[row, step])", GATHER),
        ("chunk.prompts[r] for r in row", "chunk.prompts[0] for r in row", GATHER),
        ("terminal=tensor(step + 1 >= end)", "terminal=tensor(step >= end)", GATHER),
    ),
    "learner/update.py": (
        ("raw = tuple(self.mixture.trained(ids, prompts, parts))", "pass", f"{MIXED} -k gets_the_sum"),
        ("for part in process_group.gather(mine) for row in part", "for row in mine", f"{MIXED} -m long -k two_ranks"),
        ("flow_loss(concatenate(parts), self.flow, beta)",
         "flow_loss(concatenate(parts), self.flow, self.config.objective.beta)", f"{UPDATE} -k annealed"),
        ("experience.scores.rewards[:, -1] - offset", "experience.scores.rewards[:, -1]", f"{EVERY} -k no_residual"),
        ("share = len(batch.t) / count", "share = self.micro_batch / count", f"{EVERY} -k micro_batches_do_not"),
        ("loss + self.config.objective.regulariser * moved_by", "loss", f"{HELD} -k anchor"),
    ),
    "evaluation/collapse.py": (
        ("high < 0 < was and", "high < 0 < was or", COLLAPSE),
        ("-fell > FALL *", "-fell > -FALL *", COLLAPSE),
    ),
    "evaluation/metrics.py": (
        ("np.flatnonzero(good & (groups == group))", "np.flatnonzero(good)", METRICS),
        ("more = np.append(change, (1.0, -1.0))", "more = change", METRICS),
        ("return float(np.median(drawn)), float(most)", "return float(drawn[0]), float(drawn[0])", METRICS),
    ),
    "evaluation/certificate.py": (
        ("each = log_z - exponent * rewards + path", "each = log_z - exponent * rewards - path", CERTIFICATE),
        ("if not tilts.known(pool.ravel(), places, exponent):", "if False:", CERTIFICATE),
        ("(count - 1) * np.log(others", "count * np.log(others", CERTIFICATE),
    ),
    "evaluation/targets.py": (
        ("aim = laws(pool, self.places, self.weights, count)",
         "aim = laws(pool, self.places, np.ones(len(pool)), count)", LAWS),
        ("drawn.append(float(share @ variations(sampled, estimated)))",
         "drawn.append(float(share @ variations(sampled, law)) / 2)", LAWS),
        ("of_tuned, _, of_pool = self._codes(given)", "of_tuned, _, of_pool = self._codes(name)", LAWS),
    ),
    "evaluation/adapters.py": (
        ("if any(prompts) else None", "if False else None", f"{EMBEDDED} -k pools"),
        ("own = {key: value for key, value in config.own_code.items() if key not in given}", "own = {}", RECEIVED),
        ('!= run.about["prompts_sha256"]', '== ""', RECEIVED),
        ("return f\"{self.place}-{self.sets()['tuned'].name}\"", "return self.place", JUDGED),
    ),
    "learner/open_run.py": (("            _require_free(storage, config)", "            pass", OPEN),),
    "records/facts.py": (('" * ("config_sha256" in known)', '" * 0', DAMAGED),),
    "records/run_folder.py": ((
        "except (OSError, ValueError, LookupError, pa.ArrowException) as error:\n        raise StorageError(f\"{place}",
        "except LookupError as error:\n        raise StorageError(f\"{place}", DAMAGED,
    ),),
    "records/passwords.py": (('return USERINFO.sub("", text)', "return text", "tests/records/test_passwords.py"),),
    "reports/summary.py": (('"rose" if low > 0', '"rose" if low >= 0', "tests/reports/test_summary.py"),),
    "learner/controller.py": (("if label not in warned:", "if True:", f"{MIXED} -k once"),),
    "actors/pool.py": (("if first and calls:", "if calls:", "tests/actors/test_pool.py"),),
}  # fmt: skip
PARTS = ROWS, reward_mutations.ROWS, benchmark_mutations.ROWS
MUTATIONS = [(name, *row) for part in PARTS for name, rows in part.items() for row in rows]


def run_tests(folder: Path, tests: str) -> int | None:
    """pytest's exit status in a copy of the tree, in a process of its own; None if it ran too long."""
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(folder, tests.split()))
    process.start()
    process.join(timeout=SECONDS)
    if process.is_alive():
        process.kill()
        process.join(timeout=30)
        return None
    return process.exitcode


def _pytest(folder: Path, tests: list[str]) -> None:
    import pytest

    os.chdir(folder)
    sys.dont_write_bytecode = True  # a mutation of the same second and length would be taken for what it replaces
    sys.path[:0] = [str(folder)]
    with open(os.devnull, "w") as quiet:
        os.dup2(quiet.fileno(), 1)
        os.dup2(quiet.fileno(), 2)
        os._exit(pytest.main([*tests, "-x", "-p", "no:cacheprovider", "-o", "timeout=0"]))


def main(words: list[str]) -> int:
    """Exit status 0: all were seen; 1: one was not."""
    import_module("diffusers.pipelines.stable_diffusion")  # before the forks, so that no row imports it anew

    rows = [row for row in MUTATIONS if not words or any(word in f"{row[0]} {row[2]}" for word in words)]
    faults = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "tree"
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        for name in listed.stdout.splitlines():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        for tests in dict.fromkeys(row[3] for row in rows):
            if (status := run_tests(folder, tests)) != 0:
                print(f"FAILS WITHOUT A MUTATION ({status}): {tests}", flush=True)
                faults += 1
        for name, old, new, tests in rows:
            source = (ROOT / name).read_text(encoding="utf-8")
            said = "GONE, or there twice"
            if source.count(old) == 1:
                (folder / name).write_text(source.replace(old, new), encoding="utf-8")
                status = run_tests(folder, tests)
                # 1: tests failed. Anything else is no verdict: nothing collected, an import that breaks, a signal.
                said = {1: "seen", 0: "NOT SEEN", None: f"NO ANSWER in {SECONDS} s"}.get(status, f"BROKE ({status})")
                (folder / name).write_text(source, encoding="utf-8")
            faults += said != "seen"
            print(f"{said}: {name}: {old} -> {new}", flush=True)
    print(f"{len(rows)} mutations, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
