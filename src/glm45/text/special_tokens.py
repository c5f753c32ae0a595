"""The 36 special tokens of GLM-4.5, in GLM's order.

They are added tokens: their ids follow the byte-pair vocabulary without a gap (151329 to 151364 in GLM-4.5's own
tokenizer). Order and spelling: `tokenizer_config.json` of the GLM-4.5 release; names of the ten tags from its chat
template. Only the renderer emits them; text never becomes one (`Tokenizer.encode`).
"""

END_OF_TEXT = "<|endoftext|>"
GMASK = "[gMASK]"
SOP = "<sop>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
OBSERVATION = "<|observation|>"
THINK = "<think>"
THINK_END = "</think>"
TOOL_CALL = "<tool_call>"
TOOL_CALL_END = "</tool_call>"
TOOL_RESPONSE = "<tool_response>"
TOOL_RESPONSE_END = "</tool_response>"
ARG_KEY = "<arg_key>"
ARG_KEY_END = "</arg_key>"
ARG_VALUE = "<arg_value>"
ARG_VALUE_END = "</arg_value>"
NOTHINK = "/nothink"

CONTROL_TOKENS = (
    END_OF_TEXT,
    "[MASK]",
    GMASK,
    "[sMASK]",
    SOP,
    "<eop>",
    SYSTEM,
    USER,
    ASSISTANT,
    OBSERVATION,
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|begin_of_audio|>",
    "<|end_of_audio|>",
    "<|begin_of_transcription|>",
    "<|end_of_transcription|>",
    "<|code_prefix|>",
    "<|code_middle|>",
    "<|code_suffix|>",
)
"""Marked `special` in the exported tokenizer: `skip_special_tokens=True` hides them."""

TAG_TOKENS = (
    THINK,
    THINK_END,
    TOOL_CALL,
    TOOL_CALL_END,
    TOOL_RESPONSE,
    TOOL_RESPONSE_END,
    ARG_KEY,
    ARG_KEY_END,
    ARG_VALUE,
    ARG_VALUE_END,
    NOTHINK,
    "<|begin_of_box|>",
    "<|end_of_box|>",
    "<|image|>",
    "<|video|>",
)
"""Added but not marked `special`, as in GLM-4.5: output parsers that read text must see them."""

SPECIAL_TOKENS = CONTROL_TOKENS + TAG_TOKENS

EOS_TOKENS = (END_OF_TEXT, USER, OBSERVATION)
"""GLM-4.5 has no end-of-turn token: a turn ends where the next role begins, or the text does."""
