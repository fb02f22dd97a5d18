"""Routing as a pure decision: names, every strategy, what is left out and why, and what must never happen."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.errors import InvalidInput, PolicyDenied, UnknownModel
from agentic_flow.gateway.models import choose, meaning
from agentic_flow.gateway.policies import GatewayPolicies
from agentic_flow.gateway.prices import PriceList
from agentic_flow.gateway.routing.memory import LATENCY_AGE_MAX_S, PROBE_TIMEOUT_S, Latencies, Pins
from agentic_flow.gateway.routing.names import ALIAS_HOPS_MAX, BUILT_IN, check_names, resolve_alias
from agentic_flow.gateway.routing.plan import Candidate, Considered, Router


class HandClock:
    """Time that stands until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def time_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        raise AssertionError("routing never waits")


@dataclass
class Provider:
    """A provider as far as routing knows one."""

    name: str
    default_model: str | None
    owned: str = ""
    configured: bool = True
    setup_hint: str = "set its key"

    def owns(self, model: str) -> bool:
        return bool(self.owned) and model.startswith(self.owned)


PRICES = {
    "big:pro": (10.0, 50.0),
    "big:mini": (1.0, 5.0),
    "other:plain": (2.0, 2.0),
    "home:llama": (0.0, 0.0),
}


def providers(**configured: bool) -> dict[str, Provider]:
    """Two vendors, an endpoint of one's own without a default, a local model, the extractive one."""
    found = [
        Provider("big", "pro", owned="big-"),
        Provider("other", "plain", owned="plain"),
        Provider("home", None),
        Provider("onnx", "phi", configured=False),
        Provider("extractive", "extractive"),
    ]
    for provider in found:
        provider.configured = configured.get(provider.name, provider.configured)
    return {provider.name: provider for provider in found}


def router(known: dict[str, Provider] | None = None, **more: Any) -> Router:
    return Router(providers() if known is None else known, PriceList(PRICES), **more)


def policies(**fields: Any) -> GatewayPolicies:
    made = GatewayPolicies.model_validate(fields)
    check_names(made)
    return made


def route(*targets: str | tuple[str, float], **fields: Any) -> dict[str, Any]:
    named = [(target, 1.0) if isinstance(target, str) else target for target in targets]
    return {"targets": [{"model": model, "weight": weight} for model, weight in named], **fields}


def shown(candidates: Sequence[Candidate]) -> list[str]:
    return [f"{candidate.provider}:{candidate.model}" for candidate in candidates]


def left_out(rows: Sequence[Considered]) -> dict[str, str]:
    return {f"{row.provider}:{row.model}": row.reason for row in rows if row.position is None}


# Names


def test_a_model_by_name_goes_as_without_routing() -> None:
    """Catches names that mean something else once there is a router, and errors that lost their hint."""
    known = providers(other=False)
    for name in ("big:pro", "big:", "big-7", "extractive", "home:llama"):
        plan = router(known).plan(name, GatewayPolicies())
        assert plan.candidates == (Candidate(*choose(name, known)),)
        assert plan.route is None
        assert not plan.sticky
    for name in ("nonsense", "plain", "other:plain", "auto:nonsense"):
        with pytest.raises(UnknownModel) as expected:
            choose(name, known)
        with pytest.raises(UnknownModel) as refused:
            router(known).plan(name, GatewayPolicies())
        assert refused.value.message == expected.value.message
        assert (expected.value.hint or "") in (refused.value.hint or "")


def test_a_near_miss_of_a_route_is_told() -> None:
    """Catches a misspelt route that is only told which models there are."""
    with pytest.raises(UnknownModel, match="chep") as refused:
        router().plan("chep", policies(routes={"cheap": route("big:")}))
    assert "'cheap'" in (refused.value.hint or "")


def test_meaning_does_not_ask_for_a_key() -> None:
    """Catches an explanation that cannot name a model whose provider is not set up."""
    assert meaning("plain", providers(other=False)) == ("other", "plain")
    assert meaning("nonsense", providers()) is None


