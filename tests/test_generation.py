"""Generation: per-request seeds, per-row temperature, no prompt lost, resuming, both backends."""

import json
import textwrap
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlhf_guide import generation, sampling
from rlhf_guide.attention import ALL_ATTENTION_FUNCTIONS
from rlhf_guide.chat import encode_prompt, stop_token_ids
from rlhf_guide.errors import DataError, GuideError, ParameterError
from rlhf_guide.models import load_policy, load_tokenizer, resolve_model
from rlhf_guide.profiles import load_profile

SETTINGS = replace(load_profile("smoke").generation, max_new_tokens=20, batch_size=6)
TEMPERATURES = [1.0, 1.0, 0.7]
HEADS = ((4, 1), (2, 3), (2, 3))  # heads and tokens of queries, keys and values
PROMPTS = [
    {
        "prompt_id": f"p{i}",
        "messages": [{"role": "user", "content": "tell " * (1 + (i * 7) % 5) + str(i)}],
        "source": "test",
        "facts": [[str(i)]],
    }
    for i in range(7)
]


@pytest.fixture(scope="module")
def tiny():
    return resolve_model("random-tiny-llama")


def _generate(model, path, prompts=PROMPTS, settings=SETTINGS, seed=1, temperatures=None):
    # In double precision: 49,152 about equally likely tokens lie so close together that rounding
    # in float32, which differs with the batch's size, now and then picks the next one.
    return generation.generate(
        model,
        prompts,
        settings,
        temperatures or TEMPERATURES,
        seed,
        path,
        "float64",
        progress=False,
    )


def _texts(rows):
    return [response["text"] for row in rows for response in row["responses"]]


def test_no_prompt_is_lost_and_order_and_fields_stay(tiny, tmp_path):
    path = tmp_path / "out.jsonl"
    rows = _generate(tiny, path)
    assert [row["prompt_id"] for row in rows] == [p["prompt_id"] for p in PROMPTS]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert {key: row[key] for key in prompt} == prompt
        assert [r["temperature"] for r in row["responses"]] == TEMPERATURES
        for response in row["responses"]:
            assert response["finish_reason"] in ("stop", "length")
            assert response["n_tokens"] <= 20
            assert "<|im_end|>" not in response["text"]


def test_the_same_call_gives_the_same_rows_and_another_seed_others(tiny, tmp_path):
    first = _generate(tiny, tmp_path / "a.jsonl")
    assert first == _generate(tiny, tmp_path / "b.jsonl")
    assert _texts(first) != _texts(_generate(tiny, tmp_path / "c.jsonl", seed=2))
    seeds = [response["seed"] for row in first for response in row["responses"]]
    assert len(set(seeds)) == len(seeds)
    assert len(set(_texts(first))) == len(seeds)


def test_neither_batch_nor_neighbours_matter(tiny, tmp_path):
    """Left padding, the shared prompt cache and the batch's order leave every answer alone."""
    together = _generate(tiny, tmp_path / "a.jsonl", settings=replace(SETTINGS, batch_size=64))
    alone = _generate(tiny, tmp_path / "b.jsonl", settings=replace(SETTINGS, batch_size=1))
    assert _texts(together) == _texts(alone)


