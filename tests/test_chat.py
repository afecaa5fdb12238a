"""Templates and masks, against tables written by hand."""

from copy import deepcopy
from functools import cache

import pytest
from tokenizers import Regex, pre_tokenizers

from rlhf_guide.chat import (
    CHATML,
    LLAMA3,
    assistant_mask,
    check_template,
    encode_completion,
    encode_conversation,
    encode_prompt,
    end_of_turn_id,
    stop_token_ids,
    truncate_left,
)
from rlhf_guide.errors import TemplateError
from rlhf_guide.models import load_tokenizer, resolve_model

# A layout like Gemma's: BOS, other role names, and no place for a system message.
NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role'])"
    " + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello you"}
AGAIN = {"role": "user", "content": "Bye"}
LAST = {"role": "assistant", "content": "Thanks"}


@cache
def _original():
    return load_tokenizer(resolve_model("random-tiny-llama"))


def _tokenizer(template, tokens=(), bos="<|im_start|>"):
    tokenizer = deepcopy(_original())
    if tokens:
        tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)})
        tokenizer.add_special_tokens({"bos_token": bos})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def chatml():
    return _tokenizer(CHATML)


@pytest.fixture(scope="module")
def llama3():
    turns = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = _tokenizer(LLAMA3, turns, "<|begin_of_text|>")
    # Llama-3 takes a run of newlines as one piece whatever follows; GPT-2's rule would not, and
    # its header ends in two of them.
    split = pre_tokenizers.Split(Regex(r"\s*\n+| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    return tokenizer


@pytest.fixture(scope="module")
def no_system():
    return _tokenizer(NO_SYSTEM, ("<start_of_turn>", "<end_of_turn>"), "<bos>")


def _table(tokenizer, messages):
    """[(token, mask), …], the form of the tables below."""
    ids, mask = assistant_mask(tokenizer, messages)
    return list(zip(tokenizer.convert_ids_to_tokens(ids), mask, strict=True))


def _expected(rows):
    return [(token, mask) for tokens, mask in rows for token in tokens.split(" ")]


def test_mask_table_chatml(chatml):
    assert _table(chatml, [SYSTEM, USER, ANSWER, AGAIN, LAST]) == _expected(
        [
            ("<|im_start|> system Ċ Be Ġkind . <|im_end|> Ċ", 0),
            ("<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> ass istant Ċ", 0),
            ("Hello Ġyou <|im_end|>", 1),
            ("Ċ <|im_start|> user Ċ By e <|im_end|> Ċ <|im_start|> ass istant Ċ", 0),
            ("Thanks <|im_end|>", 1),
        ]
    )


def test_mask_table_llama3(llama3):
    head = "<|start_header_id|> {} <|end_header_id|> ĊĊ"
    assert _table(llama3, [SYSTEM, USER, ANSWER, AGAIN, LAST]) == _expected(
        [
            ("<|begin_of_text|> " + head.format("system") + " Be Ġkind . <|eot_id|>", 0),
            (head.format("user") + " Hi <|eot_id|> " + head.format("ass istant"), 0),
            ("Hello Ġyou <|eot_id|>", 1),
            (head.format("user") + " By e <|eot_id|> " + head.format("ass istant"), 0),
            ("Thanks <|eot_id|>", 1),
        ]
    )


def test_mask_table_without_system_turns(no_system):
    assert _table(no_system, [USER, ANSWER]) == _expected(
        [
            ("<bos> <start_of_turn> user Ċ Hi <end_of_turn> Ċ <start_of_turn> model Ċ", 0),
            ("Hello Ġyou <end_of_turn>", 1),
        ]
    )
    with pytest.raises(TemplateError, match=r"refuses the roles system, user.*no system role"):
        encode_prompt(no_system, [SYSTEM, USER])


@pytest.mark.parametrize("name", ["chatml", "llama3", "no_system"])
def test_the_ways_to_encode_agree(name, request):
    tokenizer = request.getfixturevalue(name)
    check_template(tokenizer)
    whole = encode_conversation(tokenizer, [USER, ANSWER])
    prompt, completion = encode_completion(tokenizer, [USER], ANSWER["content"])
    assert prompt == encode_prompt(tokenizer, [USER])
    assert prompt + completion == whole == assistant_mask(tokenizer, [USER, ANSWER])[0]
    assert whole[-1] == completion[-1] == end_of_turn_id(tokenizer)
    cut = encode_completion(tokenizer, [USER], ANSWER["content"], finished=False)[1]
    assert [*cut, end_of_turn_id(tokenizer)] == completion


def test_a_header_that_ends_inside_a_token_is_refused():
    turns = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    with pytest.raises(TemplateError, match="inside a token"):
        check_template(_tokenizer(LLAMA3, turns, "<|begin_of_text|>"))


def test_stop_tokens_hold_turn_end_and_eos(llama3, chatml):
    assert stop_token_ids(chatml) == [2]
    assert stop_token_ids(llama3) == sorted(
        [llama3.eos_token_id, llama3.convert_tokens_to_ids("<|eot_id|>")]
    )


def test_no_token_spans_prompt_and_answer(chatml):
    text = "\n\n1. one"
    prompt, completion = encode_completion(chatml, [USER], text)
    assert prompt == encode_prompt(chatml, [USER])
    assert chatml.decode(completion[:-1]) == text


def test_no_default_system_message(chatml):
    assert "system" not in chatml.decode(encode_prompt(chatml, [USER]))


def test_doubled_bos_is_refused(llama3):
    text = llama3.apply_chat_template([USER], tokenize=False)
    doubled = [{"role": "user", "content": text}]
    llama3_twice = _tokenizer("{{ bos_token }}" + LLAMA3)
    with pytest.raises(TemplateError, match="twice"):
        encode_prompt(llama3_twice, [USER])
    bare = _tokenizer("{{ bos_token }}{{ messages[0]['content'] }}", ("<|x|>",), "<|begin|>")
    with pytest.raises(TemplateError, match="twice"):
        encode_prompt(bare, [{"role": "user", "content": "<|begin|>Hi"}])
    assert encode_prompt(llama3, doubled)  # inside a turn it is the writer's own text


def test_bos_comes_once(llama3, no_system):
    for tokenizer in (llama3, no_system):
        assert encode_conversation(tokenizer, [USER, ANSWER]).count(tokenizer.bos_token_id) == 1


def test_a_template_that_rewrites_history_is_refused():
    rewriting = CHATML.replace(
        "message['content'] +", "(message['content'] if loop.last else 'gone') +"
    )
    with pytest.raises(TemplateError, match="not a prefix"):
        encode_completion(_tokenizer(rewriting), [USER], "Hello")


def test_check_template_names_what_is_wrong(chatml):
    tokenizer = _tokenizer(CHATML)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(TemplateError, match="padding token"):
        check_template(tokenizer)
    with pytest.raises(TemplateError, match="no chat template"):
        check_template(_tokenizer(None))
    mute = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    with pytest.raises(TemplateError, match="no special token"):
        check_template(_tokenizer(mute + "{% if add_generation_prompt %}assistant: {% endif %}"))


def test_a_conversation_without_answer_teaches_nothing(chatml):
    with pytest.raises(TemplateError, match="no assistant turn"):
        assistant_mask(chatml, [USER])


def test_truncation_keeps_the_end():
    assert truncate_left([1, 2, 3, 4], 2) == [3, 4]
    assert truncate_left([1, 2], 5) == [1, 2]