def test_aliases_lead_to_models_and_to_routes() -> None:
    """Catches an alias that is not followed, in a request or among targets."""
    given_policies = policies(
        aliases={"a": "b", "b": "cheap", "m": "big:mini"}, routes={"cheap": route("m", "other:")}
    )
    plan = router().plan("a", given_policies)
    assert plan.asked == "a"
    assert plan.route == "cheap"
    assert shown(plan.candidates) == ["big:mini", "other:"]
    assert shown(router().plan("m", given_policies).candidates) == ["big:mini"]


@given(
    aliases=st.dictionaries(
        st.sampled_from("abcdefghijklm"), st.sampled_from("abcdefghijklmnop"), max_size=13
    )
)
def test_aliases_end_or_are_refused(aliases: dict[str, str]) -> None:
    """Catches a chain of aliases that never ends, or one that is stored and refused only when asked for."""

    def end_of(name: str) -> str | None:
        try:
            return resolve_alias(name, aliases)
        except UnknownModel:
            return None

    ends = {name: end_of(name) for name in aliases}
    assert not {end for end in ends.values() if end is not None} & aliases.keys()
    for name, end in ends.items():
        walked = name
        for _ in range(len(aliases)):
            walked = aliases.get(walked, walked)
        # Refused exactly when the walk never ends, or is long.
        assert end == walked or end is None
    refused = None in ends.values()
    if refused:
        with pytest.raises(InvalidInput, match="aliases"):
            check_names(GatewayPolicies(aliases=aliases))
    else:
        check_names(GatewayPolicies(aliases=aliases))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"aliases": {"a": "a"}}, "aliases.a: .*leads back to itself"),
        ({"aliases": {str(n): str(n + 1) for n in range(ALIAS_HOPS_MAX + 1)}}, "aliases.0: .*is longer than"),
        ({"aliases": {"auto:cost": "big:"}}, "aliases.auto:cost: .*built-in"),
        ({"aliases": {"x": "big:"}, "routes": {"x": route("big:")}}, "aliases.x: .*also the name of a route"),
        ({"routes": {"auto:privacy": route("big:")}}, "routes.auto:privacy: .*built in"),
        ({"routes": {"x": route("big:", "auto")}}, r"routes.x.targets\[1\].model: 'auto' is a route"),
        ({"routes": {"x": route("y"), "y": route("big:")}}, r"routes.x.targets\[0\].model"),
        ({"aliases": {"z": "x"}, "routes": {"x": route("z")}}, r"routes.x.targets\[0\].model: 'z'"),
    ],
)
def test_names_that_cannot_be_followed_are_not_stored(fields: dict[str, Any], told: str) -> None:
    """Catches policies that fail, or mean something else, when somebody asks."""
    with pytest.raises(InvalidInput, match=told):
        check_names(GatewayPolicies.model_validate(fields))


def test_a_built_in_name_keeps_its_word_whatever_is_stored() -> None:
    """Catches `auto:privacy` led astray by policies that were stored without the check."""
    astray = GatewayPolicies.model_validate(
        {"aliases": {"auto:privacy": "big:"}, "routes": {"auto:privacy": route("big:")}}
    )
    assert shown(router().plan("auto:privacy", astray).candidates) == ["extractive:"]


# Strategies


def test_fallback_keeps_the_order() -> None:
    """Catches a list that is sorted by anything but its operator."""
    plan = router().plan("r", policies(routes={"r": route("other:", "big:mini", "big:")}))
    assert shown(plan.candidates) == ["other:", "big:mini", "big:"]


def test_cost_counts_the_tokens_of_the_call() -> None:
    """Catches a cheapest model that is chosen by its input price alone, or by no size at all."""
    given_policies = policies(routes={"r": route("big:mini", "other:", "home:unpriced", strategy="cost")})
    much_in = router().plan("r", given_policies, tokens_in=100_000, tokens_out=10)
    assert shown(much_in.candidates) == ["big:mini", "other:", "home:unpriced"]
    much_out = router().plan("r", given_policies, tokens_in=10, tokens_out=10_000)
    assert shown(much_out.candidates) == ["other:", "big:mini", "home:unpriced"]
    rows = router().explain("r", given_policies, tokens_in=1_000_000, tokens_out=1_000_000)
    assert [row.cost_usd for row in rows] == [pytest.approx(4.0), pytest.approx(6.0), None]
    assert rows[2].reason.endswith("no price is known")


