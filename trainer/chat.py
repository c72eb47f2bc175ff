"""From a conversation to tokens and a mask of those that are learned: the one path of verdict and training. Torch-free.

The learned spans are found by rendering twice, the second time with a placeholder for every learned assistant text.
What stands between the placeholders is the template's own, so the spans are known to the character, and putting the
texts back must give the first rendering again, or the conversation is refused. A span is what the model has to write:
from the end of the generation prompt to the end-of-turn token, which is included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from jinja2.exceptions import TemplateError
from tokenizers import AddedToken, Encoding, Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from trainer.errors import TrainerError
from trainer.findings import Finding, finding
from trainer.formats import Conversation, Message

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


class Rendered(NamedTuple):
    """The template's text, and which of its characters are learned."""

    text: str
    spans: list[tuple[int, int]]


class Document(msgspec.Struct):
    """A conversation as the model sees it. ``learned[i]``: token i is one that the model must learn to write.

    ``ids`` and ``learned`` are cut to the first ``limit`` tokens; ``length`` and ``learned_length`` are from before.
    """

    ids: list[int]
    learned: list[bool]
    length: int
    learned_length: int
    text: str
    spans: list[tuple[int, int]]
    """Learned spans of ``text``, in characters."""


class Chat:
    """A base model's tokenizer and chat template, read from its folder. Raises TrainerError MODEL_REFUSED."""

    def __init__(self, folder: Path | str, limit: int) -> None:
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise _refused("it has no tokenizer.json")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        settings = _json(folder / "tokenizer_config.json")
        self.template = _template(folder, settings)
        self.special = _special(settings, _json(folder / "special_tokens_map.json"))
        added = sorted((t.content for t in self.tokenizer.get_added_tokens_decoder().values()), key=len, reverse=True)
        self._end = re.compile(r"\s*(?:" + "|".join(map(re.escape, [*added, *self.special.values()])) + ")")
        self.limit = limit
        self._lead = ""
        self._probe()

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The template's text; ``prompt`` adds the start of an assistant turn. Raises jinja2's TemplateError."""
        chat = [{"role": message.role, "content": message.content} for message in messages]
        rendered, _ = render_jinja_template(
            [chat], chat_template=self.template, add_generation_prompt=prompt, **self.special
        )
        return str(rendered[0])

    def encode(self, conversations: Sequence[Conversation]) -> list[Document | Finding]:
        """Documents in the order of the conversations, a finding in place of each that cannot be learned from."""
        results = [self._locate(conversation) for conversation in conversations]
        sound = [result for result in results if not isinstance(result, Finding)]
        encodings = iter(self.tokenizer.encode_batch([text for text, _ in sound], add_special_tokens=False))
        return [
            result if isinstance(result, Finding) else self._document(conversation.line, result, next(encodings))
            for conversation, result in zip(conversations, results, strict=True)
        ]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation that the model is to go on with."""
        ids: list[int] = self.tokenizer.encode(self.render(messages, prompt=True), add_special_tokens=False).ids
        return ids

    def _locate(self, conversation: Conversation) -> Rendered | Finding:
        try:
            text = self.render(conversation.messages)
            spans = self._spans(conversation, text)
        except (TemplateError, TypeError, ValueError) as error:
            return finding(conversation.line, "", "TEMPLATE_REFUSED", str(error))
        if spans is None:
            return finding(conversation.line, "", "TEMPLATE_ALTERED", "assistant text does not come out as it stands")
        return Rendered(text, spans)

    def _spans(self, conversation: Conversation, text: str) -> list[tuple[int, int]] | None:
        """Learned spans of the rendered ``text``; None when it does not hold the assistant texts as they are."""
        mark = conversation.digest().hex()
        learned = [message for message in conversation.messages if _is_learned(message)]
        marked = [Message("assistant", mark) if _is_learned(message) else message for message in conversation.messages]
        frame = self.render(marked).split(mark)
        if len(frame) != len(learned) + 1 or not text.startswith(frame[0]):
            return None
        spans, position = [], len(frame[0])
        for message, before, after in zip(learned, frame[:-1], frame[1:], strict=True):
            end = _past(text, position, message.content, after)
            stop = self._end.match(text, end) if end is not None else None
            if end is None or stop is None:
                return None
            lead = len(self._lead) if before.endswith(self._lead) else 0
            spans.append((position - lead, stop.end()))
            position = end + len(after)
        return spans if position == len(text) else None

    def _document(self, line: int, rendered: Rendered, encoding: Encoding) -> Document | Finding:
        text, spans = rendered
        ids = encoding.ids
        learned = [False] * len(ids)
        for start, end in spans:
            first = _token_from(encoding, start, end)
            last = encoding.char_to_token(end - 1)
            if first is None or last is None:
                return finding(line, "", "TEMPLATE_ALTERED", "the tokenizer does not keep the assistant text apart")
            learned[first : last + 1] = [True] * (last + 1 - first)
        # The first token of a document is never predicted.
        learned[:1] = [False] * len(ids[:1])
        total, kept = sum(learned), learned[: self.limit]
        if not any(kept):
            found = f"{len(ids)} tokens, the learned ones after the first {self.limit}" if total else "no learned token"
            return finding(line, "", "NOTHING_TO_LEARN", found)
        return Document(ids[: self.limit], kept, len(ids), total, text, spans)

    def _probe(self) -> None:
        """See once how the template writes an assistant turn: what it puts before the text, and that it ends it."""
        user, answer = Message("user", "Ping?"), Message("assistant", "Pong!")
        try:
            whole, prompt = self.render([user, answer]), self.render([user], prompt=True)
        except TemplateError as error:
            raise _refused(f"its chat template fails on a plain question and answer: {error}") from error
        at = whole.rfind(answer.content)
        if at < 0 or not self._end.match(whole, at + len(answer.content)):
            raise _refused("its chat template does not end an assistant turn with a token of its own")
        if whole.startswith(prompt) and len(prompt) <= at:
            self._lead = whole[len(prompt) : at]


def _is_learned(message: Message) -> bool:
    return message.role == "assistant" and message.weight > 0


def _past(text: str, start: int, content: str, after: str) -> int | None:
    """End of ``content`` at ``start`` when ``after`` follows it; templates may trim it."""
    for form in (content, content.strip(), content.lstrip(), content.rstrip()):
        end = start + len(form)
        if text.startswith(form, start) and text.startswith(after, end):
            return end
    return None


def _token_from(encoding: Encoding, start: int, end: int) -> int | None:
    """The first token that begins at or after character ``start`` and before ``end``."""
    for character in range(start, end):
        token = encoding.char_to_token(character)
        place = encoding.token_to_chars(token) if token is not None else None
        if token is not None and place is not None and place[0] >= start:
            return int(token)
    return None


def _template(folder: Path, settings: dict[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    template = file.read_text("utf-8") if file.is_file() else settings.get("chat_template")
    if template is None:
        template = _json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    if not isinstance(template, str):
        raise _refused("it has no chat template")
    return template


def _special(*sources: dict[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for source in sources:
        for name in SPECIAL:
            value = source.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str | AddedToken):
                tokens.setdefault(name, str(value))
    return tokens


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_bytes())) if file.is_file() else {}
    except (ValueError, TypeError) as error:
        raise _refused(f"{file.name} is not a JSON object: {error}") from error


def _refused(why: str) -> TrainerError:
    return TrainerError(
        "MODEL_REFUSED",
        f"The base model cannot be trained on conversations: {why}.",
        "Choose an instruction-tuned model with a fast tokenizer and a chat template.",
    )
