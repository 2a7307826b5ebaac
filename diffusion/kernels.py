"""The forward (denoising) and backward (noising) transition kernels of a Gaussian path, and of DDIM with eta > 0.

Notation of arXiv 2406.00633: x = x_t, x_next = x_t' is the cleaner state, abar = cumulative alpha;

    p_F(x_t' | x_t) = N(mu_theta(x_t), sigma_t^2 I)          the policy
    p_B(x_t | x_t') = N(a_t x_t', (1 - a_t^2) I)             the noising kernel, no parameters

p_B is the reverse of DDIM's steps at eta 1 alone: at a smaller eta that one knows the image (Bayes gives it a mean that
depends on x_0), and only objectives without p_B can train.
The last transition goes to timestep 0, so that sigma_t > 0 everywhere (a step to abar = 1 would make log p_F infinite).
Shapes: x and model outputs [B, C, H, W], t [B], densities [B] in nats."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from diffusion.settings import Grid, Reduction

# Settings of diffusers' schedulers that change what is drawn and that the kernel does not follow: refused unless off.
NOT_FOLLOWED = (
    "thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
    "use_flow_sigmas", "use_dynamic_shifting", "shift_terminal", "sigma_min", "sigma_max", "snr_shift_scale",
)  # fmt: skip


class GaussianKernel:
    """Gaussian transition densities on the grid of any path x_t = alpha_t x_0 + sigma_t eps. Constants are float64,
    arithmetic is float32 or wider whatever the inputs' dtype: in bfloat16 abar_1 rounds to 1 and sigma to 0."""

    clip: float | None = None
    reverses_noising = True  # else there is no p_B

    def __init__(
        self, timesteps: Tensor, prediction_type: str, squares: Mapping[str, Tensor], noisy_steps: int | None = None
    ) -> None:
        """`timesteps` [N] int64, decreasing: rows of the tables `squares` [T] float64. Of the state at t, `abar`
        alpha_t^2 and `noise` sigma_t^2; `abar_next` and `noise_next` of the next state; of the step, the variance
        `sigma` of p_F, `direction` (what of noise_next is not drawn anew), A^2 `shrink` and the variance `noising` of
        p_B. The first `noisy_steps` transitions have a density; None: all."""
        self.timesteps, self.num_steps, self.prediction_type = timesteps, len(timesteps), prediction_type
        self.noisy_steps = self.num_steps if noisy_steps is None else noisy_steps
        roots = {f"root_{name}": table.sqrt() for name, table in squares.items()}
        # [T] float64 by device: a copy to a GPU makes the host wait, so each is made once.
        self._tables: dict[torch.device, dict[str, Tensor]] = {torch.device("cpu"): {**squares, **roots}}

    def clean(self, model_output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Predicted clean latent xhat_theta(x_t), clipped where the scheduler clips it: p_F stays a Gaussian with a
        known mean, whose gradient through what was clipped is 0."""
        model_output, x = _wide(model_output), _wide(x)
        clean, abar = model_output, self._at("abar", t, x)
        if self.prediction_type == "epsilon":
            clean = (x - self._at("root_noise", t, x) * model_output) / abar.sqrt()
        elif self.prediction_type == "v_prediction":
            clean = abar.sqrt() * x - self._at("root_noise", t, x) * model_output
        elif self.prediction_type == "flow":  # the velocity eps - x_0
            clean = x - self._at("root_noise", t, x) * model_output
        return clean if self.clip is None else clean.clamp(-self.clip, self.clip)

    def epsilon(self, model_output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Predicted noise eps_theta(x_t); like diffusers' own of the output, not of a clipped clean latent."""
        model_output, x = _wide(model_output), _wide(x)
        if self.prediction_type == "epsilon":
            return model_output
        root_noise, root_signal = self._at("root_noise", t, x), self._at("root_abar", t, x)
        if self.prediction_type == "v_prediction":
            return root_signal * model_output + root_noise * x
        if self.prediction_type == "flow":
            return x + root_signal * model_output
        return (x - root_signal * model_output) / root_noise

    def mean(self, model_output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """mu_theta(x_t), the mean of p_F(. | x_t)."""
        x = _wide(x)
        signal = self._at("root_abar_next", t, x) * self.clean(model_output, t, x)
        return signal + self._at("root_direction", t, x) * self.epsilon(model_output, t, x)

    def without_noise(self, model_output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """The next state by DDIM with eta 0, whatever this kernel's eta."""
        x = _wide(x)
        signal = self._at("root_abar_next", t, x) * self.clean(model_output, t, x)
        return signal + self._at("root_noise_next", t, x) * self.epsilon(model_output, t, x)

    def divergence(self, model_output: Tensor, reference: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """KL(p_F(.|x) || p_ref(.|x)) [B] in nats, of two guided outputs: |mu - mu_ref|^2 / (2 sigma_t^2)."""
        apart = self.mean(model_output, t, x) - self.mean(reference, t, x)
        return (apart.square() / (2 * self._at("sigma", t, apart))).flatten(1).sum(1)

    def abar(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Cumulative alpha abar_t = alpha_t^2 [B]."""
        return self._table("abar", t.device)[t].to(dtype)

    def noise(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """sigma_t^2 [B] of the path: what of the state is noise, per dimension."""
        return self._table("noise", t.device)[t].to(dtype)

    def variance(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Of p_F [B], per dimension."""
        return self._table("sigma", t.device)[t].to(dtype)

    def log_pf(self, model_output: Tensor, t: Tensor, x: Tensor, x_next: Tensor, reduction: Reduction) -> Tensor:
        """log p_F(x_next | x)."""
        mean, x_next = self.mean(model_output, t, x), _wide(x_next)
        return _log_normal(x_next - mean, self._at("sigma", t, mean), reduction)

    def log_pb(self, t: Tensor, x: Tensor, x_next: Tensor, reduction: Reduction) -> Tensor:
        """log p_B(x | x_next)."""
        x, x_next = _wide(x), _wide(x_next)
        residual = x - self._at("root_shrink", t, x) * x_next
        return _log_normal(residual, self._at("noising", t, x), reduction)

    def score_pf(self, model_output: Tensor, t: Tensor, x: Tensor, x_next: Tensor) -> Tensor:
        """Gradient of the summed log p_F(x_next | x) with respect to x_next."""
        mean = self.mean(model_output, t, x)
        return -(_wide(x_next) - mean) / self._at("sigma", t, mean)

    def score_pb_next(self, t: Tensor, x: Tensor, x_next: Tensor) -> Tensor:
        """Gradient of the summed log p_B(x | x_next) with respect to x_next."""
        return -self._at("root_shrink", t, _wide(x)) * self.score_pb(t, x, x_next)

    def score_pb(self, t: Tensor, x: Tensor, x_next: Tensor) -> Tensor:
        """Gradient of the summed log p_B(x | x_next) with respect to x."""
        x, x_next = _wide(x), _wide(x_next)
        return -(x - self._at("root_shrink", t, x) * x_next) / self._at("noising", t, x)

    def sample(self, model_output: Tensor, t: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        mean = self.mean(model_output, t, x)
        return mean + self._at("root_sigma", t, mean) * noise

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """The table at t, shaped [B, 1, 1, 1] in like's dtype; looked up in float64, then cast."""
        return self._table(name, t.device)[t].to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))

    def _table(self, name: str, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = {key: table.to(device) for key, table in self._tables[torch.device("cpu")].items()}
        return self._tables[device][name]


class DDIMKernel(GaussianKernel):
    """Of a diffusion model, abar = alpha^2 = 1 - sigma^2: DDIM's steps with eta > 0."""

    def __init__(
        self,
        alphas_cumprod: Tensor,
        timesteps: Tensor,
        prediction_type: str = "epsilon",
        eta: float = 1.0,
        clip: float | None = None,
    ) -> None:
        """`alphas_cumprod` [T], decreasing; `timesteps` [N] int64, decreasing, all > 0; with `eta` 1 sigma is the
        posterior ("small") variance of DDPM, and above 1 no mean would keep the marginals; clean predictions are
        clipped to [-clip, clip]. Raises ValueError if a transition has no density."""
        if prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"its prediction_type is {prediction_type!r}, not epsilon, v_prediction or sample")
        if eta > 1:
            raise ValueError(f"eta ({eta}) must be at most 1: more noise than there is at a timestep")
        timesteps = timesteps.to(torch.int64).cpu()
        if (timesteps[1:] >= timesteps[:-1]).any():
            raise ValueError(f"its {len(timesteps)} timesteps must decrease: set fewer sampler.steps")
        if timesteps[0] >= len(alphas_cumprod):
            begin = f"its grid begins at timestep {timesteps[0]} of {len(alphas_cumprod)}"
            raise ValueError(f"{begin}: set fewer sampler.steps")
        if timesteps[-1] <= 0:
            raise ValueError("its grid evaluates the model at timestep 0: set fewer sampler.steps")
        abar = alphas_cumprod.to("cpu", torch.float64)
        if prediction_type == "epsilon" and abar[timesteps[0]] < 1e-7:
            raise ValueError(
                f"at its timestep {timesteps[0]} no signal is left (rescale_betas_zero_snr, or its betas), and its "
                "prediction_type epsilon says nothing of the picture there: set sampler.steps or timestep_spacing to "
                "begin later"
            )
        # Off-grid timesteps step by the grid's usual stride; grid entries step to their successor.
        following = (torch.arange(len(abar)) - max(1, len(abar) // len(timesteps))).clamp(min=0)
        following[timesteps] = torch.cat([timesteps[1:], timesteps.new_zeros(1)])
        after = abar[following]
        sigma2 = eta**2 * (1 - after) / (1 - abar) * (1 - abar / after)
        if not bool((sigma2[timesteps] > 0).all()):
            raise ValueError(f"a transition has no variance: sampler.eta ({eta}) and all its betas must be above 0")
        squares = {
            "abar": abar, "noise": 1 - abar, "abar_next": after, "sigma": sigma2, "shrink": abar / after,
            "direction": (1 - after - sigma2).clamp(min=0), "noising": 1 - abar / after, "noise_next": 1 - after,
        }  # fmt: skip
        super().__init__(timesteps, prediction_type, squares)
        self.clip = clip

    def noise(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return 1 - self.abar(t, dtype)

    @classmethod
    def from_scheduler(cls, scheduler, num_steps: int = 50, eta: float = 1.0, grid: Grid = "ddim") -> "DDIMKernel":
        """The kernel of a diffusers scheduler that DDIM can stand in for; only its settings are read. Raises a
        ValueError, which names the setting, for one that is not followed. Equal to diffusers' DDIM step with
        `set_alpha_to_one=False, steps_offset=1`: without an offset leading spacing evaluates the model at timestep 0.
        `grid` dpm_solver: the timesteps of first-order SDE-DPM-Solver++ (arXiv 2412.07775), whose steps are
        DDIM steps with eta 1."""
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        given = scheduler.config
        if faults := [f"{name} is {given[name]}" for name in NOT_FOLLOWED if given.get(name) not in (None, False)]:
            raise ValueError(f"its {', its '.join(faults)}, which is not followed here: switch it off")
        if given.get("timestep_type") == "continuous" or "learned" in str(given.get("variance_type")):
            raise ValueError(
                "its timestep_type is continuous, or its variance_type a learned one: neither is followed here"
            )
        if given.get("steps_offset", 0) not in (0, 1):
            raise ValueError(f"its steps_offset is {given.steps_offset}: only 0, read as 1, and 1 are followed")
        stepper = own = DDIMScheduler.from_config(given, steps_offset=1)
        total, spacing = own.config.num_train_timesteps, own.config.timestep_spacing
        if grid == "dpm_solver":
            if own.config.clip_sample:
                raise ValueError("its clip_sample is true, which DPM-Solver has not: set sampler.grid=ddim")
            stepper = DPMSolverMultistepScheduler.from_config(
                own.config, algorithm_type="sde-dpmsolver++", solver_order=1, final_sigmas_type="sigma_min"
            )
        elif spacing == "linspace":
            raise ValueError(
                "its timestep_spacing is linspace, which evaluates the model at timestep 0: set it to leading or "
                "trailing, or sampler.grid=dpm_solver"
            )
        elif spacing == "trailing" and total % num_steps:
            raise ValueError(
                f"its timestep_spacing is trailing, and {num_steps} steps do not divide its {total} timesteps, where "
                "diffusers' DDIM steps to other timesteps than it evaluates: set sampler.steps to a divisor, or "
                "sampler.grid=dpm_solver"
            )
        elif given.get("lambda_min_clipped", -math.inf) > -math.inf:
            raise ValueError("its lambda_min_clipped is DPM-Solver's: set sampler.grid=dpm_solver")
        stepper.set_timesteps(num_steps)
        clip = own.config.clip_sample_range if own.config.clip_sample else None
        return cls(stepper.alphas_cumprod, stepper.timesteps, own.config.prediction_type, eta, clip)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _log_normal(residual: Tensor, variance: Tensor, reduction: Reduction) -> Tensor:
    per_dim = -0.5 * (residual.square() / variance + variance.log() + math.log(2 * math.pi))
    flat = per_dim.flatten(1)
    return flat.sum(1) if reduction == "sum" else flat.mean(1)
