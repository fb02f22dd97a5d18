"""The process that runs one local model; `onnx_process` starts it and talks to it.

    python -m agentic_flow.gateway.onnx_worker FOLDER [THREADS]

onnxruntime-genai holds Python's global lock while it loads, reads a prompt or computes a token (measured with
0.18: a prompt of 1,000 tokens stops every other thread for as long as it takes), and what it loads is native
code fed with files that a stranger made. In a process of its own neither reaches the gateway, and its memory
goes back to the system when the model is let go.

Lines of JSON. In: `generate`, `more` (credit for so many more lines of text), `cancel`; the end of the input
ends the process. Out: `loaded` or `failed`, then for each generation `started`, texts, and one `end` or
`error`. Generations take turns, one token each.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import Any, BinaryIO

Json = dict[str, Any]


class Refused(Exception):
    """A generation that cannot be begun: the kind of refusal and its facts."""

    def __init__(self, kind: str, message: str, **facts: int) -> None:
        super().__init__(message)
        self.kind = kind
        self.facts = facts


class Generation:
    """One answer under way. The prompt is read by the first step."""

    def __init__(self, og: Any, model: Any, tokenizer: Any, context_tokens: int, command: Json) -> None:
        try:
            prompt: str = tokenizer.apply_chat_template(
                command["messages"],
                template_str=command["template"],
                tools=command["tools"],
                add_generation_prompt=True,
            )
            self._prompt = tokenizer.encode(prompt)
        except RuntimeError as error:
            raise Refused("template", _line(error)) from error
        self.input_tokens = len(self._prompt)
        if self.input_tokens >= context_tokens:
            raise Refused("too_long", "", input_tokens=self.input_tokens, context_tokens=context_tokens)
        self._tokens_max = min(command["output_tokens_max"], context_tokens - self.input_tokens)
        options = og.GeneratorParams(model)
        options.set_search_options(
            **command["search"], max_length=self.input_tokens + self._tokens_max, num_beams=1, batch_size=1
        )
        if command["schema"] is not None:
            try:
                options.set_guidance("json_schema", command["schema"])
                self._generator = og.Generator(model, options)
            except RuntimeError as error:
                raise Refused("schema", _line(error)) from error
        else:
            self._generator = og.Generator(model, options)
        self._stream = tokenizer.create_stream()
        self._ends = {int(token) for token in tokenizer.eos_token_ids}
        self.credit: int = command["credit"]
        self.tokens = 0

    def step(self) -> tuple[str, str | None]:
        """One token: its text (often empty, within a character), and why this was the last one."""
        if self.tokens == 0:
            self._generator.append_tokens(self._prompt)
        self._generator.generate_next_token()
        token = int(self._generator.get_next_tokens()[0])
        self.tokens += 1
        if token in self._ends:
            return "", "end"
        text: str = self._stream.decode(token)
        return text, "length" if self.tokens >= self._tokens_max else None


class Worker:
    """The loaded model and its generations."""

    def __init__(self, og: Any, folder: str, threads: int | None, output: BinaryIO) -> None:
        config = og.Config(folder)
        if threads is not None:
            session = {"session_options": {"intra_op_num_threads": threads}}
            config.overlay(json.dumps({"model": {"decoder": session}}))
        self._og = og
        self._output = output
        self._model = og.Model(config)
        self._tokenizer = og.Tokenizer(self._model)
        # Marks of tool calls are special tokens in some models; they are read as text.
        self._raw_tokenizer = og.Tokenizer(self._model)
        self._raw_tokenizer.update_options(skip_special_tokens="false")
        self._generations: dict[int, Generation] = {}

    def run(self, commands: queue.SimpleQueue[Json | None]) -> None:
        """Serve until the input ends."""
        while True:
            ready = [key for key, generation in self._generations.items() if generation.credit > 0]
            while not ready or not commands.empty():
                command = commands.get()
                if command is None:
                    return
                self._obey(command)
                ready = [key for key, generation in self._generations.items() if generation.credit > 0]
            for key in ready:
                self._step(key)

    def _obey(self, command: Json) -> None:
        key = command["id"]
        match command["op"]:
            case "generate":
                self._begin(key, command)
            case "more" if key in self._generations:
                self._generations[key].credit += command["lines"]
            case "cancel" if key in self._generations:
                self._end(key, "cancelled")
            case _:
                pass  # about a generation that has ended meanwhile

    def _begin(self, key: int, command: Json) -> None:
        tokenizer = self._raw_tokenizer if command["tools"] else self._tokenizer
        try:
            generation = Generation(self._og, self._model, tokenizer, command["context_tokens"], command)
        except Refused as refused:
            self._say(id=key, event="error", kind=refused.kind, message=str(refused), **refused.facts)
        except (RuntimeError, MemoryError) as error:
            self._say(id=key, event="error", kind=_kind(error, "broken"), message=_line(error))
        else:
            self._generations[key] = generation
            self._say(id=key, event="started", input_tokens=generation.input_tokens)

    def _step(self, key: int) -> None:
        generation = self._generations[key]
        try:
            text, reason = generation.step()
        except (RuntimeError, MemoryError) as error:
            del self._generations[key]
            kind = _kind(error, "failed" if generation.tokens else "broken")
            self._say(id=key, event="error", kind=kind, message=_line(error))
            return
        if text:
            generation.credit -= 1
            self._say(id=key, event="text", text=text, tokens=generation.tokens)
        if reason:
            self._end(key, reason)

    def _end(self, key: int, reason: str) -> None:
        tokens = self._generations.pop(key).tokens
        self._say(id=key, event="end", reason=reason, tokens=tokens)

    def _say(self, **event: object) -> None:
        say(self._output, event)


def say(output: BinaryIO, event: Json) -> None:
    """Write one line."""
    output.write(json.dumps(event).encode() + b"\n")


def main(words: list[str]) -> int:
    """Load the model and serve; 1 when it could not be loaded, which a `failed` line explains."""
    # The library may print; only our lines may reach the reader.
    output = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    commands: queue.SimpleQueue[Json | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(commands,), daemon=True).start()
    try:
        import onnxruntime_genai  # pyright: ignore[reportMissingTypeStubs]

        og: Any = onnxruntime_genai
        if hasattr(og, "disable_telemetry_events"):
            og.disable_telemetry_events()
    except ImportError as error:
        say(output, {"event": "failed", "kind": "missing", "message": _line(error)})
        return 1
    try:
        worker = Worker(og, words[0], int(words[1]) if len(words) > 1 else None, output)
    except Exception as error:  # noqa: BLE001 - whatever it is, the reader is to hear it
        say(output, {"event": "failed", "kind": _kind(error, "broken"), "message": _line(error)})
        return 1
    say(output, {"event": "loaded"})
    worker.run(commands)
    return 0


def _read(commands: queue.SimpleQueue[Json | None]) -> None:
    for line in sys.stdin.buffer:
        commands.put(json.loads(line))
    commands.put(None)


def _kind(error: BaseException, otherwise: str) -> str:
    # All errors of the library are RuntimeErrors; only their words tell them apart.
    said = str(error).lower()
    signs = ("bad_alloc", "bad allocation", "out of memory", "failed to allocate")
    return "memory" if isinstance(error, MemoryError) or any(sign in said for sign in signs) else otherwise


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    # The library's threads need not be waited for.
    os._exit(code)
