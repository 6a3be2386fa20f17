"""An Ollama Modelfile whose template gives the very prompt that the model was trained on.

Ollama's templates are Go's `text/template`: https://github.com/ollama/ollama/blob/main/docs/template.mdx
"""

from __future__ import annotations

from collections.abc import Sequence

from stages.common.prompting.chat_frames import answer_frame, conversation_frame
from stages.common.prompting.prompts import PromptFormat, encode_prompts
from stages.common.prompting.tokenizer import PromptTokenizer

# A character that no template, label or exemplar has; it stands for the text.
_TEXT = "\ue000"
# Ollama's own default, below which nothing is gained.
LEAST_CONTEXT = 4096


class NoModelfileError(Exception):
    """A Modelfile cannot say what the prompt is; the message says why."""


def modelfile(
    file_name: str, prompt_format: PromptFormat, tokenizer: PromptTokenizer, leading_bos: str, texts: Sequence[str]
) -> str:
    """The Modelfile that stands beside a GGUF file.

    Args:
        file_name: of the GGUF file.
        prompt_format: how prompts are made.
        tokenizer: the model's.
        leading_bos: the begin token where llama.cpp puts it before every text, else empty; the template leaves it out.
        texts: of rows, on which the template is tried; none with the kind "chat".

    Raises:
        NoModelfileError: no template of Ollama's gives these prompts.
    """
    if prompt_format.kind == "multi_label":
        raise NoModelfileError("with several labels for a text answers are scored, and Ollama only generates")
    lines = [f"FROM ./{file_name}"]
    if prompt_format.kind == "chat":
        template = chat_template(tokenizer, leading_bos)
        if prompt_format.system is not None:
            lines.append(f"SYSTEM {_quoted(prompt_format.system.strip())}")
    else:
        pieces = text_frame(prompt_format, tokenizer, texts)
        pieces[0] = pieces[0].removeprefix(leading_bos)
        template = "{{ .Prompt }}".join(map(literal, pieces)) + "{{ .Response }}"
    lines.append(f"TEMPLATE {_quoted(template)}")
    spelling = {token_id: token for token, token_id in tokenizer.control_ids.items()}
    lines += [f'PARAMETER stop "{spelling[end]}"' for end in prompt_format.terminator_ids]
    lines.append(f"PARAMETER num_ctx {max(prompt_format.max_length_tokens, LEAST_CONTEXT)}")
    if prompt_format.kind != "chat":
        lines.append("PARAMETER temperature 0")
    if prompt_format.kind == "classification":
        longest = max(len(completion["ids"]) for completion in prompt_format.completions.values())
        lines.append(f"PARAMETER num_predict {longest}")
    return "\n".join(lines) + "\n"


def text_frame(prompt_format: PromptFormat, tokenizer: PromptTokenizer, texts: Sequence[str]) -> list[str]:
    """What the prompt has before, between and after the places of its text.

    Raises:
        NoModelfileError: the prompt depends on the text otherwise than by holding it.
    """
    answers = [1] * (2 + len(texts)) if prompt_format.kind == "question_answering" else None
    once, twice, *prompts = encode_prompts(prompt_format, tokenizer, [_TEXT, _TEXT * 2, *texts], answers)
    pieces = once.text.split(_TEXT)
    same = [(_TEXT * 2, twice), *zip(texts, prompts, strict=True)]
    if len(pieces) < 2 or any(text.join(pieces) != prompt.text for text, prompt in same if not prompt.shortened):
        raise NoModelfileError("format_prompts.template does more with the text than to put it into its place")
    return pieces


def chat_template(tokenizer: PromptTokenizer, leading_bos: str) -> str:
    """A template over `.Messages` that writes a conversation as the base model's chat template does.

    Raises:
        NoModelfileError: the chat template writes turns differently from place to place.
    """

    def frame(*roles: str) -> list[str]:
        return [tokenizer.publish(text) for text in conversation_frame(tokenizer, roles)]

    first, asks = frame("user")
    _, _, next_user, _ = frame("user", "assistant", "user")
    before_system, after_system, _ = frame("system", "user")
    turns = ["user", "assistant"] * 2 + ["user"]
    alike = [first, asks, next_user, asks, next_user, asks]
    if frame(*turns) != alike or frame("system", *turns) != [before_system, after_system, *alike[1:]]:
        raise NoModelfileError("the base model's chat template writes turns differently from place to place")
    answer = answer_frame(tokenizer)
    return "".join(
        [
            '{{ range $i, $m := .Messages }}{{ if eq $m.Role "system" }}',
            literal(before_system.removeprefix(leading_bos)),
            '{{ $m.Content }}{{ else if eq $m.Role "user" }}{{ if eq $i 0 }}',
            literal(first.removeprefix(leading_bos)),
            "{{ else if and (eq $i 1) $.System }}",
            literal(after_system),
            "{{ else }}",
            literal(next_user),
            "{{ end }}{{ $m.Content }}",
            literal(asks),
            "{{ else }}",
            literal(answer.lead),
            "{{ $m.Content }}",
            literal(answer.trail),
            "{{ end }}{{ end }}",
        ]
    )


def literal(text: str) -> str:
    """A text as a template writes it.

    What would begin an action or end the Modelfile's string becomes an action itself, and so do characters that
    Ollama's parser leaves out because they cannot be seen, as no-break spaces.
    """
    escaped = text.replace("{{", '{{ "{{" }}').replace('"""', '{{ "\\"\\"\\"" }}')
    escaped = "".join(one if _survives(one) else f'{{{{ "\\U{ord(one):08x}" }}}}' for one in escaped)
    # Beside the quotes of the Modelfile's string one more would not be told from them.
    return '{{ "\\"" }}' + escaped[1:] if escaped.startswith('"') else escaped


def _survives(character: str) -> bool:
    return character.isprintable() or character in "\n\r\t"


def _quoted(text: str) -> str:
    if '"""' in text or text.startswith('"') or text.endswith('"') or not all(map(_survives, text)):
        raise NoModelfileError("the system message has quotes or invisible characters that a Modelfile cannot hold")
    return f'"""{text}"""'
