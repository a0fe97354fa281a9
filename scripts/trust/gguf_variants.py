"""Makes variants of a GGUF model for measurements: SOURCE FOLDER. Runs under the Python that has `gguf` and `numpy`.

f16.gguf: the weights as they are, in 16 bits. q8_0.gguf, q4_0.gguf: quantized anew from these. pruned.gguf: without some of the
layers, which stands for a smaller model of the same family.
"""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import QuantError, dequantize, quantize

PRUNED_LAYERS = (9, 14, 20)
VARIANTS = {
    "f16": (GGMLQuantizationType.F16, ()),
    "q8_0": (GGMLQuantizationType.Q8_0, ()),
    "q4_0": (GGMLQuantizationType.Q4_0, ()),
    "pruned": (GGMLQuantizationType.F16, PRUNED_LAYERS),
}
FILE_TYPES = {GGMLQuantizationType.F16: 1, GGMLQuantizationType.Q8_0: 7, GGMLQuantizationType.Q4_0: 2}
_BLOCK = re.compile(r"blk\.(\d+)\.(.*)")


def write_variant(reader: Any, target: Path, kind: Any, without: tuple[int, ...]) -> None:
    """Writes one variant."""
    architecture = reader.get_field("general.architecture").contents()
    writer = GGUFWriter(str(target), architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = field.contents()
        if field.name == "general.file_type":
            value = FILE_TYPES[kind]
        elif field.name == f"{architecture}.block_count":
            value -= len(without)
        item = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=item)
    for tensor in reader.tensors:
        name = tensor.name
        if block := _BLOCK.fullmatch(name):
            layer = int(block[1])
            if layer in without:
                continue
            name = f"blk.{layer - sum(gone < layer for gone in without)}.{block[2]}"
        weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if len(tensor.shape) == 1:
            writer.add_tensor(name, weights)
        else:
            _add_matrix(writer, name, weights, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_matrix(writer: Any, name: str, weights: Any, kind: Any) -> None:
    """Adds a matrix in this type; in 16 bits if its rows do not fit the type's blocks."""
    if kind != GGMLQuantizationType.F16:
        try:
            writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)
        except QuantError:
            kind = GGMLQuantizationType.F16
    if kind == GGMLQuantizationType.F16:
        writer.add_tensor(name, weights.astype(np.float16))


if __name__ == "__main__":
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    for name, (kind, without) in VARIANTS.items():
        part = folder / f"{name}.part"
        write_variant(GGUFReader(source), part, kind, without)
        part.rename(folder / f"{name}.gguf")
