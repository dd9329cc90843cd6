"""What every reader of a written folder gives: the weights that its graph really uses, each once, and where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sparseport.weights.linear import DenseWeight, LowRankBranch, QuantizedWeight

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ReadBack:
    """One weight found in a graph.

    name          module name of a quantised layer, else the tensor's own name (`<module>.weight`)
    weight        the values; a quantised one has uint8 codes whatever the stored type was
    element_type  name of the stored type: `u4`, `i4`, `u8`, `i8`, `f16`, `f32`
    places        names of the operations that use it: linear layers, look-ups, and for small tensors any operation
    added         what the graph holds more than the checkpoint in every element (1 for Gemma's norms)
    """

    name: str
    weight: QuantizedWeight | DenseWeight
    element_type: str
    places: tuple[str, ...]
    added: int = 0


@dataclass(frozen=True)
class BranchBack:
    """One un-merged branch found beside the product of its module: values in the dtypes they are stored in."""

    module: str
    branch: LowRankBranch


@dataclass(frozen=True)
class SlotShape:
    """What a place for adapters takes.

    shape   [out, in] of its layer
    dtypes  of a and of b
    """

    shape: tuple[int, int]
    dtypes: tuple[str, str]


class GraphReader(Protocol):
    """A written graph, parsed from disk by code that did not write it."""

    graph_file: str
    """Name of the file with the graph, for messages."""

    data_file: str
    """Name of the file with the weights' bytes, for messages."""

    def weights(self, shapes: Shapes) -> Iterator[ReadBack]:
        """Yield every named weight that the graph uses, in graph order.

        Args:
            shapes: shape of every weight by module or tensor name, as certified; where a graph holds several layers in
                one tensor they tell the rows apart.

        Raises:
            VerificationError: a weight is stored or used in a way that is not known, or its parts do not fit.
        """
        ...

    def branches(self) -> Iterator[BranchBack]:
        """After `weights`: yield the un-merged branch of every module that has one.

        Raises:
            VerificationError: a branch is computed or used in a way that is not known.
        """
        ...

    def adapter(self, name: str) -> Iterator[BranchBack]:
        """After `weights`: yield the branches of an adapter's file beside the graph, as the runtime will use them.

        Raises:
            VerificationError: the file cannot be read, or the runtime would give a branch to another layer.
        """
        ...

    def unnamed_matrices(self, named: set[str]) -> list[str]:
        """Matrices that a linear layer or a look-up uses and that are not among the `named` ones; sorted."""
        ...

    def around(self) -> dict[str, Any]:
        """After `weights`: what can be said of the rest of the graph, to be compared with the certificate's `graph`.

        Raises:
            VerificationError: the graph is not one that its format allows.
        """
        ...

    def misplaced(self, module: str, places: tuple[str, ...], tied_head: bool) -> str | None:
        """The first of a weight's places that is not its own; None if all are, or if the graph's names do not tell.

        Args:
            module: the layer that the weight belongs to.
            places: where the graph uses it.
            tied_head: the weight is the embedding, and the head uses it too.
        """
        ...


def open_reader(target: str, folder: Path) -> GraphReader:
    """Parse the graph of a folder that was written for a target.

    Raises:
        VerificationError: the runtime's own parser cannot read it.
    """
    if target == "onnx":
        from sparseport.targets.onnx.readback import OnnxReader

        return OnnxReader.open(folder)
    from sparseport.targets.openvino.readback import OpenVinoReader

    return OpenVinoReader.open(folder)
