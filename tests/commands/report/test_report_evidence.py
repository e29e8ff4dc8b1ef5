"""Every rule of evidence: it appears where it must, and not in a comparison without fault. Also what a claim needs."""

import dataclasses
from pathlib import Path

import pytest

from trainer.commands.report.caveats import metric_of
from trainer.commands.report.evidence import RULES, find_caveats
from trainer.commands.report.load import Run
from trainer.commands.report.results import results
from trainer.commands.report.study import Arm, Study

VALUES = {
    **{
        "model.name": "gpt2",
        "max_steps": 100,
        "device": "cpu",
        "data.order": "windows",
        "data.separate_documents": False,
    },
    **{
        "batch.tokens_per_step": 512,
        "batch.sequence_start": 64,
        "batch.sequence_length": 64,
        "batch.sequence_double_every": 0,
    },
    **{"optim.recipe": "plain", "optim.warmup_steps": 3, "evaluation.protocol": "full", "evaluation.max_tokens": 0},
    "evaluation.sequence_length": 64,
}
START = {
    **{"host": "machine", "processes": 1, "versions": {"torch": "2.13.0", "crescendo-lm": "0.3.0"}},
    "git": {"sha": "0123456789abcdef", "dirty": False},
}
DATA = {
    **{"fingerprint": "f" * 64, "tokenizer": {"name": "bytes", "sha256": "a"}, "indexes": {"validation": "1"}},
    "splits": {"validation": {"tokens": 10, "bytes": 20, "documents": 2}},
}
# Unequal by a few thousandths, as runs are.
NOISE = {1: 0.001, 2: -0.002, 3: 0.0015, 4: 0.0005}


def finished(seed: int, loss: float, **more) -> Run:
    values = {**VALUES, **more.pop("values", {})}
    facts = {
        **{"seed": seed, "learning_rate": 0.002, "scale": 1.0, "state": "finished", "step": 100, "values": values},
        **{
            "loss": loss,
            "bits": loss / 2,
            "tokens": 51200,
            "flops": 1e9,
            "seconds": 60.0,
            "parameters": 1000,
            "epochs": 0.5,
        },
        **{"starts": [START], "data": DATA},
    }
    return Run(Path(f"run-{seed}"), f"run-{seed}", **(facts | more))


def sound() -> Study:
    """Two arms, two scales, three seeds, everything equal: no caveat. llama is better by 0.1."""
    arms = []
    for scale in (1.0, 2.0):
        for name, gain in (("gpt2", 0.0), ("llama", 0.1)):
            runs = [finished(seed, 3 - gain + NOISE[seed] * (1 + gain), scale=scale) for seed in (1, 2, 3)]
            tuning = [
                finished(0, 3.2, purpose="tuning", learning_rate=rate, scale=scale) for rate in (0.001, 0.002, 0.004)
            ]
            arms.append(Arm(name, scale, runs + tuning, learning_rate=0.002, bracketed=True))
    return Study("sound", None, arms, "gpt2", declared=True, budget="tokens", seeds=[1, 2, 3], tuning_seed=0)


def rules_of(study: Study) -> set[str]:
    return {caveat.rule for caveat in find_caveats(study)}


def texts(study: Study, rule: str) -> str:
    return " ".join(caveat.text for caveat in find_caveats(study) if caveat.rule == rule)


def llama(study: Study) -> Arm:
    return study.arms[1]


def test_a_sound_comparison_has_no_caveat():
    study = sound()
    assert find_caveats(study) == []
    found = results(study, metric_of(study), [], None)
    assert [one.claim for one in found] == ["none", "better", "none", "better"]
    assert found[1].verdict.startswith("llama is better than gpt2 by 0.1000 nats [0.09")
    assert found[1].verdict.endswith("(Holm), 3 seeds")


def change(arm: Arm, **changes) -> None:
    """Change its test runs; a dictionary is merged into the one that is there."""
    for i, run in enumerate(arm.runs):
        if run.purpose == "test":
            new = {k: {**getattr(run, k), **v} if isinstance(v, dict) else v for k, v in changes.items()}
            arm.runs[i] = dataclasses.replace(run, **new)


