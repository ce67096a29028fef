"""The prompts of VILA-U: chat template, media placeholders, and tokenization of text."""

import re
from typing import Any


IMAGE, VIDEO = "<image>", "<video>"
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"
VIDEO_START, VIDEO_END = "<vi_start>", "<vi_end>"
USER, ASSISTANT = "USER:", "ASSISTANT:"

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# Vicuna's first template. An empty message is its role alone, without space or separator. Images of the assistant are
# enclosed in markers, images of the user are followed by a newline. `generation`, a tag of transformers that produces
# no text, marks the training targets.
CHAT_TEMPLATE = """\
{%- macro text_of(message) -%}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content or [] -%}
{%- if part.type == 'text' -%}
{{- part.text -}}
{%- elif part.type == 'image' -%}
{{- '<im_start><image><im_end>' if message.role == 'assistant' else '<image>\\n' -}}
{%- elif part.type == 'video' -%}
{{- '<vi_start><video><vi_end>' if message.role == 'assistant' else '<video>\\n' -}}
{%- else -%}
{{- raise_exception('content parts must be of type text, image or video, got ' ~ part.type) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0].role == 'system' -%}
{{- text_of(messages[0]) | trim ~ ' ' -}}
{%- else -%}
{{- 'SYSTEM_PROMPT ' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- set text = text_of(message) | trim -%}
{{- 'USER: ' ~ text ~ ' ' if text else 'USER:' -}}
{%- elif message.role == 'assistant' -%}
{%- set text = text_of(message) -%}
{{- 'ASSISTANT:' -}}
{%- if text -%}
{%- generation -%}
{{- ' ' ~ text ~ '</s>' -}}
{%- endgeneration -%}
{%- endif -%}
{%- elif message.role != 'system' or not loop.first -%}
{{- raise_exception('roles must be user and assistant, after at most one system message, got ' ~ message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'ASSISTANT:' -}}
{%- endif -%}
""".replace("SYSTEM_PROMPT", SYSTEM_PROMPT.replace("'", "\\'"))


def user_turn(text: str, head: str = f"{SYSTEM_PROMPT} ") -> str:
    """A prompt of one turn, open for the answer. `head` precedes the first turn."""
    text = text.strip()
    return f"{head}{USER} {text} {ASSISTANT}" if text else f"{head}{USER}{ASSISTANT}"


def expand_media(text: str, num_frames: int, wrap: bool) -> tuple[str, list[dict[str, tuple[int, int]]]]:
    """Replaces `<video>` by one `<image>` per frame; with `wrap`, adds missing markers around `<image>`.

    Frames of the user are on separate lines; in an answer they follow one another.

    Returns:
        The text, and for each replacement its character range before ("span") and after ("new_span"), as in processors
        of transformers.
    """
    video = IMAGE * num_frames
    written = {f"{VIDEO_START}{VIDEO}": VIDEO_START + video, VIDEO: "\n".join([IMAGE] * num_frames)}
    if wrap:
        written[IMAGE] = f"{IMAGE_START}{IMAGE}{IMAGE_END}"
    expanded, moves, done = "", [], 0
    for match in re.finditer(f"{VIDEO_START}{VIDEO}|{VIDEO}|(?<!{IMAGE_START}){IMAGE}(?!{IMAGE_END})", text):
        expanded += text[done : match.start()]
        start, done = len(expanded), match.end()
        expanded += written.get(match[0], match[0])
        moves.append({"span": match.span(), "new_span": (start, len(expanded))})
    return expanded + text[done:], moves


def encode_piece(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text by the rule of LLaMA's slow tokenizer with `legacy=False`, without the first token `<s>`.

    A "▁" is put before the text, also if it starts with a space; directly before a special token it is dropped again.
    Nothing is added after special tokens. The tokenizer must add a "▁" only if the text does not start with a space
    (`check_tokenizer`), so a leading space gives that "▁" in either case.
    """
    if not text:
        return []
    ids = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
    if len(ids) > 1 and ids[0] == tokenizer.convert_tokens_to_ids("▁") and ids[1] in tokenizer.all_special_ids:
        return ids[1:]
    return ids


def check_tokenizer(tokenizer: Any) -> None:
    """Checks that a tokenizer is suitable.

    Raises:
        ValueError: it lacks the tokens of VILA-U, or treats the start of a text differently.
    """
    known = tokenizer.get_vocab()
    missing = [token for token in (IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END, IMAGE) if token not in known]
    if missing:
        raise ValueError(
            f"`tokenizer` must have the tokens {missing}, but lacks them. Add them with the ids in the model's "
            "config, `<image>` last, with `tokenizer.add_tokens(..., special_tokens=True)`."
        )
    plain, spaced, after = (
        tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in ("a", " a", f"{IMAGE_END}a")
    )
    if plain != spaced or plain[0][0] != "▁" or after[1][0] == "▁":
        raise ValueError(
            "`tokenizer` must be a LLaMA tokenizer with `legacy=False`, which puts '▁' before a text without a "
            f"leading space and none after special tokens, but it returns {plain} of 'a', {spaced} of ' a' and "
            f"{after} "
            f"of '{IMAGE_END}a'."
        )
