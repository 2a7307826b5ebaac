"""What the JSON files of a run hold, for whoever reads them: they may be damaged, or somebody else's. Other keys than
these may be there too."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

Number = FiniteFloat | None  # null: it was none
Count = Annotated[int, Field(ge=0, lt=2**53)]
Seconds = Annotated[float, Field(ge=0, le=1e11)]  # since 1970, too: years of four digits


class Shape(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Written(Shape):
    format: int


class SettledAt(Shape):
    """Share of a reward's variance that is settled at a state, and its 95 % interval."""

    state: Count
    share: Annotated[float, Field(ge=-1, le=1)]
    low: Annotated[float, Field(ge=-1, le=1)]
    high: Annotated[float, Field(ge=-1, le=1)]


class Settled(Shape):
    """Where a reward is settled, evaluation/settling.py, and the transitions that are trained for it."""

    window: Annotated[list[Count], Field(min_length=2, max_length=2)]  # first and last
    steps: Annotated[int, Field(ge=1, le=1000)]  # of a path
    profile: Annotated[list[SettledAt], Field(min_length=1)]

    @model_validator(mode="after")
    def _within_the_path(self) -> Self:
        states = [each.state for each in self.profile]
        if not self.window[0] <= self.window[1] < self.steps:
            raise ValueError(f"its window {self.window} is not within 0 to {self.steps - 1}")
        if states != sorted({*states}) or states[-1] > self.steps:
            raise ValueError("its states are not in order, or beyond the path")
        return self


class About(Written):
    """run.json."""

    run_id: str
    name: str
    created: Seconds
    finished: bool
    config_digest: str
    prompts_sha256: str
    config_sha256: str | None = None  # of config.yaml
    mlflow_run_id: str | None = None
    environment: dict[str, str | None] = {}
    cluster: dict[str, FiniteFloat] = {}
    dimensions: Count | None = None  # numbers in a latent
    failure: str | None = None  # the kind of the one that ended it last
    changes: list[dict[str, Any]] = []  # of settings, on the way
    settled: Settled | None = None  # what objective.window=auto was measured to be
    spread: list[Annotated[FiniteFloat, Field(ge=0, le=1e6)]] | None = None  # what sampler.spread was measured to be


class Line(Shape):
    """A line of metrics.jsonl."""

    __pydantic_extra__: dict[str, Number]
    epoch: Annotated[int, Field(ge=-1, lt=2**31)]
    step: Count
    time: Seconds
    policy_version: Count
    seconds: Seconds
    trajectories: Count
    trajectories_trained: Count = 0
    eval_reward_mean: Number
    adapter_sha256: str | None = None
    collapse: str | None = None
    eval_no_gap: str | None = None  # why there is no eval_gap
    eval_nats_by_transition: list[Number] | None = None
    updates: list[dict[str, Number]]


class Event(Shape):
    time: Seconds
    text: str


class Beat(Shape):
    """status.json."""

    state: Literal["starting", "running", "finished", "failed", "stopped"]
    process: Annotated[int, Field(ge=0, lt=2**31)]
    host: str
    since: Seconds
    time: Seconds
    quiet_seconds: FiniteFloat
    epochs: Count | None = None
    reason: str | None = None
    mlflow: str | None = None
    doing: str = ""
    done: Count = 0
    total: Count = 0
    events: Count = 0
    last_events: list[Event] = []
    staleness: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)] | None = None
    epochs_in_work: Count = 0
    actors: dict[str, Count] = {}
    waiting: dict[str, Count] = {}
    running: dict[str, Count] = {}


class Evaluation(Shape):
    """evaluation/epoch-N.json: columns of the fixed images."""

    prompt: list[str]
    reward: list[Number]
    reward_parts: dict[str, list[Number]] = {}
    held_out: dict[str, list[Number]] = {}

    @model_validator(mode="after")
    def _of_one_length(self) -> Self:
        columns = [self.reward, *self.reward_parts.values(), *self.held_out.values()]
        if any(len(column) != len(self.prompt) for column in columns):
            raise ValueError("its columns are not of one length")
        return self


class Figure(Shape):
    __pydantic_extra__: dict[str, Number]


class JudgedOn(Shape):
    images: Count = 0
    prompts: Count = 0
    seed: int = 0
    features: str = ""


class Certificate(Shape):
    """evaluation/certificate.py's `measure`."""

    exponent: Number = None
    bound: Number = None
    explained: Number = None
    ess: Number = None
    nats_by_transition: list[Number] | None = None
    gain: Number = None
    ideal_gain: Number = None
    no_gap: str | None = None


class Judgement(Shape):
    """evaluation/step-N-IMAGES-images-....json, of learner.evaluate."""

    settings: JudgedOn | None = None
    absent: dict[str, str] = {}  # figures that cannot be had, and why
    reward: Figure | None = None
    accuracy: Figure | None = None
    vendi: Figure | None = None
    distance: Figure | None = None
    fid: Figure | None = None
    kid: Figure | None = None
    held_out: dict[str, Figure | None] = {}
    gap: Figure | None = None
    nats: Figure | None = None
    certificate: Certificate | None = None
    epochs_done: Count | None = None


class Law(Shape):
    """Of an attribute: shares of its values."""

    name: str
    values: list[str]
    base: list[Number]
    target: list[Number]
    tuned: list[Number]
    tv: Figure
    drift: Figure | None = None


class TargetJudgement(Shape):
    """evaluation/targets-step-N-IMAGES-images-....json, of learner.targets."""

    settings: JudgedOn
    name: str
    reward_name: str
    beta: FiniteFloat
    base_pictures: Count
    ess: FiniteFloat
    ess_least: FiniteFloat
    given: str
    warning: str | None = None
    reward: Figure
    distance: Figure | None = None
    attributes: Annotated[list[Law], Field(min_length=1)]
    epochs_done: Count | None = None


class SetAside(Shape):
    """quarantine/*.json."""

    epoch: Count
    trajectory_id: Count
    prompt: str
    reason: str


class Accounts(Shape):
    epochs: Count
    totals: dict[str, Count]


class Manifest(Written):
    """state.json of a checkpoint. Older formats have no seal."""

    sha256: str
    run_id: str
    step: Count
    next_epoch: Count
    files: dict[str, str]
    policy_version: Count
    adapter_sha256: str
    ranks: Annotated[int, Field(gt=0)]
    batch_sizes: dict[str, Count | None]
    ledger: Accounts
    run: About | None = None  # run.json as it was then
    metrics_sha256: str | None = None  # of metrics.jsonl until then