def test_quality_then_cost() -> None:
    """Catches quality that is not looked up by any of a model's names, and ties that cost too much."""
    given_policies = policies(
        routes={"r": route("other:", "big:mini", "big:pro", "home:x", strategy="quality")},
        quality={"big:pro": 0.9, "mini": 0.9, "plain": 0.5},
    )
    plan = router().plan("r", given_policies)
    assert shown(plan.candidates) == ["big:mini", "big:pro", "other:", "home:x"]


@pytest.mark.parametrize("strategy", ["cost", "latency"])
def test_the_least_quality_leaves_out(strategy: str) -> None:
    """Catches a cheap model that is used although it is not good enough, or not known to be."""
    given_policies = policies(
        routes={"r": route("big:", "big:mini", "home:x", strategy=strategy, quality_min=0.6)},
        quality={"big:pro": 0.6, "big:mini": 0.59},
    )
    assert shown(router().plan("r", given_policies).candidates) == ["big:"]
    reasons = left_out(router().explain("r", given_policies))
    assert "0.59" in reasons["big:mini"]
    assert "not known" in reasons["home:x"]


def test_latency_tries_each_once_then_the_soonest() -> None:
    """Catches targets that are never measured, and failures that make a target look fast."""
    clock = HandClock()
    plans = router(clock=clock)
    given_policies = policies(routes={"r": route("big:", "other:", "home:x", strategy="latency")})

    def first() -> Candidate:
        return plans.plan("r", given_policies).candidates[0]

    tried = [first(), first(), first()]
    assert {*tried} == {Candidate("big", ""), Candidate("other", ""), Candidate("home", "x")}
    for candidate, first_token_s in ((tried[0], 0.3), (tried[1], 0.1), (tried[2], 0.2)):
        plans.observe(candidate, first_token_s, ok=True)
    assert first() == tried[1]
    for _ in range(12):
        plans.observe(tried[1], None, ok=False)
    assert first() == tried[2]
    clock.now_s += LATENCY_AGE_MAX_S + 1
    assert first() == Candidate("other", "")  # all forgotten; the cheapest is tried first
    assert plans.explain("r", given_policies)[0].latency_s is None


def test_one_call_at_a_time_tries_an_unmeasured_target() -> None:
    """Catches a herd of calls sent to a target of which nothing is known, and one given up for good."""
    clock = HandClock()
    found = Latencies(clock)
    key, fast = ("big", "pro"), ("other", "plain")
    found.observe(fast, 0.1, ok=True)
    assert found.rank(key) < found.rank(fast)
    found.begin_probe(key)
    assert found.rank(fast) < found.rank(key)
    clock.now_s += PROBE_TIMEOUT_S
    assert found.rank(key) < found.rank(fast)
    found.observe(key, None, ok=False)
    assert found.rank(fast) < found.rank(key)
    clock.now_s += LATENCY_AGE_MAX_S + 1
    assert found.rank(key)[0] == 0


def test_privacy_never_leaves_the_house() -> None:
    """Catches private data sent to a vendor because the local model is away."""
    given_policies = policies(routes={"r": route("big:", "onnx:phi", "home:llama", strategy="privacy")})
    with pytest.raises(PolicyDenied) as refused:
        router().plan("r", given_policies)
    assert "onnx" in refused.value.message
    assert "not local" in refused.value.message
    assert "extractive" in (refused.value.hint or "")
    owned = given_policies.model_copy(update={"local": ("home",)})
    assert shown(router().plan("r", owned).candidates) == ["home:llama"]
    one = given_policies.model_copy(update={"local": ("home:llama",)})
    assert shown(router().plan("r", one).candidates) == ["home:llama"]
    with_onnx = router(providers(onnx=True)).plan("r", given_policies)
    assert shown(with_onnx.candidates) == ["onnx:phi"]


@pytest.mark.parametrize(
    ("checker", "kept"), [("regex", True), ("model:onnx:phi", True), ("model:big:", False)]
)
def test_the_judge_of_a_private_route_is_local_too(checker: str, kept: bool) -> None:
    """Catches a private answer that is shown to a remote model to be judged."""
    given_policies = policies(
        routes={"r": route("onnx:phi", strategy="privacy", escalation={"checker": checker})}
    )
    plans = router(providers(onnx=True))
    if kept:
        assert plans.plan("r", given_policies).escalation is not None
    else:
        with pytest.raises(PolicyDenied, match="checker"):
            plans.plan("r", given_policies)


