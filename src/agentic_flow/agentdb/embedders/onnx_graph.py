"""The ONNX graph of a BERT encoder with mean pooling, made from the names of its weights; the weights stay
in the model's safetensors file, which the graph points into.

Nothing but the standard library: a graph is a few hundred nodes, and ONNX a handful of protocol-buffer
messages. Batches hold texts of one length, so the graph needs no padding and no mask, and no text's vector
depends on its neighbours.

Sources: J. Devlin et al., "BERT" (arXiv 1810.04805); the ONNX IR (github.com/onnx/onnx, docs/IR.md and
onnx.proto); the safetensors format (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

INPUT = "input_ids"
OUTPUT = "sentence"

_IR_VERSION = 9
_OPSET = 20  # the first with Gelu
_FLOAT = 1
_INT64 = 7
_EXTERNAL = 1
_HEADER_MAX_BYTES = 1024 * 1024
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class BertShape:
    """The numbers that fix the graph: layers, hidden size, heads, and the layer norm's epsilon."""

    layers: int
    hidden: int
    heads: int
    epsilon: float


class Stored(NamedTuple):
    """Where a float32 tensor lies in its file."""

    shape: tuple[int, ...]
    offset: int
    size_bytes: int


def read_header(path: Path) -> dict[str, Stored]:
    """The float32 tensors of a safetensors file by name; their numbers are not read.

    Raises:
        ValueError: it is no safetensors file, or is cut short.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _HEADER_MAX_BYTES:
            raise ValueError(f"a header of {length} bytes")
        header: Any = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    found: dict[str, Stored] = {}
    size_bytes = path.stat().st_size
    for name, entry in cast(dict[str, Any], header).items():
        if name == "__metadata__":
            continue
        try:
            kind, shape = entry["dtype"], tuple(int(size) for size in entry["shape"])
            start, end = (int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"the tensor {name!r} is not described") from error
        if kind != "F32":
            continue
        if end - start != _FLOAT_BYTES * math.prod(shape) or 8 + length + end > size_bytes:
            raise ValueError(f"the tensor {name!r} does not fit the file")
        found[name] = Stored(shape, 8 + length + start, end - start)
    return found


def bert_graph(shape: BertShape, weights: Mapping[str, Stored], location: str) -> bytes:
    """A serialized ONNX model: token ids of shape (texts, tokens) in, one unit vector a text out.

    Args:
        shape: Of the encoder.
        weights: Tensors of the file, under the names that transformers' BertModel gives them.
        location: Name of the file, in the folder that the session is told.

    Raises:
        KeyError: a weight is missing.
    """
    graph = _Graph()
    used: set[str] = set()

    def weight(name: str) -> str:
        weights[name]  # a missing weight is found here, with its name
        used.add(name)
        return name

    def dense(x: str, name: str) -> str:
        return graph.add("Gemm", x, weight(f"{name}.weight"), weight(f"{name}.bias"), transB=1)

    def norm(x: str, name: str) -> str:
        return graph.add(
            "LayerNormalization",
            x, weight(f"{name}.weight"), weight(f"{name}.bias"),
            axis=-1, epsilon=shape.epsilon,
        )  # fmt: skip

    size = graph.add("Shape", INPUT)
    rows = graph.ints("rows", [-1, shape.hidden])
    split = graph.add("Concat", size, graph.ints("heads", [shape.heads, shape.hidden // shape.heads]), axis=0)
    tokens = graph.add("Shape", INPUT, start=1, end=2)
    zero = graph.ints("zero", [0])
    positions = graph.add("Slice", weight("embeddings.position_embeddings.weight"), zero, tokens)
    # One segment: the first of the two rows of token types belongs to every token.
    kind = graph.add("Gather", weight("embeddings.token_type_embeddings.weight"), zero)
    x = graph.add("Gather", weight("embeddings.word_embeddings.weight"), INPUT)
    x = graph.add("Add", graph.add("Add", x, positions), kind)
    x = graph.add("Reshape", norm(x, "embeddings.LayerNorm"), rows)
    scale = graph.floats("scale", [1 / math.sqrt(shape.hidden / shape.heads)])
    for layer in range(shape.layers):
        at = f"encoder.layer.{layer}"

        def head(x: str, name: str, order: Sequence[int], at: str = at) -> str:
            split_up = graph.add("Reshape", dense(x, f"{at}.attention.self.{name}"), split)
            return graph.add("Transpose", split_up, perm=order)

        scores = graph.add("MatMul", head(x, "query", (0, 2, 1, 3)), head(x, "key", (0, 2, 3, 1)))
        shares = graph.add("Softmax", graph.add("Mul", scores, scale), axis=-1)
        mixed = graph.add("MatMul", shares, head(x, "value", (0, 2, 1, 3)))
        mixed = graph.add("Reshape", graph.add("Transpose", mixed, perm=(0, 2, 1, 3)), rows)
        mixed = dense(mixed, f"{at}.attention.output.dense")
        x = norm(graph.add("Add", x, mixed), f"{at}.attention.output.LayerNorm")
        wide = graph.add("Gelu", dense(x, f"{at}.intermediate.dense"))
        x = norm(graph.add("Add", x, dense(wide, f"{at}.output.dense")), f"{at}.output.LayerNorm")
    whole = graph.add("Concat", size, graph.ints("hidden", [shape.hidden]), axis=0)
    mean = graph.add("ReduceMean", graph.add("Reshape", x, whole), graph.ints("one", [1]), keepdims=0)
    graph.add("LpNormalization", mean, axis=-1, p=2, output=OUTPUT)
    stored = [_external(name, weights[name], location) for name in sorted(used)]
    return graph.model(stored, shape.hidden)


class _Graph:
    """Nodes and small constants, in order."""

    def __init__(self) -> None:
        self._nodes: list[bytes] = []
        self._constants: list[bytes] = []

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Append a node; the name of its one output."""
        output = output or f"{operator}_{len(self._nodes)}"
        self._nodes.append(
            _fields(
                *((1, name) for name in inputs),
                (2, output),
                (4, operator),
                *((5, _attribute(name, value)) for name, value in attributes.items()),
            )
        )
        return output

    def ints(self, name: str, values: Sequence[int]) -> str:
        """A one-dimensional int64 constant."""
        return self._constant(name, _INT64, len(values), struct.pack(f"<{len(values)}q", *values))

    def floats(self, name: str, values: Sequence[float]) -> str:
        """A one-dimensional float32 constant."""
        return self._constant(name, _FLOAT, len(values), struct.pack(f"<{len(values)}f", *values))

    def _constant(self, name: str, kind: int, length: int, raw: bytes) -> str:
        self._constants.append(_fields((1, length), (2, kind), (8, name), (9, raw)))
        return name

    def model(self, stored: Iterable[bytes], hidden: int) -> bytes:
        """The serialized ModelProto."""
        graph = _fields(
            *((1, node) for node in self._nodes),
            (2, "bert"),
            *((5, tensor) for tensor in (*self._constants, *stored)),
            (11, _value_info(INPUT, _INT64, ["texts", "tokens"])),
            (12, _value_info(OUTPUT, _FLOAT, ["texts", hidden])),
        )
        return _fields((1, _IR_VERSION), (7, graph), (8, _fields((1, ""), (2, _OPSET))))


