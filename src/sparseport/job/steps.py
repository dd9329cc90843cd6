"""Steps of a job: each writes a folder that the next reads, and is not repeated while its settings stay the same."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseport import __version__
from sparseport.checkpoints.paths import file_sha256
from sparseport.errors import OutputExists
from sparseport.progress import Progress
from sparseport.publish import TEMP_PREFIX, staged_output

# The file by which a step's folder is known as a job's own; an exported folder is known by its certificate.
MARKER = "sparseport-made.json"


@dataclass
class Steps:
    """Runs steps once: a step is done when its folder is there and was made by the same chain of settings.

    work_dir  folder of all steps' folders
    markers   name of a step's folder -> the file by which it is known as one that a job made
    progress  where to report
    given     what decides the first step beside its settings: digests of files that came from outside
    seconds   step -> time that it took in this run
    """

    work_dir: Path
    markers: dict[str, str]
    progress: Progress
    given: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    _chain: str = __version__
    _broken: bool = False

    def __post_init__(self) -> None:
        self._chain += self.given

    def require_own(self) -> None:
        """Refuse to start in a folder where a step would have to replace something that no job made.

        Raises:
            OutputExists: names what stands in the way.
        """
        fix = "choose another --work-dir, or move it away"
        for name, marker in self.markers.items():
            target = self.work_dir / name
            if target.is_dir() and ((target / marker).is_file() or not any(target.iterdir())):
                continue
            if target.exists() or target.is_symlink():
                raise OutputExists(
                    "this was not made by a job", where=target, expected=f"a folder with {marker}", fix=fix
                )
        if self._file.exists() and self._read() is None:
            raise OutputExists("this was not written by a job", where=self._file, fix=fix)

    def folder(self, name: str, settings: list[Any], make: Callable[[Path], None], staged: bool = True) -> Path:
        """Return the step's folder, making it if it is missing or was made from other settings.

        Args:
            name: of the step and its folder.
            settings: every recipe section or plain value that decides what the step makes, besides earlier steps.
            make: fills the folder that it is given.
            staged: whether the folder is to be replaced here, by a marked one; if not, `make` sees to that.
        """
        target = self.work_dir / name
        if self._is_done(name, settings) and (target / self.markers[name]).is_file():
            self.progress.note(f"{name}: kept from an earlier run")
            return target
        started = time.monotonic()
        if staged:
            with staged_output(
                target, overwrite=True, ours=lambda folder: (folder / self.markers[name]).is_file()
            ) as stage:
                make(stage)
                facts = {"made_by": f"sparseport {__version__}", "step": name}
                (stage / self.markers[name]).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        else:
            make(target)
        self._finish(name, {}, started)
        return target

    def values(self, name: str, settings: list[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the step's results, from the last run if nothing before it changed."""
        if self._is_done(name, settings):
            self.progress.note(f"{name}: kept from an earlier run")
            return dict((self._read() or {})[name]["result"])
        started = time.monotonic()
        result = make()
        self._finish(name, result, started)
        return result

    def _is_done(self, name: str, settings: list[Any]) -> bool:
        from pydantic import BaseModel  # not at the top: `--help` works without it

        plain = [item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in settings]
        plain = [_by_content(item) for item in plain]
        text = self._chain + name + json.dumps(plain, sort_keys=True)
        self._chain = hashlib.sha256(text.encode("utf-8")).hexdigest()
        return not self._broken and (self._read() or {}).get(name, {}).get("chain") == self._chain

    def _finish(self, name: str, result: dict[str, Any], started: float) -> None:
        self._broken = True  # what follows was made from the old folder
        self.seconds[name] = round(time.monotonic() - started, 1)
        state = {**(self._read() or {}), name: {"chain": self._chain, "result": result}}
        self.work_dir.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_name(TEMP_PREFIX + self._file.name)
        partial.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        partial.replace(self._file)

    def _read(self) -> dict[str, dict[str, Any]] | None:
        """Per finished step its chain and result; None if there is no record of ours."""
        try:
            state = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        ours = isinstance(state, dict) and all(isinstance(step, dict) and "chain" in step for step in state.values())
        return state if ours else None

    @property
    def _file(self) -> Path:
        return self.work_dir / "state.json"


def _by_content(value: Any) -> Any:
    """Settings in which files are known by what they hold: `sizes.json` that was edited is another setting."""
    if isinstance(value, dict):
        return {key: _by_content(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_by_content(item) for item in value]
    if not isinstance(value, str):
        return value
    path = Path(value)
    if path.is_file():
        return {"sha256": file_sha256(path)}
    module, colon, _ = value.partition(":")
    if colon and re.fullmatch(r"\w+(\.\w+)*", module):  # a function of the user's, `package.module:function`
        with contextlib.suppress(ImportError, ValueError):
            found = importlib.util.find_spec(module)
            if found is not None and found.origin is not None and Path(found.origin).is_file():
                return {"function": value, "sha256": file_sha256(Path(found.origin))}
    return value


def task_facts(task: str, data: Path | None = None) -> dict[str, str]:
    """What names a task's content: its name, and the digests of its files if it is not one of the package's own."""
    path = Path(task)
    if path.is_file():
        return {"task": path.name, "sha256": file_sha256(path)}
    if data is None:
        return {"task": task}
    files = sorted(path for path in data.rglob("*.jsonl") if path.is_file())
    return {"task": task, "sha256": hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()}


def hide_library_bars() -> None:
    """transformers shows a bar for every file it reads; ours are about the work."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