def test_the_learned_strategy_asks_and_is_held_to_the_rules() -> None:
    """Catches a learned order that brings back what was left out, or that loses or repeats a candidate."""

    class Decided(NamedTuple):
        order: tuple[Candidate, ...]
        reason: str
        propensity: float
        tries: int = 1
        predicted: tuple[float, ...] = (0.8, 0.1, 0.7)
        propensities: tuple[float, ...] = (0.2, 0.1, 0.9)

    class Learned:
        def decide(
            self,
            candidates: Sequence[Candidate],
            prompt: str,
            *,
            costs_usd: Sequence[float | None],
            tenant: str = "",
            tries_max: int = 1,
            cost_weight: float | None = None,
            explore: bool = True,
        ) -> Decided:
            seen.append((prompt, tenant, list(costs_usd)))
            weights.append((cost_weight, explore))
            last = candidates[-1]
            return Decided((last, Candidate("other", ""), last), f"learned from {tenant}", 0.9)

    seen: list[tuple[str, str, list[float | None]]] = []
    weights: list[tuple[float | None, bool]] = []
    weighed = route("big:", "other:", "big:mini", strategy="learned", cost_weight=0.25)
    given_policies = policies(routes={"r": weighed})
    plans = router(providers(other=False), learned=Learned())
    plan = plans.plan("r", given_policies, prompt="why?", tenant="t", tokens_in=1000, tokens_out=1000)
    assert shown(plan.candidates) == ["big:mini", "big:"]
    assert "learned from t" in plan.reason
    assert plan.propensity == 0.9
    assert plan.escalation is None
    assert seen == [("why?", "t", [pytest.approx(0.06), pytest.approx(0.006)])]
    rows = plans.explain("r", given_policies, prompt="why?", tenant="t")
    assert [(row.model, row.position, row.predicted, row.propensity) for row in rows[:2]] == [
        ("mini", 1, 0.7, 0.9),
        ("pro", 2, None, 0.0),
    ]
    assert weights == [(0.25, True), (0.25, False)]
    with pytest.raises(InvalidInput, match="learned"):
        router().plan("r", given_policies)


@pytest.mark.parametrize(("worth_trying", "tries_max"), [(1, 1), (2, 2), (9, 3)])
def test_a_learned_order_says_how_many_to_try(worth_trying: int, tries_max: int) -> None:
    """Catches models that are asked, one after the other, though the router saw no worth in it."""

    class Decided(NamedTuple):
        order: tuple[Candidate, ...]
        reason: str = "learned"
        propensity: float = 1.0
        tries: int = worth_trying
        predicted: tuple[float, ...] = ()
        propensities: tuple[float, ...] = ()

    class Learned:
        def decide(self, candidates: Sequence[Candidate], prompt: str, **_: object) -> Decided:
            return Decided(tuple(candidates))

    checked = route("big:", "big:mini", strategy="learned", escalation={"checker": "length", "tries_max": 3})
    plan = router(providers(other=False), learned=Learned()).plan("r", policies(routes={"r": checked}))
    assert plan.escalation is not None
    assert plan.escalation.tries_max == tries_max
    assert len(plan.candidates) == 2


def test_auto_is_the_cheapest_that_writes() -> None:
    """Catches `auto` answered by the free model that only cites, or by one that nobody can price."""
    rows = router(providers(onnx=True)).explain("auto", GatewayPolicies())
    assert [row.provider for row in rows if row.position] == ["onnx", "other", "big"]
    reasons = left_out(rows)
    assert "no price" in reasons["home:"]
    assert "selects and cites" in reasons["extractive:extractive"]
    named = policies(routes={"x": route("home:llama", "big:mini")})
    assert shown(router().plan("auto", named).candidates) == ["home:llama", "other:", "big:mini", "big:"]
    own = policies(routes={"auto": route("big:")})
    assert shown(router().plan("auto", own).candidates) == ["big:"]
    assert shown(router().plan("auto:cost", own).candidates)[0] == "other:"
    alone = providers(big=False, other=False, home=False)
    assert shown(router(alone).plan("auto", GatewayPolicies()).candidates) == ["extractive:"]
    unpriced = providers(big=False, other=False)
    assert shown(router(unpriced).plan("auto", GatewayPolicies()).candidates) == ["home:"]


