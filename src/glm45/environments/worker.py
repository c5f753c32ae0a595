"""The process in which verifiers run: JSON lines in, JSON lines out.

Started by `verify.RewardWorkers`; it can be killed at any moment without harm to the run.
"""

import dataclasses
import json
import math
import os
import resource
import sys
from typing import Any, TextIO

from glm45.config import from_dict
from glm45.environments.catalogue import load_verifier
from glm45.environments.protocol import Failure, Outcome, Reward, Task, Verifier
from glm45.environments.sandbox import SandboxLimits, SandboxUnavailableError
from glm45.environments.verify import RewardConfig


def score_one(verifiers: dict[str, Verifier], request: dict[str, Any], sandbox: SandboxLimits) -> Outcome:
    """Judge one request, or only load its verifier (`prove`); whatever a verifier raises becomes a typed failure."""
    try:
        name = request.get("prove") or request["task"]["verifier"]
        if name not in verifiers:
            verifiers[name] = load_verifier(name, sandbox)
        reward = (
            Reward(1.0) if "prove" in request else verifiers[name].score(Task(**request["task"]), request["response"])
        )
    except MemoryError:
        return Failure("memory", "the verifier ran out of memory")
    except SandboxUnavailableError as error:
        return Failure("refused", str(error))
    except Exception as error:
        return Failure("error", f"{type(error).__name__}: {error}")
    if not isinstance(reward, Reward) or not math.isfinite(reward.value):
        return Failure("error", f"the verifier returned {reward!r}, which is not a finite Reward")
    return reward


def serve(requests: TextIO, answers: TextIO, sandbox: SandboxLimits) -> None:
    """Answer requests until the other side closes."""
    verifiers: dict[str, Verifier] = {}
    for line in requests:
        outcome = score_one(verifiers, json.loads(line), sandbox)
        kind = "reward" if isinstance(outcome, Reward) else "failure"
        answers.write(json.dumps({kind: dataclasses.asdict(outcome)}) + "\n")
        answers.flush()


def main() -> None:
    """Limit the memory, keep the protocol's channel away from whatever prints, and serve."""
    config = from_dict(RewardConfig, json.loads(sys.argv[1]))
    memory_bytes = config.memory_mb << 20
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a verifier that prints must not write into the protocol
    serve(sys.stdin, answers, config.sandbox)


if __name__ == "__main__":
    main()
