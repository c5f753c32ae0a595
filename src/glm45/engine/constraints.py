"""Grammars that an output must follow: JSON schemas and tool calls, enforced token by token with xgrammar.

Tags such as `<tool_call>` are single tokens and are matched as such: no string of the output can spell one, and no
free text may contain one, so whatever a grammar lets through, `glm45.text.parsing` reads back.
"""

import functools
import json
import threading
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING, Any

import torch

from glm45.engine.request import Constraint, Sequence
from glm45.text.arguments import value_kind
from glm45.text.special_tokens import (
    ARG_KEY,
    ARG_KEY_END,
    ARG_VALUE,
    ARG_VALUE_END,
    THINK,
    THINK_END,
    TOOL_CALL,
    TOOL_CALL_END,
)
from glm45.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import xgrammar

REMEMBERED = 256
"""Compiled grammars that are kept, of each kind."""
Format = dict[str, Any]
"""A part of xgrammar's structural tag."""


class Grammars:
    """Compiles constraints for one tokenizer, and remembers them. Safe to use from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        import xgrammar  # slow to import, needed by few

        special = tokenizer.special_tokens
        vocabulary = [_spelling(tokenizer, index) for index in range(vocab_size)]
        self._vocab_size = vocab_size
        self._tokens = {text: index for index, text in special.items()}
        self._info = xgrammar.TokenizerInfo(
            vocabulary, vocab_size=vocab_size, stop_token_ids=list(tokenizer.eos_token_ids)
        )
        # Without xgrammar's cache, which shares masks between grammars and takes different single tokens for equal
        # (0.2.8): after one call with arguments, another tool's call was let go on with `</arg_key>`.
        compiler = xgrammar.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)
        self._compile_grammar = functools.lru_cache(REMEMBERED)(compiler.compile_grammar)
        self._compile_tag = functools.lru_cache(REMEMBERED)(compiler.compile_structural_tag)
        self._lock = threading.Lock()

    def matcher(self, constraint: Constraint) -> "Matcher":
        """Return a fresh matcher. Raises ValueError for a schema or grammar that cannot be compiled."""
        import xgrammar

        try:
            with self._lock:
                compiled = self._compile(constraint)
        except (RuntimeError, ValueError, xgrammar.InvalidJSONError, xgrammar.InvalidStructuralTagError) as error:
            lines = str(error).strip().splitlines()
            raise ValueError(f"the constraint cannot be enforced: {lines[-1] if lines else error!r}") from None
        return Matcher(xgrammar.GrammarMatcher(compiled), self._vocab_size)

    def _compile(self, constraint: Constraint) -> "xgrammar.CompiledGrammar":
        if constraint.grammar is not None:
            return self._compile_grammar(constraint.grammar)
        if constraint.tools is not None:
            body = self._calls(constraint.tools)
        else:
            body = _json({"type": "object"} if constraint.json_schema is None else constraint.json_schema)
        parts = [*self._reasoning(), body] if constraint.reasoning else [body]
        tag = {"type": "structural_tag", "format": _sequence(*parts)}
        return self._compile_tag(json.dumps(tag))

    def _token(self, text: str) -> Format:
        return {"type": "token", "token": self._tokens[text]}

    def _text(self) -> Format:
        """Any text: no tag, no control token."""
        return {"type": "any_tokens", "exclude_tokens": sorted(self._tokens.values())}

    def _reasoning(self) -> list[Format]:
        """Optional reasoning, as the model writes it, and the newline before the answer."""
        thought = _sequence(self._token(THINK), self._text(), self._token(THINK_END))
        return [_optional(_constant("\n")), _optional(_sequence(thought, _optional(_constant("\n"))))]

    def _calls(self, tools: Rows[Mapping[str, Any]]) -> Format:
        """One call, and more after it, each of any of the tools."""
        call: Format = {"type": "or", "elements": [self._call(tool.get("function") or tool) for tool in tools]}
        return _sequence(call, {"type": "star", "content": _sequence(_optional(_constant("\n")), call)})

    def _call(self, function: Mapping[str, Any]) -> Format:
        parameters = function.get("parameters") or {}
        properties, required = parameters.get("properties") or {}, parameters.get("required") or []
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise ValueError(f"tool {function['name']!r}: its properties are no object or its required is no list")
        arguments = []
        for key, schema in properties.items():
            argument = self._argument(key, schema, parameters)
            arguments.append(argument if key in required else _optional(argument))
        name = _constant(function["name"] + "\n")
        return _sequence(self._token(TOOL_CALL), name, *arguments, self._token(TOOL_CALL_END))

    def _argument(self, key: str, schema: Any, parameters: Mapping[str, Any]) -> Format:
        name = _sequence(self._token(ARG_KEY), _constant(key), self._token(ARG_KEY_END), _constant("\n"))
        value = self._value(key, schema, parameters)
        return _sequence(name, self._token(ARG_VALUE), value, self._token(ARG_VALUE_END), _constant("\n"))

    def _value(self, key: str, schema: Any, parameters: Mapping[str, Any]) -> Format:
        """A string stands as it is, anything else is JSON: how the parser reads values back."""
        kind = value_kind(parameters, key)
        if kind == "json":
            definitions = {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}
            return _json({**definitions, **schema})
        choices = schema.get("enum") if isinstance(schema, Mapping) else None
        if choices and isinstance(choices, list) and kind == "string":
            return {"type": "or", "elements": [_constant(str(choice)) for choice in choices]}
        return self._text()


class Matcher:
    """Where one sample stands in its grammar."""

    def __init__(self, matcher: "xgrammar.GrammarMatcher", vocab_size: int) -> None:
        import xgrammar

        self._matcher = matcher
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)

    def mask(self, logits_V: torch.Tensor) -> None:
        """Set the logits of what the grammar forbids next to -inf, in place."""
        if self._matcher.is_terminated():
            return
        self._matcher.fill_next_token_bitmask(self._bitmask)
        bits = self._bitmask.view(torch.int32)[0]
        allowed_V = ((bits[:, None] >> torch.arange(32, dtype=torch.int32)) & 1).bool().flatten()[: len(logits_V)]
        logits_V[~allowed_V.to(logits_V.device)] = float("-inf")

    def accept(self, token: int) -> None:
        """Go on by one sampled token."""
        if not self._matcher.is_terminated():
            accepted = self._matcher.accept_token(token)
            assert accepted, f"token {token} was sampled against its grammar"


def _spelling(tokenizer: Tokenizer, index: int) -> bytes:
    """What xgrammar takes a token for: nothing can be matched by nobody."""
    if index >= tokenizer.vocab_size:
        return b""  # only pads the embedding
    if index in tokenizer.special_tokens:
        return b"\xff" + tokenizer.special_tokens[index].encode()  # in no text, so it is matched by its id alone
    spelling = tokenizer.decode_bytes([index])
    # xgrammar lets control characters into JSON strings of limited length; JSON does not.
    return b"" if any(byte < 0x20 and byte != 0x0A for byte in spelling) else spelling


def mask_logits(logits_NV: torch.Tensor, sequences: Rows[Sequence]) -> None:
    """Set the logits of tokens that a row's grammar forbids to -inf, in place."""
    for row, sequence in enumerate(sequences):
        if sequence.matcher is not None:
            sequence.matcher.mask(logits_NV[row])


def _constant(text: str) -> Format:
    return {"type": "const_string", "value": text}


def _json(schema: Mapping[str, Any]) -> Format:
    return {"type": "json_schema", "json_schema": schema}


def _sequence(*elements: Format) -> Format:
    return {"type": "sequence", "elements": list(elements)}


def _optional(content: Format) -> Format:
    return {"type": "optional", "content": content}