def test_what_was_left_out_is_told() -> None:
    """Catches a refusal that leaves the operator to guess which of the targets was wrong, and how."""
    given_policies = policies(routes={"r": route("other:", "nonsense")})
    with pytest.raises(UnknownModel) as refused:
        router(providers(other=False)).plan("r", given_policies)
    assert "set its key" in (refused.value.hint or "")
    assert "nonsense: no provider serves it" in (refused.value.hint or "")
    assert len(refused.value.details["left_out"]) == 2
    rows = router().explain("r", policies(routes={"r": route("big:", "big:pro", "big:mini")}))
    assert [(row.model, row.position) for row in rows] == [("pro", 1), ("mini", 2), ("pro", None)]


# What must never happen

NAMES = ("big:", "big:pro", "big:mini", "other:", "plain", "home:llama", "onnx:", "extractive", "nonsense")
STRATEGIES = ("fallback", "weighted", "cost", "latency", "quality", "privacy")

some_policies = st.fixed_dictionaries(
    {
        "routes": st.dictionaries(
            st.sampled_from(["r", "s", "auto"]),
            st.fixed_dictionaries(
                {
                    "targets": st.lists(
                        st.fixed_dictionaries(
                            {"model": st.sampled_from(NAMES), "weight": st.floats(0.1, 100)}
                        ),
                        max_size=6,
                    ),
                    "strategy": st.sampled_from(STRATEGIES),
                    "sticky": st.booleans(),
                    "quality_min": st.sampled_from([0.0, 0.5]),
                }
            ),
        ),
        "quality": st.dictionaries(st.sampled_from(NAMES), st.floats(0, 1)),
        "local": st.lists(st.sampled_from(["home", "other", "big:mini"]), max_size=2),
    }
)
some_configured = st.fixed_dictionaries(
    {name: st.booleans() for name in ("big", "other", "home", "onnx", "extractive")}
)


@given(
    fields=some_policies,
    configured=some_configured,
    asked=st.sampled_from(["r", "s", *BUILT_IN]),
    conversation=st.none() | st.text(max_size=3),
    seed=st.integers(0, 100),
)
def test_a_plan_keeps_its_promises(
    fields: dict[str, Any], configured: dict[str, bool], asked: str, conversation: str | None, seed: int
) -> None:
    """Catches a candidate that cannot be asked, one named twice, and private data on its way out."""
    known = providers(**configured)
    given_policies = policies(**fields)
    plans = router(known, rng=random.Random(seed))
    rule = (
        BUILT_IN[asked]
        if asked.startswith("auto:")
        else given_policies.routes.get(asked, BUILT_IN.get(asked))
    )
    if rule is None:
        with pytest.raises(UnknownModel):
            plans.plan(asked, given_policies, conversation=conversation)
        return
    rows = plans.explain(asked, given_policies)
    try:
        plan = plans.plan(asked, given_policies, conversation=conversation)
    except UnknownModel:
        assert rule.strategy != "privacy"
        assert not any(row.position for row in rows)
        return
    except PolicyDenied:
        assert rule.strategy == "privacy"
        assert not any(row.position for row in rows)
        return
    assert plan.candidates
    assert all(known[candidate.provider].configured for candidate in plan.candidates)
    meant = [(c.provider, c.model or known[c.provider].default_model or "") for c in plan.candidates]
    assert len(set(meant)) == len(meant)
    assert sorted(meant) == sorted((row.provider, row.model) for row in rows if row.position)
    if rule.strategy == "privacy":
        local = {"onnx", "extractive", *given_policies.local}
        assert all(provider in local or f"{provider}:{model}" in local for provider, model in meant)
    plans.served(conversation, "", plan.route, plan.candidates[-1])
    again = plans.plan(asked, given_policies, conversation=conversation)
    assert sorted(again.candidates) == sorted(plan.candidates)
    if plan.sticky and conversation is not None:
        assert again.candidates[0] == plan.candidates[-1]


