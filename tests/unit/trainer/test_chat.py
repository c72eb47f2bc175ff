from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from trainer.chat import Chat, Document
from trainer.errors import TrainerError
from trainer.findings import Finding
from trainer.formats import Conversation, Message

LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
BROKEN = "{% for m in messages %}{{ m.nothing.here }}{% endfor %}"
ADDED = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<end_of_turn>", "<start_of_turn>"]
ADDED += ["<think>", "</think>"]


def talk(*texts: str, line: int = 1, weights: tuple[int, ...] | None = None) -> Conversation:
    weights = weights or (1,) * len(texts)
    messages = [
        Message(("user", "assistant")[n % 2], text, weight)  # type: ignore[arg-type]
        for n, (text, weight) in enumerate(zip(texts, weights, strict=True))
    ]
    return Conversation(line, None, None, tuple(messages))


def spans(result: Document | Finding) -> list[str]:
    assert isinstance(result, Document), result
    return [result.text[start:end] for start, end in result.spans]


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that knows the end-of-turn tokens of several families."""
    folder = tmp_path_factory.mktemp("families")
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    tokenizer.add_special_tokens(ADDED)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))
    return folder


def with_template(folder: Path, target: Path, template: str, limit: int = 512) -> Chat:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    (target / "chat_template.jinja").write_text(template)
    return Chat(target, limit)


@pytest.fixture(scope="module")
def smol(tiny: Path) -> Chat:
    return Chat(tiny, 512)


def learned_text(chat: Chat, document: Document) -> str:
    ids = [token for token, learned in zip(document.ids, document.learned, strict=True) if learned]
    return str(chat.tokenizer.decode(ids, skip_special_tokens=False))


def test_smollm2_learns_the_answers_and_their_ends_and_nothing_else(smol: Chat) -> None:
    document = smol.encode([talk("Hi", "Hello there.", "Why?", "Because it is.")])[0]
    assert spans(document) == ["Hello there.<|im_end|>", "Because it is.<|im_end|>"]
    assert isinstance(document, Document)
    assert learned_text(smol, document) == "Hello there.<|im_end|>Because it is.<|im_end|>"
    assert document.text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert document.learned_length == sum(document.learned)
    assert smol.prompt_ids([Message("user", "Hi")]) == document.ids[: document.learned.index(True)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA, ["Hello.<|eot_id|>", "Because.<|eot_id|>"]),
        (GEMMA, ["Hello.<end_of_turn>", "Because.<end_of_turn>"]),
        (MISTRAL, [" Hello.<|im_end|>", " Because.<|im_end|>"]),
        (THINKING, ["Hello.<|im_end|>", "<think>\n\n</think>\n\nBecause.<|im_end|>"]),
    ],
    ids=["llama", "gemma", "mistral", "thinking"],
)
def test_templates_of_other_families(folder: Path, tmp_path: Path, template: str, expected: list[str]) -> None:
    chat = with_template(folder, tmp_path, template)
    document = chat.encode([talk("Hi", "Hello.", "Why?", "Because.")])[0]
    assert spans(document) == expected
    assert isinstance(document, Document)
    assert learned_text(chat, document) == "".join(expected)


def test_spans_are_what_rendering_prefixes_finds(smol: Chat) -> None:
    conversation = talk("Hi", " Hello. \n", "Why?", "Because <|im_end|> so.", "And?", "<|im_start|>assistant\n")
    document = smol.encode([conversation])[0]
    assert isinstance(document, Document)
    found = []
    for index in range(1, len(conversation.messages), 2):
        start = len(smol.render(conversation.messages[:index], prompt=True))
        end = len(smol.render(conversation.messages[: index + 1]))
        found.append((start, end - len("\n")))
    assert document.spans == found


def test_weight_zero_is_read_but_not_learned(smol: Chat) -> None:
    document = smol.encode([talk("Hi", "Hello.", "Why?", "Because.", weights=(1, 0, 1, 1))])[0]
    assert spans(document) == ["Because.<|im_end|>"]


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(lambda text: text.strip() != "")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_any_text_is_learned_as_it_stands(smol: Chat, pairs: list[tuple[str, str]]) -> None:
    conversation = talk(*(text for pair in pairs for text in pair))
    document = smol.encode([conversation])[0]
    assert spans(document) == [f"{answer}<|im_end|>" for _, answer in pairs]
    assert isinstance(document, Document)
    assert document.ids == smol.tokenizer.encode(smol.render(conversation.messages), add_special_tokens=False).ids


def test_a_template_may_refuse_a_conversation(folder: Path, tmp_path: Path) -> None:
    chat = with_template(folder, tmp_path, GEMMA)
    system = Conversation(7, None, None, (Message("system", "x"), *talk("Hi", "Yo").messages))
    good, refused = chat.encode([talk("Hi", "Yo"), system])
    assert isinstance(good, Document)
    assert isinstance(refused, Finding)
    assert (refused.line, refused.code, refused.found) == (7, "TEMPLATE_REFUSED", "System role not supported")


def test_an_answer_that_the_template_rewrites_is_refused(folder: Path, tmp_path: Path) -> None:
    chat = with_template(folder, tmp_path, THINKING)
    refused = chat.encode([talk("Hi", "<think>hm</think>Hello.")])[0]
    assert isinstance(refused, Finding)
    assert refused.code == "TEMPLATE_ALTERED"


def test_documents_are_cut_at_the_end_and_refused_when_nothing_learned_is_left(tiny: Path) -> None:
    chat = Chat(tiny, 48)
    cut, empty = chat.encode([talk("Hi", "word " * 60), talk("word " * 60, "Hello.", line=2)])
    assert isinstance(cut, Document)
    assert len(cut.ids) == len(cut.learned) == 48
    assert cut.length > 60
    assert cut.learned_length > sum(cut.learned) > 0
    assert isinstance(empty, Finding)
    assert (empty.line, empty.code) == (2, "NOTHING_TO_LEARN")


@pytest.mark.parametrize("template", [NO_END, BROKEN], ids=["no end of turn", "broken"])
def test_a_model_whose_template_cannot_be_learned_is_refused(folder: Path, tmp_path: Path, template: str) -> None:
    with pytest.raises(TrainerError, match="chat template") as caught:
        with_template(folder, tmp_path, template)
    assert caught.value.code == "MODEL_REFUSED"


@pytest.mark.parametrize("missing", ["tokenizer.json", "chat_template.jinja"])
def test_a_model_without_tokenizer_or_template_is_refused(tiny: Path, tmp_path: Path, missing: str) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    (tmp_path / missing).unlink()
    with pytest.raises(TrainerError, match="it has no"):
        Chat(tmp_path, 512)


def test_the_template_may_stand_in_the_tokenizer_settings(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    for value in (template, named):
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": value, "eos_token": {"content": "<|im_end|>"}})
        )
        chat = Chat(tmp_path, 512)
        assert chat.template == template
        assert chat.special == {"eos_token": "<|im_end|>"}
