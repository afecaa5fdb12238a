"""The arms of an online iteration: their pairs, the study with stubs for training, its summary."""

from pathlib import Path

import pytest

from data_prep.embedded import load_prompts
from rlhf_guide import online_arms as study
from rlhf_guide.errors import DataError, MissingStage, ParameterError
from rlhf_guide.files import read_jsonl, write_json, write_jsonl
from rlhf_guide.online_arms import AGAINST, ARMS, BASE, MOVING, SECOND, START, STORED, arm_pairs
from rlhf_guide.online_stages import REWARDS
from rlhf_guide.profiles import load_profile
from rlhf_guide.workspace import open_run

TRAINED = [STORED, *ARMS, SECOND, MOVING]  # in the study's order
SEEDS = 2
KILLED_AT = 19  # the training that is interrupted, in the second seed


def annotated(rewards, texts=None, prompt_id="p"):
    """One prompt's scored answers: the first half hot, the second half cool."""
    half = len(rewards) // 2
    names = [f"hot {i}" for i in range(half)] + [f"cool {i}" for i in range(half)]
    responses = [{"text": text, "finish_reason": "stop"} for text in texts or names]
    question = [{"role": "user", "content": "Q"}]
    return {
        "prompt_id": prompt_id,
        "messages": question,
        "responses": responses,
        "rewards": rewards,
    }


def texts_of(pairs):
    return [tuple(pair[side][-1]["content"] for side in ("chosen", "rejected")) for pair in pairs]


EIGHT = annotated([1.0, 2.0, 9.0, -9.0, 3.0, 4.0, 8.0, -8.0])


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        (BASE, ("hot 2", "hot 3")),
        ("4 answers a prompt", ("cool 1", "hot 0")),
        ("2 answers a prompt", ("cool 0", "hot 0")),
        ("best against second", ("hot 2", "cool 2")),
    ],
)
def test_an_arm_takes_its_answers_half_of_each_temperature(name, pair):
    assert texts_of(arm_pairs([EIGHT], ARMS[name], seed=0)) == [pair]
    assert len(EIGHT["responses"]) == len(EIGHT["rewards"]) == 8, "the shared answers are kept"


