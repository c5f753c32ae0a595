"""One prompt with one generated trajectory: what rollout makes, verifiers judge and training learns from."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from glm45.environments.protocol import Failure, Message, Outcome, Task

Status = Literal["running", "completed", "truncated", "aborted", "failed"]


@dataclass(slots=True)
class Sample:
    """Tokens, what of them is learnt, and what they earned; only the `append_*` and `judge` methods change it.

    Sampled token ids are kept as they were sampled and never made again from text.
    """

    task: Task
    group_id: int
    """Samples of one prompt share it."""
    index: int
    """Place within the group."""
    tokens: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    """True for tokens that the model sampled."""
    rollout_logprobs: list[float] = field(default_factory=list)
    """The engine's log-probability of each sampled token; 0 elsewhere."""
    weight_version: int = -1
    """Oldest version of the weights that sampled any token; -1 before there is one."""
    status: Status = "running"
    """`truncated`: cut by the cap or the context; `failed`: could not be judged."""
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    """The conversation, the model's messages as the parser read them."""
    metadata: dict[str, Any] = field(default_factory=dict)

    def append_context(self, tokens: list[int], messages: list[Message]) -> None:
        """Add tokens that somebody else wrote: the prompt, or an environment's answer."""
        self._require("running", "context")
        self.tokens += tokens
        self.loss_mask += [False] * len(tokens)
        self.rollout_logprobs += [0.0] * len(tokens)
        self.messages += messages
        self._check()

    def append_generated(
        self, tokens: list[int], logprobs: list[float], message: Message, weight_version: int, truncated: bool
    ) -> None:
        """Add tokens that the model sampled, with the message that they say."""
        self._require("running", "generated tokens")
        if len(tokens) != len(logprobs):
            raise ValueError(f"sample {self.group_id}/{self.index}: {len(tokens)} tokens, {len(logprobs)} logprobs")
        self.tokens += tokens
        self.loss_mask += [True] * len(tokens)
        self.rollout_logprobs += logprobs
        self.messages.append(message)
        self.weight_version = weight_version if self.weight_version < 0 else min(self.weight_version, weight_version)
        self.status = "truncated" if truncated else "completed"
        self._check()

    def append_turn(self, tokens: list[int], messages: list[Message]) -> None:
        """Go on after a finished message with what an environment answered."""
        self._require("completed", "another turn")
        self.status = "running"
        self.append_context(tokens, messages)

    def judge(self, outcome: Outcome) -> None:
        """Set the reward, or mark the sample as failed: a failure is not a reward of zero."""
        if isinstance(outcome, Failure):
            self.status = "failed"
            self.metadata["failure"] = {"kind": outcome.kind, "detail": outcome.detail}
        else:
            # Penalties come later: whether the answer was right is the verifier's word alone.
            self.reward, self.reward_parts = outcome.value, {"correct": float(outcome.value == 1.0), **outcome.parts}

    def add_penalty(self, part: str, value: float) -> None:
        """Add a negative part to a judged sample's reward."""
        assert self.reward is not None
        assert value <= 0
        self.reward += value
        self.reward_parts[part] = value

    @property
    def num_generated(self) -> int:
        """Sampled tokens: the length of the response."""
        return sum(self.loss_mask)

    @property
    def response(self) -> Message:
        """The model's last message."""
        return self.messages[-1]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Sample":
        """Inverse of `to_dict`."""
        sample = cls(**{**values, "task": Task(**values["task"])})
        sample._check()
        return sample

    def _require(self, status: Status, what: str) -> None:
        if self.status != status:
            raise ValueError(f"sample {self.group_id}/{self.index} is {self.status}: it takes no {what}")

    def _check(self) -> None:
        lengths = {len(self.tokens), len(self.loss_mask), len(self.rollout_logprobs)}
        assert len(lengths) == 1, f"sample {self.group_id}/{self.index}: lengths differ: {lengths}"
