"""From spec to plan: networks follow from edges, bounds from the tier, and what makes no sense is refused."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.errors import InvalidInput, PathNotFound
from agentic_flow.core.settings import ALIASES, env_name, load, setting_names
from agentic_flow.deploy.edges import EDGES, ORDER, Edge, edges_among, segments
from agentic_flow.deploy.plan import INSTANCES_MAX, LIMITS, StackPlan, checked_plan
from agentic_flow.deploy.spec import ImageSpec, PortsSpec, ServiceSpec, StackSpec, parse_spec, read_spec

PORTS = st.integers(min_value=1, max_value=65_535)


@st.composite
def specs(draw: st.DrawFn) -> StackSpec:
    """Specs that make sense."""
    store = draw(st.sampled_from(["directory", "postgresql"]))
    tier = draw(st.sampled_from(["small", "medium", "large"]))
    replicas = st.integers(min_value=1, max_value=INSTANCES_MAX[tier] if store == "postgresql" else 1)
    services = {name: ServiceSpec(replicas=draw(replicas)) for name in ("platform", "agentdb", "swarm")}
    if store == "postgresql" and draw(st.booleans()):
        services["worker"] = ServiceSpec(replicas=draw(replicas))
    numbers = draw(st.lists(PORTS, min_size=7, max_size=7, unique=True))
    ports = dict(zip(PortsSpec.model_fields, numbers, strict=True))
    for name in draw(st.sets(st.sampled_from(["swarm", "agentdb", "metrics"]))):
        ports[name] = None
    return StackSpec(
        name=draw(st.from_regex(r"[a-z][a-z0-9-]{0,20}[a-z0-9]", fullmatch=True)),
        tier=tier,
        store=store,
        services=services,
        provider=draw(st.sampled_from(["local", "claude", "openrouter", "multi-model"])),
        model=draw(st.none() | st.text(min_size=1, max_size=20)),
        observability=draw(st.booleans()),
        ports=PortsSpec(**ports),
        images=ImageSpec(prefix=draw(st.sampled_from(["", "registry.example/team/"])), tag="1.2.3"),
        address=draw(st.sampled_from(["127.0.0.1", "::1", "10.0.0.5"])),
    )


def pairs(plan_edges: tuple[Edge, ...]) -> set[frozenset[str]]:
    return {frozenset((edge.caller, edge.callee)) for edge in plan_edges}


def sharing(groups: tuple[tuple[str, ...], ...]) -> set[frozenset[str]]:
    return {frozenset(pair) for group in groups for pair in combinations(group, 2)}


@given(specs())
def test_two_parts_share_a_network_exactly_when_an_edge_joins_them(spec: StackSpec) -> None:
    """Catches a network that lets somebody reach whom the list of edges does not name, or cuts an edge."""
    plan = checked_plan(spec)
    assert sharing(plan.networks) == pairs(plan.edges)


@given(st.sets(st.sampled_from(ORDER)), st.sets(st.sampled_from(ORDER)))
def test_segments_are_right_for_any_parts(present: set[str], published: set[str]) -> None:
    """Catches a grouping that is only right for the stacks that there are today."""
    edges = edges_among(present, published=published)
    assert sharing(segments(edges)) == pairs(edges)
    assert segments(edges) == segments(edges)


@given(
    st.lists(
        st.tuples(st.sampled_from(ORDER), st.sampled_from(ORDER)).filter(lambda pair: pair[0] != pair[1]),
        max_size=25,
    )
)
def test_segments_are_right_for_any_edges(joined: list[tuple[str, str]]) -> None:
    """Catches a group that is no clique: it would join two whom no edge joins."""
    edges = tuple(Edge(caller, callee, "") for caller, callee in joined)
    assert sharing(segments(edges)) == pairs(edges)


@given(specs())
def test_who_calls_whom_is_who_is_told_whose_address(spec: StackSpec) -> None:
    """Catches a service that is told of a neighbour whom it may not call."""
    plan = checked_plan(spec)
    allowed = {(edge.caller, edge.callee) for edge in plan.edges}
    for part in plan.parts:
        for variable, value in part.environment.items():
            if variable.startswith("AGENTIC_FLOW_PEERS__") and variable.endswith("_URL"):
                callee = value.removeprefix("https://").partition(":")[0]
                assert (part.name, callee) in allowed


@given(specs())
def test_only_who_calls_providers_has_a_way_out(spec: StackSpec) -> None:
    """Catches a database or coordinator that could reach the world outside."""
    assert [part.name for part in checked_plan(spec).parts if part.way_out] == ["platform"]


@given(specs())
def test_the_settings_of_every_part_are_settings(spec: StackSpec) -> None:
    """Catches a variable that the program would refuse, or a value of the wrong kind."""
    known = {env_name(name) for name, _ in setting_names()}
    for part in checked_plan(spec).parts:
        if not part.ours:
            continue
        assert set(part.passed) <= set(ALIASES)
        ours = {name: value for name, value in part.environment.items() if name.startswith("AGENTIC_FLOW_")}
        assert set(ours) <= known
        # The files are inside the container.
        environ = {name: value for name, value in ours.items() if not name.endswith("DATABASE_URL_FILE")}
        settings = load(
            environ=environ, directory=Path("/nonexistent"), user_config=Path("/nonexistent")
        ).settings
        assert settings.auth.required
        assert settings.tls.mutual


@given(specs())
def test_every_secret_that_is_named_is_given(spec: StackSpec) -> None:
    """Catches a `_file` setting whose file the part does not get."""
    for part in checked_plan(spec).parts:
        given_files = {secret.name for secret in part.secrets}
        if part.has_certificate:
            given_files |= {"ca.crt", f"{part.name}.crt", f"{part.name}.key"}
        named = {
            value.removeprefix("/run/secrets/")
            for value in part.environment.values()
            if value.startswith("/run/secrets/")
        }
        assert named <= given_files


def test_the_tiers_keep_to_their_bounds() -> None:
    """Catches a bound outside what the services were laid out for."""
    bounds_mib = {"platform": (1024, 4096), "agentdb": (256, 2048), "swarm": (512, 4096)}
    for limits in LIMITS.values():
        for name, (least, most) in bounds_mib.items():
            assert least <= limits[name].memory_mib <= most
    for name, (least, most) in bounds_mib.items():
        assert (LIMITS["small"][name].memory_mib, LIMITS["large"][name].memory_mib) == (least, most)


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        ({"services": {"worker": {}}}, "no platform", "services"),
        ({"services": {"mcp": {}}}, "'mcp' is not a service", "worker"),
        ({"tier": "huge"}, "tier = 'huge'", "tier"),
        ({"teir": "small"}, "teir", "tier"),
        ({"ports": {"swarm": 3000}}, "both 3000", "of its own"),
        ({"ports": {"claude": 9000}}, "both 9000", "of its own"),
        ({"ports": {"platform": None, "swarm": None}}, "no port is published", "ports.platform"),
        ({"ports": {"platform": 0}}, "ports.platform = 0", "ports.platform"),
        ({"images": {"tag": "latest"}}, "latest", "images.tag"),
        ({"images": {"prefix": "registry.example"}}, "slash", "images.prefix"),
        ({"name": "Mine"}, "'Mine'", "name"),
        ({"hostnames": ["a_b"]}, "a_b", "hostnames"),
        ({"hostnames": []}, "at least one", "hostnames"),
        ({"address": "everywhere"}, "everywhere", "address"),
        ({"inputs_dir": "a:b"}, "a:b", "inputs_dir"),
        ({"services": {"swarm": {"replicas": -1}}}, "-1", "replicas"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused_with_a_hint(
    data: dict[str, Any], message: str, hint: str
) -> None:
    """Catches a wrong spec that is rendered all the same, or refused without saying what to change."""
    with pytest.raises(InvalidInput) as caught:
        checked_plan(parse_spec(data))
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


MAIN = {"platform": {}, "agentdb": {}, "swarm": {}}


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        ({"services": {**MAIN, "worker": {}}}, "a worker", "postgresql://"),
        ({"services": {**MAIN, "swarm": {"replicas": 2}}}, "2 of swarm", "postgresql://"),
        (
            {"store": "postgresql", "services": {**MAIN, "worker": {"replicas": 4}}},
            "more than the tier 'small'",
            "at most 3",
        ),
    ],
)
def test_several_of_one_need_a_database(data: dict[str, Any], message: str, hint: str) -> None:
    """Catches replicas that would each keep a folder of their own and know nothing of each other."""
    test_a_spec_that_makes_no_sense_is_refused_with_a_hint(data, message, hint)


def test_a_spec_is_read_from_yaml_and_toml(tmp_path: Path) -> None:
    """Catches a file whose kind changes what it means."""
    yaml, toml = tmp_path / "stack.yaml", tmp_path / "stack.toml"
    yaml.write_text("tier: medium\nports:\n  platform: 4000\n")
    toml.write_text('tier = "medium"\n[ports]\nplatform = 4000\n')
    assert read_spec(yaml) == read_spec(toml) != StackSpec()
    (tmp_path / "empty.yaml").write_text("")
    assert read_spec(tmp_path / "empty.yaml") == StackSpec()


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.yaml", "- 1"), ("a.yaml", "a: ["), ("a.toml", "a ="), ("a.txt", ""), ("a.yaml", "x: 1")],
)
def test_a_file_that_is_no_spec_is_named(tmp_path: Path, name: str, text: str) -> None:
    """Catches a traceback of a parser where an error of ours belongs."""
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidInput, match=name):
        read_spec(tmp_path / name)
    with pytest.raises(PathNotFound):
        read_spec(tmp_path / "absent.yaml")


def test_the_main_stack_is_what_the_documents_say() -> None:
    """Catches a change of the default stack that nobody meant: parts, networks, ports, volumes, secrets."""
    plan: StackPlan = checked_plan(StackSpec())
    assert [part.name for part in plan.parts] == ["proxy", "platform", "agentdb", "swarm"]
    assert plan.networks == (("proxy", "platform", "swarm"), ("platform", "agentdb", "swarm"))
    assert [(one.part, one.port) for one in plan.published] == [("platform", 3000), ("swarm", 9000)]
    assert [volume.name for volume in plan.volumes] == ["platform-data", "agent-memory", "swarm-data"]
    assert {secret.name for secret in plan.secrets} == {"owner_key", "service_key"}
    assert plan.certificates == ("proxy", "platform", "agentdb", "swarm")
    assert {(edge.caller, edge.callee) for edge in EDGES} >= {(e.caller, e.callee) for e in plan.edges}