def test_a_killed_run_goes_on(tiny, tmp_path):
    whole = _generate(tiny, tmp_path / "whole.jsonl")
    path = tmp_path / "cut.jsonl"
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    kept = json.loads(lines[4])
    kept["responses"][0]["text"] = "kept, not drawn again"
    path.write_text(json.dumps(kept) + "\n" + lines[1] + "\n" + lines[2][: len(lines[2]) // 2])
    resumed = _generate(tiny, path)
    assert resumed[4]["responses"][0]["text"] == "kept, not drawn again"
    assert [resumed[i] for i in (0, 1, 2, 3, 5, 6)] == [whole[i] for i in (0, 1, 2, 3, 5, 6)]


def test_a_finished_file_needs_no_model(tiny, tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    rows = _generate(tiny, path)
    monkeypatch.setattr(generation, "load_policy", None)
    assert _generate(tiny, path) == rows


@pytest.mark.parametrize("change", ["seed", "temperatures"])
def test_rows_of_another_call_are_not_kept(tiny, tmp_path, change):
    path = tmp_path / "out.jsonl"
    before = _generate(tiny, path)
    changed = {"seed": 5} if change == "seed" else {"temperatures": [0.5, 1.0, 0.7]}
    after = _generate(tiny, path, **changed)
    assert len(after) == len(PROMPTS)
    assert before[0]["responses"][0] != after[0]["responses"][0]


def test_every_row_has_its_own_temperature(tiny, tmp_path):
    """At temperature 0 all samples are the greedy answer, beside a neighbour at 1.0."""
    rows = _generate(tiny, tmp_path / "a.jsonl", temperatures=[0.0, 1.0, 0.0])
    tokenizer, model = load_tokenizer(tiny), load_policy(tiny, "float32")
    for row in rows:
        greedy, warm, again = (response["text"] for response in row["responses"])
        assert greedy == again != warm
        ids = torch.tensor([encode_prompt(tokenizer, row["messages"])])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=[*stop_token_ids(tokenizer), tokenizer.pad_token_id],
        )
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert greedy == expected


def test_the_sampler_draws_from_softmax_at_each_temperature():
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20_000, 1)
    temperatures = torch.tensor([1.0, 0.5]).repeat(10_000)
    sampler = sampling.InverseTransformSampler(temperatures, torch.rand(20_000, 1), 3)
    scores = sampler(torch.zeros(20_000, 3, dtype=torch.long), logits.clone())
    assert bool((scores.isfinite().sum(dim=1) == 1).all())
    chosen = scores.argmax(dim=1)
    for temperature in (1.0, 0.5):
        drawn = chosen[temperatures == temperature].bincount(minlength=4) / 10_000
        expected = torch.softmax(logits[0] / temperature, dim=0)
        assert (drawn - expected).abs().max() < 0.015


@pytest.mark.parametrize("size", [5, 256, 1000])
def test_a_draw_inverts_the_running_sum_over_all_weights(size):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(0, 4, (500, size), generator=generator).float()
    weights[:, 0] = 1
    uniforms = torch.rand(500, 1, generator=generator)
    uniforms[:2] = torch.tensor([[0.0], [1 - 1e-6]])
    ends = weights.cumsum(dim=1)  # whole numbers: exact
    expected = torch.searchsorted(ends, uniforms * ends[:, -1:], right=True)
    drawn = sampling.draw(weights, uniforms)
    assert torch.equal(drawn, expected)
    assert bool((weights.gather(1, drawn) > 0).all())


def test_grouped_attention_changes_no_answer(tiny, tmp_path, monkeypatch):
    shared = _generate(tiny, tmp_path / "a.jsonl")
    monkeypatch.setattr(sampling, "_grouped_attention", lambda device: nullcontext())
    assert _generate(tiny, tmp_path / "b.jsonl") == shared


@pytest.mark.parametrize("padded", [False, True])
def test_heads_of_a_group_read_for_a_new_token_together(tiny, monkeypatch, padded):
    """The tiny Llama has 4 heads in 2 groups. Padded rows come with a mask, others with none."""
    model = load_policy(tiny, "float64")
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.ones(2, 4, dtype=torch.long)
    mask[0, 0] = 0 if padded else 1
    plain_attention, asked = torch.nn.functional.scaled_dot_product_attention, []

    def watched(query, key, value, **options):
        asked.append((tuple(query.shape[1:3]), options["attn_mask"] is not None))
        return plain_attention(query, key, value, **options)

    def two_tokens(reading):
        with reading, torch.no_grad():
            first = model(input_ids=ids, attention_mask=mask[:, :3])
            asked.clear()
            return model(
                input_ids=torch.tensor([[11], [12]]),
                attention_mask=mask,
                past_key_values=first.past_key_values,
            ).logits

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    together = two_tokens(sampling._grouped_attention(model.device))
    assert asked == [((2, 2), padded)] * model.config.num_hidden_layers
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is usual
    alone = two_tokens(nullcontext())
    assert asked == [((4, 1), padded)] * model.config.num_hidden_layers
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("change", ["mask", "position_bias"])
def test_heads_that_differ_in_what_they_see_are_read_one_by_one(change):
    """As with ALiBi, where each head has biases of its own, in the mask or beside it."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, m, 8, generator=generator) for n, m in HEADS)
    bias = torch.randn(2, 4, 1, 3, generator=generator)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    mask, options = (bias, {}) if change == "mask" else (None, {"position_bias": bias})
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    expected = usual(module, query, key, value, mask, **options)[0]
    with sampling._grouped_attention(query.device):
        reading = ALL_ATTENTION_FUNCTIONS["sdpa"]
        found = reading(module, query, key, value, mask, **options)[0]
    torch.testing.assert_close(found, expected)


def test_top_p_keeps_the_nucleus_only():
    logits = torch.log(torch.tensor([[0.6, 0.3, 0.1]])).repeat(1000, 1)
    sampler = sampling.InverseTransformSampler(torch.ones(1000), torch.rand(1000, 1), 1, top_p=0.8)
    chosen = sampler(torch.zeros(1000, 1, dtype=torch.long), logits).argmax(dim=1)
    assert set(chosen.tolist()) == {0, 1}


def test_an_extreme_uniform_still_picks_a_likely_token():
    logits = torch.tensor([[5.0, 4.0, -1e4, -1e4]])
    for value in (0.0, 1.0):
        sampler = sampling.InverseTransformSampler(torch.ones(1), torch.tensor([[value]]), 1)
        assert sampler(torch.zeros(1, 1, dtype=torch.long), logits).argmax().item() in (0, 1)


def test_rows_that_stop_leave_the_batch(tiny, tmp_path, monkeypatch):
    """With every thirtieth token a stop, rows leave at different segments and none changes."""
    many = [*range(0, 49152, 30)]
    monkeypatch.setattr(generation, "stop_token_ids", lambda tokenizer, model=None: many)
    settings = replace(SETTINGS, max_new_tokens=60, batch_size=64)
    together = _generate(tiny, tmp_path / "a.jsonl", settings=settings)
    answers = [response for row in together for response in row["responses"]]
    stopped = [answer for answer in answers if answer["finish_reason"] == "stop"]
    assert 3 <= len(stopped) < len(answers)
    assert len({answer["n_tokens"] // sampling.SEGMENT for answer in stopped}) >= 2
    assert all(a["n_tokens"] == 60 for a in answers if a["finish_reason"] == "length")
    alone = _generate(tiny, tmp_path / "b.jsonl", settings=replace(settings, batch_size=1))
    assert together == alone


def test_bad_requests_are_refused(tiny, tmp_path):
    with pytest.raises(DataError, match="'p0' stands twice"):
        _generate(tiny, tmp_path / "a.jsonl", prompts=[*PROMPTS, PROMPTS[0]])
    with pytest.raises(ParameterError, match="none below 0"):
        _generate(tiny, tmp_path / "a.jsonl", temperatures=[-1.0])
    with pytest.raises(DataError, match="8192 positions"):
        _generate(tiny, tmp_path / "a.jsonl", settings=replace(SETTINGS, max_new_tokens=8192))
    assert _generate(tiny, tmp_path / "b.jsonl", prompts=[]) == []


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_keeps_what_is_finished_and_names_the_number(
    tiny, tmp_path, monkeypatch, error
):
    path, sample_batch = tmp_path / "a.jsonl", generation.sample_batch
    calls = []

    def second_fails(*given):
        calls.append(given)
        if len(calls) == 2:
            raise error
        return sample_batch(*given)

    monkeypatch.setattr(generation, "sample_batch", second_fails)
    with pytest.raises(GuideError, match="lower generation_batch_size"):
        _generate(tiny, path)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(kept) == 2
    monkeypatch.undo()
    smaller = _generate(tiny, path, settings=replace(SETTINGS, batch_size=3))
    assert smaller == _generate(tiny, tmp_path / "b.jsonl")
    assert all(row in smaller for row in kept)


def test_other_errors_stay_what_they_are(tiny, tmp_path, monkeypatch):
    def broken(*given):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(generation, "sample_batch", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        _generate(tiny, tmp_path / "a.jsonl")


def test_vllm_missing_names_the_extras(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GuideError, match=r"rlhf-guide\[vllm\].*make vllm"):
        _generate(tiny, tmp_path / "a.jsonl", settings=replace(SETTINGS, backend="vllm"))


FAKE_VLLM = """
    from types import SimpleNamespace

    class SamplingParams(SimpleNamespace):
        pass

    class LLM:
        def __init__(self, model, dtype, **options):
            assert dtype == "float64"

        def generate(self, prompts, parameters, use_tqdm):
            if BROKEN:
                raise RuntimeError("out of memory")
            results = []
            for prompt, wanted in zip(prompts, parameters):
                ids, stop = [wanted.seed % 1000 + 200], wanted.temperature < 1
                done = SimpleNamespace(token_ids=ids, finish_reason="stop" if stop else "length")
                results.append(SimpleNamespace(outputs=[done]))
            return results
"""


@pytest.mark.parametrize("broken", [False, True])
def test_vllm_runs_in_its_own_process(tiny, tmp_path, monkeypatch, broken):
    """A stand-in for vLLM proves the protocol: token ids in, token ids out, reasons kept."""
    module = f"BROKEN = {broken}\n" + textwrap.dedent(FAKE_VLLM)
    (tmp_path / "vllm.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = replace(SETTINGS, backend="vllm")
    if broken:
        with pytest.raises(GuideError, match="out of memory"):
            _generate(tiny, tmp_path / "a.jsonl", settings=settings)
        return
    rows = _generate(tiny, tmp_path / "a.jsonl", settings=settings)
    tokenizer = load_tokenizer(tiny)
    assert [row["prompt_id"] for row in rows] == [p["prompt_id"] for p in PROMPTS]
    for response in (r for row in rows for r in row["responses"]):
        assert response["text"] == tokenizer.decode([response["seed"] % 1000 + 200])
        assert response["n_tokens"] == 1
        assert response["finish_reason"] == ("length" if response["temperature"] == 1 else "stop")


def test_a_policy_is_named_by_its_place_in_the_run_whatever_the_run_is_called(tmp_path):
    from rlhf_guide.generation import policy_name

    names = set()
    for run in ("smoke", "another"):
        folder = tmp_path / run / "offline_dpo" / "policy"
        folder.mkdir(parents=True)
        (tmp_path / run / "run.json").write_text("{}")
        names.add(policy_name("base/model", folder))
    assert names == {"offline_dpo/policy"}
    assert policy_name("/somewhere/far/base/model", None) == "base/model"
