"""An exported model that has read some tokens and goes on from there: one interface over the runtimes.

A session is made once and read from the start as often as needed; compiling is what takes time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


class Session(Protocol):
    """A model and the KV cache of what it has read so far."""

    def reset(self) -> None:
        """Forget everything that was read."""

    def read(self, tokens: Sequence[int]) -> F32:
        """Read on; logits float32 [tokens, vocabulary] of the positions read."""

    def fork(self, rows: Sequence[Sequence[int]]) -> list[F32]:
        """Logits float32 [tokens, vocabulary] of each row, as if it alone came after what was read.

        Afterwards the session has to be reset.
        """


class OpenVinoSession:
    """A stateful IR: the KV cache is state of the model, and `beam_idx` says which row of it goes on in which."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._inputs = {name for port in self._request.model_inputs for name in port.get_names()}
        self._seen = 0

    def reset(self) -> None:
        """See `Session`."""
        self._request.reset_state()
        self._seen = 0

    def read(self, tokens: Sequence[int]) -> F32:
        """See `Session`."""
        logits: F32 = self._infer(np.array([tokens], np.int64))[0]
        return logits

    def fork(self, rows: Sequence[Sequence[int]]) -> list[F32]:
        """See `Session`: the rows go through the model together.

        Shorter rows are filled up at their end, where causal attention keeps the filling from what counts.
        """
        width = max(map(len, rows))
        ids = np.zeros((len(rows), width), np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
        logits = self._infer(ids)
        return [logits[index, : len(row)] for index, row in enumerate(rows)]

    def _infer(self, ids: npt.NDArray[np.int64]) -> F32:
        self._seen += ids.shape[1]
        self._request.infer(feeds(ids, self._seen, self._inputs))
        return np.array(self._request.get_tensor("logits").data, np.float32)


class OnnxSession:
    """A graph whose KV cache goes in as `past_key_values.*` and comes out as `present.*`.

    session  onnxruntime.InferenceSession
    empty    the cache of no tokens
    active   an adapter and the options of a run that switch it on, or None
    """

    def __init__(self, session: Any, empty: dict[str, F32], active: tuple[Any, Any] | None = None) -> None:
        self._session = session
        # Held as long as the session: ONNX Runtime keeps no adapter alive, and goes on without one that is gone.
        self._adapter: Any = None if active is None else active[0]
        self._options: Any = None if active is None else active[1]
        self._inputs = {port.name for port in session.get_inputs()}
        self._outputs = [port.name for port in session.get_outputs()]
        self._empty = empty
        self.reset()

    def reset(self) -> None:
        """See `Session`."""
        self._cache, self._seen = dict(self._empty), 0

    def read(self, tokens: Sequence[int]) -> F32:
        """See `Session`."""
        logits, self._cache = self._run(tokens)
        self._seen += len(tokens)
        return logits

    def fork(self, rows: Sequence[Sequence[int]]) -> list[F32]:
        """See `Session`: one row after the other.

        ONNX Runtime's GroupQueryAttention reads several tokens after a cache in one row only.
        """
        return [self._run(row)[0] for row in rows]

    def _run(self, tokens: Sequence[int]) -> tuple[F32, dict[str, F32]]:
        feed = feeds(np.array([tokens], np.int64), self._seen + len(tokens), self._inputs)
        result = dict(zip(self._outputs, self._session.run(None, {**feed, **self._cache}, self._options), strict=True))
        logits = np.array(result.pop("logits")[0], np.float32)
        return logits, {name.replace("present", "past_key_values"): value for name, value in result.items()}


def feeds(ids: npt.NDArray[np.int64], seen: int, inputs: set[str]) -> dict[str, npt.NDArray[Any]]:
    """What a graph is fed to read tokens, as far as it has such inputs.

    Args:
        ids: int64 [rows, tokens], the same number in each row.
        seen: tokens that each row will have read afterwards.
        inputs: names of the graph's inputs.
    """
    rows, tokens = ids.shape
    feed: dict[str, npt.NDArray[Any]] = {
        "input_ids": ids,
        "attention_mask": np.ones((rows, seen), np.int64),
        "position_ids": np.tile(np.arange(seen - tokens, seen, dtype=np.int64), (rows, 1)),
        "beam_idx": np.zeros(rows, np.int32),  # every row goes on from the first row of what was read
    }
    return {name: value for name, value in feed.items() if name in inputs}
