"""What the report says of others' claims: shown, contradicted, or not decided, with the pairs that decide."""

from pathlib import Path

import pytest
from synthetic_runs import simple_comparison
from test_report_evidence import finished

from trainer.commands.report.caveats import Caveat
from trainer.commands.report.claims import claim_table, judge
from trainer.commands.report.study import Arm, Claim, Study, read_comparison
from trainer.core.errors import UserError

NOISE = {1: 0.001, 2: -0.002, 3: 0.0015}


def study(losses: dict[str, float], pairs, noise=NOISE) -> Study:
    """Arms with three seeds around these losses; each arm's noise is another multiple of the same."""
    arms = [
        Arm(name, 1.0, [finished(seed, loss + noise[seed] * (1 + i)) for seed in (1, 2, 3)])
        for i, (name, loss) in enumerate(losses.items())
    ]
    return Study("s", Path("s"), arms, next(iter(losses)), declared=True, claims=[Claim("so it is", "a paper", pairs)])


@pytest.mark.parametrize(
    "losses, verdict",
    [
        ({"a": 2.8, "b": 2.9, "c": 3.0}, "shown"),
        ({"a": 2.8, "b": 3.0, "c": 2.9}, "contradicted"),  # one pair is the other way round
        ({"a": 2.8, "b": 2.8, "c": 3.0}, "not decided: the means have the claimed order"),
    ],
)
def test_a_claim_is_shown_by_all_pairs_and_contradicted_by_one(losses, verdict):
    losses = {name: loss + (1e-4 if name == "b" else 0) for name, loss in losses.items()}
    (judged,) = judge(study(losses, (("a", "b"), ("b", "c"))), "loss", [])
    assert judged.verdict == verdict


def test_means_in_the_opposite_order_that_chance_explains_decide_nothing():
    noise = {1: 0.1, 2: -0.2, 3: 0.15}
    (judged,) = judge(study({"a": 3.0, "b": 2.9}, (("a", "b"),), noise), "loss", [])
    assert judged.verdict == "not decided: the means have the opposite order"


def test_p_is_adjusted_for_all_pairs_of_all_claims_each_once():
    """Also a pair that another claim has the other way round; not one of which nothing can be claimed."""
    losses = {"a": 2.8, "b": 2.9, "c": 3.0, "d": 3.1}
    one = study(losses, (("a", "b"),))
    (alone,) = judge(one, "loss", [])
    assert alone.pairs[0].adjusted == alone.pairs[0].test.p
    one.claims += [
        Claim("not so", "another", (("b", "a"),)),
        Claim("more", "another", (("a", "b"), ("b", "c"), ("b", "d"))),
    ]
    protocol = Caveat("protocol_differs", "d has windows of its own", (("d", 1.0),), "the validation protocol differs")
    first, opposite, more = judge(one, "loss", [protocol])
    assert first.pairs[0].adjusted == opposite.pairs[0].adjusted == pytest.approx(2 * alone.pairs[0].adjusted)
    assert [first.verdict, opposite.verdict] == ["shown", "contradicted"]
    assert more.pairs[2].adjusted is None and "p " not in more.pairs[2].words()
    assert more.verdict == "not decided: the means have the claimed order"


def test_a_claim_needs_three_seeds_that_both_arms_have():
    """Each arm has three, and two of them are the same."""
    one = study({"a": 2.8, "b": 2.9}, (("a", "b"),))
    one.arms[0].runs[2].seed = 4
    (judged,) = judge(one, "loss", [])
    assert judged.pairs[0].test.n == 2 and judged.pairs[0].blocked == "a claim needs 3 or more seeds of both arms"
    assert judged.verdict.startswith("not decided")


def test_a_caveat_that_forbids_a_claim_decides_nothing():
    blocks = Caveat("few_seeds", "there are few seeds", blocks="they have few seeds")
    (judged,) = judge(study({"a": 2.8, "b": 2.9}, (("a", "b"),)), "loss", [blocks])
    assert judged.verdict.startswith("not decided") and "they have few seeds" in judged.pairs[0].words()


def test_equal_differences_on_every_seed_decide_nothing():
    (judged,) = judge(study({"a": 2.8, "b": 2.9}, (("a", "b"),), {1: 0, 2: 0, 3: 0}), "loss", [])
    assert judged.verdict.startswith("not decided") and "says nothing about chance" in judged.pairs[0].words()


def test_without_runs_nothing_is_decided():
    one = study({"a": 2.8, "b": 2.9}, (("a", "b"),))
    one.arms[1].runs = []
    judged = judge(one, "loss", [])
    assert judged[0].verdict == "not decided: runs are missing"
    assert claim_table(one, judged, "loss").rows[0][-1] == "no seed has a finished run of both"


def test_claims_of_a_comparison_stand_in_its_report(tmp_path, capsys):
    from trainer.__main__ import dispatch

    experiment = simple_comparison(tmp_path / "demo")
    said = "llama is <b>better</b>"
    experiment.content["claims"] = [{"words": said, "source": "a paper", "pairs": [["llama", "gpt2"]]}]
    dispatch(["report", str(experiment.write())])
    assert "### Claims" in capsys.readouterr().out
    page = (experiment.folder / "report" / "report.html").read_text()
    assert "llama is &lt;b&gt;better&lt;/b&gt;" in page and said not in page


def test_a_claim_about_nothing_is_refused(tmp_path):
    experiment = simple_comparison(tmp_path / "demo")
    experiment.content["claims"] = [{"words": "so", "source": "x", "pairs": []}]
    with pytest.raises(UserError, match="a claim names no pair of arms"):
        read_comparison(experiment.write())


@pytest.mark.parametrize("pairs", [[["llama", "huge"]], [["llama"]], ["llama"], [["llama", "llama"]]])
def test_a_claim_about_arms_that_are_not_there_is_refused(tmp_path, pairs):
    experiment = simple_comparison(tmp_path / "demo")
    experiment.content["claims"] = [{"words": "so", "source": "x", "pairs": pairs}]
    with pytest.raises(UserError, match="which are not two of the arms"):
        read_comparison(experiment.write())
