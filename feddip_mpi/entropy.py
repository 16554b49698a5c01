"""An optional entropy stage over packed values, by a library (zstandard). Pure.

Quantised updates are far from uniform, so a fast entropy coder makes int8 codes a seventh and int4 codes a fifth
shorter; float32 values hardly (docs/results/exchange.md, "The codec").
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from feddip_mpi.errors import InputError

_LEVEL = 1  # higher levels search for repetitions, which updates do not have


def require() -> None:
    """Raises InputError where the library is missing: before a run begins, not in its first round."""
    try:
        import zstandard  # noqa: F401
    except ImportError:
        raise InputError(
            "upload.entropy: zstd needs the zstandard package: pip install 'feddip-mpi[zstd]', or upload.entropy=none"
        ) from None


def shorter(data: np.ndarray) -> tuple[np.ndarray, bool]:
    """(uint8 [bytes], whether they are compressed): compressed where that is shorter."""
    import zstandard

    packed = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False).compress(data.data) if data.size else b""
    if not packed or len(packed) >= data.size:
        return data, False
    return np.frombuffer(packed, np.uint8), True


def restore(data: Tensor, size: int) -> Tensor:
    """The inverse of `shorter` for compressed bytes, on their device.

    Args:
        data: uint8.
        size: length of the result; nothing longer is ever allocated.

    Raises:
        ValueError: the data is damaged or does not have that length.
    """
    import zstandard

    raw = data.cpu().numpy().tobytes()
    try:
        if zstandard.frame_content_size(raw) != size:
            raise ValueError(f"compressed values are not {size} bytes long")
        out = zstandard.ZstdDecompressor().decompress(raw, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"compressed values are damaged: {error}") from None
    return torch.frombuffer(bytearray(out), dtype=torch.uint8).to(data.device)