def start(**changes) -> list[dict]:
    return [{**START, **changes}]


# rule -> (how to break a sound comparison, words that its caveat must have)
BREAKS = {
    "not_swept": (lambda s: setattr(llama(s), "bracketed", None), "No learning rates were tried for llama at scale 1"),
    "not_bracketed": (lambda s: setattr(llama(s), "bracketed", False), "0.002 is at the edge of those tried (0.001, 0.002, 0.004)"),
    "tuning_differs": (lambda s: llama(s).runs.pop(), "each arm: gpt2 at scale 1 3, llama at scale 1 2"),
    "tuned_on_test_runs": (lambda s: setattr(s, "tuning_seed", 2), "seed 2, which is also a test seed"),
    "few_seeds": (lambda s: llama(s).runs.pop(2), "Fewer than 3 finished seeds: llama at scale 1 (2)"),
    "equal_seeds": (lambda s: change(llama(s), loss=2.9), "All seeds of llama at scale 1 end with the same loss"),
    "pairs_missing": (lambda s: llama(s).runs.append(finished(4, 2.9)), "without a partner are 4"),
    "unfinished": (
        lambda s: llama(s).runs.append(finished(4, 2.9, state="unfinished", message="7 of 100 steps")),
        "not in the table: run-4 (7 of 100 steps)",
    ),
    "not_all_ran": (lambda s: llama(s).runs.append(finished(4, 2.9, state="diverged")), "Diverged: run-4 (1 of 25 runs)"),
    "one_scale": (lambda s: s.arms.__delitem__(slice(2, 4)), "All runs have one size (model_scale 1)"),
    "warmup_differs": (lambda s: change(llama(s), values={"optim.warmup_steps": 9}), "warm-up rules differ between runs: 3, 9 steps"),
    "tokenizers_differ": (lambda s: change(llama(s), data={"tokenizer": {"name": "gpt2", "sha256": "b"}}), "(bytes, gpt2): bits per byte"),
    "data_differs": (lambda s: change(llama(s), data={"fingerprint": "0" * 64}), "fingerprints ffffffffffff, 000000000000"),
    "order_differs": (lambda s: change(llama(s), values={"data.order": "samples"}), "data.order (windows, samples)"),
    "sequences_differ": (lambda s: change(llama(s), values={"batch.sequence_start": 16}), "batch.sequence_start (64, 16)"),
    "baseline_changed": (lambda s: setattr(s, "first_baseline", "llama"), "declared llama as its baseline: who chooses gpt2"),
    "seeds_added": (lambda s: setattr(s, "added_seeds", [3]), "Seeds 3 were added after the comparison began"),
    "protocol_differs": (
        lambda s: change(llama(s), values={"evaluation.sequence_length": 9}), "evaluation.sequence_length (64, 9)"
    ),
    "compute_differs": (lambda s: change(llama(s), tokens=52000), "used 1.016 times those of gpt2"),
    "frozen_not_counted": (lambda s: change(llama(s), frozen=("objective.teacher",)), "models of llama at scale 1 (objective.teacher)"),
    "data_repeated": (lambda s: change(llama(s), epochs=1.5), "more than once (up to 1.5 times) in 3 runs"),
    "batch_multiplied": (lambda s: change(llama(s), multiplied=True), "batch of llama at scale 1 grew"),
    "machines_differ": (
        lambda s: change(llama(s), starts=start(host="other", device="NVIDIA A100")), "(cpu, NVIDIA A100), host (machine, other)"
    ),
    "code_differs": (lambda s: change(llama(s), starts=start(git={"sha": "0123456789abcdef", "dirty": True})), "uncommitted changes"),
}  # fmt: skip


def test_every_rule_is_tested():
    assert set(BREAKS) == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize("rule", BREAKS)
def test_a_rule_appears_where_it_is_broken(rule):
    """And no other, except those that follow: a lone seed or a lone scale has more than one fault."""
    spoil, words = BREAKS[rule]
    study = sound()
    spoil(study)
    assert words in texts(study, rule)
    follows = {"few_seeds": {"pairs_missing"}}.get(rule, set())
    assert rules_of(study) == {rule} | follows


