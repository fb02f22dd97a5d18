"""A tiny decoder with random weights, in the folder layout of onnxruntime-genai, for tests and for trying.

    python -m agentic_flow.testing.onnx_fixture FOLDER

It is built like a published model, only small: grouped-query attention with rotary positions and a shared
key-value cache, a byte-level BPE tokenizer, a chat template. The same arguments give the same weights. What
it says means nothing, unless it is given a `script`. Needs the packages `onnx` and `numpy`.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS_TEMPLATE = (
    "{% if tools %}<|system|>Call tools as <tool_call>{...}</tool_call>. There are:"
    "{% for tool in tools %} {{ tool | tojson }}{% endfor %}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}"
    "<tool_call>{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>"
    "{% endfor %}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
"""Special tokens, in the order of their ids; the first ends an answer."""

LAYERS, HIDDEN, HEADS, KV_HEADS = 2, 64, 4, 2
HEAD_SIZE = HIDDEN // HEADS
_PAIRS = "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le"
_SURE = 1000.0


def write_decoder(
    folder: Path,
    *,
    seed: int = 7,
    context_tokens: int = 4096,
    template: str | None = TEMPLATE,
    script: Sequence[str] = (),
    ends: bool = False,
) -> Path:
    """Write the model folder.

    Args:
        folder: Made if it is not there.
        seed: Of the random weights.
        context_tokens: Longest conversation.
        template: Chat template; None for a model without one.
        script: What it answers to everything, instead of what its weights say: each piece is a token of its
            own, but a piece of one character outside ASCII is left to its bytes. No token may come twice.
        ends: Whether the random weights may choose the end token. Without it only a script ends an answer.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = _vocabulary()
    pieces = [piece for piece in script if piece.isascii() or len(piece) > 1]
    added = [*SPECIALS, *pieces]
    ids = {piece: len(vocabulary) + place for place, piece in enumerate(added)}
    size = len(vocabulary) + len(added)
    said = [
        token for piece in script for token in ([ids[piece]] if piece in ids else _bytes(piece, vocabulary))
    ]
    chain = [ids["<|assistant|>"], *said, ids["<|end|>"]] if script else []
    if len(set(chain)) != len(chain):
        raise ValueError("a script cannot say a token twice")
    rng = np.random.default_rng(seed)
    pushes = np.zeros((size, size), np.float32)
    # Only printable ASCII and pairs, so that what it says can be read.
    readable = [token for text, token in vocabulary.items() if text.isascii()]
    pushes[:, :] = -_SURE
    pushes[:, readable] = 0.0
    if ends:
        pushes[:, ids["<|end|>"]] = 0.0
    for token, following in itertools.pairwise(chain):
        pushes[token, following] = 2 * _SURE
    (folder / "model.onnx").write_bytes(_graph(rng, pushes, context_tokens))
    _write(folder / "tokenizer.json", _tokenizer(vocabulary, merges, added))
    about = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", "model_max_length": context_tokens}
    if template is not None:
        about["chat_template"] = template
    _write(folder / "tokenizer_config.json", about)
    _write(folder / "genai_config.json", _config(context_tokens, size, ids["<|end|>"]))
    return folder


