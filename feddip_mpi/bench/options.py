"""What `feddip-mpi bench exchange` is asked for, checked before anything is made. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from feddip_mpi import costs, entropy, indices, values
from feddip_mpi.errors import InputError

DENSE, PAIRS = "dense-allreduce", "values+int32"
YARDSTICKS = (DENSE, PAIRS)
CONTENDERS = (*costs.MODES, *YARDSTICKS)
DEFAULT_SIZE = 2_000_000


@dataclass(frozen=True)
class Options:
    """One benchmark.

    Attributes:
        model: a name or an import path; None: `size` weights, all of them prunable.
        size: n where no model is named; None: DEFAULT_SIZE.
        sparsity: shares of zeros, each measured by itself.
        values: value types of the upload, likewise.
        modes: of CONTENDERS; empty: all that make sense here.
        regrow: off-mask coordinates that travel, as a share of the kept weights.
        download: value type of the sums that `sharded` hands on.
        clients: participants a rank.
        compress: entropy coding.
        overlap: messages travel while the next are made.
        repeats: measured ones, after one to warm up.
        seconds: no further measurement begins after so many.
        seed: of the streams that make updates, residuals and masks.
    """

    model: str | None = None
    size: int | None = None
    sparsity: Sequence[float] = (0.95,)
    values: Sequence[str] = ("int8",)
    modes: Sequence[str] = ()
    regrow: float = 0.0
    download: str = "fp32"
    clients: int = 1
    compress: bool = False
    overlap: bool = True
    repeats: int = 5
    seconds: float = 12.0
    seed: int = 1

    def check(self) -> None:
        """Raise InputError with all mistakes at once."""
        wrong = [message for message in self._mistakes() if message]
        if wrong:
            raise InputError("; ".join(wrong))
        if self.compress:
            entropy.require()

    def _mistakes(self) -> list[str]:
        asked = [*(("--values", kind) for kind in self.values), ("--download", self.download)]
        unknown = [f"{name} {kind}" for name, kind in asked if kind not in values.KINDS]
        strange = [mode for mode in self.modes if mode not in CONTENDERS]
        return [
            "--model and --size: name one of them" if self.model is not None and self.size is not None else "",
            "" if 1 <= self.weights <= indices.MAX_SIZE else f"--size {self.size}: 1 to {indices.MAX_SIZE} is allowed",
            *("" if 0 <= share < 1 else f"--sparsity {share:g}: at least 0 and less than 1" for share in self.sparsity),
            f"{unknown[0]}: one of {', '.join(values.KINDS)} is allowed" if unknown else "",
            f"--modes {strange[0]}: one of {', '.join(CONTENDERS)} is allowed" if strange else "",
            "" if 0 <= self.regrow <= 1e6 else f"--regrow {self.regrow:g}: at least 0 and at most 1e6",
            f"--download {self.download}: sums are handed on by `sharded` only; add --modes sharded"
            if self.download != "fp32" and self.modes and "sharded" not in self.modes else "",
            "" if self.clients >= 1 else f"--clients {self.clients}: at least 1",
            "" if self.repeats >= 1 else f"--repeats {self.repeats}: at least 1",
            "" if self.seconds > 0 and not math.isnan(self.seconds) else f"--seconds {self.seconds:g}: above 0",
        ]  # fmt: skip

    @property
    def weights(self) -> int:
        """n where no model is named."""
        return DEFAULT_SIZE if self.size is None else self.size

    def chosen(self, ranks: int, nodes: int) -> list[str]:
        """The contenders on this many ranks and nodes: as asked, each once; `node` by itself only where it differs."""
        asked = self.modes or [mode for mode in CONTENDERS if mode != "node" or nodes < ranks]
        return list(dict.fromkeys(asked))

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            **{name: list(dict.fromkeys(getattr(self, name))) for name in ("sparsity", "values", "modes")},
        }
