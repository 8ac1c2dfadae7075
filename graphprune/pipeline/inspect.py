"""Looking at a model's node groups without changing it: no weights are read unless they are to be certified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from graphprune.certify.certificate import Certificate, certify
from graphprune.coupling.groups import NodeGroups, node_groups
from graphprune.errors import NothingPrunableError, SourceError
from graphprune.files import write_json
from graphprune.pipeline.onnx_arrays import example_arrays
from graphprune.report.group_document import Document, group_document
from graphprune.report.group_files import write_groups
from graphprune.source.location import ModelSource, find_model
from graphprune.source.model import example_inputs, load_model, model_class
from graphprune.trace.model import trace


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        document: The groups, as ``groups.json`` holds them.
        certificate: The proof that they are right, if it was asked for.
    """

    document: Document
    certificate: Certificate | None

    def raise_if_nothing_is_prunable(self) -> None:
        """Raise if no group may lose a unit.

        Raises:
            NothingPrunableError: With the reasons.
        """
        groups = self.document["groups"]
        if not any(row["prunable"] for row in groups):
            raise NothingPrunableError.because((row["name"], row["reason"]) for row in groups)


def inspect(reference: str, folder: Path, *, certified: bool = False) -> Inspection:
    """Find a model's node groups and write the files that show them.

    Args:
        reference: A transformers folder, a hub id, ``demo``, a folder or a .json file with a configuration alone, or
            a .onnx file.
        folder: For ``groups.json``, ``groups.html``, ``groups.svg`` and ``groups.graphml``; created if need be.
        certified: Whether to prove the groups on the model's weights, and to write ``certificate.json``.

    Raises:
        SourceError: If there is no such model, or it has no weights to certify with.
        TraceError: If it cannot be traced.
        VerificationError: If the certificate fails; the files are written before.
    """
    path = Path(reference).expanduser()
    if path.suffix == ".onnx":
        name, model, groups = path.name, None, _groups_of_onnx(path)
        examples = example_arrays(groups.graph, groups.graph.program, seed=0) if certified else {}
    else:
        name, model = _with_weights(reference) if certified else _without_weights(reference, path)
        examples = example_inputs(model)
        groups = node_groups(trace(model, examples, dynamic=False))
    document = group_document(groups, name)
    write_groups(document, folder)
    return Inspection(document, _certified(model, groups, examples, folder) if certified else None)


def _groups_of_onnx(path: Path) -> NodeGroups:
    if not path.is_file():
        raise SourceError(f"there is no file '{path}'", "give the path of a .onnx file")
    return node_groups(trace(path))


def _with_weights(reference: str) -> tuple[str, nn.Module]:
    source = find_model(reference)
    return source.name, load_model(source, torch.float32, model_class(_opened(source)))


def _without_weights(reference: str, path: Path) -> tuple[str, nn.Module]:
    """Build the model on the meta device, where weights have shapes and no memory."""
    source = _configuration(reference, path)
    config = _opened(source)
    try:
        with torch.device("meta"):
            kind = model_class(config)
            model = kind.from_config(config) if kind is AutoModelForCausalLM else kind(config)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise SourceError(
            f"no model can be built from {source.location}: {_first_line(error)}",
            "give the configuration of a model that stock transformers knows",
        ) from error
    return source.name, model.eval()


def _configuration(reference: str, path: Path) -> ModelSource:
    """Return where the configuration is: unlike a model to be run, it may stand without weights."""
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SourceError(f"{path} has no config.json", "give a folder that save_pretrained wrote")
        return ModelSource(path.resolve().name, str(path.resolve()), True)
    if path.suffix == ".json":
        if not path.is_file():
            raise SourceError(f"there is no file '{path}'", "give a config.json, or the folder that holds it")
        named = path.resolve().parent.name if path.name == "config.json" else path.stem
        return ModelSource(named, str(path.resolve()), True)
    return find_model(reference)


def _opened(source: ModelSource) -> Any:
    try:
        return AutoConfig.from_pretrained(source.location, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"cannot open {source.location}: {_first_line(error)}",
            "check that it is the configuration of a model that stock transformers knows"
            if source.is_local
            else "without a network, give a local folder instead",
        ) from error


def _certified(
    model: nn.Module | None, groups: NodeGroups, examples: Mapping[str, Any], folder: Path
) -> Certificate:
    certificate = certify(model, groups, examples)
    write_json(folder / "certificate.json", certificate.row())
    certificate.raise_if_failed()
    return certificate


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
