"""What tells one checkpoint's weights from another's, wherever they lie, without reading all of them."""

import hashlib
from collections.abc import Iterator

from conversion.io.open_files import OpenFiles
from conversion.io.sources import Source
from conversion.io.weight_files import StoredTensor, read_headers
from conversion.io.weight_formats import ADAPTER_FORMATS, MODEL_FORMATS

SAMPLE_BYTES = 4096
SAMPLES = 16


def weights_hash(source: Source) -> str:
    """SHA-256 of a checkpoint's tensors: names, dtypes, shapes, and of each up to 16 pieces of 4 KiB, evenly spread.

    The same for a copy of the files, and for other shards. What differs only between the pieces is not noticed; a
    fine-tune changes more than that.

    Raises:
        ValueError: there are no weights, or a file is damaged.
    """
    tensors = read_headers(source.folder, ADAPTER_FORMATS if source.is_adapter else MODEL_FORMATS)
    digest, files = hashlib.sha256(), OpenFiles()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype_name} {list(tensor.shape)}\n".encode())
        for piece in _pieces(tensor, files):
            digest.update(piece)
    files.close()
    return digest.hexdigest()


def _pieces(tensor: StoredTensor, files: OpenFiles) -> Iterator[bytes]:
    last = tensor.num_bytes - SAMPLE_BYTES
    starts = {number * last // (SAMPLES - 1) for number in range(SAMPLES)} if last > 0 else {0}
    file = files.get(tensor.file)
    for start in sorted(starts):
        buffer = bytearray(min(SAMPLE_BYTES, tensor.num_bytes))
        view, place = memoryview(buffer), tensor.offset + start
        while len(view):
            count = file.read_into(view, place)
            if not count:
                raise ValueError(f"{tensor.file} ended early while it was read")
            view, place = view[count:], place + count
        yield bytes(buffer)
