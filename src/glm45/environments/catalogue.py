"""Verifiers by name, loaded when asked for and proved on load."""

import importlib

from glm45.environments.protocol import Verifier, prove
from glm45.environments.sandbox import SandboxLimits

VERIFIERS = {
    "arithmetic": "glm45.environments.arithmetic:ArithmeticVerifier",
    "reasoning_gym": "glm45.environments.reasoning_gym:ReasoningGymVerifier",
    "mathematics": "glm45.environments.mathematics:MathematicsVerifier",
    "science": "glm45.environments.science:ScienceVerifier",
    "code": "glm45.environments.code:CodeVerifier",
    "tools": "glm45.environments.tools:ToolCallVerifier",
    "instructions": "glm45.environments.instructions:InstructionVerifier",
}


def load_verifier(name: str, sandbox: SandboxLimits | None = None) -> Verifier:
    """Return the verifier called `name`, or the one at `module:attribute`, after it has proved itself.

    `sandbox` limits the programs of `code`; None is the default limits. Raises ValueError if there is none of that name
    or if the proof fails.
    """
    path = VERIFIERS.get(name, name)
    module_name, colon, attribute = path.partition(":")
    if not colon:
        raise ValueError(f"no verifier {name!r}: use one of {', '.join(VERIFIERS)}, or module:attribute for your own")
    try:
        make = getattr(importlib.import_module(module_name), attribute)
        verifier: Verifier = make(sandbox) if name == "code" else make()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"verifier {name!r} cannot be loaded: {error}") from error
    prove(verifier, name)
    return verifier