def _external(name: str, stored: Stored, location: str) -> bytes:
    """A TensorProto whose numbers are in another file."""
    where = {"location": location, "offset": str(stored.offset), "length": str(stored.size_bytes)}
    return _fields(
        *((1, size) for size in stored.shape),
        (2, _FLOAT),
        (8, name),
        *((13, _fields((1, key), (2, value))) for key, value in where.items()),
        (14, _EXTERNAL),
    )


def _value_info(name: str, kind: int, shape: Sequence[int | str]) -> bytes:
    sizes = (_fields((1 if isinstance(size, int) else 2, size)) for size in shape)
    tensor = _fields((1, kind), (2, _fields(*((1, size) for size in sizes))))
    return _fields((1, name), (2, _fields((1, tensor))))


def _attribute(name: str, value: int | float | Sequence[int]) -> bytes:
    if isinstance(value, int):
        return _fields((1, name), (3, value), (20, 2))
    if isinstance(value, float):
        return _fields((1, name), (2, value), (20, 1))
    return _fields((1, name), *((8, each) for each in value), (20, 7))


def _fields(*fields: tuple[int, int | float | str | bytes]) -> bytes:
    """A protocol-buffer message of these (number, value) pairs.

    Source: protobuf.dev/programming-guides/encoding.
    """
    parts: list[bytes] = []
    for number, value in fields:
        if isinstance(value, int):
            parts += _varint(number << 3), _varint(value & 0xFFFF_FFFF_FFFF_FFFF)
        elif isinstance(value, float):
            parts += _varint(number << 3 | 5), struct.pack("<f", value)
        else:
            raw = value.encode() if isinstance(value, str) else value
            parts += _varint(number << 3 | 2), _varint(len(raw)), raw
    return b"".join(parts)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