@pytest.mark.parametrize("name", ["best against random", "random pair"])
def test_random_strategies_draw_by_seed(name):
    rows = [annotated(EIGHT["rewards"], prompt_id=f"p{i}") for i in range(12)]
    first, again, other = (texts_of(arm_pairs(rows, ARMS[name], seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert {chosen == "hot 2" for chosen, _ in first} == (
        {True} if "best" in name else {True, False}
    )


def test_the_length_penalty_ranks_and_orients():
    penalty = ARMS["length penalty 0.003"].length_penalty
    long = "x" * round(2 / penalty)  # costs 2
    row = annotated([1.5, 0.0], [long, "short"])
    assert texts_of(arm_pairs([row], ARMS[BASE], 0)) == [(long, "short")]
    assert texts_of(arm_pairs([row], ARMS["length penalty 0.003"], 0)) == [("short", long)]


def test_the_optimistic_term_gets_an_answer_of_the_reference():
    (pair,) = arm_pairs([EIGHT], ARMS["optimistic term 0.005"], seed=0)
    assert pair["reference"] == [*EIGHT["messages"], {"role": "assistant", "content": "hot 0"}]
    assert pair["reference_finished"]
    (plain,) = arm_pairs([EIGHT], ARMS[BASE], seed=0)
    assert plain == {key: pair[key] for key in plain}
    assert "reference" not in plain


def test_summary_pairs_seeds_and_averages_them_before_prompts():
    def row(arm, seed, utility, **more):
        return {"arm": arm, "seed": seed, "utility": utility, "characters": 10.0 + seed, **more}

    rows = [
        row(START, 2, [0.0, 2.0]),  # not in the order of the other arms
        row(START, 1, [0.0, 0.0]),
        row(BASE, 1, [1.0, 1.0], pairs=4),
        row(BASE, 2, [0.0, 3.0], pairs=3),
        row("random pair", 1, [1.0, 0.0], pairs=4),
        row("random pair", 2, [0.0, 2.0], pairs=4),
    ]
    found = study.summary(rows, n_boot=200)
    base, other = found[BASE], found["random pair"]
    assert base["utility"]["value"] == pytest.approx(1.25)
    assert (base["against"], base["seeds"], base["pairs"]) == (START, 2, 3.5)
    assert base["characters"] == 11.5
    assert base["gain"]["value"] == pytest.approx(0.75)
    assert base["gain_of_seeds"] == pytest.approx([1.0, 0.5])
    assert (base["gain"]["low"], base["gain"]["high"], base["gain"]["n"]) == (0.5, 1.0, 2)
    assert other["against"] == BASE
    assert other["gain_of_seeds"] == pytest.approx([-0.5, -0.5])
    assert (other["gain"]["low"], other["gain"]["high"]) == (-1.0, 0.0)
    assert "gain" not in found[START]


def ready_run(folder):
    """A run folder in which all stages that the study reads have finished."""
    ws = open_run(load_profile("smoke"), folder)
    data = ws.stage("data", {})
    for split in ("online_1", "online_2", "online_3", "validation"):
        write_jsonl(data.dir / f"prompts_{split}.jsonl", load_prompts(split)[:6])
    stored = [
        {**pair, "prompt_id": f"stored-{i}"}
        for i, pair in enumerate(arm_pairs([EIGHT] * 9, ARMS[BASE], 0))
    ]
    write_jsonl(data.dir / "preference_train.jsonl", stored)
    data.finish()
    for name in ("sft", "reward_model"):
        stage = ws.stage(name, {}, ["data"])
        write_json(stage.dir / "model" / "config.json", {})
        stage.finish()
    return ws


def drawn(prompts, temperatures):
    """Constant answers; the reward of the course's model falls with the answer's number."""
    return [
        {
            **prompt,
            "responses": [
                {"text": f"{prompt['prompt_id']} " + "so " * k, "finish_reason": "stop"}
                for k in range(len(temperatures))
            ],
        }
        for prompt in prompts
    ]


def scored(rows, scorer):
    sign = {"model": -1.0, "verbose_reward_model": 1.0}[scorer.name]
    rewards = [[sign * len(x["text"]) for x in row["responses"]] for row in rows]
    return [{**row, "rewards": r} for row, r in zip(rows, rewards, strict=True)]


class Stubs:
    """What samples, scores and trains, replaced; and a record of what was trained and judged."""

    def __init__(self, monkeypatch):
        self.trained, self.judged, self.verbose = [], [], 0
        self.killed = False
        monkeypatch.setattr(study, "generate", lambda _, rows, __, t, *___, **____: drawn(rows, t))
        monkeypatch.setattr(study, "annotate", lambda rows, scorer, _: scored(rows, scorer))
        monkeypatch.setattr(study, "RewardScorer", lambda folder, *_: folder)
        monkeypatch.setattr(study, "relabelled", lambda pairs, _: pairs)
        monkeypatch.setattr(study, "resolve_model", lambda *_: Path("base"))
        monkeypatch.setattr(study, "load_policy", lambda *_: None)
        monkeypatch.setattr(study, "load_tokenizer", lambda *_: None)
        monkeypatch.setattr(study, "save_model", lambda _, __, folder: folder.mkdir(exist_ok=True))
        for name in ("train_reward_model", "train_dpo", "judge_policy"):
            monkeypatch.setattr(study, name, getattr(self, name))

    def train_reward_model(self, base, pairs, settings, folder, *_):
        self.verbose += 1
        write_json(folder / "tokenizer_config.json", {})

    def train_dpo(self, reference, pairs, settings, folder, seed, dtype, initial_adapter=None):
        if len(self.trained) == KILLED_AT and not self.killed:
            self.killed = True
            raise KeyboardInterrupt
        self.trained.append((reference, pairs, settings, seed, initial_adapter))
        write_json(Path(folder) / "adapter_config.json", {})
        return {"metrics": {"pairs": len(pairs), "end_margin": 1.0}, "history": []}

    def judge_policy(self, policy, prompts, answers, seed, profile):
        self.judged.append([prompt["prompt_id"] for prompt in prompts])
        return [float(len(self.trained))] * len(prompts), 20.0


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study that was killed once and went on: run folder, stage, stubs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        ws, stubs = ready_run(tmp_path_factory.mktemp("run")), Stubs(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            study.run_arms(ws, SEEDS)
        stage = study.run_arms(ws, SEEDS)
        yield ws, stage, stubs


def test_a_killed_study_goes_on_and_repeats_nothing(done):
    ws, stage, stubs = done
    rows = read_jsonl(stage.dir / "utilities.jsonl")
    arms = [(row["seed"], row["arm"]) for row in rows]
    assert stubs.killed
    assert len(arms) == len(set(arms)) == SEEDS * (len(TRAINED) + 1)
    assert [call[3] for call in stubs.trained] == [42] * len(TRAINED) + [43] * len(TRAINED)
    assert stubs.verbose == 1
    assert stage.done
    assert study.run_arms(ws, SEEDS).metrics == stage.metrics
    assert len(stubs.trained) == SEEDS * len(TRAINED)


def test_every_comparison_is_between_arms_that_are_run(done):
    _, stage, _ = done
    assert set(AGAINST) == set(TRAINED) == set(stage.metrics) - {START}
    assert set(AGAINST.values()) <= set(stage.metrics)
    assert all(stage.metrics[name]["against"] == other for name, other in AGAINST.items())
    assert all(stage.metrics[name]["seeds"] == SEEDS for name in stage.metrics)


def test_arms_share_the_answers_and_differ_in_their_choice(done):
    ws, stage, stubs = done
    calls = dict(zip(TRAINED, stubs.trained, strict=False))
    count = stage.config["prompts"]
    first = stage.dir / "seed_42" / "policy"
    reference = ws.path / "sft" / "model"
    assert {len(call[1]) for call in calls.values()} == {count}
    assert all(row["prompt_id"].startswith("stored-") for row in calls[STORED][1])
    slices = [{row["prompt_id"] for row in load_prompts(f"online_{t}")} for t in (1, 2)]
    for name, (start, pairs, settings, _, initial) in calls.items():
        second = name in (SECOND, MOVING)
        assert name == STORED or {row["prompt_id"] for row in pairs} <= slices[second]
        assert initial == (first if name == SECOND else None)
        assert start == (first.with_name("previous") if name == MOVING else reference)
        changed = ARMS[name].dpo if name in ARMS else {}
        assert {key: getattr(settings, key) for key in changed} == dict(changed)
        assert changed or settings == ws.profile.dpo
    swapped = [(rejected, chosen) for chosen, rejected in texts_of(calls[BASE][1])]
    assert texts_of(calls["verbose reward model"][1]) == swapped, "its rewards are the negatives"


def test_no_arm_is_judged_on_prompts_of_its_training(done):
    ws, _, stubs = done
    expected = [p["prompt_id"] for s in ("online_3", "validation") for p in load_prompts(s)[:6]]
    assert all(judged == expected for judged in stubs.judged)
    assert [row["prompt_id"] for row in study.unseen(ws)] == expected


def test_one_arm_is_repeated_on_the_pairs_of_the_study(done):
    ws, _, stubs = done
    with pytest.raises(MissingStage):
        study.repeat_arm(ws, "random pair")
    iteration = ws.stage("online/iteration_1/annotation", {})
    temperatures = study.mixed_temperatures(ws.profile.online)
    rows = drawn(load_prompts("online_1")[:6], temperatures)  # more than the study takes
    write_jsonl(iteration.dir / REWARDS, scored(rows, Path("model")))
    iteration.finish()
    before = stubs.trained[TRAINED.index("random pair")]
    row = study.repeat_arm(ws, "random pair")
    assert stubs.trained.pop() == before, "the same reference, pairs, settings and seed"
    assert row["pairs"] == len(before[1])
    assert study.summary([row | {"arm": START}], 10)[START]["seeds"] == 1
    for unknown in ("no such arm", "verbose reward model"):
        with pytest.raises(ParameterError, match="random pair"):
            study.repeat_arm(ws, unknown)


def test_true_utilities_are_means_of_a_prompt_s_answers():
    prompt = load_prompts("validation")[0]
    answers = [
        {"text": prompt["reference"], "finish_reason": "stop", "n_tokens": 3},
        {"text": "No.", "finish_reason": "stop", "n_tokens": 3},
    ]
    each = [study.true_utilities([{**prompt, "responses": [answer]}])[0][0] for answer in answers]
    both, characters = study.true_utilities([{**prompt, "responses": answers}])
    assert each[0] > each[1]
    assert both == pytest.approx([sum(each) / 2])
    assert characters == (len(prompt["reference"]) + 3) / 2


def test_real_data_is_refused_before_anything_is_drawn():
    study.require_truth([{"facts": []}])
    with pytest.raises(DataError, match="data_source=embedded"):
        study.require_truth([{"prompt_id": "p"}])