def test_a_learning_rate_that_ended_lower_on_the_same_seeds_is_named():
    """Whatever experiment.json says; a lower loss on other seeds alone shows nothing."""
    study = sound()
    by_rate = llama(study).curve()
    by_rate[0.004][0].loss = 3.1
    assert rules_of(study) == {"not_bracketed"}
    assert "on the same seeds 0.004 ended lower than the chosen 0.002" in texts(study, "not_bracketed")
    by_rate[0.004][0].seed = 9
    assert "not_bracketed" not in rules_of(study)


def test_warm_up_by_the_same_share_of_the_run_is_the_same_rule():
    """3 % of 100 and of 250 steps: 3 and 8 (7.5, rounded)."""
    study = sound()
    change(llama(study), values={"optim.warmup_steps": 8, "max_steps": 250})
    assert "warmup_differs" not in rules_of(study)
    change(llama(study), values={"optim.recipe": "hlb"})
    assert "optim.recipe (plain, hlb)" in texts(study, "warmup_differs")


@pytest.mark.parametrize("state", ["failed", "refused", "running", "waiting"])
def test_runs_that_did_not_end_are_named(state):
    study = sound()
    llama(study).runs.append(finished(4, 2.9, state=state))
    assert rules_of(study) == {"not_all_ran"} and "run-4" in texts(study, "not_all_ran")


def test_a_refused_arm_is_named_with_its_reason():
    study = sound()
    study.arms.append(Arm("huge", 1.0, refused="needs 900 GiB"))
    assert texts(study, "not_all_ran") == "Refused: huge at scale 1: needs 900 GiB"


@pytest.mark.parametrize("budget, name, equal, unequal", [
    ("tokens", "tokens", 51700, 51720), ("flops", "flops", 1.0099e9, 1.02e9),
    ("parameters", "parameters", 1029, 1031), ("seconds", "seconds", 61.7, 61.9),
])  # fmt: skip
def test_a_budget_has_its_tolerance(budget, name, equal, unequal):
    """1 % for tokens and FLOPs, 3 % for parameters and seconds."""
    study = sound()
    study.budget = budget
    change(llama(study), **{name: equal})
    assert find_caveats(study) == []
    change(llama(study), **{name: unequal})
    assert rules_of(study) == {"compute_differs"}


def test_without_a_budget_the_reader_is_told_what_is_equal():
    study = sound()
    study.budget, study.declared = None, False
    change(llama(study), flops=2e9)
    assert "equal: tokens, parameters, seconds; not equal: FLOPs (1e+09 to 2e+09)" in texts(study, "compute_differs")


def test_between_tokenizers_bits_per_byte_decide():
    """llama has the lower loss per token, but needs more bits."""
    study = sound()
    change(
        llama(study),
        data={"tokenizer": {"name": "gpt2", "sha256": "b"}, "fingerprint": "0", "indexes": {"validation": "2"}},
    )
    for run in llama(study).by_seed.values():
        run.bits = run.loss
    assert metric_of(study) == "bits" and rules_of(study) == {"tokenizers_differ"}
    verdict = results(study, "bits", find_caveats(study), None)[1]
    assert verdict.claim == "worse" and "bits/byte" in verdict.verdict
    change(llama(study), data={"splits": {"validation": {"tokens": 10, "bytes": 21, "documents": 2}}})
    assert "validation splits differ" in texts(study, "data_differs")


@pytest.mark.parametrize("rule", ["few_seeds", "equal_seeds", "protocol_differs"])
def test_some_faults_forbid_a_claim(rule):
    study = sound()
    BREAKS[rule][0](study)
    found = results(study, "loss", find_caveats(study), None)
    assert found[1].claim == "none" and found[1].verdict.startswith("no claim: llama is better than gpt2 by 0.1")