def _graph(rng: np.random.Generator, pushes: NDArray[np.float32], context_tokens: int) -> bytes:
    import onnx

    h: Any = onnx.helper
    types: Any = onnx.TensorProto
    size = len(pushes)
    weights: list[Any] = []
    nodes: list[Any] = []

    def keep(name: str, value: NDArray[Any]) -> str:
        weights.append(onnx.numpy_helper.from_array(value, name))
        return name

    def weight(name: str, *shape: int) -> str:
        return keep(name, (rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32))

    def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        nodes.append(h.make_node(op, inputs, outputs, **attributes))
        return outputs[0]

    def norm(name: str, value: str) -> str:
        ones = keep(f"{name}.scale", np.ones(HIDDEN, np.float32))
        return node("SimplifiedLayerNormalization", [value, ones], [name], axis=-1, epsilon=1e-5)

    def product(name: str, value: str, *shape: int) -> str:
        return node("MatMul", [value, weight(f"{name}.weight", *shape)], [name])

    angles = np.outer(np.arange(context_tokens), 10000.0 ** (-np.arange(0, HEAD_SIZE, 2) / HEAD_SIZE))
    keep("cos", np.cos(angles).astype(np.float32))
    keep("sin", np.sin(angles).astype(np.float32))
    keep("one", np.array([1], np.int64))
    node("ReduceSum", ["attention_mask", "one"], ["seen"])
    node("Sub", ["seen", "one"], ["last"])
    node("Cast", ["last"], ["last_32"], to=types.INT32)
    node("Shape", ["attention_mask"], ["mask_shape"])
    node("Gather", ["mask_shape", keep("first", np.array(1, np.int64))], ["total"], axis=0)
    node("Cast", ["total"], ["total_32"], to=types.INT32)
    # Small beside what the layers add, so that the context counts and not the last token alone.
    table = keep("embedding", (rng.standard_normal((size, HIDDEN)) * 0.3).astype(np.float32))
    value = node("Gather", [table, "input_ids"], ["embedded"])
    inputs = [h.make_tensor_value_info(name, types.INT64, ["batch", to]) for name, to in _INPUTS]
    outputs = [h.make_tensor_value_info("logits", types.FLOAT, ["batch", "new", size])]
    for layer in range(LAYERS):
        at = f"layer{layer}"
        normed = norm(f"{at}.norm", value)
        query = product(f"{at}.query", normed, HIDDEN, HIDDEN)
        pair = [product(f"{at}.{what}", normed, HIDDEN, KV_HEADS * HEAD_SIZE) for what in ("key", "value")]
        past = [f"past_key_values.{layer}.{what}" for what in ("key", "value")]
        present = [f"present.{layer}.{what}" for what in ("key", "value")]
        attended = node(
            "GroupQueryAttention",
            [query, *pair, *past, "last_32", "total_32", "cos", "sin"],
            [f"{at}.attended", *present],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        )
        value = node("Add", [value, product(f"{at}.output", attended, HIDDEN, HIDDEN)], [f"{at}.attention"])
        up = product(f"{at}.up", norm(f"{at}.norm2", value), HIDDEN, 2 * HIDDEN)
        gate = node("Mul", [up, node("Sigmoid", [up], [f"{at}.sigmoid"])], [f"{at}.gate"])
        value = node("Add", [value, product(f"{at}.down", gate, 2 * HIDDEN, HIDDEN)], [f"{at}.out"])
        shapes = [(name, "past") for name in past], [(name, "total") for name in present]
        for infos, listed in zip((inputs, outputs), shapes, strict=True):
            infos += [
                h.make_tensor_value_info(name, types.FLOAT, ["batch", KV_HEADS, length, HEAD_SIZE])
                for name, length in listed
            ]
    scores = product("scores", norm("norm", value), HIDDEN, size)
    pushed = node("Gather", [keep("pushes", pushes), "input_ids"], ["pushed"])
    node("Add", [scores, pushed], ["logits"])
    graph = h.make_graph(nodes, "tiny_decoder", inputs, outputs, weights)
    opsets = [h.make_opsetid("", 21), h.make_opsetid("com.microsoft", 1)]
    return h.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


_INPUTS = (("input_ids", "new"), ("attention_mask", "total"))


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level BPE (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(256 + rest.index(byte)) for byte in range(256)]


def _vocabulary() -> tuple[dict[str, int], list[list[str]]]:
    pairs = _PAIRS.split()
    return {text: place for place, text in enumerate([*_byte_letters(), *pairs])}, [
        list(pair) for pair in pairs
    ]


def _bytes(text: str, vocabulary: dict[str, int]) -> list[int]:
    letters = _byte_letters()
    return [vocabulary[letters[byte]] for byte in text.encode()]


def _tokenizer(vocabulary: dict[str, int], merges: list[list[str]], added: list[str]) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": len(vocabulary) + place, "content": piece, **plain, "special": piece in SPECIALS}
            for place, piece in enumerate(added)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "unk_token": None,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _config(context_tokens: int, size: int, end: int) -> dict[str, Any]:
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": HEAD_SIZE,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model: dict[str, Any] = {
        "type": "llama",
        "context_length": context_tokens,
        "vocab_size": size,
        "eos_token_id": [end],
        "pad_token_id": end,
        "decoder": decoder,
    }
    search = {"do_sample": False, "max_length": context_tokens, "top_k": 1, "past_present_share_buffer": True}
    return {"model": model, "search": search}


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), "utf-8")


if __name__ == "__main__":
    print(f"wrote {write_decoder(Path(sys.argv[1]))}")
