"""Messages to tokens: the only module that applies a chat template.

Two decisions matter for training. Text is tokenised exactly once, without the tokenizer's own
special tokens, because the template has written them already: tokenising templated text a second
time doubles the BOS. And a prompt is tokenised apart from its answer, just as the policy sees it
when it samples: it reads the prompt's tokens and then writes its own, so no token may span both.
"""

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError as JinjaError

from rlhf_guide.errors import TemplateError

Message = dict[str, str]

# ChatML without the default system message of the original, which would put words into prompts
# that the data never had.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Llama-3's layout: a header names the role, `<|eot_id|>` ends the turn, content is trimmed.
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

# What base models of Llama-3's family end a document with. Their tokenizer's eos becomes the turn's
# end with the template, but the model may still write this.
DOCUMENT_END = "<|end_of_text|>"

_PROBE = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a prompt, with the header that opens the assistant's turn.

    Raises TemplateError when the template refuses the messages or the BOS is doubled.
    """
    return _tokens(tokenizer, _render(tokenizer, messages, True), start=True)


def encode_conversation(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a whole conversation: what a reward model reads.

    No generation prompt, and nothing after the last end-of-turn token (most templates add a
    newline there): the reward is read at the last token, which must always be the same one.
    """
    ids = _tokens(tokenizer, _render(tokenizer, messages, False), start=True)
    return ids[: _last_index(ids, end_of_turn_id(tokenizer)) + 1]


def encode_completion(
    tokenizer: Any, prompt_messages: Sequence[Message], text: str, finished: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of an answer to it, apart.

    A finished answer ends with the end-of-turn token; one that the length limit cut does not,
    or training on it would teach the policy to stop mid-sentence. Raises TemplateError when the
    templated prompt is no prefix of the templated conversation.
    """
    answer = {"role": "assistant", "content": text}
    prompt, rest = _split(tokenizer, prompt_messages, answer)
    prompt_ids = _tokens(tokenizer, prompt, start=True)
    ids = _tokens(tokenizer, rest)
    stop = _last_index(ids, end_of_turn_id(tokenizer))
    return prompt_ids, ids[: stop + 1] if finished else ids[:stop]


def assistant_mask(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and a mask: 1 on what the assistant wrote, 0 elsewhere.

    The end-of-turn token of every assistant turn counts as written by the assistant: a policy
    that is never trained on it never stops. Raises TemplateError without any assistant turn.
    """
    ids: list[int] = []
    mask: list[int] = []
    done = ""
    stop = tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, rest = _split(tokenizer, messages[:index], message)
        context = _tokens(tokenizer, _after(prompt, done), start=not done)
        # What follows the end-of-turn token (a newline) belongs to the next turn's header.
        answer = rest[: rest.rindex(stop) + len(stop)]
        turn = _tokens(tokenizer, answer)
        ids += context + turn
        mask += [0] * len(context) + [1] * len(turn)
        done = prompt + answer
    if not ids:
        raise TemplateError("the conversation has no assistant turn, so nothing can be learnt.")
    return ids, mask


def check_template(tokenizer: Any) -> None:
    """Refuse a tokenizer whose template would corrupt the training signal, and say why.

    Checked: a template exists; padding is neither the end of sequence nor the end of a turn (or
    the collator would mask the token that teaches stopping); the BOS comes once; an encoded
    prompt is a prefix of the encoded conversation, token by token. Raises TemplateError.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TemplateError(
            "the tokenizer has no chat template: set tokenizer.chat_template, for example to "
            "rlhf_guide.chat.CHATML, and save it with the model."
        )
    pad = tokenizer.pad_token_id
    if pad is None or pad in (tokenizer.eos_token_id, end_of_turn_id(tokenizer)):
        raise TemplateError(
            f"the padding token is {tokenizer.pad_token!r}; it must exist and differ from the end "
            "of sequence and the end of turn, or the policy never learns to stop: load the "
            "tokenizer with rlhf_guide.models.load_tokenizer, which picks another."
        )
    whole = encode_conversation(tokenizer, _PROBE)
    prompt, completion = encode_completion(tokenizer, _PROBE[:1], _PROBE[1]["content"])
    if prompt + completion != whole:
        raise TemplateError(
            "prompt and answer tokenised apart differ from the conversation tokenised whole: "
            "this template ends its assistant header inside a token; end it with a newline or "
            "a special token."
        )


def end_of_turn_id(tokenizer: Any) -> int:
    """The token that ends an assistant turn: the last special token after a templated answer.

    It need not be the tokenizer's eos: Llama-3 ends turns with `<|eot_id|>` and documents with
    `<|end_of_text|>`. Raises TemplateError when the template writes none.
    """
    _, rest = _split(tokenizer, _PROBE[:1], _PROBE[1])
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    found = [token for token in _tokens(tokenizer, rest) if token in special]
    if not found:
        raise TemplateError(
            "the chat template writes no special token after an answer, so the end of a turn "
            "cannot be learnt: add an end-of-turn token to the template."
        )
    return found[-1]


def stop_token_ids(tokenizer: Any, model: Any = None) -> list[int]:
    """Every token that ends generation.

    End of turn, the tokenizer's eos, the end of a document in Llama-3's vocabulary, and the
    model's own eos.
    """
    stops = {end_of_turn_id(tokenizer), tokenizer.eos_token_id}
    added = tokenizer.added_tokens_decoder
    stops |= {token for token, known in added.items() if known.content == DOCUMENT_END}
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops |= set(eos) if isinstance(eos, list | tuple) else {eos}
    return sorted(token for token in stops if token is not None)


def truncate_left(ids: list[int], max_length: int) -> list[int]:
    """The last `max_length` tokens: the end of the answer decides, the far context least."""
    return ids[-max_length:]


def _render(tokenizer: Any, messages: Sequence[Message], generation_prompt: bool) -> str:
    """Apply the template, as text."""
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation_prompt
        )
    except (JinjaError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise TemplateError(f"the chat template refuses the roles {roles}: {error}") from error


def _tokens(tokenizer: Any, text: str, start: bool = False) -> list[int]:
    """Tokenise templated text once; `start` also refuses a doubled BOS at its beginning."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if start and bos is not None and ids[:2] == [bos, bos]:
        raise TemplateError(
            f"the text starts with {tokenizer.bos_token!r} twice: the template writes it and so "
            "does the content or a second tokenisation; keep messages, not templated strings."
        )
    return ids


def _split(tokenizer: Any, prompt_messages: Sequence[Message], answer: Message) -> tuple[str, str]:
    """Templated prompt, and what the template writes after it for the answer."""
    prompt = _render(tokenizer, prompt_messages, True)
    whole = _render(tokenizer, [*prompt_messages, answer], False)
    return prompt, _after(whole, prompt)


def _after(text: str, prefix: str) -> str:
    """`text` without `prefix`; the prefix property is what makes a prompt reusable."""
    if not text.startswith(prefix):
        raise TemplateError(
            "the templated prompt is not a prefix of the templated conversation: the template "
            "rewrites earlier turns or lacks a generation prompt, so the policy would be trained "
            f"on other contexts than it answers. Prompt ends {prefix[-40:]!r}; the conversation "
            f"has {text[: len(prefix)][-40:]!r} there."
        )
    return text[len(prefix) :]


def _last_index(ids: list[int], token: int) -> int:
    """Position of the last `token`."""
    for index in range(len(ids) - 1, -1, -1):
        if ids[index] == token:
            return index
    raise TemplateError(
        f"a conversation was encoded without its end-of-turn token (id {token}): it does not end "
        "with an assistant turn, or the template drops the token."
    )
