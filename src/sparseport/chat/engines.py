"""The runtimes that answer: OpenVINO GenAI for OpenVINO folders, onnxruntime-genai for ONNX folders.

Both run a folder as applications do: with its own `generation_config.json` or `genai_config.json`, and with their own
tokenizers and template engines.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.chat.conversation import Answer, Engine, Finish, Message, OnText, Sampling
from sparseport.chat.folder import ChatFolder
from sparseport.checkpoints.json_files import read_json
from sparseport.errors import EnvironmentProblem
from sparseport.extras import missing

# Room for tokens that a generator of onnxruntime-genai is made with, in steps: its KV cache is allocated at once.
_ROOM = 1024


def load_engine(folder: ChatFolder) -> Engine:
    """The folder in its runtime, on the CPU.

    Raises:
        EnvironmentProblem: the runtime is not installed, or cannot load the folder.
    """
    make = OpenVinoEngine if folder.target == "openvino" else OnnxEngine
    try:
        return make(folder.path, folder.adapter)
    except ModuleNotFoundError as error:
        raise missing(error.name, folder.target) from error
    except Exception as error:
        raise EnvironmentProblem(
            f"the runtime cannot load the folder: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            where=folder.path,
            fix="`--verify` says whether the folder is whole, `sparseport doctor` whether the runtime is",
        ) from error


class _Written:
    """What a model has written so far: texts, moments of tokens, and how it came to an end.

    Runtimes call this in the middle of their own code, so what `on_text` raises is kept and raised by `answer`.
    """

    def __init__(self, prompt_tokens: int, ends: set[int], on_text: OnText) -> None:
        self.moments: list[float] = []
        self.over = False
        self._started = time.perf_counter()
        self._prompt_tokens, self._ends, self._on_text = prompt_tokens, ends, on_text
        self._pieces: list[str] = []
        self._finish: Finish = "length"
        self._error: BaseException | None = None

    def token(self, token: int) -> bool:
        """Count a token; returns whether it has a text, as an end token has not."""
        self.moments.append(time.perf_counter())
        if token in self._ends:
            self.over, self._finish = True, "end"
        return not self.over

    def text(self, piece: str) -> bool:
        """Hand a text on; returns whether to go on."""
        if piece and self._error is None:
            self._pieces.append(piece)
            try:
                goes_on = self._on_text(piece)
            except BaseException as error:
                goes_on, self._error = False, error
            if not goes_on and not self.over:
                self.over, self._finish = True, "stopped"
        return not self.over

    def answer(self, sampling: Sampling) -> Answer:
        """The whole of it.

        Raises:
            BaseException: what `on_text` raised.
        """
        if self._error is not None:
            raise self._error
        count = len(self.moments)
        # A runtime may have ended it for a reason of its own, such as a text in the folder's configuration.
        finish = "end" if self._finish == "length" and count < sampling.max_tokens else self._finish
        return Answer(
            text="".join(self._pieces),
            prompt_tokens=self._prompt_tokens,
            tokens=count,
            first_token=self.moments[0] - self._started if count else 0.0,
            per_second=(count - 1) / (self.moments[-1] - self.moments[0]) if count > 1 else None,
            finish=finish,
        )


def _token_streamer(genai: Any, tokenizer: Any, written: _Written) -> Any:
    """What OpenVINO GenAI gives each token to: counts it, and turns it into text unless it is an end token.

    GenAI's own text streamer would write end tokens as text where the tokenizer does not call them special.
    """
    status = genai.StreamingStatus

    class TokenStreamer(genai.StreamerBase):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._texts = genai.TextStreamer(tokenizer, lambda piece: not written.text(piece))

        def write(self, token: int | Sequence[int]) -> Any:
            for one in token if isinstance(token, Sequence) else [token]:
                if written.token(int(one)):
                    self._texts.write(int(one))
            return status.STOP if written.over else status.RUNNING

        def end(self) -> None:
            self._texts.end()

    return TokenStreamer()


class OpenVinoEngine:
    """An OpenVINO folder in `openvino_genai.LLMPipeline`, which finds what it has read before in its cache.

    That cache knows tokens, not adapters (GenAI 2026.4). One process has one adapter here, so it is right.
    """

    def __init__(self, folder: Path, adapter: str | None) -> None:
        import openvino
        import openvino_genai

        self._openvino, self._genai = openvino, openvino_genai
        options: dict[str, Any] = {}
        if adapter is not None:
            options["adapters"] = openvino_genai.AdapterConfig(openvino_genai.Adapter(str(folder / adapter)))
        self._pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **options)
        self._tokenizer = self._pipeline.get_tokenizer()
        self.has_template = bool(self._tokenizer.chat_template)

    def fill_template(self, messages: Sequence[Message]) -> str:
        """See `Engine`."""
        return str(self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True))

    def encode(self, text: str, special_tokens: bool) -> list[int]:
        """See `Engine`."""
        encoded = self._tokenizer.encode(text, add_special_tokens=special_tokens)
        return [int(token) for token in encoded.input_ids.data[0]]

    def generate(self, tokens: list[int], sampling: Sampling, on_text: OnText) -> Answer:
        """See `Engine`."""
        config = self._pipeline.get_generation_config()
        config.max_new_tokens, config.num_beams = sampling.max_tokens, 1
        config.do_sample = sampling.temperature is not None
        if sampling.temperature is not None:
            config.temperature, config.rng_seed = sampling.temperature, sampling.seed
        ids = np.array([tokens], np.int64)
        inputs = self._genai.TokenizedInputs(self._openvino.Tensor(ids), self._openvino.Tensor(np.ones_like(ids)))
        written = _Written(len(tokens), {config.eos_token_id, *config.stop_token_ids}, on_text)
        streamer = _token_streamer(self._genai, self._tokenizer, written)
        self._pipeline.generate(inputs, config, streamer)
        return written.answer(sampling)

    def reset(self) -> None:
        """See `Engine`: the pipeline takes its seed anew with every answer."""


class OnnxEngine:
    """An ONNX folder in onnxruntime-genai; the generator goes on from what it has read before."""

    def __init__(self, folder: Path, adapter: str | None) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(folder))
        self._tokenizer = onnxruntime_genai.Tokenizer(self._model)
        self._adapters: Any = None
        if adapter is not None:
            self._adapters = onnxruntime_genai.Adapters(self._model)
            self._adapters.load(str(folder / adapter), "chosen")
        self._generator: Any = None
        self._room = 0
        self._sampling: tuple[float | None, int] | None = None
        config = read_json(folder / "genai_config.json", what="genai_config.json")["model"]
        ends = config.get("eos_token_id")
        self._ends = set(ends) if isinstance(ends, list) else {ends} - {None}
        self._longest = config.get("context_length")
        self.has_template = _has_template(folder)

    def fill_template(self, messages: Sequence[Message]) -> str:
        """See `Engine`."""
        return str(self._tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True))

    def encode(self, text: str, special_tokens: bool) -> list[int]:
        """See `Engine`."""
        self._tokenizer.update_options(add_special_tokens="true" if special_tokens else "false")
        return [int(token) for token in self._tokenizer.encode(text)]

    def generate(self, tokens: list[int], sampling: Sampling, on_text: OnText) -> Answer:
        """See `Engine`."""
        written = _Written(len(tokens), self._ends, on_text)
        generator = self._read(tokens, sampling)
        stream = self._tokenizer.create_stream()
        while len(written.moments) < sampling.max_tokens and not written.over:
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if written.token(token):
                written.text(stream.decode(token))
        return written.answer(sampling)

    def reset(self) -> None:
        """See `Engine`."""
        self._generator = None

    def _read(self, tokens: list[int], sampling: Sampling) -> Any:
        """A generator that has read `tokens`: the last one, where it began with the same ones, or a new one."""
        chosen = (sampling.temperature, sampling.seed)
        needed = len(tokens) + sampling.max_tokens
        if self._generator is None or needed > self._room or chosen != self._sampling:
            rounded, longest = -(-needed // _ROOM) * _ROOM, self._longest
            self._room, self._sampling = rounded if longest is None else min(rounded, max(longest, needed)), chosen
            self._generator = self._fresh(sampling)
            self._generator.append_tokens(np.array(tokens, np.int32))
            return self._generator
        seen = [int(token) for token in self._generator.get_sequence(0)]
        # One token at least has to be read: the next one is chosen from what the last one gives. And the last one that
        # was written has not been read: onnxruntime-genai 0.18 leaves it out when it goes on.
        most = min(len(seen), len(tokens)) - 1
        same = next((at for at in range(most) if seen[at] != tokens[at]), most)
        self._generator.rewind_to(same)
        self._generator.append_tokens(np.array(tokens[same:], np.int32))
        return self._generator

    def _fresh(self, sampling: Sampling) -> Any:
        parameters = self._genai.GeneratorParams(self._model)
        options: dict[str, Any] = {"max_length": self._room, "num_beams": 1}
        options["do_sample"] = sampling.temperature is not None
        if sampling.temperature is not None:
            options |= {"temperature": sampling.temperature, "random_seed": sampling.seed}
        parameters.set_search_options(**options)
        generator = self._genai.Generator(self._model, parameters)
        if self._adapters is not None:
            generator.set_active_adapter(self._adapters, "chosen")
        return generator


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(read_json(config, what="tokenizer_config.json").get("chat_template"))