def test_only_arms_with_another_protocol_than_the_baseline_are_not_judged():
    study = sound()
    change(llama(study), values={"evaluation.max_tokens": 9})  # of the earlier validations alone
    assert not find_caveats(study)
    change(llama(study), values={"evaluation.sequence_length": 9})
    (caveat,) = [one for one in find_caveats(study) if one.rule == "protocol_differs"]
    assert caveat.arms == (("llama", 1.0),) and caveat.blocks


def test_a_fault_of_one_scale_forbids_no_claim_at_another():
    study = sound()
    llama(study).runs.pop(2)
    assert [one.claim for one in results(study, "loss", find_caveats(study), None)] == [
        "none",
        "none",
        "none",
        "better",
    ]


def test_what_chance_could_have_done_is_no_claim():
    study = sound()
    for run, loss in zip(llama(study).by_seed.values(), (3.01, 2.98, 3.0), strict=True):
        run.loss = loss
    one = results(study, "loss", [], None)[1]
    low, high = one.test.interval
    assert low < 0 < high and one.claim == "none"
    size = f"llama is better than gpt2 by {-one.test.mean:.4f} nats [{-high:.4f}, {-low:.4f}]"
    assert one.verdict.startswith(f"no claim: {size}") and "a claim needs p < 0.01" in one.verdict
    assert f"about {one.needed:,} seeds show it" in one.verdict


def test_a_worse_arm_is_called_worse():
    study = sound()
    study.baseline = "llama"
    one = results(study, "loss", [], None)[1]
    assert (one.arm.name, one.claim) == ("gpt2", "worse") and one.verdict.startswith(
        "gpt2 is worse than llama by 0.1000"
    )
    assert one.test.mean == pytest.approx(0.1, abs=1e-3) and one.test.interval[0] > 0


def test_a_claim_needs_three_seeds_that_both_arms_have():
    """Arm and baseline have three seeds each, and share two."""
    study = sound()
    llama(study).runs[2].seed = 4
    one = results(study, "loss", find_caveats(study), None)[1]
    assert one.test.n == 2 and one.adjusted is None and one.claim == "none"
    assert one.verdict.endswith("2 seeds, but a claim needs 3 or more seeds of both arms")


def test_an_arm_of_which_nothing_can_be_claimed_costs_the_others_nothing():
    study = sound()
    alone = results(study, "loss", [], None)[1].adjusted
    change(study.arms[3], values={"evaluation.sequence_length": 9})
    found = results(study, "loss", find_caveats(study), None)
    assert found[3].adjusted is None and found[1].adjusted == found[1].test.p == pytest.approx(alone / 2)


def test_as_many_seeds_as_are_needed_after_the_correction():
    """The difference of one arm in two costs more seeds than that of one alone."""
    study = sound()
    for run, loss in zip(llama(study).by_seed.values(), (3.0, 2.98, 2.95), strict=True):
        run.loss = loss
    both = results(study, "loss", [], None)[1]
    study.arms = study.arms[:2]
    alone = results(study, "loss", [], None)[1]
    assert both.needed > alone.needed >= 3


def test_one_seed_says_nothing_about_chance():
    study = sound()
    del llama(study).runs[1:3]
    one = results(study, "loss", [], None)[1]
    assert one.test.interval is None and one.adjusted is None and "on one seed" in one.verdict


def test_equal_differences_make_no_claim():
    study = sound()
    for run in llama(study).by_seed.values():
        run.loss = study.arms[0].by_seed[run.seed].loss - 0.1
    one = results(study, "loss", [], None)[1]
    assert one.claim == "none" and one.test.p == 0 and "equal differences say nothing about chance" in one.verdict


def test_the_target_has_its_own_test():
    """One-sided: three losses near 2.9 are below 2.95, those near 3 are not."""
    study = sound()
    alone = results(dataclasses.replace(study, arms=study.arms[:2]), "loss", [], 2.95)
    found = results(study, "loss", [], 2.95)
    assert found[1].below_target == pytest.approx(2 * alone[1].below_target)  # Holm: of four arms two are far above
    assert found[0].below_target > 0.99 and found[1].below_target < 0.01
