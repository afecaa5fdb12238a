"""The chat template on any conversation: nothing is lost, added or masked wrongly."""

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_guide.chat import assistant_mask, encode_completion, encode_prompt, end_of_turn_id
from rlhf_guide.models import load_tokenizer, resolve_model

# Any text that does not itself spell a special token. Some bytes are not in SmolLM2's vocabulary,
# which drops them in silence: those of control characters and of planes without letters.
LETTERS = st.characters(
    max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cn", "Cc"], include_characters="\n\t"
)
TEXT = st.text(LETTERS, max_size=40).filter(lambda text: "<|" not in text)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)


@cache
def tokenizer():
    return load_tokenizer(resolve_model("random-tiny-llama"))


def conversation(turns):
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(roles, turn, strict=True)
    ]


def text_of(ids):
    return tokenizer().decode(ids, clean_up_tokenization_spaces=False)


@given(TURNS)
@settings(max_examples=50)
def test_an_answer_comes_back_as_it_was_written(turns):
    *prompt, answer = conversation(turns)
    prompt_ids, ids = encode_completion(tokenizer(), prompt, answer["content"])
    assert prompt_ids == encode_prompt(tokenizer(), prompt)
    assert ids[-1] == end_of_turn_id(tokenizer())
    assert text_of(ids[:-1]) == answer["content"]
    cut = encode_completion(tokenizer(), prompt, answer["content"], finished=False)
    assert cut == (prompt_ids, ids[:-1])


@given(TURNS)
@settings(max_examples=50)
def test_the_mask_holds_every_answer_with_its_end_and_nothing_else(turns):
    ids, mask = assistant_mask(tokenizer(), conversation(turns))
    stop = text_of([end_of_turn_id(tokenizer())])
    learnt = [token for token, kept in zip(ids, mask, strict=True) if kept]
    assert text_of(learnt) == "".join(answer + stop for _, answer in turns)
    assert text_of(ids).count(stop) == 2 * len(turns)