@pytest.mark.parametrize("conversations", [False, True])
def test_weights_are_respected(conversations: bool) -> None:
    """Catches a draw that favours anybody, and fallbacks out of the order of their weights."""
    plans = router(rng=random.Random(7))
    given_policies = policies(
        routes={"r": route(("big:", 1), ("other:", 6), ("big:mini", 3), strategy="weighted", sticky=True)}
    )
    draws = 20_000
    counted: Counter[str] = Counter()
    for number in range(draws):
        plan = plans.plan("r", given_policies, conversation=str(number) if conversations else None)
        names = shown(plan.candidates)
        counted[names[0]] += 1
        assert names[1:] == [name for name in ("other:", "big:mini", "big:") if name != names[0]]
    for name, share in (("other:", 0.6), ("big:mini", 0.3), ("big:", 0.1)):
        # Five standard deviations of a binomial count.
        assert abs(counted[name] - share * draws) < 5 * (draws * share * (1 - share)) ** 0.5, counted
    reasons = [row.reason for row in plans.explain("r", given_policies)]
    assert [reason.split()[2] for reason in reasons] == ["60", "30", "10"]


# Conversations


def test_a_conversation_stays_until_its_target_is_gone() -> None:
    """Catches a conversation that moves, one that is stuck with a dead target, and one that tenants share."""
    known = providers()
    plans = router(known)
    given_policies = policies(routes={"r": route("big:", "other:", "home:x", sticky=True)})

    def first(conversation: str | None = "c", tenant: str = "t") -> Candidate:
        plan = plans.plan("r", given_policies, conversation=conversation, tenant=tenant)
        assert plan.sticky
        return plan.candidates[0]

    plans.served("c", "t", "r", Candidate("other", "plain"))
    assert first() == Candidate("other", "")
    assert first(tenant="u") == first(conversation=None) == first("d") == Candidate("big", "")
    plans.served("c", "t", "r", Candidate("big", ""))  # a fallback answered once
    assert first() == Candidate("other", "")
    known["other"].configured = False
    assert first() == Candidate("big", "")
    plans.served("c", "t", "r", Candidate("home", "x"))
    known["other"].configured = True
    assert first() == Candidate("home", "x")


def test_two_workers_draw_the_same_for_a_new_conversation() -> None:
    """Catches a conversation that two workers send to different targets from the start."""
    given_policies = policies(routes={"r": route("big:", "other:", strategy="weighted", sticky=True)})
    one, two = router(rng=random.Random(1)), router(rng=random.Random(2))
    drawn = [
        [plans.plan("r", given_policies, conversation=str(n), tenant="t").candidates[0] for n in range(50)]
        for plans in (one, two)
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 2


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.sampled_from(["add", "get", "drop"])),
        max_size=120,
    )
)
def test_pins_stay_bounded_and_true(steps: list[tuple[str, int, str]]) -> None:
    """Catches memory that grows with conversations, a count that drifts, and a pin that changes."""
    pins = Pins(tenant_max=4, total_max=7)
    held: dict[tuple[str, bytes], tuple[str, str]] = {}
    for turn, (tenant, number, step) in enumerate(steps):
        key = Pins.key(tenant, "r", str(number))
        if step == "add":
            pins.add(tenant, key, held.get((tenant, key), ("provider", str(turn))))
            found = pins.get(tenant, key)
            assert found is not None
            held[tenant, key] = found
        elif step == "drop":
            pins.drop(tenant, key)
            held.pop((tenant, key), None)
            assert pins.get(tenant, key) is None
        else:
            found = pins.get(tenant, key)
            if found is None:
                held.pop((tenant, key), None)
            else:
                assert found == held[tenant, key]
        assert len(pins) <= 7
        present = [place for place in held if pins.get(*place) is not None]
        assert len(present) == len(pins)
        for tenant_name in "abc":
            assert sum(owner == tenant_name for owner, _ in present) <= 4


def test_keys_of_conversations_do_not_run_together() -> None:
    """Catches two conversations known by one key because their names were only joined."""
    assert Pins.key("a", "bc", "d") != Pins.key("ab", "c", "d")
    assert Pins.key("a", "b", "c" * 100_000) != Pins.key("a", "b", "c" * 100_001)
